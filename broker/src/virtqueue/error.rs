//! Why a queue cannot start or go on.

use std::mem::discriminant;

use thiserror::Error;

use crate::log_limit::LogCause;

/// Why a queue cannot start or go on. The error concerns this queue only.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The number of descriptors breaks VIRTIO 1.2, 2.7.
    #[error("a queue of {size} descriptors: the size must be a power of two of at most 32768")]
    Size {
        /// The given size.
        size: u16,
    },
    /// A ring's address breaks VIRTIO 1.2, 2.7.
    #[error("the {ring} at {gpa:#x} is not aligned to {alignment_bytes} bytes")]
    Misaligned {
        /// The name of the ring.
        ring: &'static str,
        /// Guest-physical address of the ring.
        gpa: u64,
        /// The required alignment.
        alignment_bytes: u64,
    },
    /// A ring is outside guest memory, or not in one region of it.
    #[error("the {ring} of {len_bytes} bytes at {gpa:#x} is not inside one region of guest memory")]
    OutsideMemory {
        /// The name of the ring.
        ring: &'static str,
        /// Guest-physical address of the ring.
        gpa: u64,
        /// Length of the ring in bytes.
        len_bytes: u64,
    },
    /// The driver made more chains available than the queue has entries.
    #[error(
        "the driver's available index went from {next_avail} to {avail_idx}, which is more than the {size} entries"
    )]
    AvailIndex {
        /// The index that the driver wrote.
        avail_idx: u16,
        /// The next entry that the device would have taken.
        next_avail: u16,
        /// Number of entries.
        size: u16,
    },
    /// The driver made a chain available whose head is not in the descriptor table.
    #[error("the driver made descriptor {head} available, but the queue has only {size}")]
    HeadOutOfRange {
        /// Index of the head.
        head: u16,
        /// Number of descriptors.
        size: u16,
    },
    /// The driver made a chain available again before the device returned it.
    #[error("the driver made descriptor {head} available again while it is in flight")]
    HeadInFlight {
        /// Index of the head.
        head: u16,
    },
    /// The caller completed a chain that is not in flight, which is a bug of the caller.
    #[error("descriptor {head} was completed but is not in flight")]
    NotInFlight {
        /// Index of the head.
        head: u16,
    },
    /// The front-end's in-flight region is for smaller queues.
    #[error("the in-flight region has {entries} entries per queue, but this queue has {size} descriptors")]
    InflightTooSmall {
        /// Entries per queue of the region.
        entries: u16,
        /// Number of descriptors.
        size: u16,
    },
    /// The in-flight region has the format of another version.
    #[error("the in-flight region of this queue has version {version}; this back-end only knows version 1")]
    InflightVersion {
        /// The version in the region.
        version: u16,
    },
    /// The in-flight region does not match the used ring.
    #[error(
        "the used index is {ring_used_idx} in the ring and {region_used_idx} in the in-flight region; a matching \
         region is at most {size} entries behind"
    )]
    InflightUsedIndex {
        /// `idx` of the used ring.
        ring_used_idx: u16,
        /// `used_idx` of the region.
        region_used_idx: u16,
        /// Number of descriptors.
        size: u16,
    },
}

impl QueueError {
    /// The cause for rate limits of log lines: the kind of error without its values.
    pub(crate) fn cause(&self) -> LogCause {
        match self {
            Self::Misaligned { ring, .. } | Self::OutsideMemory { ring, .. } => {
                LogCause::new((discriminant(self), ring))
            }
            _ => LogCause::new(discriminant(self)),
        }
    }
}
