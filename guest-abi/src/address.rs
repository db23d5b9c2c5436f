//! Guest-physical addresses in SQEs.
//!
//! The broker registers guest RAM as io_uring *fixed buffers*, one per 1 GiB of guest-physical address space, at the
//! virtual address `iova_base + gpa`. The kernel stores the address at which a buffer was registered and checks each
//! `READ_FIXED`/`WRITE_FIXED` against it. So the pair computed here is exact, needs no table, and reaches only this
//! guest's RAM.

use core::fmt;

/// Guest-physical bytes that one fixed buffer (one *slot*) covers. 1 GiB is the kernel's limit for a registered
/// buffer (`io_validate_user_buf_range`, Linux 5.1 and later).
pub const SLOT_BYTES: u64 = 1 << 30;

/// Maximum number of slots: `IORING_MAX_REG_BUFFERS`, 16384, for 16 TiB of guest-physical address space.
pub const SLOT_COUNT_MAX: u32 = 1 << 14;

/// The device's rule for converting a guest-physical address into the fields of an SQE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedAddressing {
    /// The number of bytes to add to a guest-physical address for `sqe.addr`. A multiple of [`SLOT_BYTES`], not zero.
    pub iova_base: u64,
}

/// The fields of an SQE for one guest-physical segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedAddress {
    /// `sqe.buf_index`: the slot, `gpa >> 30`.
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
    /// The segment crosses a multiple of [`SLOT_BYTES`]: each side needs its own SQE (a block driver sets
    /// `seg_boundary_mask` to `SLOT_BYTES - 1`).
    CrossesSlot {
        /// Guest-physical start of the segment.
        gpa: u64,
        /// Length of the segment in bytes.
        len_bytes: u32,
    },
    /// The segment does not end below 16 TiB ([`SLOT_COUNT_MAX`] slots), or not below 2^64 after adding `iova_base`.
    TooHigh {
        /// Guest-physical start of the segment.
        gpa: u64,
    },
}

impl FixedAddressing {
    /// The fixed buffer and the address for `len_bytes` bytes at `gpa`.
    ///
    /// The kernel checks that there is RAM at `gpa`: a request with an address outside the registered buffer completes
    /// with -EFAULT.
    pub fn resolve(&self, gpa: u64, len_bytes: u32) -> Result<FixedAddress, AddressError> {
        let Some(span_bytes) = u64::from(len_bytes).checked_sub(1) else {
            return Err(AddressError::Empty);
        };
        let too_high = AddressError::TooHigh { gpa };
        let last = gpa.checked_add(span_bytes).ok_or(too_high)?;
        let slot = gpa / SLOT_BYTES;
        if last / SLOT_BYTES >= u64::from(SLOT_COUNT_MAX) {
            return Err(too_high);
        }
        if last / SLOT_BYTES != slot {
            return Err(AddressError::CrossesSlot { gpa, len_bytes });
        }
        let buf_index = u16::try_from(slot).map_err(|_| too_high)?;
        self.iova_base.checked_add(last).ok_or(too_high)?;
        let addr = self.iova_base + gpa;
        Ok(FixedAddress { buf_index, addr })
    }
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "the segment has no bytes"),
            Self::CrossesSlot { gpa, len_bytes } => {
                write!(f, "the segment of {len_bytes} bytes at guest-physical {gpa:#x} crosses a 1 GiB boundary")
            }
            Self::TooHigh { gpa } => write!(f, "the segment at guest-physical {gpa:#x} does not end below 16 TiB"),
        }
    }
}

impl core::error::Error for AddressError {}

#[cfg(test)]
mod tests;
