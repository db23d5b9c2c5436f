//! Confining the process that owns guests' rings: what it does not need is taken from it before it makes the first ring.
//!
//! A hostile guest reaches the kernel through its ring with the credentials of the ring's creator, and this process with
//! everything that it sends over its queues. So the process has one device, and three layers around it, in this order, each a
//! type that the one before gives:
//!
//! 1. [`drop_privileges`]: no capability, ever again (`capabilities(7)`, `PR_SET_NO_NEW_PRIVS`). Before `io_uring_setup`,
//!    because a ring keeps the credentials that its creator had then: with CAP_SYS_NICE it takes real-time I/O priorities
//!    from its guest.
//! 2. [`Unprivileged::restrict_paths`]: no file but the few that serving opens again later (Landlock, Linux 5.13).
//! 3. [`Restricted::filter_system_calls`]: no system call but those that serving makes (seccomp), for all threads.
//!
//! Beside them, [`close_descriptors_on_exec`] sees to what the process was started with.
//!
//! For programs: each changes the whole process, and none can be undone.

mod descriptors;
mod paths;
mod privileges;
mod refused;
mod system_calls;

use std::io;

use crate::privileges::PrivilegesError;
pub use descriptors::close_descriptors_on_exec;
pub use paths::{Paths, Restricted};
pub use privileges::{Unprivileged, drop_privileges};

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// Capabilities and Landlock domains belong to threads; those that are there would keep theirs.
    #[error("the process has {threads} threads already; only a single one can give up the privileges of all")]
    Threads {
        /// How many there are.
        threads: usize,
    },
    /// The kernel refused.
    #[error("confining this process: {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<PrivilegesError> for SandboxError {
    fn from(PrivilegesError { what, source }: PrivilegesError) -> Self {
        Self::System { what, source }
    }
}

impl SandboxError {
    fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

#[cfg(test)]
mod tests;
