//! The control page: the words by which the device and the driver of an attached queue communicate.
//!
//! The page has 4096 bytes in guest memory and is little-endian. The driver fills it with zeroes before ATTACH. From
//! ATTACH until its completion each word has one writer. Words of the two sides are on different cache lines (no
//! machine has lines of more than 256 bytes). All words are 32 bits wide and aligned, and both sides read and write
//! them whole.

use core::fmt;
use core::mem::offset_of;

use crate::epoch::Announcement;
use crate::little_endian::{Le32, Le64, wire};
use crate::request::ErrorCode;
use crate::{AddressingError, Doorbell, FixedAddressing, LayoutError, RingLayout, RingMemory, SegmentLimits};

/// [`RingRecord::doorbell`]: [`Doorbell::WhenAsleep`].
pub const DOORBELL_WHEN_ASLEEP: u32 = 1;
/// [`RingRecord::doorbell`]: [`Doorbell::Always`].
pub const DOORBELL_ALWAYS: u32 = 2;

/// [`RingRecord::mode`]: the host kernel consumes the ring.
pub const MODE_DIRECT: u32 = 1;
/// [`RingRecord::mode`]: the device consumes the ring and checks each entry.
pub const MODE_MEDIATED: u32 = 2;

/// A ring: the positions of its parts, as offsets in bytes into the rings part of its area, the rule for addresses in its
/// SQEs, and the limits of its segments.
///
/// The device writes the record before it announces `Open`, and keeps it until the driver has acknowledged the end of
/// that epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RingRecord {
    /// SQ head.
    pub sq_head_offset_bytes: Le32,
    /// SQ tail.
    pub sq_tail_offset_bytes: Le32,
    /// SQ flags.
    pub sq_flags_offset_bytes: Le32,
    /// CQ head.
    pub cq_head_offset_bytes: Le32,
    /// CQ tail.
    pub cq_tail_offset_bytes: Le32,
    /// CQ flags.
    pub cq_flags_offset_bytes: Le32,
    /// The CQEs.
    pub cqes_offset_bytes: Le32,
    /// [`DOORBELL_WHEN_ASLEEP`] or [`DOORBELL_ALWAYS`].
    pub doorbell: Le32,
    /// [`MODE_DIRECT`] or [`MODE_MEDIATED`]. For information: a driver does the same in both modes.
    pub mode: Le32,
    /// `buf_index` is the guest-physical address shifted right by this many bits: 22 to 30.
    pub slot_shift: Le32,
    /// The number of bytes to add to a guest-physical address for `sqe.addr`: a multiple of 1 GiB, not zero. Like the
    /// slots, it holds for this ring only.
    pub iova_base: Le64,
    /// Alignment of each segment's address in bytes: a power of two, at most 4096.
    pub address_align_bytes: Le32,
    /// The unit of each segment's length, and of its position on the disk, in bytes: a power of two, at most 65536.
    pub length_align_bytes: Le32,
    /// Maximum number of bytes of one SQE: a multiple of `length_align_bytes`, at least 4096.
    pub segment_bytes_max: Le32,
    /// 0; drivers ignore it.
    pub reserved: Le32,
}
wire!(RingRecord {
    sq_head_offset_bytes,
    sq_tail_offset_bytes,
    sq_flags_offset_bytes,
    cq_head_offset_bytes,
    cq_tail_offset_bytes,
    cq_flags_offset_bytes,
    cqes_offset_bytes,
    doorbell,
    mode,
    slot_shift,
    iova_base,
    address_align_bytes,
    length_align_bytes,
    segment_bytes_max,
    reserved,
});

