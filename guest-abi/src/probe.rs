//! The device's description of itself, and the choice of a version.

use core::fmt;

use crate::SegmentLimits;
use crate::attach::AttachLimits;
use crate::little_endian::{Le16, Le32, Le64, wire};
use crate::request::ErrorCode;
pub use crate::version::VERSION;

/// [`ProbeAnswer::magic`]: the bytes `ringpass`.
pub const MAGIC: u64 = 0x7373_6170_676e_6972;

/// [`ProbeAnswer::features`]: a write with `RWF_DSYNC` is durable when it completes (force unit access). Without this
/// feature a driver does not attach while the write cache is off, and sends a flush after a write with FUA.
pub const F_DSYNC: u64 = 1 << 0;

/// Reserved for I/O priorities in `ioprio` of an SQE. No device offers it.
pub const F_IOPRIO: u64 = 1 << 1;

/// Reserved for write streams in `write_stream` of an SQE. No device offers it.
pub const F_WRITE_STREAM: u64 = 1 << 2;

/// Reserved for `RWF_DONTCACHE`. No device offers it.
pub const F_DONTCACHE: u64 = 1 << 3;

/// Reserved for the moderation of interrupts. No device offers it.
pub const F_MODERATION: u64 = 1 << 4;

/// The feature bits that have a meaning in this crate.
pub const FEATURES_KNOWN: u64 = F_DSYNC;

/// The answer of PROBE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ProbeAnswer {
    /// [`MAGIC`].
    pub magic: Le64,
    /// Length in bytes of the answer that the device knows, including this field and the magic. Fields beyond it are
    /// zero.
    pub answer_bytes: Le32,
    /// Lowest version that the device supports.
    pub version_min: Le16,
    /// Highest version that the device supports.
    pub version_max: Le16,
    /// `F_*`. The driver selects the features that it knows and sets them in ATTACH.
    pub features: Le64,
    /// Maximum number of SQ entries of a ring.
    pub sq_entries_max: Le32,
    /// Maximum number of CQ entries of a ring.
    pub cq_entries_max: Le32,
    /// Alignment of the control page and of the areas, and the unit of their lengths, in bytes: a power of two, 4096 to
    /// 65536.
    pub page_bytes: Le32,
    /// Alignment of each segment's address in bytes: a power of two, at most 4096.
    pub address_align_bytes: Le32,
    /// The unit of each segment's length, and of its position on the disk, in bytes: a power of two, at most 65536.
    pub length_align_bytes: Le32,
    /// Maximum number of bytes of one SQE; a multiple of `length_align_bytes`, at least 4096. No segment crosses a
    /// multiple of [`SEGMENT_BOUNDARY_BYTES`](crate::SEGMENT_BOUNDARY_BYTES) either.
    pub segment_bytes_max: Le32,
    /// Number of queues of the device, including queue 0. 1: no queue can be attached.
    pub queue_count: Le16,
    /// The [`ErrorCode`] with which the device would refuse every ATTACH now; 0: none.
    pub refusal: Le16,
    /// 0.
    pub reserved: Le32,
}
wire!(ProbeAnswer {
    magic,
    answer_bytes,
    version_min,
    version_max,
    features,
    sq_entries_max,
    cq_entries_max,
    page_bytes,
    address_align_bytes,
    length_align_bytes,
    segment_bytes_max,
    queue_count,
    refusal,
    reserved,
});

/// A checked answer, on which a driver can rely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// The version to use: the highest that both sides support.
    pub version: u16,
    /// The features that both sides know.
    pub features: u64,
    /// The limits for ATTACH.
    pub limits: AttachLimits,
    /// The limits of segments that the device expects of its rings. The record of each ring has those that count.
    pub segments: SegmentLimits,
    /// Number of queues of the device, including queue 0.
    pub queue_count: u16,
    /// The code with which the device would refuse every ATTACH now. The outer `None`: it would refuse none. The inner
    /// `None`: a code of a later version.
    pub refusal: Option<Option<ErrorCode>>,
}

/// The reason why a driver uses a device as an ordinary virtio-blk device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProbeError {
    /// The answer has no magic: another device that answers OK to any request.
    NotRingpass,
    /// The device supports only these versions.
    Version {
        /// The lowest version.
        min: u16,
        /// The highest version.
        max: u16,
    },
    /// A field is out of range.
    Field {
        /// The field's name.
        field: &'static str,
        /// The field's value.
        value: u64,
    },
}

impl ProbeAnswer {
    /// Decodes the answer from the bytes that a device wrote. Missing bytes are zero.
    pub fn from_prefix(bytes: &[u8]) -> Self {
        let mut whole = [0; Self::BYTES];
        let length = bytes.len().min(Self::BYTES);
        whole[..length].copy_from_slice(&bytes[..length]);
        Self::from_bytes(&whole)
    }

    /// Checks the answer of a device for a driver of version [`VERSION`].
    pub fn check(&self) -> Result<Device, ProbeError> {
        if self.magic.get() != MAGIC {
            return Err(ProbeError::NotRingpass);
        }
        let (min, max) = (self.version_min.get(), self.version_max.get());
        if !(min..=max).contains(&VERSION) {
            return Err(ProbeError::Version { min, max });
        }
        let answer_bytes = self.answer_bytes.get();
        let page_bytes = self.page_bytes.get();
        let segments = SegmentLimits {
            address_align_bytes: self.address_align_bytes.get(),
            length_align_bytes: self.length_align_bytes.get(),
            bytes_max: self.segment_bytes_max.get(),
        };
        let entries = [self.sq_entries_max.get(), self.cq_entries_max.get()];
        let entries_fit = |entries: u32, limit: u32| entries.is_power_of_two() && entries <= limit;
        let checks = [
            ("answer_bytes", u64::from(answer_bytes), answer_bytes as usize >= Self::BYTES),
            ("sq_entries_max", entries[0].into(), entries_fit(entries[0], crate::layout::SQ_ENTRIES_MAX)),
            ("cq_entries_max", entries[1].into(), entries_fit(entries[1], crate::layout::CQ_ENTRIES_MAX)),
            ("page_bytes", page_bytes.into(), page_bytes.is_power_of_two() && (4096..=65536).contains(&page_bytes)),
            ("queue_count", self.queue_count.get().into(), self.queue_count.get() != 0),
        ];
        for (field, value, is_good) in checks {
            if !is_good {
                return Err(ProbeError::Field { field, value });
            }
        }
        segments.check().map_err(|(field, value)| ProbeError::Field { field, value: value.into() })?;
        let refusal = self.refusal.get();
        Ok(Device {
            version: VERSION,
            features: self.features.get() & FEATURES_KNOWN,
            limits: AttachLimits {
                features: self.features.get(),
                sq_entries_max: entries[0],
                cq_entries_max: entries[1],
                page_bytes,
            },
            segments,
            queue_count: self.queue_count.get(),
            refusal: (refusal != 0).then(|| ErrorCode::from_number(refusal.into())),
        })
    }
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRingpass => write!(f, "the device is not a ringpass device"),
            Self::Version { min, max } => {
                write!(f, "the device supports versions {min} to {max} of the interface, but this driver has {VERSION}")
            }
            Self::Field { field, value } => write!(f, "the device's {field} is {value:#x}, which is out of range"),
        }
    }
}

impl core::error::Error for ProbeError {}

#[cfg(test)]
mod tests;
