//! The virtio-blk device (VIRTIO 1.2, 5.2) without its I/O: its features and configuration space, and the meaning of a
//! descriptor chain.
//!
//! - [`BlkConfig`]: the device's features and its configuration space, and the [`RequestLimits`] that follow from them.
//! - [`CacheMode`]: write-back or write-through, as negotiated and as the driver wrote it.
//! - [`RequestTypes`]: the requests that the negotiated features allow.
//! - [`DeviceRecord`]: what a driver was told of the device, which must not change across a restart of the server.
//! - [`parse`]: turns one descriptor chain into one checked [`Request`], or into its immediate answer.
//! - [`Status`]: the last byte of each request.
//! - [`GuestErrors`]: errors of guests, counted, and logged at a bounded rate.
//!
//! This module has no I/O, no transport and no unsafe code. Guest memory is volatile: the module copies each value
//! once, and checks and uses the copy. Unchecked values never leave the module.

mod cache_mode;
mod chain;
mod config;
mod device_record;
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
mod type_rules;

pub use cache_mode::CacheMode;
pub use config::{BlkConfig, BlkConfigError, BlkParameters, CONFIG_SPACE_BYTES};
pub use device_record::{Continuity, DeviceChanged, DeviceRecord};
pub use guest_errors::{GuestError, GuestErrors};
pub use limits::{DiscardLimits, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, RequestLimits, WriteZeroesLimits};
pub use refusal::{Refusal, Unanswerable};
pub use request::{Answer, AttachRequest, ByteRange, Operation, Parsed, Request, parse};
pub use request_types::RequestTypes;
pub use segments::{Segment, SegmentList};
pub use serial::{Serial, SerialError};
pub use status::Status;

/// The unit of capacity and of all addresses in requests (VIRTIO 1.2, 5.2.4), regardless of the logical block.
pub const SECTOR_BYTES: u32 = 512;
