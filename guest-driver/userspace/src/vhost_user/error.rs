//! What can go wrong between a driver and its device.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{AllocateError, RamError};

/// Why a device cannot be used as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody serves there.
    #[error("cannot connect to {}: {source}; is `ringpass serve --socket-path` running there?", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A message of vhost-user failed.
    #[error("{what}: {source}")]
    Protocol {
        /// What was asked.
        what: &'static str,
        /// What came instead.
        source: vhost::Error,
    },
    /// The device is there and does not answer.
    #[error(
        "no answer from the device within {} s ({what}): it has another front-end, its process is stopped, or its disk hangs",
        .patience.as_secs_f64()
    )]
    Silent {
        /// What was asked.
        what: &'static str,
        /// How long an answer was waited for.
        patience: Duration,
    },
    /// The device did not say that its queues have stopped.
    #[error(
        "the device has not confirmed that its I/O has ended ({why}): requests that it had taken may still be executed, and use \
         the memory that it was given"
    )]
    NotStopped {
        /// What came instead.
        why: String,
    },
    /// The device lacks something that this driver needs.
    #[error("the device does not offer {what}")]
    Lacks {
        /// What.
        what: &'static str,
    },
    /// The device does not have that queue, or somebody has it.
    #[error("queue {index} is not there to be taken: the device has {count} queues, of which 0 is this driver's own")]
    NoQueue {
        /// The queue.
        index: u16,
        /// Queues in use.
        count: u16,
    },
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Guest RAM is used up.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// There is no region.
    #[error("the guest has no RAM there")]
    NoMemory,
    /// Two regions share addresses.
    #[error("a region of {len_bytes:#x} bytes at {gpa:#x} would overlap the one at {other_gpa:#x}")]
    RegionsOverlap {
        /// Where it was to be.
        gpa: u64,
        /// Its length.
        len_bytes: u64,
        /// The one that is there.
        other_gpa: u64,
    },
    /// The device executed a request with an error.
    #[error("the device failed a {what} request (status {status}: {})", status_name(*status))]
    Status {
        /// The request.
        what: &'static str,
        /// `VIRTIO_BLK_S_*`.
        status: u8,
    },
    /// The device gives no ring.
    #[error("the device gives no ring ({code:?}); `ringpass serve` logs why")]
    Refused {
        /// What it said.
        code: ringpass_guest_abi::request::ErrorCode,
    },
    /// The device broke a rule.
    #[error("the device broke the protocol: {0}")]
    BrokenDevice(String),
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Error {
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }

    pub(super) fn protocol(what: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self::Protocol { what, source }
    }
}

fn status_name(status: u8) -> &'static str {
    match status {
        1 => "I/O error",
        2 => "not supported",
        _ => "unknown",
    }
}
