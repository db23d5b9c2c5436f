//! How far a ring is from its end.

use std::time::Duration;

/// A ring, or its I/O, has not ended within the time given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StillRunning {
    /// The ring has not even been closed.
    #[error("the ring has not been closed")]
    Open,
    /// I/O is under way.
    #[error(
        "I/O of the ring is still under way {} ms after it was closed: the disk is slow or does not answer, or something \
         still maps the ring's window; the guest's memory stays in use until it ends",
        .since_close.as_millis()
    )]
    Closed {
        /// Time since the ring was closed.
        since_close: Duration,
    },
}
