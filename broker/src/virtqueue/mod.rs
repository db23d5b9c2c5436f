//! Split virtqueues (VIRTIO 1.2, 2.7): rings, in-flight tracking, dirty log.
//!
//! [`SplitQueue`] is the device's side of one queue. It takes descriptor chains ([`DescriptorChain`]), returns them as
//! used, and keeps two records of the vhost-user front-end: the in-flight region ([`InflightRegion`]), from which the
//! next process learns what this one had not finished, and the log of pages that the device wrote ([`DirtyLog`]).
//!
//! Others write to all of this at the same time: the driver to the rings, the front-end to the region and the log. The
//! code loads each value once, checks it, and then uses it; a value that violates the rules stops this queue and no
//! other.

mod chain;
#[cfg(test)]
mod crash;
mod device_record;
mod dirty_log;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod inflight;
mod recovery;
mod rings;
mod shared_memory;
mod split_queue;
#[cfg(test)]
mod tests;

pub use chain::{ChainError, DescriptorChain};
pub use device_record::DEVICE_RECORD_MAX_BYTES;
pub use dirty_log::DirtyLog;
pub use error::QueueError;
pub use inflight::{InflightError, InflightFile, InflightQueue, InflightRegion};
pub use rings::QUEUE_SIZE_MAX;
pub use shared_memory::SharedMemoryError;
pub use split_queue::{PoppedChain, QueueSetup, SplitQueue, UnrecordedChain};
