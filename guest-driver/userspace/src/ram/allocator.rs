//! Hands out a guest's RAM.

use std::sync::Arc;

use super::PAGE_BYTES;
use super::area::RamArea;
use super::guest_ram::{GuestRam, RamError};

/// Hands out areas of a guest's RAM that do not overlap, each in one region. An area of at most 4 MiB crosses no multiple of
/// 4 MiB, so that one request can name all of it ([`ringpass_guest_abi::FixedAddressing`]).
///
/// The drop of an area returns it to the allocator. The bytes stay as they are: a new area holds what an earlier owner
/// wrote there.
#[derive(Debug)]
pub struct RamAllocator {
    ram: Arc<GuestRam>,
}

/// The reason why an area cannot be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllocateError {
    /// The length is 0.
    #[error("an area must have at least one byte")]
    Empty,
    /// The alignment is not a power of two, or is less than a page.
    #[error(
        "an area cannot start at a multiple of {align_bytes} bytes: the alignment must be a power of two from 4096 on"
    )]
    Alignment {
        /// The requested alignment in bytes.
        align_bytes: u64,
    },
    /// No free piece of RAM is long enough.
    #[error(
        "no free piece of guest RAM holds {len_bytes} bytes at a multiple of {align_bytes}: {free_bytes} bytes are free, the \
         longest piece has {longest_bytes} (and an area of at most 4 MiB crosses no multiple of 4 MiB); drop buffers, use \
         fewer or smaller ones, or give the guest more RAM"
    )]
    NoRoom {
        /// The requested length.
        len_bytes: u64,
        /// The requested alignment.
        align_bytes: u64,
        /// Number of free bytes in total.
        free_bytes: u64,
        /// Length of the longest free piece.
        longest_bytes: u64,
    },
    /// The range is not free RAM.
    #[error(
        "the {len_bytes} bytes at guest-physical {gpa:#x} cannot be reserved: they are not page-aligned, not RAM of one \
         region, or in use"
    )]
    NotFree {
        /// First byte of the range, guest-physical.
        gpa: u64,
        /// Length of the range.
        len_bytes: u64,
    },
}

impl AllocateError {
    /// The error for two regions, neither of which has room.
    pub(crate) fn combined_with(self, other: Self) -> Self {
        match (self, other) {
            (
                Self::NoRoom { len_bytes, align_bytes, free_bytes, longest_bytes },
                Self::NoRoom { free_bytes: more_bytes, longest_bytes: other_bytes, .. },
            ) => Self::NoRoom {
                len_bytes,
                align_bytes,
                free_bytes: free_bytes + more_bytes,
                longest_bytes: longest_bytes.max(other_bytes),
            },
            (_, other) => other,
        }
    }
}

impl GuestRam {
    /// The only allocator of this RAM.
    ///
    /// # Errors
    ///
    /// [`RamError::AllocatorTaken`] at the second call.
    pub fn allocator(self: &Arc<Self>) -> Result<RamAllocator, RamError> {
        self.take_allocator()?;
        Ok(RamAllocator { ram: self.clone() })
    }
}

impl RamAllocator {
    /// The RAM of which this allocator hands out areas.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Number of free bytes, which need not lie in one piece.
    pub fn free_bytes(&self) -> u64 {
        self.ram.free().free_bytes()
    }

    /// The first free area of at least `len_bytes` bytes, in whole pages.
    ///
    /// # Errors
    ///
    /// `len_bytes` is 0, or no free piece is long enough.
    pub fn allocate(&mut self, len_bytes: u64) -> Result<RamArea, AllocateError> {
        self.allocate_aligned(len_bytes, PAGE_BYTES)
    }

    /// The first free area of at least `len_bytes` bytes, in whole pages, that starts at a multiple of `align_bytes`.
    ///
    /// # Errors
    ///
    /// `len_bytes` is 0, `align_bytes` is not a power of two from 4096 on, or no free piece is long enough.
    pub fn allocate_aligned(&mut self, len_bytes: u64, align_bytes: u64) -> Result<RamArea, AllocateError> {
        if len_bytes == 0 {
            return Err(AllocateError::Empty);
        }
        if !align_bytes.is_power_of_two() || align_bytes < PAGE_BYTES {
            return Err(AllocateError::Alignment { align_bytes });
        }
        let mut free = self.ram.free();
        let page_bytes = len_bytes.checked_next_multiple_of(PAGE_BYTES);
        let found = page_bytes.and_then(|page_bytes| Some((free.take_first(page_bytes, align_bytes)?, page_bytes)));
        let Some((gpa, page_bytes)) = found else {
            let (free_bytes, longest_bytes) = (free.free_bytes(), free.longest_bytes());
            return Err(AllocateError::NoRoom { len_bytes, align_bytes, free_bytes, longest_bytes });
        };
        drop(free);
        Ok(RamArea::new(self.ram.clone(), gpa, page_bytes))
    }

    /// The area of `len_bytes` bytes (rounded up to whole pages) at `gpa`, which the device or the caller chose.
    ///
    /// # Errors
    ///
    /// `len_bytes` is 0, or the range is not page-aligned, not RAM, in two 1 GiB slots, or in use.
    pub fn reserve(&mut self, gpa: u64, len_bytes: u64) -> Result<RamArea, AllocateError> {
        if len_bytes == 0 {
            return Err(AllocateError::Empty);
        }
        let not_free = AllocateError::NotFree { gpa, len_bytes };
        let page_bytes = len_bytes.checked_next_multiple_of(PAGE_BYTES).ok_or(not_free)?;
        if gpa % PAGE_BYTES != 0 || !self.ram.free().take_at(gpa, page_bytes) {
            return Err(not_free);
        }
        Ok(RamArea::new(self.ram.clone(), gpa, page_bytes))
    }
}
