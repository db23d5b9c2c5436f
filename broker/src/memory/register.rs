//! Registering the slots of guest RAM in the table of a ring, and what that is charged to.

use std::io;

use rustix::io_uring::{IoringSetupFlags, io_uring_params};

use super::iova_map::MappedSpan;
use super::layout::{Slot, Span};
use super::region::GuestMemory;
use super::{IOVA_BASE, MemoryError, Piece, Source};
use crate::limits::Memlock;
use crate::ring_fd::RingFd;

/// A ring that never runs, with an empty table.
pub(super) fn new_holder(table_slots: u32) -> Result<RingFd, MemoryError> {
    let mut params = io_uring_params::default();
    params.flags = IoringSetupFlags::R_DISABLED;
    let holder = RingFd::setup(1, &mut params)
        .map_err(MemoryError::system("creating the ring that holds the pinned memory (io_uring_setup)"))?;
    register_table(&holder, table_slots)?;
    Ok(holder)
}

pub(super) fn register_table(ring: &RingFd, table_slots: u32) -> Result<(), MemoryError> {
    ring.register_empty_buffers(table_slots).map_err(MemoryError::system("registering an empty table of buffers"))
}

/// Maps a span, registers its slots in the table of `ring`, and unmaps it. The table begins with slot `table_first` of the
/// guest's memory.
pub(super) fn pin_span(
    ring: &RingFd,
    table_first: u32,
    memory: &GuestMemory,
    span: &Span,
    charge: &Charge,
    is_wanted: &dyn Fn() -> bool,
) -> Result<(), MemoryError> {
    let mapped = MappedSpan::map(memory, span, is_wanted)?;
    for slots in span.slots.chunk_by(|slot, next| slot.index + 1 == next.index) {
        let range = |slot: &Slot| IOVA_BASE + slot.gpa..IOVA_BASE + slot.gpa + slot.len_bytes;
        let ranges: Vec<_> = slots.iter().map(range).collect();
        debug_assert!(ranges.iter().all(|range| mapped.holds(range.start, range.end - range.start)));
        // SAFETY: guest RAM and scratch memory, mapped shared just now (`Span::pieces` covers all slots); this process
        // never makes references to either.
        unsafe { ring.pin_buffers(slots[0].index - table_first, &ranges) }.map_err(|(at, source)| {
            match source.raw_os_error() {
                Some(nix::libc::ENOMEM) => charge.refused(source),
                _ => {
                    let Slot { index, gpa, len_bytes } = slots[at];
                    MemoryError::Register { slot: index, gpa, len_bytes, source }
                }
            }
        })?;
    }
    Ok(())
}

pub(super) fn pinned_by_this_process() -> Result<u64, MemoryError> {
    Memlock::pinned_by_this_process().map_err(MemoryError::system("reading what this process has pinned"))
}

pub(super) fn current_memlock() -> Result<Memlock, MemoryError> {
    Memlock::current().map_err(MemoryError::system("reading RLIMIT_MEMLOCK and what this user has pinned"))
}

/// The charge of a pinning against RLIMIT_MEMLOCK, and the state of that limit before the pinning began.
pub(super) struct Charge {
    needed_bytes: u64,
    pub(super) memlock: Memlock,
}

impl Charge {
    /// The charge of `spans` of `memory`. Refuses spans that exceed the limit by themselves: pinning allocates every
    /// page, so a large guest would be filled in vain. Whether the rest of the limit is free only the kernel knows.
    pub(super) fn new<'a>(memory: &GuestMemory, spans: impl Iterator<Item = &'a Span>) -> Result<Self, MemoryError> {
        let needed_bytes = spans.flat_map(|span| &span.pieces).map(|piece| locked_bytes(memory, piece)).sum();
        let memlock = current_memlock()?;
        if !memlock.exempt && memlock.soft_bytes.is_some_and(|limit_bytes| needed_bytes > limit_bytes) {
            memlock.check(needed_bytes)?;
        }
        Ok(Self { needed_bytes, memlock })
    }

    /// The meaning of a registration for which the kernel had no memory.
    fn refused(&self, source: io::Error) -> MemoryError {
        match self.memlock.check(self.needed_bytes) {
            Err(error) => error.into(),
            Ok(()) => MemoryError::NoMemoryToPin {
                needed_bytes: self.needed_bytes,
                limit_bytes: self.memlock.soft_bytes.filter(|_| !self.memlock.exempt),
                source,
            },
        }
    }
}

/// Bytes that pinning `piece` counts against RLIMIT_MEMLOCK: every page; a huge page counts whole.
fn locked_bytes(memory: &GuestMemory, piece: &Piece) -> u64 {
    match piece.source {
        Source::Region { region, .. } => {
            piece.len_bytes.next_multiple_of(memory.regions()[region].backing.page_bytes())
        }
        Source::Scratch => piece.len_bytes,
    }
}
