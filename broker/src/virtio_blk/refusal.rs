//! Why the device refuses requests, and the status that the driver gets.

use std::mem::discriminant;

use vm_memory::GuestAddress;

use super::Status;
use super::type_rules::known_type;
use crate::log_limit::LogCause;
use crate::virtqueue::ChainError;

/// Why a descriptor chain has no place for a status byte. The device cannot answer it, so the queue must stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unanswerable {
    /// The descriptors do not form a chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The chain has no device-writable byte.
    #[error("the descriptor chain has no device-writable byte, and so no place for a status")]
    NoStatus,
    /// The last device-writable byte is not in the guest's memory.
    #[error("the status byte at guest-physical {:#x} is not in the guest's memory", gpa.0)]
    StatusOutsideMemory {
        /// Address of the status byte.
        gpa: GuestAddress,
    },
}

impl Unanswerable {
    /// The cause for rate limits of log lines: the kind of error without its values.
    pub(crate) fn cause(&self) -> LogCause {
        match self {
            Self::Chain(error) => LogCause::new((discriminant(self), discriminant(error))),
            Self::NoStatus | Self::StatusOutsideMemory { .. } => LogCause::new(discriminant(self)),
        }
    }
}

/// Why the device answers a request with an error instead of executing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The device-readable part is shorter than the header.
    #[error("the request header has {len_bytes} of 16 bytes")]
    ShortHeader {
        /// Length of the device-readable part.
        len_bytes: u32,
    },
    /// A buffer is partly or completely outside the guest's memory.
    #[error("the buffer of {len_bytes} bytes at guest-physical {:#x} is not in the guest's memory", gpa.0)]
    OutsideMemory {
        /// Start of the buffer.
        gpa: GuestAddress,
        /// Length of the buffer.
        len_bytes: u32,
    },
    /// A device-readable descriptor follows a device-writable one (VIRTIO 1.2, 2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// The request has more pieces of data than there is room for. Drivers that respect `seg_max` never cause this.
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
    /// The request has data in a direction that its type does not have.
    #[error("a request of type {request_type} has {len_bytes} bytes of data in the wrong direction")]
    WrongDirection {
        /// The `type` field.
        request_type: u32,
        /// Length of that data.
        len_bytes: u32,
    },
    /// The type does not allow this length of data.
    #[error("a request of type {request_type} cannot have {len_bytes} bytes of data")]
    DataLength {
        /// The `type` field.
        request_type: u32,
        /// Length of the data.
        len_bytes: u32,
    },
    /// A discard or write zeroes request has more ranges than the one range that the configuration space allows.
    #[error("a request of type {request_type} has {ranges} ranges; the device takes one")]
    TooManyRanges {
        /// The `type` field.
        request_type: u32,
        /// Number of ranges.
        ranges: u32,
    },
    /// The range does not consist of whole logical blocks.
    #[error("the {sectors} sectors from sector {sector} are not whole logical blocks")]
    Unaligned {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// The range ends beyond the capacity.
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
    /// A discard request has the unmap flag, or a discard or write zeroes request has a flag that VIRTIO 1.2 does not
    /// define.
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
    /// The cause for rate limits of log lines: the kind of error and the type of request, without the values.
    pub(crate) fn cause(&self) -> LogCause {
        let request_type = match *self {
            Self::UnknownType { request_type }
            | Self::NotNegotiated { request_type, .. }
            | Self::WrongDirection { request_type, .. }
            | Self::DataLength { request_type, .. }
            | Self::TooManyRanges { request_type, .. }
            | Self::RangeTooLong { request_type, .. }
            | Self::Flags { request_type, .. }
            | Self::ReadOnly { request_type } => known_type(request_type),
            Self::ShortHeader { .. }
            | Self::OutsideMemory { .. }
            | Self::ReadableAfterWritable
            | Self::TooManySegments
            | Self::Unaligned { .. }
            | Self::BeyondCapacity { .. } => None,
        };
        LogCause::new((discriminant(self), request_type))
    }

    /// The status for the driver (VIRTIO 1.2, 5.2.6.2).
    pub fn status(self) -> Status {
        match self {
            // QEMU's devices answer several ranges so, too. VIRTIO 1.2 forbids drivers to send more than
            // `max_discard_seg` (5.2.6.1) and leaves the status to the device, but demands this one if any range has an
            // unknown flag (5.2.6.2). The device does not read the flags of ranges behind the first, and this status is
            // right for all of them. A driver that gets it does without the operation, as Linux does, or sends one
            // range at a time; IOERR would look like a bad disk.
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Each refusal, with the given type and value.
    fn refusals(request_type: u32, value: u32) -> [Refusal; 14] {
        let gpa = GuestAddress(value.into());
        let (sector, sectors) = (value.into(), value.into());
        [
            Refusal::ShortHeader { len_bytes: value },
            Refusal::OutsideMemory { gpa, len_bytes: value },
            Refusal::ReadableAfterWritable,
            Refusal::TooManySegments,
            Refusal::UnknownType { request_type },
            Refusal::NotNegotiated { request_type, feature: "VIRTIO_BLK_F_DISCARD" },
            Refusal::WrongDirection { request_type, len_bytes: value },
            Refusal::DataLength { request_type, len_bytes: value },
            Refusal::TooManyRanges { request_type, ranges: value },
            Refusal::Unaligned { sector, sectors },
            Refusal::BeyondCapacity { sector, sectors },
            Refusal::RangeTooLong { request_type, sectors: value },
            Refusal::Flags { request_type, flags: value },
            Refusal::ReadOnly { request_type },
        ]
    }

    #[test]
    fn the_cause_of_a_refusal_depends_on_kind_and_type_only() {
        let mut causes = HashSet::new();
        for value in [0, 1, 77, u32::MAX] {
            causes.extend(refusals(11, value).map(|refusal| refusal.cause()));
        }
        assert_eq!(causes.len(), 14);
        causes.extend(refusals(13, 5).map(|refusal| refusal.cause()));
        assert_eq!(causes.len(), 14 + 8, "8 of the refusals name a type");
    }

    #[test]
    fn all_unknown_types_share_one_cause() {
        let causes: HashSet<_> =
            (100..10_000).map(|request_type| Refusal::UnknownType { request_type }.cause()).collect();
        assert_eq!(causes.len(), 1);
    }
}
