//! Why an engine cannot start.

use std::io;

use thiserror::Error;
use vm_memory::mmap::MmapRegionError;

use crate::ring_host::RingHostError;

/// Why an engine cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The kernel gives no io_uring.
    #[error(
        "a worker cannot have its io_uring: {call}: {source}; `ringpass probe` tells what stands in the way (the sysctl \
         kernel.io_uring_disabled, a seccomp filter, a limit)"
    )]
    Ring {
        /// The system call that failed.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No file descriptor for waking a worker.
    #[error("a worker cannot have an eventfd: {0}; is RLIMIT_NOFILE too low?")]
    Eventfd(#[source] io::Error),
    /// No memory for bounce buffers.
    #[error("a worker cannot have its bounce buffers: {0}")]
    BounceBuffers(#[source] MmapRegionError),
    /// No thread.
    #[error("a worker's thread cannot be started: {0}")]
    Thread(#[source] io::Error),
    /// Nothing can make the guests' rings.
    #[error(transparent)]
    RingHost(#[from] RingHostError),
    /// A worker cannot run on the CPU that it was given.
    #[error(
        "a worker cannot run on CPU {cpu}: {error}; give CPUs that are online and that this process may use \
         (`grep Cpus_allowed_list /proc/self/status`)"
    )]
    Affinity {
        /// Number of the CPU.
        cpu: usize,
        /// What the kernel said.
        error: io::Error,
    },
}
