//! A worker's part in [`block_locks`](super::block_locks): requests that take their blocks, wait for them, and let them
//! go.

use std::ops::Range;

use super::alignment::Alignment;
use super::block_locks::{Access, Claim, Owner};
use super::command::Command;
use super::slot::Step;
use super::worker::Worker;
use crate::virtio_blk::{ByteRange, Operation, Request};

impl Worker<'_> {
    /// Takes the blocks that the request in a slot changes, if it changes any. False: it waits for them.
    pub(super) fn take_blocks(&mut self, number: u32, alignment: Alignment) -> bool {
        let slot = self.slots.get(number);
        let Some(request) = &slot.request else { return true };
        let size_bytes = self.disk.as_ref().map_or(0, |in_use| in_use.disk.size_bytes());
        let Some((range, access)) = claimed(request, alignment.write_block_bytes, size_bytes) else { return true };
        slot.blocks = Some(access);
        if access == Access::Alone {
            self.vrings[slot.queue].counters.partial_writes.add(1);
        }
        let owner = Owner { worker: self.number, slot: number };
        let is_granted = self.shared.block_locks.acquire(Claim { owner, range, access });
        if !is_granted {
            slot.step = Step::WaitForBlocks;
        }
        is_granted
    }

    /// Lets them go when the request has ended. Requests of this worker that have waited for them begin in this turn or
    /// the next, those of others when these workers hear of it.
    #[cold]
    pub(super) fn let_go_of_blocks(&mut self, number: u32, access: Access) {
        for owner in self.shared.block_locks.release(Owner { worker: self.number, slot: number }, access) {
            if owner.worker == self.number {
                self.granted.push(owner.slot);
            } else {
                self.workers[owner.worker].send(Command::BeginGranted { slot: owner.slot });
            }
        }
    }

    /// Begins requests that have their blocks now. False: there are none.
    #[inline]
    pub(super) fn begin_granted(&mut self) -> bool {
        let mut busy = false;
        // One that fails at once lets go of its blocks, which another one may have waited for.
        while let Some(number) = self.granted.pop() {
            self.begin_with_blocks(number);
            busy = true;
        }
        busy
    }
}

/// The blocks that a request changes, and how it wants them. `None`: it changes nothing.
fn claimed(request: &Request, block_bytes: u32, size_bytes: u64) -> Option<(Range<u64>, Access)> {
    let block = u64::from(block_bytes);
    let (range, access) = match request.operation {
        Operation::Read { .. } | Operation::Flush | Operation::GetId => return None,
        // The kernel zeroes parts of blocks by itself.
        Operation::Discard(range) | Operation::WriteZeroes { range, .. } => (range, Access::Shared),
        Operation::Write { offset_bytes } => {
            let range = ByteRange { offset_bytes, len_bytes: request.data_bytes.into() };
            let is_whole = (range.offset_bytes | range.len_bytes).is_multiple_of(block);
            (range, if is_whole { Access::Shared } else { Access::Alone })
        }
    };
    let end = range.offset_bytes + range.len_bytes;
    if access == Access::Alone && end > size_bytes - size_bytes % block {
        // It writes through the page cache: see `piece`.
        return Some((0..u64::MAX, access));
    }
    Some((range.offset_bytes - range.offset_bytes % block..end.next_multiple_of(block), access))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn of(operation: Operation, data_bytes: u32, size_bytes: u64) -> Option<(Range<u64>, Access)> {
        let request = Request { operation, data_bytes, status_gpa: GuestAddress(0), writable_bytes: 1 };
        claimed(&request, 4096, size_bytes)
    }

    fn write(offset_bytes: u64, len_bytes: u32) -> Option<(Range<u64>, Access)> {
        of(Operation::Write { offset_bytes }, len_bytes, SIZE)
    }

    #[test]
    fn writes_of_whole_blocks_share_them_and_others_have_theirs_alone() {
        assert_eq!(write(4096, 8192), Some((4096..12288, Access::Shared)));
        assert_eq!(write(4096, 512), Some((4096..8192, Access::Alone)));
        assert_eq!(write(4608, 4096), Some((4096..12288, Access::Alone)));
        assert_eq!(write(SIZE - 512, 512), Some((SIZE - 4096..SIZE, Access::Alone)));
    }

    #[test]
    fn a_write_behind_the_last_whole_block_has_the_disk_alone() {
        let write = |offset_bytes, len_bytes| of(Operation::Write { offset_bytes }, len_bytes, SIZE + 1024);
        assert_eq!(write(SIZE - 512, 512), Some((SIZE - 4096..SIZE, Access::Alone)));
        assert_eq!(write(SIZE, 512), Some((0..u64::MAX, Access::Alone)));
        assert_eq!(write(SIZE - 4096, 4608), Some((0..u64::MAX, Access::Alone)));
    }

    #[test]
    fn ranges_share_all_blocks_that_they_touch_and_what_changes_nothing_takes_none() {
        let range = ByteRange { offset_bytes: 4608, len_bytes: 4096 };
        let blocks = Some((4096..12288, Access::Shared));
        assert_eq!(of(Operation::Discard(range), 0, SIZE), blocks);
        assert_eq!(of(Operation::WriteZeroes { range, unmap: false }, 0, SIZE), blocks);
        for operation in [Operation::Read { offset_bytes: 512 }, Operation::Flush, Operation::GetId] {
            assert_eq!(of(operation, 512, SIZE), None);
        }
    }
}
