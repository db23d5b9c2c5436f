//! The layout of a ring: the positions of its parts.

use core::fmt;
use core::mem::size_of;

use crate::{Cqe, Sqe};

/// `IORING_SQ_NEED_WAKEUP` in the SQ flags: the kernel's SQ thread sleeps, so the driver must ring the doorbell.
pub const SQ_NEED_WAKEUP: u32 = 1 << 0;
/// `IORING_SQ_CQ_OVERFLOW` in the SQ flags: completions wait in the kernel because the CQ was full. A correct driver
/// never sees this flag.
pub const SQ_CQ_OVERFLOW: u32 = 1 << 1;
/// `IORING_CQ_EVENTFD_DISABLED` in the CQ flags: the driver has muted interrupts.
pub const CQ_EVENTFD_DISABLED: u32 = 1 << 0;

/// Maximum number of entries of a submission queue: `IORING_MAX_ENTRIES`.
pub const SQ_ENTRIES_MAX: u32 = 32768;
/// Maximum number of entries of a completion queue: `IORING_MAX_CQ_ENTRIES`.
pub const CQ_ENTRIES_MAX: u32 = 65536;
/// Room for the indexes and flags before the CQEs, in bytes. The kernel uses 320 bytes of it (Linux 5.1 to 6.18).
pub const RINGS_HEADER_BYTES: u32 = 1024;
/// Length of an SQE in bytes.
pub const SQE_BYTES: u32 = 64;
/// Length of a CQE in bytes.
pub const CQE_BYTES: u32 = 16;
const _: () = assert!(size_of::<Sqe>() == SQE_BYTES as usize && size_of::<Cqe>() == CQE_BYTES as usize);
/// The end of 32-bit offsets into the rings area.
const OFFSETS_END_BYTES: u64 = 1 << 32;
/// The unit of ring memory.
const PAGE_BYTES: u64 = 4096;

/// The length in bytes of the rings area of a ring with `cq_entries` completion queue entries, in whole 4 KiB pages.
///
/// The area holds up to 1024 bytes of indexes and flags, and `cq_entries` CQEs of 16 bytes. The broker refuses a kernel
/// whose rings need more.
pub fn rings_area_bytes(cq_entries: u32) -> u64 {
    (u64::from(RINGS_HEADER_BYTES) + u64::from(cq_entries) * u64::from(CQE_BYTES)).next_multiple_of(PAGE_BYTES)
}

/// The length in bytes of the SQE area of a ring with `sq_entries` submission queue entries, in whole 4 KiB pages.
pub fn sqes_area_bytes(sq_entries: u32) -> u64 {
    (u64::from(sq_entries) * u64::from(SQE_BYTES)).next_multiple_of(PAGE_BYTES)
}

/// When the driver must ring the doorbell after it has published SQEs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// Only while [`SQ_NEED_WAKEUP`] is set: a kernel thread polls the SQ (`IORING_SETUP_SQPOLL`).
    WhenAsleep,
    /// After every batch: no thread polls the SQ.
    Always,
}

/// The positions of the parts of one ring, as the device told the driver: byte offsets into the rings area.
///
/// All fields come from the kernel (`struct io_sqring_offsets`, `struct io_cqring_offsets`) through the broker, and may
/// differ between kernel versions. There is no SQ array (`IORING_SETUP_NO_SQARRAY`, Linux 6.6): entry `i` of the SQ is
/// SQE slot `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Submission queue entries, a power of two, 1 to 32768.
    pub sq_entries: u32,
    /// Completion queue entries, a power of two, 1 to 65536. A driver must never have more requests outstanding.
    pub cq_entries: u32,
    /// SQ head: `u32`, written by the kernel.
    pub sq_head_offset: u32,
    /// SQ tail: `u32`, written by the driver.
    pub sq_tail_offset: u32,
    /// SQ flags: `u32`, written by the kernel ([`SQ_NEED_WAKEUP`], [`SQ_CQ_OVERFLOW`]).
    pub sq_flags_offset: u32,
    /// CQ head: `u32`, written by the driver.
    pub cq_head_offset: u32,
    /// CQ tail: `u32`, written by the kernel.
    pub cq_tail_offset: u32,
    /// CQ flags: `u32`, written by the driver ([`CQ_EVENTFD_DISABLED`]).
    pub cq_flags_offset: u32,
    /// The CQEs: `cq_entries` times 16 bytes.
    pub cqes_offset: u32,
    /// Length of the rings area in bytes.
    pub rings_bytes: u64,
    /// Length of the SQE area in bytes.
    pub sqes_bytes: u64,
    /// When to ring the doorbell.
    pub doorbell: Doorbell,
}

