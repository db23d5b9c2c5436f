//! Rules on those fields of an SQE that the kernel's restrictions do not cover, for the checker in user space.

use core::fmt;

use bitflags::bitflags;

use crate::{
    operation::Operation,
    sqe::{Sqe, SqeFlags},
};

bitflags! {
    /// `RWF_*` flags of a read or write (preadv2(2), io_uring_enter(2)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct RwFlags: u32 {
        /// `RWF_HIPRI`: poll for completion.
        const HIPRI = 0x1;
        /// `RWF_DSYNC`: the data is durable at completion.
        const DSYNC = 0x2;
        /// `RWF_SYNC`: data and metadata are durable at completion.
        const SYNC = 0x4;
        /// `RWF_NOWAIT`: fail rather than block.
        const NOWAIT = 0x8;
        /// `RWF_APPEND`: write at the end of the file, regardless of the offset.
        const APPEND = 0x10;
        /// `RWF_NOAPPEND` (Linux 6.9): write at the offset, even if the file was opened for appending.
        const NOAPPEND = 0x20;
        /// `RWF_ATOMIC` (Linux 6.11): write all of the data or nothing.
        const ATOMIC = 0x40;
        /// `RWF_DONTCACHE` (Linux 6.14): leave no data in the page cache.
        const DONTCACHE = 0x80;
    }
}

bitflags! {
    /// A set of priority classes of requests (ioprio_set(2)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct IoPrioClasses: u8 {
        /// `IOPRIO_CLASS_NONE`: the class of the ring's owner.
        const NONE = 1 << 0;
        /// `IOPRIO_CLASS_RT`: before all other I/O on the host.
        const REALTIME = 1 << 1;
        /// `IOPRIO_CLASS_BE`: the ordinary class.
        const BEST_EFFORT = 1 << 2;
        /// `IOPRIO_CLASS_IDLE`: after all other I/O on the host.
        const IDLE = 1 << 3;
    }
}

bitflags! {
    /// Attributes of a read or write (`IORING_RW_ATTR_FLAG_*`, Linux 6.14).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Attributes: u64 {
        /// `IORING_RW_ATTR_FLAG_PI`: protection information, at an address of the ring's owner.
        const PI = 1 << 0;
    }
}

/// Slots of a table, from the first to the last inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slots {
    /// The first slot.
    pub first: u32,
    /// The last slot, not below the first.
    pub last: u32,
}

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OffsetWindow {
    /// Offset of the first byte.
    pub start_bytes: u64,
    /// Length in bytes, not 0. The window ends at or below 2^63.
    pub len_bytes: u64,
}

/// The permitted length of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LengthRange {
    /// The minimum in bytes.
    pub min: u32,
    /// The maximum in bytes, not below the minimum.
    pub max: u32,
}

/// Rules on the fields of an SQE. The kernel cannot enforce them, so a policy with such a rule is for mediated mode
/// only. If all fields are `None`, there are no rules.
///
/// The rules apply to the operations whose fields this crate reads: `READ_FIXED`, `WRITE_FIXED`, `READ`, `WRITE`,
/// `FSYNC`, `FALLOCATE` and `NOP`. If a policy has any rule, it refuses every other operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct FieldRules {
    /// The slots of the file table that an SQE may use.
    pub file_slots: Option<Slots>,
    /// The slots of the buffer table that a fixed read or write may use.
    pub buffer_slots: Option<Slots>,
    /// The part of the file that an SQE may read, write or allocate.
    pub offset_window: Option<OffsetWindow>,
    /// The permitted length of a read or write.
    pub length_bytes: Option<LengthRange>,
    /// The alignment in bytes, a power of two: offset and length must be multiples of it.
    pub alignment_bytes: Option<u32>,
    /// The `RWF_*` flags that a read or write may carry.
    pub rw_flags: Option<RwFlags>,
    /// The priority classes that a read or write may request.
    pub ioprio_classes: Option<IoPrioClasses>,
    /// The attributes that a read or write may have.
    pub attributes: Option<Attributes>,
    /// The maximum number of requests under way at once, at least 1. The program that starts requests counts them:
    /// [`Checker::may_start`](crate::Checker::may_start).
    pub max_outstanding: Option<u32>,
}

/// A rule on a field, identified by its key in policy files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FieldRule {
    /// [`FieldRules::file_slots`].
    FileSlots,
    /// [`FieldRules::buffer_slots`].
    BufferSlots,
    /// [`FieldRules::offset_window`].
    OffsetWindow,
    /// [`FieldRules::length_bytes`].
    LengthBytes,
    /// [`FieldRules::alignment_bytes`].
    AlignmentBytes,
    /// [`FieldRules::rw_flags`].
    RwFlags,
    /// [`FieldRules::ioprio_classes`].
    IoPrioClasses,
    /// [`FieldRules::attributes`].
    Attributes,
    /// [`FieldRules::max_outstanding`].
    MaxOutstanding,
}