/// The control page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ControlPage {
    /// Device: the [`Announcement`]. Written last, with release; read with acquire.
    pub announced: Le32,
    /// Device: why the last ring ended early, an [`ErrorCode`]; 0 after a switch and after a restart. Written before
    /// `announced`. For information.
    pub end_reason: Le32,
    /// Device: the ring of the open epoch.
    pub ring: RingRecord,
    /// Device: 0; drivers ignore it.
    pub device_reserved: [Le32; 46],
    /// Driver: the announcement whose demand the driver has fulfilled. Written with release, before the doorbell.
    pub acknowledged: Le32,
    /// Driver: 1 if the driver wants its queue back, and never 0 again. Written with release, before the doorbell.
    pub detach: Le32,
    /// Driver: 0; devices ignore it.
    pub driver_reserved: [Le32; 62],
    /// Neither side writes here: 0.
    pub reserved: [[Le32; 64]; 14],
}
wire!(ControlPage { announced, end_reason, ring, device_reserved, acknowledged, detach, driver_reserved, reserved });

/// Length of the control page in bytes.
pub const CONTROL_PAGE_BYTES: u32 = 4096;
const _: () = assert!(ControlPage::BYTES == CONTROL_PAGE_BYTES as usize);

/// Offset of [`ControlPage::announced`] in bytes.
pub const ANNOUNCED_OFFSET_BYTES: u32 = offset_of!(ControlPage, announced) as u32;
/// Offset of [`ControlPage::end_reason`] in bytes.
pub const END_REASON_OFFSET_BYTES: u32 = offset_of!(ControlPage, end_reason) as u32;
/// Offset of [`ControlPage::ring`] in bytes.
pub const RING_OFFSET_BYTES: u32 = offset_of!(ControlPage, ring) as u32;
/// Offset of [`ControlPage::acknowledged`] in bytes.
pub const ACKNOWLEDGED_OFFSET_BYTES: u32 = offset_of!(ControlPage, acknowledged) as u32;
/// Offset of [`ControlPage::detach`] in bytes.
pub const DETACH_OFFSET_BYTES: u32 = offset_of!(ControlPage, detach) as u32;

/// The reason why a driver cannot use a ring's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordError {
    /// The record's layout is not possible.
    Layout(LayoutError),
    /// `doorbell` is neither of the two values.
    Doorbell(u32),
    /// The rule for addresses is not possible.
    Addressing(AddressingError),
    /// A limit of segments is out of range.
    Segments {
        /// The field's name.
        field: &'static str,
        /// The field's value.
        value: u32,
    },
}

impl RingRecord {
    /// The record that a device writes for a ring.
    pub fn new(layout: &RingLayout, addressing: FixedAddressing, segments: &SegmentLimits, mode: u32) -> Self {
        let doorbell = match layout.doorbell {
            Doorbell::WhenAsleep => DOORBELL_WHEN_ASLEEP,
            Doorbell::Always => DOORBELL_ALWAYS,
        };
        Self {
            sq_head_offset_bytes: layout.sq_head_offset.into(),
            sq_tail_offset_bytes: layout.sq_tail_offset.into(),
            sq_flags_offset_bytes: layout.sq_flags_offset.into(),
            cq_head_offset_bytes: layout.cq_head_offset.into(),
            cq_tail_offset_bytes: layout.cq_tail_offset.into(),
            cq_flags_offset_bytes: layout.cq_flags_offset.into(),
            cqes_offset_bytes: layout.cqes_offset.into(),
            doorbell: doorbell.into(),
            mode: mode.into(),
            slot_shift: addressing.slot_shift().into(),
            iova_base: addressing.iova_base().into(),
            address_align_bytes: segments.address_align_bytes.into(),
            length_align_bytes: segments.length_align_bytes.into(),
            segment_bytes_max: segments.bytes_max.into(),
            reserved: 0.into(),
        }
    }

    /// The checked layout of a ring whose size and area the driver chose.
    pub fn layout(
        &self,
        sq_entries: u32,
        cq_entries: u32,
        lengths: &crate::attach::Lengths,
    ) -> Result<RingLayout, RecordError> {
        let doorbell = match self.doorbell.get() {
            DOORBELL_WHEN_ASLEEP => Doorbell::WhenAsleep,
            DOORBELL_ALWAYS => Doorbell::Always,
            other => return Err(RecordError::Doorbell(other)),
        };
        let layout = RingLayout {
            sq_entries,
            cq_entries,
            sq_head_offset: self.sq_head_offset_bytes.get(),
            sq_tail_offset: self.sq_tail_offset_bytes.get(),
            sq_flags_offset: self.sq_flags_offset_bytes.get(),
            cq_head_offset: self.cq_head_offset_bytes.get(),
            cq_tail_offset: self.cq_tail_offset_bytes.get(),
            cq_flags_offset: self.cq_flags_offset_bytes.get(),
            cqes_offset: self.cqes_offset_bytes.get(),
            rings_bytes: lengths.rings_bytes,
            sqes_bytes: lengths.sqes_bytes,
            doorbell,
        };
        layout.validate().map_err(RecordError::Layout)?;
        Ok(layout)
    }

