//! Hands out a guest's RAM.

use std::sync::Arc;

use ringpass_guest_abi::SLOT_BYTES;

use crate::ram::PAGE_BYTES;
use crate::{GuestRam, RamArea};

/// Hands out areas of a guest's RAM that do not overlap, each in one region and one 1 GiB slot, so that a request can
/// name all of it ([`ringpass_guest_abi::FixedAddressing`]). Areas are not taken back: a driver sets up once.
#[derive(Debug)]
pub struct RamAllocator {
    ram: Arc<GuestRam>,
    /// What is left: (guest-physical address, length), by ascending address, none across a slot boundary.
    free: Vec<(u64, u64)>,
}

/// Why there is no such area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllocateError {
    /// An area has at least one byte.
    #[error("an area must have at least one byte")]
    Empty,
    /// No free piece of RAM is long enough.
    #[error(
        "there is no free piece of {len_bytes} bytes of guest RAM, the longest has {longest_bytes} (a piece ends at a \
         hole and at each multiple of 1 GiB): give the guest more RAM, or use fewer or smaller buffers"
    )]
    NoRoom {
        /// Bytes asked for.
        len_bytes: u64,
        /// Length of the longest free piece.
        longest_bytes: u64,
    },
    /// The range is not free RAM.
    #[error(
        "the {len_bytes} bytes at guest-physical {gpa:#x} cannot be reserved: they are not page-aligned, not RAM, in two \
         1 GiB slots, or in use"
    )]
    NotFree {
        /// First byte asked for.
        gpa: u64,
        /// Bytes asked for.
        len_bytes: u64,
    },
}

impl RamAllocator {
    /// The caller ensures that there is only one allocator for this RAM.
    pub(crate) fn new(ram: Arc<GuestRam>) -> Self {
        let mut free = Vec::new();
        for (mut gpa, mut left_bytes) in ram.regions() {
            while left_bytes != 0 {
                let len_bytes = left_bytes.min(SLOT_BYTES - gpa % SLOT_BYTES);
                free.push((gpa, len_bytes));
                gpa += len_bytes;
                left_bytes -= len_bytes;
            }
        }
        Self { ram, free }
    }

    /// The RAM that is handed out.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The first free area of at least `len_bytes` bytes, in whole pages.
    pub fn allocate(&mut self, len_bytes: u64) -> Result<RamArea, AllocateError> {
        if len_bytes == 0 {
            return Err(AllocateError::Empty);
        }
        let longest_bytes = self.free.iter().map(|&(_, len_bytes)| len_bytes).max().unwrap_or(0);
        let no_room = AllocateError::NoRoom { len_bytes, longest_bytes };
        let len_bytes = len_bytes.checked_next_multiple_of(PAGE_BYTES).ok_or(no_room)?;
        let piece = self.free.iter().find(|piece| piece.1 >= len_bytes);
        let &(gpa, _) = piece.ok_or(no_room)?;
        self.reserve(gpa, len_bytes)
    }

    /// The area of `len_bytes` bytes (rounded up to whole pages) at `gpa`, where somebody else chose the place.
    pub fn reserve(&mut self, gpa: u64, len_bytes: u64) -> Result<RamArea, AllocateError> {
        if len_bytes == 0 {
            return Err(AllocateError::Empty);
        }
        let not_free = AllocateError::NotFree { gpa, len_bytes };
        let len_bytes = len_bytes.checked_next_multiple_of(PAGE_BYTES).ok_or(not_free)?;
        let end = gpa.checked_add(len_bytes).ok_or(not_free)?;
        let holds = |&(start, len_bytes): &(u64, u64)| start <= gpa && end <= start + len_bytes;
        let index = self.free.iter().position(holds).filter(|_| gpa % PAGE_BYTES == 0).ok_or(not_free)?;
        let (start, piece_bytes) = self.free[index];
        let rest = [(start, gpa - start), (end, start + piece_bytes - end)];
        self.free.splice(index..=index, rest.into_iter().filter(|&(_, len_bytes)| len_bytes != 0));
        Ok(RamArea::new(self.ram.clone(), gpa, len_bytes))
    }
}
