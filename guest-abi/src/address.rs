//! Guest-physical addresses in SQEs.
//!
//! The broker registers guest RAM as io_uring *fixed buffers* at the virtual address `iova_base + gpa`, one for each
//! *slot*: a range of guest-physical addresses of 2^`slot_shift` bytes. The kernel stores the address at which a buffer
//! was registered and checks each `READ_FIXED`/`WRITE_FIXED` against it. So the pair computed here is exact, needs no
//! table, and reaches only this guest's RAM.
//!
//! The device chooses the size of the slots, because the slot bounds what a single SQE can make the kernel do: no check
//! but the bounds of the buffer limits the length of an SQE. The device tells base and shift with each ring
//! ([`RingRecord`](crate::control::RingRecord)), so they can change from one ring to the next. The *segments* of a driver
//! need not change: a segment that does not cross a multiple of [`SEGMENT_BOUNDARY_BYTES`] lies in one slot of any size.

use core::fmt;

/// The smallest [`slot_shift`](FixedAddressing::slot_shift): slots of 4 MiB.
pub const SLOT_SHIFT_MIN: u32 = 22;

/// The largest [`slot_shift`](FixedAddressing::slot_shift): slots of 1 GiB, the kernel's limit for a registered buffer
/// (`io_validate_user_buf_range`, Linux 5.1 and later).
pub const SLOT_SHIFT_MAX: u32 = 30;

/// Maximum number of slots: `IORING_MAX_REG_BUFFERS`, 16384.
pub const SLOT_COUNT_MAX: u32 = 1 << 14;

/// No segment crosses a multiple of this many bytes (the `seg_boundary_mask` of a Linux block driver, plus 1).
pub const SEGMENT_BOUNDARY_BYTES: u64 = 1 << 22;
const _: () = assert!(SEGMENT_BOUNDARY_BYTES == 1 << SLOT_SHIFT_MIN);

/// Guest RAM for rings ends at or below this address: 16 TiB, [`SLOT_COUNT_MAX`] slots of the largest size.
pub const GPA_LIMIT: u64 = 1 << 44;
const _: () = assert!(GPA_LIMIT == (SLOT_COUNT_MAX as u64) << SLOT_SHIFT_MAX);

/// The device's rule for converting a guest-physical address into the fields of an SQE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedAddressing {
    iova_base: u64,
    slot_shift: u32,
}

/// The reason why a rule of addressing cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressingError {
    /// The base is zero, not a multiple of 1 GiB, or too high for the last slot.
    Base(u64),
    /// The shift is not [`SLOT_SHIFT_MIN`] to [`SLOT_SHIFT_MAX`].
    Shift(u32),
}

/// The fields of an SQE for one guest-physical segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedAddress {
    /// `sqe.buf_index`: the slot, `gpa >> slot_shift`.
    pub buf_index: u16,
    /// `sqe.addr`: `iova_base + gpa`.
    pub addr: u64,
}

/// The reason why a guest-physical segment does not fit into one SQE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressError {
    /// The segment has no bytes.
    Empty,
    /// The segment crosses a multiple of [`SEGMENT_BOUNDARY_BYTES`]: each side needs its own SQE.
    CrossesBoundary {
        /// Guest-physical start of the segment.
        gpa: u64,
        /// Length of the segment in bytes.
        len_bytes: u32,
    },
    /// The segment does not end at or below the end of the last possible slot.
    TooHigh {
        /// Guest-physical start of the segment.
        gpa: u64,
        /// The end of the last possible slot.
        limit_gpa: u64,
    },
}

impl FixedAddressing {
    /// Checks the rule that a device tells.
    ///
    /// # Errors
    ///
    /// `iova_base` is zero, not a multiple of 1 GiB, or above 2^64 - 2^44; `slot_shift` is out of range.
    pub const fn new(iova_base: u64, slot_shift: u32) -> Result<Self, AddressingError> {
        if iova_base == 0 || iova_base % (1 << SLOT_SHIFT_MAX) != 0 || iova_base > u64::MAX - (GPA_LIMIT - 1) {
            return Err(AddressingError::Base(iova_base));
        }
        if slot_shift < SLOT_SHIFT_MIN || slot_shift > SLOT_SHIFT_MAX {
            return Err(AddressingError::Shift(slot_shift));
        }
        Ok(Self { iova_base, slot_shift })
    }

    /// The number of bytes to add to a guest-physical address for `sqe.addr`: a multiple of 1 GiB, not zero.
    pub const fn iova_base(&self) -> u64 {
        self.iova_base
    }

    /// `buf_index` is the guest-physical address shifted right by this many bits: [`SLOT_SHIFT_MIN`] to
    /// [`SLOT_SHIFT_MAX`].
    pub const fn slot_shift(&self) -> u32 {
        self.slot_shift
    }

    /// Guest-physical bytes that one slot covers: 4 MiB to 1 GiB.
    pub const fn slot_bytes(&self) -> u64 {
        1 << self.slot_shift
    }

    /// The end of the last possible slot: memory above it is out of reach of the ring.
    pub const fn limit_gpa(&self) -> u64 {
        (SLOT_COUNT_MAX as u64) << self.slot_shift
    }

    /// The fixed buffer and the address for `len_bytes` bytes at `gpa`.
    ///
    /// The kernel checks that there is RAM at `gpa`: a request with an address outside the registered buffer completes
    /// with -EFAULT.
    ///
    /// # Errors
    ///
    /// The segment has no bytes, crosses a multiple of [`SEGMENT_BOUNDARY_BYTES`], or lies above all slots.
    #[inline]
    pub fn resolve(&self, gpa: u64, len_bytes: u32) -> Result<FixedAddress, AddressError> {
        let Some(span_bytes) = u64::from(len_bytes).checked_sub(1) else {
            return Err(AddressError::Empty);
        };
        let limit_gpa = self.limit_gpa();
        let too_high = AddressError::TooHigh { gpa, limit_gpa };
        let last = gpa.checked_add(span_bytes).filter(|&last| last < limit_gpa).ok_or(too_high)?;
        if last / SEGMENT_BOUNDARY_BYTES != gpa / SEGMENT_BOUNDARY_BYTES {
            return Err(AddressError::CrossesBoundary { gpa, len_bytes });
        }
        let buf_index = u16::try_from(gpa >> self.slot_shift).map_err(|_| too_high)?;
        // The base leaves room for every slot.
        Ok(FixedAddress { buf_index, addr: self.iova_base + gpa })
    }
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "the segment has no bytes"),
            Self::CrossesBoundary { gpa, len_bytes } => {
                write!(f, "the segment of {len_bytes} bytes at guest-physical {gpa:#x} crosses a 4 MiB boundary")
            }
            Self::TooHigh { gpa, limit_gpa } => {
                let limit_gib = limit_gpa >> 30;
                write!(f, "the segment at guest-physical {gpa:#x} does not end below {limit_gib} GiB")
            }
        }
    }
}

impl fmt::Display for AddressingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base(base) => {
                write!(f, "the base of addresses is {base:#x}, not a multiple of 1 GiB from 1 GiB to 2^64 - 16 TiB")
            }
            Self::Shift(shift) => {
                write!(f, "the shift of slots is {shift}, not {SLOT_SHIFT_MIN} to {SLOT_SHIFT_MAX}")
            }
        }
    }
}

impl core::error::Error for AddressError {}
impl core::error::Error for AddressingError {}

#[cfg(test)]
mod tests;
