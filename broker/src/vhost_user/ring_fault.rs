//! Faults of a driver in the set-up of a ring.

use std::mem::discriminant;

use thiserror::Error;

use crate::log_limit::LogCause;

/// Why a ring cannot run although the front-end follows the protocol.
///
/// A front-end passes on what its guest's driver wrote to the transport's registers, and most front-ends check little
/// of it. QEMU accepts a queue size of 15, and for a ring outside RAM it passes the address of a buffer of its own. So
/// the session does not refuse a request because of these faults. If the connection ended here, the guest would lose
/// the disk until its machine restarts, and QEMU drops the device when the back-end answers SET_VRING_ADDR with an
/// error. Instead the ring breaks, and a new set-up revives it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RingFault {
    /// The size is not a power of two (VIRTIO 1.2, 2.7), or larger than the device offers.
    #[error("a ring of {size} descriptors: the driver must give a power of two of at most {max}")]
    Size {
        /// The size.
        size: u32,
        /// The largest possible size.
        max: u16,
    },
    /// The address is not aligned as VIRTIO 1.2, 2.7 demands.
    #[error("the {part} at guest address {gpa:#x}: the driver must align it to {alignment_bytes} bytes")]
    Misaligned {
        /// The part of the ring.
        part: &'static str,
        /// Guest address of the part.
        gpa: u64,
        /// The required alignment.
        alignment_bytes: u64,
    },
    /// A part of the ring is outside RAM, or in memory of a device.
    #[error(
        "the {part} of {size_bytes} bytes at {user_address:#x} of the front-end: the driver must put it into one \
         region of guest memory"
    )]
    OutsideMemory {
        /// The part of the ring.
        part: &'static str,
        /// Address of the part in the front-end.
        user_address: u64,
        /// Length of the part.
        size_bytes: u64,
    },
    /// The driver chose a larger ring than the front-end assumed when it asked for the region.
    #[error("a ring of {size} descriptors: the front-end's in-flight region tracks {entries} of each ring")]
    InflightTooSmall {
        /// Size of the ring.
        size: u16,
        /// Number of entries for this ring in the region.
        entries: u16,
    },
}

impl RingFault {
    /// The cause for rate limits of log lines: the kind of fault without its values.
    pub(crate) fn cause(&self) -> LogCause {
        match self {
            Self::Misaligned { part, .. } | Self::OutsideMemory { part, .. } => {
                LogCause::new((discriminant(self), part))
            }
            Self::Size { .. } | Self::InflightTooSmall { .. } => LogCause::new(discriminant(self)),
        }
    }
}