/// The reason why a layout cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// A number of entries is zero, not a power of two, or above the kernel's limit.
    Entries {
        /// `"sq_entries"` or `"cq_entries"`.
        field: &'static str,
        /// The given number.
        entries: u32,
    },
    /// A field is not inside its area, is not below 4 GiB, or is not aligned to its size.
    Misplaced {
        /// The field's name.
        field: &'static str,
        /// The given offset in bytes.
        offset_bytes: u32,
    },
    /// The SQE area is shorter than its entries.
    SqesTooShort {
        /// Bytes that the entries need.
        needed_bytes: u64,
        /// Length of the given area in bytes.
        sqes_bytes: u64,
    },
}

impl RingLayout {
    /// Checks that every part lies inside its area, so that accesses to a [`RingMemory`](crate::RingMemory) of these
    /// areas never leave them. Overlapping parts are allowed: they harm only the ring itself.
    pub fn validate(&self) -> Result<(), LayoutError> {
        let entries =
            [("sq_entries", self.sq_entries, SQ_ENTRIES_MAX), ("cq_entries", self.cq_entries, CQ_ENTRIES_MAX)];
        for (field, entries, max) in entries {
            if !entries.is_power_of_two() || entries > max {
                return Err(LayoutError::Entries { field, entries });
            }
        }
        let cqes_bytes = u64::from(self.cq_entries) * u64::from(CQE_BYTES);
        let parts = [
            ("sq_head", self.sq_head_offset, 4, 4),
            ("sq_tail", self.sq_tail_offset, 4, 4),
            ("sq_flags", self.sq_flags_offset, 4, 4),
            ("cq_head", self.cq_head_offset, 4, 4),
            ("cq_tail", self.cq_tail_offset, 4, 4),
            ("cq_flags", self.cq_flags_offset, 4, 4),
            ("cqes", self.cqes_offset, cqes_bytes, 8),
        ];
        for (field, offset_bytes, len_bytes, align_bytes) in parts {
            let end_bytes = u64::from(offset_bytes) + len_bytes;
            if offset_bytes % align_bytes != 0 || end_bytes > self.rings_bytes.min(OFFSETS_END_BYTES) {
                return Err(LayoutError::Misplaced { field, offset_bytes });
            }
        }
        let needed_bytes = u64::from(self.sq_entries) * u64::from(SQE_BYTES);
        if needed_bytes > self.sqes_bytes {
            return Err(LayoutError::SqesTooShort { needed_bytes, sqes_bytes: self.sqes_bytes });
        }
        Ok(())
    }
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entries { field, entries } => {
                write!(f, "{field} is {entries}: it must be a power of two, at most 32768 (SQ) or 65536 (CQ)")
            }
            Self::Misplaced { field, offset_bytes } => {
                write!(f, "{field} at offset {offset_bytes} is not aligned or not inside the rings area")
            }
            Self::SqesTooShort { needed_bytes, sqes_bytes } => {
                write!(f, "the SQE area has {sqes_bytes} bytes, but its entries need {needed_bytes}")
            }
        }
    }
}

impl core::error::Error for LayoutError {}

#[cfg(test)]
pub(crate) mod tests;
