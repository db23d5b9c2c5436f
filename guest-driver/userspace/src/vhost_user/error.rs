//! Errors between the driver and its device.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::ram::{AllocateError, RamError};

/// The reason why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The driver cannot connect to the socket.
    #[error("cannot connect to {}: {source}; is `ringpass serve --socket-path` running there?", .path.display())]
    Connect {
        /// The path of the socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A vhost-user message failed.
    #[error("{what} failed: {source}")]
    Protocol {
        /// The operation that failed.
        what: &'static str,
        /// The error of the message.
        source: vhost::Error,
    },
    /// The device accepts the connection but does not answer.
    #[error(
        "no answer from the device within {} s ({what}): it has another front-end, its process is stopped, or its disk hangs",
        .patience.as_secs_f64()
    )]
    Silent {
        /// The operation that got no answer.
        what: &'static str,
        /// How long the driver waited.
        patience: Duration,
    },
    /// The device did not confirm that its queues have stopped.
    #[error(
        "the device has not confirmed that its I/O has ended ({why}): it may still execute requests that it had taken, and access \
         the memory that it was given"
    )]
    NotStopped {
        /// The reason why there is no confirmation.
        why: String,
    },
    /// The device lacks a feature that this driver needs.
    #[error("the device does not offer {what}")]
    Lacks {
        /// The missing feature.
        what: &'static str,
    },
    /// The device does not have that queue, or the queue is already taken.
    #[error(
        "queue {index} cannot be taken: it is taken already, or not one of the {count} queues (0 is the driver's own)"
    )]
    NoQueue {
        /// The queue.
        index: u16,
        /// Number of queues in use.
        count: u16,
    },
    /// An error of guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Guest RAM has no room.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// There is no region at that address.
    #[error("the guest has no region of RAM at that address")]
    NoMemory,
    /// Two regions share addresses.
    #[error("a region of {len_bytes:#x} bytes at {gpa:#x} would overlap the region at {other_gpa:#x}")]
    RegionsOverlap {
        /// Address of the new region.
        gpa: u64,
        /// Length of the new region.
        len_bytes: u64,
        /// Address of the existing region.
        other_gpa: u64,
    },
    /// Areas of a removed region are in use, and a new region would have their addresses.
    #[error(
        "a region of {len_bytes:#x} bytes at {gpa:#x} would have addresses of the region at {other_gpa:#x}, which was removed while \
         buffers in it are in use: drop these buffers first"
    )]
    RegionInUse {
        /// Address of the new region.
        gpa: u64,
        /// Length of the new region.
        len_bytes: u64,
        /// Address of the removed region.
        other_gpa: u64,
    },
    /// The device executed a request with an error.
    #[error("the device failed a {what} request (status {status}: {})", status_name(*status))]
    Status {
        /// The name of the request.
        what: &'static str,
        /// `VIRTIO_BLK_S_*`.
        status: u8,
    },
    /// The device refuses a ring.
    #[error("the device refuses a ring ({code:?}): see the log of `ringpass serve` for the reason")]
    Refused {
        /// The device's code.
        code: ringpass_guest_abi::request::ErrorCode,
    },
    /// The device violated the protocol.
    #[error("the device violated the protocol: {0}")]
    BrokenDevice(String),
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// The kernel's error.
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
