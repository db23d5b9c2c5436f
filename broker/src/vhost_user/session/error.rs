//! Why a request is refused.

use std::error::Error;
use std::io;
use std::mem::discriminant;

use thiserror::Error;
use vhost::vhost_user::message::{FrontendReq, VHOST_USER_CONFIG_SIZE};

use super::super::eventfd::NotAnEventfd;
use super::super::features::feature_names;
use super::super::memory_table::MemoryTableError;
use super::super::message::MessageError;
use crate::log_limit::Cause;
use crate::virtqueue::{InflightError, SharedMemoryError};

/// Why a request is refused: the front-end asks for what makes no sense. Nothing has changed then.
///
/// What a guest can bring about through a front-end that does nothing wrong is none of these: see
/// [`RingFault`](crate::vhost_user::RingFault) and [`ConfigWriteError`](crate::vhost_user::ConfigWriteError).
#[derive(Debug, Error)]
pub enum RequestError {
    /// It has not the form of a request.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// It belongs to a protocol feature that the front-end has not accepted.
    #[error("VHOST_USER_PROTOCOL_F_{feature} was not negotiated")]
    NotNegotiated {
        /// Name of the feature.
        feature: &'static str,
    },
    /// Protocol features that do not exist here.
    #[error("protocol features {bits:#x} were not offered")]
    UnofferedProtocolFeatures {
        /// Those bits.
        bits: u64,
    },
    /// Features that a driver relies on: of the device, or of its rings and addresses.
    #[error(
        "the driver uses features that this server does not offer: {}. If its guest runs, restart the server as it was ({as_it_was}), or \
         reset the guest's device",
        feature_names(*bits)
    )]
    UnofferedFeatures {
        /// Those bits.
        bits: u64,
        /// What to restart the server with.
        as_it_was: &'static str,
    },
    /// The driver's features belong to the run of its queues.
    #[error("other features ({from:#x} to {to:#x}) while vring {index} is started and enabled; stop it first")]
    FeaturesWhileRunning {
        /// Features in force.
        from: u64,
        /// Features that were to be.
        to: u64,
        /// A vring that runs.
        index: usize,
    },
    /// A vring that the device does not have.
    #[error("vring {index} does not exist, the device has {count}: a front-end with more needs a larger --num-queues")]
    NoSuchVring {
        /// Its index.
        index: u32,
        /// How many there are.
        count: usize,
    },
    /// It cannot be started yet.
    #[error("vring {index} is to be started without {missing}")]
    VringIncomplete {
        /// The vring.
        index: usize,
        /// The request that is missing.
        missing: &'static str,
    },
    /// An eventfd that is none.
    #[error("vring {index}: {source}")]
    Eventfd {
        /// The vring.
        index: usize,
        /// What it is.
        source: NotAnEventfd,
    },
    /// The memory table.
    #[error(transparent)]
    Memory(#[from] MemoryTableError),
    /// The guest was told of another device, by a server before.
    #[error("{0}")]
    DeviceChanged(Box<dyn Error + Send + Sync>),
    /// The in-flight region.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// An in-flight region for another device.
    #[error(
        "an in-flight region for {queues} queues of {queue_size} descriptors; the device has {max_queues} of at most \
         {max_queue_size} (--num-queues)"
    )]
    InflightShape {
        /// Queues of the region.
        queues: u16,
        /// Descriptors of each.
        queue_size: u16,
        /// Queues of the device.
        max_queues: usize,
        /// Their largest size.
        max_queue_size: u16,
    },
    /// The dirty log.
    #[error("the dirty log: {0}")]
    Log(#[source] SharedMemoryError),
    /// A part that no configuration space has.
    #[error(
        "{size_bytes} bytes from byte {offset_bytes} of the configuration space on; ask for 1 or more of its first \
         {VHOST_USER_CONFIG_SIZE}"
    )]
    ConfigRange {
        /// Where it begins.
        offset_bytes: u32,
        /// How long it is.
        size_bytes: u32,
    },
    /// Flags of SET_CONFIG without a meaning.
    #[error("flags {flags:#x} have no meaning")]
    ConfigFlags {
        /// The flags.
        flags: u32,
    },
    /// A vring cannot be stopped for somebody who is gone.
    #[error(
        "the front-end is gone; I/O of vring {index} is still under way, and the next front-end does not wait for it"
    )]
    FrontEndGone {
        /// The vring.
        index: usize,
    },
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl RequestError {
    /// The cause for the limits of log lines: what is wrong, without the values.
    pub(in crate::vhost_user) fn cause(&self) -> Cause {
        match self {
            Self::Message(error) => Cause::new((discriminant(self), discriminant(error))),
            Self::Memory(error) => Cause::new((discriminant(self), discriminant(error))),
            Self::Inflight(error) => Cause::new((discriminant(self), discriminant(error))),
            Self::Log(error) => Cause::new((discriminant(self), discriminant(error))),
            Self::NotNegotiated { feature } => Cause::new((discriminant(self), feature)),
            Self::System { what, .. } => Cause::new((discriminant(self), what)),
            _ => Cause::new(discriminant(self)),
        }
    }

    /// Whether the connection can go on when the front-end is told. After a message that is none, it cannot, nor when nobody is
    /// there.
    pub(super) fn is_answerable(&self) -> bool {
        match self {
            Self::Message(error) => error.is_request(),
            // What it has said after that is not to be carried out.
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
