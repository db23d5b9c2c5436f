//! The virtio-blk device (VIRTIO 1.2, 5.2): what it says of itself, and what a descriptor chain of its driver means.
//!
//! - [`BlkConfig`]: the device's features and its configuration space, and the [`RequestLimits`] that follow.
//! - [`CacheMode`]: write-back or write-through, as negotiated and as the driver wrote it.
//! - [`RequestTypes`]: what the features that were negotiated allow a driver to ask for.
//! - [`Told`]: what a driver was told of the device, which must not change over a restart of the server.
//! - [`parse`]: one descriptor chain into one checked [`Request`], or into the answer that it gets at once.
//! - [`Status`]: the last byte of each request.
//! - [`GuestErrors`]: what guests do wrong, counted, and logged at a bounded rate.
//!
//! There is no I/O here, no transport and no unsafe code. Guest memory is volatile: each value is copied once, and the
//! copy is checked and used. What was not checked never leaves the module.

mod cache_mode;
mod chain;
mod config;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod guest_errors;
mod limits;
mod refusal;
mod request;
mod request_types;
mod segments;
mod serial;
mod status;
mod told;

pub use cache_mode::CacheMode;
pub use config::{BlkConfig, BlkConfigError, BlkParameters, CONFIG_SPACE_BYTES};
pub use guest_errors::{GuestError, GuestErrors};
pub use limits::{DiscardLimits, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, RequestLimits, WriteZeroesLimits};
pub use refusal::{Refusal, Unanswerable};
pub use request::{Answer, ByteRange, InterfaceRequest, Operation, Parsed, Request, parse};
pub use request_types::RequestTypes;
pub use segments::{Segment, SegmentList};
pub use serial::{Serial, SerialError};
pub use status::Status;
pub use told::{Continuity, DeviceChanged, Told};

/// The unit of capacity and of all addresses in requests (VIRTIO 1.2, 5.2.4), whatever the logical block is.
pub const SECTOR_BYTES: u32 = 512;