impl FieldRule {
    /// The key in policy files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FileSlots => "file_slots",
            Self::BufferSlots => "buffer_slots",
            Self::OffsetWindow => "offset_window",
            Self::LengthBytes => "length_bytes",
            Self::AlignmentBytes => "alignment_bytes",
            Self::RwFlags => "rw_flags",
            Self::IoPrioClasses => "ioprio_classes",
            Self::Attributes => "attributes",
            Self::MaxOutstanding => "max_outstanding",
        }
    }
}

impl fmt::Display for FieldRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fields.{}", self.name())
    }
}

/// The layout of an operation's fields.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    FixedReadWrite,
    ReadWrite,
    Sync,
    Allocate,
    Nothing,
}

/// `FALLOC_FL_*` combinations that change nothing outside their range: allocate, punch and zero, each with and without
/// growing the file (punching only without).
const FALLOCATE_MODES: [u32; 5] = [0, 0x1, 0x3, 0x10, 0x11];
/// Bits of `ioprio` below the class.
const IOPRIO_CLASS_SHIFT: u32 = 13;

impl FieldRules {
    /// The rules that are set.
    pub fn rules(&self) -> impl Iterator<Item = FieldRule> + use<> {
        [
            (self.file_slots.is_some(), FieldRule::FileSlots),
            (self.buffer_slots.is_some(), FieldRule::BufferSlots),
            (self.offset_window.is_some(), FieldRule::OffsetWindow),
            (self.length_bytes.is_some(), FieldRule::LengthBytes),
            (self.alignment_bytes.is_some(), FieldRule::AlignmentBytes),
            (self.rw_flags.is_some(), FieldRule::RwFlags),
            (self.ioprio_classes.is_some(), FieldRule::IoPrioClasses),
            (self.attributes.is_some(), FieldRule::Attributes),
            (self.max_outstanding.is_some(), FieldRule::MaxOutstanding),
        ]
        .into_iter()
        .filter_map(|(is_set, rule)| is_set.then_some(rule))
    }

    /// Whether no rule is set.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        matches!(
            self,
            Self {
                file_slots: None,
                buffer_slots: None,
                offset_window: None,
                length_bytes: None,
                alignment_bytes: None,
                rw_flags: None,
                ioprio_classes: None,
                attributes: None,
                max_outstanding: None,
            }
        )
    }

    /// Whether the rules can judge SQEs of this operation. If they cannot and there is any rule, all such SQEs are
    /// refused.
    #[must_use]
    pub const fn judge(operation: Operation) -> bool {
        shape(operation).is_some()
    }

    /// Finds the first rule that the SQE breaks.
    #[inline]
    pub(crate) fn broken(&self, sqe: &Sqe) -> Result<(), BrokenField> {
        if self.is_empty() {
            return Ok(());
        }
        let Some(shape) = shape(Operation::new(sqe.opcode)) else { return Err(BrokenField::Unreadable) };
        if shape == Shape::Nothing {
            return Ok(());
        }
        check(FieldRule::FileSlots, self.file_slots, |slots| {
            // Without the flag, `fd` is a descriptor, not a slot.
            SqeFlags::from_bits_retain(sqe.flags).contains(SqeFlags::FIXED_FILE)
                && u32::try_from(sqe.fd).is_ok_and(|slot| slots.contains(slot))
        })?;
        match shape {
            Shape::FixedReadWrite => {
                check(FieldRule::BufferSlots, self.buffer_slots, |slots| slots.contains(sqe.buf_index.into()))?;
                self.broken_read_write(sqe)
            }
            Shape::ReadWrite => self.broken_read_write(sqe),
            Shape::Allocate => {
                if !FALLOCATE_MODES.contains(&sqe.len) {
                    return Err(BrokenField::FallocateMode);
                }
                self.broken_range(sqe.off, sqe.addr)
            }
            Shape::Sync | Shape::Nothing => Ok(()),
        }
    }

    #[inline]
    fn broken_read_write(&self, sqe: &Sqe) -> Result<(), BrokenField> {
        check(FieldRule::LengthBytes, self.length_bytes, |range| (range.min..=range.max).contains(&sqe.len))?;
        self.broken_range(sqe.off, sqe.len.into())?;
        check(FieldRule::RwFlags, self.rw_flags, |allowed| sqe.rw_flags & !allowed.bits() == 0)?;
        // Appending ignores the offset. (An offset of all ones, the file's own position, lies in no window.)
        if sqe.rw_flags & RwFlags::APPEND.bits() != 0 && self.offset_window.is_some() {
            return Err(BrokenField::Rule(FieldRule::OffsetWindow));
        }
        check(FieldRule::IoPrioClasses, self.ioprio_classes, |allowed| {
            1u8.checked_shl((sqe.ioprio >> IOPRIO_CLASS_SHIFT).into()).is_some_and(|class| allowed.bits() & class != 0)
        })?;
        check(FieldRule::Attributes, self.attributes, |allowed| sqe.attr_type_mask & !allowed.bits() == 0)
    }

    #[inline]
    fn broken_range(&self, offset: u64, len_bytes: u64) -> Result<(), BrokenField> {
        check(FieldRule::OffsetWindow, self.offset_window, |window| window.contains(offset, len_bytes))?;
        check(FieldRule::AlignmentBytes, self.alignment_bytes, |alignment| {
            (offset | len_bytes) & u64::from(alignment).wrapping_sub(1) == 0
        })
    }

    /// Finds the first rule that cannot be intended: a reversed range, or an alignment that is no power of two.
    #[must_use]
    pub fn fault(&self) -> Option<FieldFault> {
        let fault = |rule, what| Some(FieldFault { rule, what });
        if self.file_slots.is_some_and(|slots| slots.first > slots.last) {
            return fault(FieldRule::FileSlots, SLOTS_REVERSED);
        }
        if self.buffer_slots.is_some_and(|slots| slots.first > slots.last) {
            return fault(FieldRule::BufferSlots, SLOTS_REVERSED);
        }
        if self.offset_window.is_some_and(|window| window.fault()) {
            return fault(FieldRule::OffsetWindow, WINDOW_EMPTY);
        }
        if self.length_bytes.is_some_and(|range| range.min > range.max) {
            return fault(FieldRule::LengthBytes, LENGTH_REVERSED);
        }
        if self.alignment_bytes.is_some_and(|alignment| !alignment.is_power_of_two()) {
            return fault(FieldRule::AlignmentBytes, ALIGNMENT_ODD);
        }
        if self.max_outstanding == Some(0) {
            return fault(FieldRule::MaxOutstanding, NONE_OUTSTANDING);
        }
        None
    }
}

