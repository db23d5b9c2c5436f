//! Why the session refuses a request.

use std::error::Error;
use std::io;
use std::mem::discriminant;

use thiserror::Error;
use vhost::vhost_user::message::{FrontendReq, VHOST_USER_CONFIG_SIZE};

use super::super::eventfd::NotAnEventfd;
use super::super::features::feature_names;
use super::super::memory_table::MemoryTableError;
use super::super::message::MessageError;
use crate::log_limit::LogCause;
use crate::virtqueue::{InflightError, SharedMemoryError};

/// Why the session refuses a request: the front-end asks for something that makes no sense. A refused request changes
/// nothing.
///
/// Faults that a guest can cause through a correct front-end are not among these errors: see
/// [`RingFault`](crate::vhost_user::RingFault) and [`ConfigWriteError`](crate::vhost_user::ConfigWriteError).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The message is malformed.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The request belongs to a protocol feature that the front-end has not accepted.
    #[error("VHOST_USER_PROTOCOL_F_{feature} was not negotiated")]
    NotNegotiated {
        /// Name of the feature.
        feature: &'static str,
    },
    /// The front-end accepts protocol features that this back-end does not offer.
    #[error("protocol features {bits:#x} were not offered")]
    UnofferedProtocolFeatures {
        /// The bits that were not offered.
        bits: u64,
    },
    /// The driver relies on features that the device, its rings or its addressing do not have.
    #[error(
        "the driver uses features that this server does not offer: {}. If its guest runs, restart the server as before \
         ({as_it_was}), or reset the guest's device",
        feature_names(*bits)
    )]
    UnofferedFeatures {
        /// The bits that were not offered.
        bits: u64,
        /// The options with which to restart the server.
        as_it_was: &'static str,
    },
    /// The driver's features must not change while a queue runs.
    #[error("the features change from {from:#x} to {to:#x} while vring {index} is started and enabled; stop it first")]
    FeaturesWhileRunning {
        /// Features in force.
        from: u64,
        /// The new features.
        to: u64,
        /// A running vring.
        index: usize,
    },
    /// The device does not have this vring.
    #[error("vring {index} does not exist: the device has {count}; a front-end with more needs a larger --num-queues")]
    NoSuchVring {
        /// Index of the vring.
        index: u32,
        /// Number of vrings that the device has.
        count: usize,
    },
    /// The vring cannot start yet.
    #[error("vring {index} cannot start: the front-end must send {missing} first")]
    VringIncomplete {
        /// The vring.
        index: usize,
        /// The missing request.
        missing: &'static str,
    },
    /// The descriptor is not an eventfd.
    #[error("vring {index}: {source}")]
    Eventfd {
        /// The vring.
        index: usize,
        /// What the descriptor is.
        source: NotAnEventfd,
    },
    /// The memory table cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryTableError),
    /// An earlier server told the guest of a different device.
    #[error("{0}")]
    DeviceChanged(Box<dyn Error + Send + Sync>),
    /// The in-flight region cannot be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The in-flight region belongs to a device of a different shape.
    #[error(
        "the in-flight region is for {queues} queues of {queue_size} descriptors; the device has {max_queues} of at \
         most {max_queue_size} (--num-queues)"
    )]
    InflightShape {
        /// Queues of the region.
        queues: u16,
        /// Descriptors of each of these queues.
        queue_size: u16,
        /// Queues of the device.
        max_queues: usize,
        /// Largest size of the device's queues.
        max_queue_size: u16,
    },
    /// The dirty log cannot be used.
    #[error("the dirty log: {0}")]
    Log(#[source] SharedMemoryError),
    /// The range is outside any configuration space.
    #[error(
        "{size_bytes} bytes from byte {offset_bytes} of the configuration space: the front-end must ask for 1 or more \
         of the first {VHOST_USER_CONFIG_SIZE} bytes"
    )]
    ConfigRange {
        /// Where the range begins.
        offset_bytes: u32,
        /// Length of the range.
        size_bytes: u32,
    },
    /// SET_CONFIG has flags without a meaning.
    #[error("flags {flags:#x} have no meaning")]
    ConfigFlags {
        /// The flags.
        flags: u32,
    },
    /// The device does not stop a vring for a front-end that is gone.
    #[error(
        "the front-end is gone; I/O of vring {index} is still under way, and the next front-end does not wait for it"
    )]
    FrontEndGone {
        /// The vring.
        index: usize,
    },
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// What the session was doing.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

impl RequestError {
    /// The cause for rate limits of log lines: the kind of error without its values.
    pub(in crate::vhost_user) fn cause(&self) -> LogCause {
        match self {
            Self::Message(error) => LogCause::new((discriminant(self), discriminant(error))),
            Self::Memory(error) => LogCause::new((discriminant(self), discriminant(error))),
            Self::Inflight(error) => LogCause::new((discriminant(self), discriminant(error))),
            Self::Log(error) => LogCause::new((discriminant(self), discriminant(error))),
            Self::NotNegotiated { feature } => LogCause::new((discriminant(self), feature)),
            Self::System { what, .. } => LogCause::new((discriminant(self), what)),
            _ => LogCause::new(discriminant(self)),
        }
    }

    /// Whether the session can tell the front-end and go on. It cannot after a malformed message, or when the front-end
    /// is gone.
    pub(super) fn is_answerable(&self) -> bool {
        match self {
            Self::Message(error) => error.is_request(),
            // The session must not carry out the messages that follow.
            Self::FrontEndGone { .. } | Self::DeviceChanged(_) => false,
            _ => true,
        }
    }
}

/// The request that ends the connection, and why.
#[derive(Debug, Error)]
#[error("{}: {source}", request_name(*.request))]
pub struct SessionError {
    /// Number of the request.
    pub request: u32,
    /// Why it is refused.
    pub source: RequestError,
}

/// The name of a request in the specification.
pub(super) fn request_name(request: u32) -> String {
    FrontendReq::try_from(request).map_or_else(|_| format!("request {request}"), |known| format!("{known:?}"))
}
