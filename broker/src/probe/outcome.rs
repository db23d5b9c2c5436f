//! The outcome of a trial.

/// The outcome of trying something.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It works.
    Works,
    /// A step failed.
    Failed {
        /// The step that failed.
        step: &'static str,
        /// The error number; `None` if the kernel did something wrong without an error.
        errno: Option<i32>,
    },
    /// It was not tried, because it builds on something that does not work.
    NotTried,
}
