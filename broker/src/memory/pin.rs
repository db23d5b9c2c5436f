//! Guest RAM as registered buffers, pinned once and shared by all rings of a device.

use std::io;

use rustix::io_uring::{IoringSetupFlags, io_uring_params};

use super::iova_map::MappedSlot;
use super::layout::Slot;
use super::region::{Backing, GuestMemory};
use super::{MemoryError, Source};
use crate::limits::Memlock;
use crate::ring::sys::RingFd;

/// How further rings get at memory that is pinned already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// They clone the table (`IORING_REGISTER_CLONE_BUFFERS`, Linux 6.12): at once, and the memory counts once.
    Clone,
    /// They pin again: as slow as the first time, and the memory counts against RLIMIT_MEMLOCK once per ring.
    PinAgain,
}

/// Guest RAM, pinned as fixed buffers.
///
/// The buffers belong to a ring of their own, which never runs. Rings that do I/O clone its table, so that nothing
/// slow ever happens on a running ring: registering 1 GiB of 4 KiB pages takes the ring's lock for about half a second.
#[derive(Debug)]
pub struct PinnedMemory {
    holder: RingFd,
    memory: GuestMemory,
    sharing: Sharing,
}

/// The slots that a change of memory touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedSlot {
    /// Fixed buffer number.
    pub index: u32,
    /// Its length in bytes after the change.
    pub len_bytes: u64,
}

impl PinnedMemory {
    /// Pins all of `memory`. Takes about 50 ms per GiB of 4 KiB pages that exist, ten times as long for pages that
    /// must be made first, and next to nothing for huge pages.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Memlock`] when RLIMIT_MEMLOCK does not allow it, with what is needed and how to raise it; nothing
    /// stays pinned.
    pub fn pin(memory: &GuestMemory, sharing: Sharing) -> Result<Self, MemoryError> {
        let needed_bytes = locked_bytes(memory);
        let memlock = current_memlock()?;
        // Pinning faults every page in: refuse before a large guest has been filled for nothing.
        if !memlock.exempt && memlock.soft_bytes.is_some_and(|limit_bytes| needed_bytes > limit_bytes) {
            memlock.check(needed_bytes)?;
        }
        let holder = new_holder(memory.layout().table_slots())?;
        let pinned = Self { holder, memory: memory.clone(), sharing };
        for slot in memory.layout().slots() {
            pin_slot(&pinned.holder, memory, slot)?;
        }
        Ok(pinned)
    }

    /// The memory that is pinned.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Gives `ring`, which has no buffers yet, all of this memory.
    pub(crate) fn share_with(&self, ring: &RingFd) -> Result<(), MemoryError> {
        match self.sharing {
            Sharing::Clone => {
                ring.clone_buffers(&self.holder).map_err(MemoryError::system("cloning the registered buffers"))
            }
            Sharing::PinAgain => {
                register_table(ring, self.memory.layout().table_slots())?;
                self.memory.layout().slots().iter().try_for_each(|slot| pin_slot(ring, &self.memory, slot))
            }
        }
    }

    /// Pins what `memory` has more than the memory pinned here, beside it: rings that run are not touched until
    /// [`KernelRing::replace_memory`](crate::ring::KernelRing::replace_memory).
    ///
    /// Takes as long as [`pin`](Self::pin) takes for the slots that change; call it on a thread that may block.
    pub fn grown_to(&self, memory: &GuestMemory) -> Result<(Self, Vec<PlannedSlot>), MemoryError> {
        if self.sharing != Sharing::Clone {
            return Err(MemoryError::CannotPlug);
        }
        let kept_slots = self.memory.layout().table_slots();
        let holder = new_holder(memory.layout().table_slots().max(kept_slots))?;
        holder.clone_buffer_slots(&self.holder, 0, kept_slots).map_err(|error| match error.raw_os_error() {
            Some(nix::libc::EINVAL) => MemoryError::CannotPlug,
            _ => MemoryError::System { what: "cloning the registered buffers into a spare ring", source: error },
        })?;
        let grown = Self { holder, memory: memory.clone(), sharing: self.sharing };
        let changed = memory.layout().slots().iter().filter(|slot| !memory.has_same_slot(slot, &self.memory));
        let mut planned = Vec::new();
        for slot in changed {
            pin_slot(&grown.holder, memory, slot)?;
            planned.push(PlannedSlot { index: slot.index, len_bytes: slot.len_bytes });
        }
        Ok((grown, planned))
    }