    /// The checked rule for addresses in the ring's SQEs.
    pub fn addressing(&self) -> Result<FixedAddressing, RecordError> {
        FixedAddressing::new(self.iova_base.get(), self.slot_shift.get()).map_err(RecordError::Addressing)
    }

    /// The checked limits of the ring's segments.
    pub fn segments(&self) -> Result<SegmentLimits, RecordError> {
        let limits = SegmentLimits {
            address_align_bytes: self.address_align_bytes.get(),
            length_align_bytes: self.length_align_bytes.get(),
            bytes_max: self.segment_bytes_max.get(),
        };
        limits.check().map_err(|(field, value)| RecordError::Segments { field, value })?;
        Ok(limits)
    }
}

/// The driver's accesses to a control page. Offsets into the memory count from the start of the page.
#[derive(Debug)]
pub struct DriverControl<M> {
    memory: M,
}

impl<M: RingMemory> DriverControl<M> {
    /// Accesses the page in `memory`, which has at least [`CONTROL_PAGE_BYTES`] bytes.
    pub fn new(memory: M) -> Self {
        Self { memory }
    }

    /// The page, for another use.
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// Fills the page with zeroes. Call this before you send ATTACH.
    pub fn clear(&self) {
        for offset_bytes in (0..CONTROL_PAGE_BYTES).step_by(4) {
            self.memory.store_relaxed(offset_bytes, 0);
        }
    }

    /// Reads the device's word, for [`epoch::driver::Event::Announced`](crate::epoch::driver::Event::Announced).
    /// Everything that the device wrote before the word is visible afterwards.
    pub fn announced(&self) -> u32 {
        u32::from_le(self.memory.load_acquire(ANNOUNCED_OFFSET_BYTES))
    }

    /// Why the last ring ended early. `None`: a code of a later version.
    pub fn end_reason(&self) -> Option<ErrorCode> {
        ErrorCode::from_number(u32::from_le(self.memory.load_relaxed(END_REASON_OFFSET_BYTES)))
    }

    /// Copies the ring's record. Read it after an announcement of `Open`.
    pub fn ring(&self) -> RingRecord {
        let mut bytes = [0; RingRecord::BYTES];
        for (offset_bytes, word) in (RING_OFFSET_BYTES..).step_by(4).zip(bytes.chunks_exact_mut(4)) {
            word.copy_from_slice(&self.memory.load_relaxed(offset_bytes).to_ne_bytes());
        }
        RingRecord::from_bytes(&bytes)
    }

    /// Acknowledges an announcement. The driver's earlier reads and writes are done when the device sees the
    /// acknowledgement. Ring the doorbell afterwards.
    pub fn acknowledge(&self, announcement: Announcement) {
        self.memory.store_release(ACKNOWLEDGED_OFFSET_BYTES, announcement.to_word().to_le());
    }

    /// Sets the detach word: the driver wants its queue back. Ring the doorbell afterwards.
    pub fn set_detach(&self) {
        self.memory.store_release(DETACH_OFFSET_BYTES, 1u32.to_le());
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout(error) => write!(f, "the device describes an impossible ring: {error}"),
            Self::Doorbell(value) => write!(f, "the device describes a doorbell of the unknown kind {value}"),
            Self::Addressing(error) => write!(f, "the device describes an impossible rule for addresses: {error}"),
            Self::Segments { field, value } => {
                write!(f, "the device describes an impossible limit of segments: {field} is {value}")
            }
        }
    }
}

impl core::error::Error for RecordError {}

#[cfg(test)]
mod tests;
