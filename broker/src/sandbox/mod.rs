//! Confining a process that serves a disk, and one that makes guests' rings ([`Role`]): before the process makes the first
//! ring, it gives up all that it does not need.
//!
//! A hostile guest reaches the kernel through its ring with the credentials of the ring's creator, and it reaches this
//! process through everything that it sends over its queues. So the process serves one device, and has three layers
//! around it, in this order, each a type that the layer before returns:
//!
//! 1. [`drop_privileges`]: no capability, ever again (`capabilities(7)`, `PR_SET_NO_NEW_PRIVS`). Before
//!    `io_uring_setup`, because a ring keeps the credentials that its creator had then: with CAP_SYS_NICE it would
//!    accept real-time I/O priorities from its guest.
//! 2. [`Unprivileged::restrict_paths`]: no file except the few that serving opens again later (Landlock, Linux 5.13).
//! 3. [`Restricted::filter_system_calls`]: no system call except those of its role (seccomp), for all threads.
//!
//! Before them, [`isolate`] hides all other files and networks, where the kernel permits it.
//!
//! In addition, [`close_descriptors_on_exec`] handles the descriptors that the process inherited.
//!
//! For programs: each function changes the whole process, and none can be undone.

mod arguments;
mod descriptors;
mod namespaces;
mod paths;
mod privileges;
mod refused;
mod role;
mod system_calls;

use std::io;

use crate::privileges::PrivilegesError;
pub(crate) use descriptors::close_descriptors_but;
pub use descriptors::close_descriptors_on_exec;
pub use namespaces::{Isolation, isolate};
pub use paths::{DiskPath, Paths, Restricted};
pub(crate) use privileges::require_one_thread;
pub use privileges::{Unprivileged, drop_privileges};
pub use role::Role;

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// Capabilities and Landlock domains belong to threads; existing threads would keep theirs.
    #[error("the process already has {threads} threads; only a process with a single thread can give up privileges")]
    Threads {
        /// The number of threads.
        threads: usize,
    },
    /// The kernel refused.
    #[error("cannot confine this process: {what} failed: {source}")]
    System {
        /// The step that failed.
        what: &'static str,
        /// The error that the kernel returned.
        source: io::Error,
    },
}

impl From<PrivilegesError> for SandboxError {
    fn from(PrivilegesError { what, source }: PrivilegesError) -> Self {
        Self::System { what, source }
    }
}

impl SandboxError {
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

#[cfg(test)]
mod tests;