    /// Gives a running `ring` the buffers of `slots`. Requests under way keep the old ones until they complete.
    pub(crate) fn replace_slots(&self, ring: &RingFd, slots: &[PlannedSlot]) -> Result<(), MemoryError> {
        slots.iter().try_for_each(|slot| {
            ring.clone_buffer_slots(&self.holder, slot.index, 1)
                .map_err(MemoryError::system("cloning a registered buffer into a running ring"))
        })
    }
}

impl Drop for PinnedMemory {
    /// Unpins now what no other ring has cloned. The kernel takes a ring apart only some time after its descriptor is
    /// closed; until then the memory would count against RLIMIT_MEMLOCK, and the next guest's might be refused.
    fn drop(&mut self) {
        if let Err(error) = self.holder.unregister_buffers() {
            tracing::warn!(%error, "cannot unpin guest memory at once: it stays pinned until the kernel gets to it");
        }
    }
}

/// A ring that never runs, with an empty table.
fn new_holder(table_slots: u32) -> Result<RingFd, MemoryError> {
    let mut params = io_uring_params::default();
    params.flags = IoringSetupFlags::R_DISABLED;
    let holder = RingFd::setup(1, &mut params)
        .map_err(MemoryError::system("creating the ring that holds the pinned memory (io_uring_setup)"))?;
    register_table(&holder, table_slots)?;
    Ok(holder)
}

fn register_table(ring: &RingFd, table_slots: u32) -> Result<(), MemoryError> {
    ring.register_empty_buffers(table_slots).map_err(MemoryError::system("registering an empty table of buffers"))
}

/// Maps, registers and unmaps one slot.
fn pin_slot(ring: &RingFd, memory: &GuestMemory, slot: &Slot) -> Result<(), MemoryError> {
    let mapped = MappedSlot::map(memory, slot)?;
    // SAFETY: guest RAM and scratch, mapped shared just now; this process never makes references to either.
    let result = unsafe { ring.pin_buffer(slot.index, mapped.address(), mapped.len_bytes()) };
    result.map_err(|source| refused(memory, slot, source))
}

/// What a refused registration means.
fn refused(memory: &GuestMemory, slot: &Slot, source: io::Error) -> MemoryError {
    if source.raw_os_error() == Some(nix::libc::ENOMEM) {
        // The limit is per user, over all processes: only now is it known that it was that.
        if let Err(error) = current_memlock().and_then(|memlock| Ok(memlock.check(locked_bytes(memory))?)) {
            return error;
        }
    }
    MemoryError::Register { slot: slot.index, gpa: slot.gpa, len_bytes: slot.len_bytes, source }
}

fn current_memlock() -> Result<Memlock, MemoryError> {
    Memlock::current().map_err(MemoryError::system("reading RLIMIT_MEMLOCK and what this user has pinned"))
}

/// Bytes that pinning `memory` counts against RLIMIT_MEMLOCK: every page of every buffer; a huge page counts whole.
fn locked_bytes(memory: &GuestMemory) -> u64 {
    let piece_bytes = |piece: &super::Piece| match piece.source {
        Source::Region { region, .. } => match memory.regions()[region].backing {
            Backing::Shmem => piece.len_bytes,
            Backing::Hugetlb { page_bytes } => piece.len_bytes.next_multiple_of(page_bytes),
        },
        Source::Scratch => piece.len_bytes,
    };
    memory.layout().slots().iter().flat_map(|slot| &slot.pieces).map(piece_bytes).sum()
}
