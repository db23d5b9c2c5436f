//! What can be wrong with a request, and what the driver is told.

use vm_memory::GuestAddress;

use super::Status;
use crate::virtqueue::ChainError;

/// Why a descriptor chain has no place for a status byte, so that it cannot be answered. The queue must stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswerable {
    /// Its descriptors are not a chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// No byte of the chain may be written by the device.
    #[error("the descriptor chain has no device-writable byte, and so no place for a status")]
    NoStatus,
    /// The last device-writable byte is not in the guest's memory.
    #[error("the status byte at guest-physical {:#x} is not in the guest's memory", gpa.0)]
    StatusOutsideMemory {
        /// Where it would be.
        gpa: GuestAddress,
    },
}

/// Why a request is answered with an error and not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The device-readable part is shorter than the header.
    #[error("the request header has {len_bytes} of 16 bytes")]
    ShortHeader {
        /// Length of the device-readable part.
        len_bytes: u32,
    },
    /// A buffer is not, or not as a whole, in the guest's memory.
    #[error("the buffer of {len_bytes} bytes at guest-physical {:#x} is not in the guest's memory", gpa.0)]
    OutsideMemory {
        /// Start of the buffer.
        gpa: GuestAddress,
        /// Its length.
        len_bytes: u32,
    },
    /// A device-readable descriptor follows a device-writable one (VIRTIO 1.2, 2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// There are more pieces of data than there is room for. Drivers that keep to `seg_max` do not get here.
    #[error("the request has more data segments than the device takes (seg_max)")]
    TooManySegments,
    /// The device does not know the type.
    #[error("the request type {request_type} is not supported")]
    UnknownType {
        /// The `type` field.
        request_type: u32,
    },
    /// The driver did not accept the feature that the type belongs to, or the device did not offer it.
    #[error("a request of type {request_type} needs {feature}, which was not negotiated")]
    NotNegotiated {
        /// The `type` field.
        request_type: u32,
        /// Name of the feature.
        feature: &'static str,
    },
    /// There is data in the direction that the type does not have.
    #[error("a request of type {request_type} has {len_bytes} bytes of data in the wrong direction")]
    WrongDirection {
        /// The `type` field.
        request_type: u32,
        /// How many bytes.
        len_bytes: u32,
    },
    /// The length of the data is not what the type needs.
    #[error("a request of type {request_type} cannot have {len_bytes} bytes of data")]
    DataLength {
        /// The `type` field.
        request_type: u32,
        /// How many bytes.
        len_bytes: u32,
    },
    /// A discard or write zeroes request has more ranges than the one that the configuration space allows.
    #[error("a request of type {request_type} has {ranges} ranges; the device takes one")]
    TooManyRanges {
        /// The `type` field.
        request_type: u32,
        /// How many ranges.
        ranges: u32,
    },
    /// The range is not one of whole logical blocks.
    #[error("the {sectors} sectors from sector {sector} are not whole logical blocks")]
    Unaligned {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// The range does not end within the capacity.
    #[error("the {sectors} sectors from sector {sector} end beyond the capacity of the disk")]
    BeyondCapacity {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// The range of a discard or write zeroes request is longer than the configuration space allows.
    #[error("a range of {sectors} sectors is longer than a request of type {request_type} may have")]
    RangeTooLong {
        /// The `type` field.
        request_type: u32,
        /// Number of sectors.
        sectors: u32,
    },
    /// A discard request with the unmap flag, or a discard or write zeroes request with a flag that VIRTIO 1.2 has not.
    #[error("a request of type {request_type} has the unsupported flags {flags:#x}")]
    Flags {
        /// The `type` field.
        request_type: u32,
        /// The `flags` field.
        flags: u32,
    },
    /// The request would change a read-only disk.
    #[error("a request of type {request_type} would change a read-only disk")]
    ReadOnly {
        /// The `type` field.
        request_type: u32,
    },
}

impl Refusal {
    /// What the driver is told (VIRTIO 1.2, 5.2.6.2).
    pub fn status(self) -> Status {
        match self {
            // As QEMU's devices say of several ranges. VIRTIO 1.2 forbids drivers to send more than `max_discard_seg`
            // (5.2.6.1) and leaves the status to the device, but demands this one if any range has an unknown flag
            // (5.2.6.2). The flags of ranges behind the first are not read, so that this is the status which is right
            // whatever they are. A driver that hears it does without the operation, as Linux does, or sends one range
            // at a time; IOERR would look like a bad disk.
            Self::TooManyRanges { .. } => Status::Unsupported,
            Self::UnknownType { .. } | Self::NotNegotiated { .. } | Self::Flags { .. } => Status::Unsupported,
            Self::ShortHeader { .. }
            | Self::OutsideMemory { .. }
            | Self::ReadableAfterWritable
            | Self::TooManySegments
            | Self::WrongDirection { .. }
            | Self::DataLength { .. }
            | Self::Unaligned { .. }
            | Self::BeyondCapacity { .. }
            | Self::RangeTooLong { .. }
            | Self::ReadOnly { .. } => Status::IoError,
        }
    }
}