pub(crate) const SLOTS_REVERSED: &str = "the last slot is below the first";
pub(crate) const WINDOW_EMPTY: &str = "the window must hold at least one byte and end at or below 2^63 bytes";
pub(crate) const LENGTH_REVERSED: &str = "max is below min";
pub(crate) const ALIGNMENT_ODD: &str = "the alignment must be a power of two";
pub(crate) const NONE_OUTSTANDING: &str = "no request could ever start: at least 1 must be allowed";

/// A rule that cannot be intended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldFault {
    /// The rule.
    pub rule: FieldRule,
    /// What is wrong with the rule.
    pub what: &'static str,
}

impl fmt::Display for FieldFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)
    }
}

/// The reason why the fields of an SQE are not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BrokenField {
    Rule(FieldRule),
    /// `FALLOCATE` with a mode that moves data or is unknown.
    FallocateMode,
    /// The fields of the operation are not known to this crate.
    Unreadable,
}

#[inline]
fn check<R: Copy>(rule: FieldRule, set: Option<R>, allows: impl FnOnce(R) -> bool) -> Result<(), BrokenField> {
    match set {
        Some(value) if !allows(value) => Err(BrokenField::Rule(rule)),
        _ => Ok(()),
    }
}

const fn shape(operation: Operation) -> Option<Shape> {
    Some(match operation {
        Operation::READ_FIXED | Operation::WRITE_FIXED => Shape::FixedReadWrite,
        Operation::READ | Operation::WRITE => Shape::ReadWrite,
        Operation::FSYNC => Shape::Sync,
        Operation::FALLOCATE => Shape::Allocate,
        Operation::NOP => Shape::Nothing,
        _ => return None,
    })
}

impl Slots {
    /// Whether the slot is in the range.
    #[must_use]
    pub const fn contains(self, slot: u32) -> bool {
        self.first <= slot && slot <= self.last
    }
}

impl OffsetWindow {
    /// Whether all of `len_bytes` bytes from `offset` lie in the window. An empty range lies in the window if its
    /// offset does, or if its offset is the end of the window.
    #[must_use]
    pub const fn contains(self, offset: u64, len_bytes: u64) -> bool {
        let (Some(end), Some(window_end)) =
            (offset.checked_add(len_bytes), self.start_bytes.checked_add(self.len_bytes))
        else {
            return false;
        };
        self.start_bytes <= offset && end <= window_end
    }

    pub(crate) const fn fault(self) -> bool {
        match self.start_bytes.checked_add(self.len_bytes) {
            Some(end) => self.len_bytes == 0 || end > 1 << 63,
            None => true,
        }
    }
}
