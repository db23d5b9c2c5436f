//! What a ring takes as one segment.

/// The limits of one segment, which is one SQE: in the answer to PROBE, and in the record of each ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentLimits {
    /// Alignment of the address in bytes: a power of two, at most 4096.
    pub address_align_bytes: u32,
    /// The unit of the length, and of the position on the disk, in bytes: a power of two, at most 65536.
    pub length_align_bytes: u32,
    /// Maximum number of bytes: a multiple of `length_align_bytes`, at least 4096.
    pub bytes_max: u32,
}

/// A limit that is out of range: the name of its field, and its value.
pub(crate) type BadLimit = (&'static str, u32);

impl SegmentLimits {
    /// Checks the ranges.
    pub(crate) fn check(&self) -> Result<(), BadLimit> {
        let Self { address_align_bytes, length_align_bytes, bytes_max } = *self;
        let is_unit = |bytes: u32, max: u32| bytes.is_power_of_two() && bytes <= max;
        if !is_unit(address_align_bytes, 4096) {
            return Err(("address_align_bytes", address_align_bytes));
        }
        if !is_unit(length_align_bytes, 65536) {
            return Err(("length_align_bytes", length_align_bytes));
        }
        if bytes_max < 4096 || bytes_max % length_align_bytes != 0 {
            return Err(("segment_bytes_max", bytes_max));
        }
        Ok(())
    }

    /// Whether a ring with these limits takes the segment of `len_bytes` bytes at `gpa` for the position `off_bytes` on the
    /// disk. [`FixedAddressing::resolve`](crate::FixedAddressing::resolve) has the rules for slots.
    #[inline]
    pub fn takes(&self, gpa: u64, len_bytes: u32, off_bytes: u64) -> bool {
        let address_mask = u64::from(self.address_align_bytes) - 1;
        let length_mask = u64::from(self.length_align_bytes) - 1;
        gpa & address_mask == 0 && (u64::from(len_bytes) | off_bytes) & length_mask == 0 && len_bytes <= self.bytes_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: SegmentLimits =
        SegmentLimits { address_align_bytes: 4, length_align_bytes: 4096, bytes_max: 1 << 20 };

    #[test]
    fn address_and_length_have_alignments_of_their_own() {
        assert!(LIMITS.takes(0x1004, 8192, 4096));
        assert!(!LIMITS.takes(0x1002, 8192, 4096), "the address");
        assert!(!LIMITS.takes(0x1000, 512, 4096), "the length");
        assert!(!LIMITS.takes(0x1000, 4096, 512), "the position on the disk");
        assert!(LIMITS.takes(0, 1 << 20, 0) && !LIMITS.takes(0, (1 << 20) + 4096, 0));
    }

    #[test]
    fn limits_out_of_range_are_refused_by_name() {
        assert_eq!(LIMITS.check(), Ok(()));
        for (field, limits) in [
            ("address_align_bytes", SegmentLimits { address_align_bytes: 8192, ..LIMITS }),
            ("address_align_bytes", SegmentLimits { address_align_bytes: 0, ..LIMITS }),
            ("length_align_bytes", SegmentLimits { length_align_bytes: 3, ..LIMITS }),
            ("length_align_bytes", SegmentLimits { length_align_bytes: 1 << 17, ..LIMITS }),
            ("segment_bytes_max", SegmentLimits { bytes_max: 2048, length_align_bytes: 512, ..LIMITS }),
            ("segment_bytes_max", SegmentLimits { bytes_max: 6144, ..LIMITS }),
        ] {
            assert!(matches!(limits.check(), Err((name, _)) if name == field), "{limits:?}");
        }
    }
}
