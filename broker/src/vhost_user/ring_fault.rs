//! What a driver can get wrong about a ring.

use std::mem::discriminant;

use thiserror::Error;

use crate::log_limit::Cause;

/// Why a ring cannot run although the front-end did nothing wrong.
///
/// A front-end passes on what its guest's driver wrote to the transport's registers, and most of them check little of it. QEMU
/// takes a queue size of 15, and for a ring that is not in RAM it passes the address of a buffer of its own. So these are no
/// reasons to refuse a request. A connection that ends here would take the disk from the guest until its machine is started
/// anew, and QEMU drops the device when SET_VRING_ADDR is answered with an error. The ring breaks, and setting it up anew
/// revives it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RingFault {
    /// VIRTIO 1.2, 2.7: a power of two; and no more than the device offers.
    #[error("a ring of {size} descriptors: the driver must give a power of two of at most {max}")]
    Size {
        /// The size.
        size: u32,
        /// The largest possible.
        max: u16,
    },
    /// VIRTIO 1.2, 2.7.
    #[error("the {part} at guest address {gpa:#x}: the driver must align it to {alignment_bytes} bytes")]
    Misaligned {
        /// Which part of the ring.
        part: &'static str,
        /// Where it is.
        gpa: u64,
        /// What its address must be a multiple of.
        alignment_bytes: u64,
    },
    /// A part of the ring is outside RAM, or in memory of a device.
    #[error(
        "the {part} of {size_bytes} bytes, which the front-end has at {user_address:#x}: the driver must put it into one \
         region of guest memory"
    )]
    OutsideMemory {
        /// Which part of the ring.
        part: &'static str,
        /// Where the front-end has it.
        user_address: u64,
        /// How long it is.
        size_bytes: u64,
    },
    /// A driver may choose a larger ring than the front-end had in mind when it asked for the region.
    #[error("a ring of {size} descriptors: the front-end's in-flight region tracks {entries} of each ring")]
    InflightTooSmall {
        /// Size of the ring.
        size: u16,
        /// Entries for it in the region.
        entries: u16,
    },
}

impl RingFault {
    /// The cause for the limits of log lines: what is wrong, without the values.
    pub(crate) fn cause(&self) -> Cause {
        match self {
            Self::Misaligned { part, .. } | Self::OutsideMemory { part, .. } => Cause::new((discriminant(self), part)),
            Self::Size { .. } | Self::InflightTooSmall { .. } => Cause::new(discriminant(self)),
        }
    }
}
