//! Requests under way: what each has done so far, and what it does next.

use std::rc::Rc;

use nix::libc::iovec;

use super::block_locks::Access;
use super::bounce::Chunk;
use super::origin::Origin;
use super::piece::Piece;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Operation, SegmentList, Status};

/// One request under way, or the room for one. The worker uses the room again and again.
#[derive(Debug)]
pub(in crate::engine) struct Slot {
    /// Where it came from. `None`: the slot is free.
    pub(in crate::engine) origin: Option<Origin>,
    /// What it does.
    pub(in crate::engine) operation: Operation,
    /// Length of its data.
    pub(in crate::engine) data_bytes: u32,
    /// Keeps the data's memory mapped.
    pub(in crate::engine) memory: Option<Rc<DeviceMemory>>,
    /// Its data.
    pub(in crate::engine) segments: SegmentList,
    /// How it ended.
    pub(in crate::engine) status: Status,
    /// How much of a read or write is done.
    pub(in crate::engine) progress_bytes: u64,
    /// It went through a bounce buffer.
    pub(in crate::engine) is_bounced: bool,
    /// What the kernel works on.
    pub(super) step: Step,
    /// How it has its blocks of the disk, or waits for them. `None`: it needs none.
    pub(super) blocks: Option<Access>,
    /// It changed a part of a block.
    pub(in crate::engine) is_partial_write: bool,
    /// What it writes is to be stable when it completes, as its driver wanted when the worker took it: the next front-end's driver may
    /// want something else.
    pub(super) is_write_through: bool,
    /// Attempts since there was progress last.
    pub(super) retries: u8,
    /// Where a read or write goes on that was done in part.
    pub(super) rest: Vec<iovec>,
}

/// The operation of a slot that is free.
const NO_OPERATION: Operation = Operation::Flush;

/// What the kernel does for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Reads or writes the guest's memory.
    Transfer,
    /// Reads or writes a bounce buffer.
    Bounce {
        /// The buffer.
        chunk: Chunk,
        /// What is in it.
        piece: Piece,
    },
    /// Nothing yet: others have its blocks.
    WaitForBlocks,
    /// Nothing yet: there is no bounce buffer free.
    WaitForChunk,
    /// Discards or zeroes.
    Range,
    /// Zeroes without giving the space back, because the disk could not do that.
    ZeroRange,
    /// Makes stable what was written.
    Sync,
}

/// The room for the requests of one worker.
#[derive(Debug)]
pub(in crate::engine) struct Slots {
    slots: Vec<Slot>,
    /// The last one freed is used first: its memory is in the cache.
    free: Vec<u32>,
    slots_max: usize,
    segments_max: usize,
}

impl Slots {
    /// Room for `slots_max` requests of `segments_max` segments each. Memory is taken as it is needed first.
    pub(in crate::engine) fn new(slots_max: usize, segments_max: usize) -> Self {
        Self { slots: Vec::with_capacity(slots_max), free: Vec::with_capacity(slots_max), slots_max, segments_max }
    }

    /// A free slot, if there is one.
    #[inline]
    pub(super) fn find(&mut self) -> Option<u32> {
        if let Some(&number) = self.free.last() {
            return Some(number);
        }
        if self.slots.len() == self.slots_max {
            return None;
        }
        let number = self.slots.len() as u32;
        self.slots.push(Slot {
            origin: None,
            operation: NO_OPERATION,
            data_bytes: 0,
            memory: None,
            segments: SegmentList::with_capacity(self.segments_max),
            status: Status::Ok,
            progress_bytes: 0,
            is_bounced: false,
            step: Step::Transfer,
            blocks: None,
            is_partial_write: false,
            is_write_through: false,
            retries: 0,
            rest: Vec::new(),
        });
        self.free.push(number);
        Some(number)
    }

    /// Whether [`find`](Self::find) would find one.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.occupied() < self.slots_max
    }

    /// The most that can be occupied.
    pub(super) fn room(&self) -> usize {
        self.slots_max
    }

    /// Takes the slot that [`find`](Self::find) found.
    #[inline]
    pub(super) fn occupy(&mut self, number: u32) {
        let found = self.free.pop();
        debug_assert_eq!(found, Some(number), "only the slot that was found last");
    }

    /// Makes a slot free again.
    #[inline]
    pub(super) fn release(&mut self, number: u32) {
        let slot = self.get_mut(number);
        slot.origin = None;
        slot.memory = None;
        self.free.push(number);
    }

    /// A slot by its number.
    #[inline]
    pub(super) fn get(&self, number: u32) -> &Slot {
        &self.slots[number as usize]
    }

    /// The same, to change it.
    #[inline]
    pub(super) fn get_mut(&mut self, number: u32) -> &mut Slot {
        &mut self.slots[number as usize]
    }

    /// How many are occupied.
    #[inline]
    pub(super) fn occupied(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Slot {
    /// Where the rest of a read or write is in the guest's memory.
    #[inline]
    pub(super) fn remaining(&self) -> &[iovec] {
        if self.progress_bytes == 0 { self.segments.iovecs() } else { &self.rest }
    }

    /// Builds the list of what is left of the data after `progress_bytes`.
    pub(super) fn compute_rest(&mut self) {
        self.rest.clear();
        let mut skip_bytes = self.progress_bytes;
        for iovec_ in self.segments.iovecs() {
            let len_bytes = iovec_.iov_len as u64;
            if skip_bytes >= len_bytes {
                skip_bytes -= len_bytes;
                continue;
            }
            self.rest.push(iovec {
                iov_base: iovec_.iov_base.wrapping_byte_add(skip_bytes as usize),
                iov_len: iovec_.iov_len - skip_bytes as usize,
            });
            skip_bytes = 0;
        }
    }
}
