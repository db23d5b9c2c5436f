//! Requests that take their blocks of the disk, wait for them, and let go of them: see [`block_locks`](super::block_locks).

use std::ops::Range;

use super::Execution;
use super::block_locks::{Access, Claim, Owner};
use super::slot::Step;
use crate::engine::alignment::Alignment;
use crate::virtio_blk::{ByteRange, Operation};

impl Execution<'_> {
    /// Takes the blocks that the request in a slot changes, if it changes any. False: it waits for them.
    pub(super) fn take_blocks(&mut self, number: u32, alignment: Alignment) -> bool {
        let size_bytes = self.disk.as_ref().map_or(0, |in_use| in_use.disk.size_bytes());
        let slot = self.slots.get_mut(number);
        let claim = claimed(&slot.operation, slot.data_bytes, alignment.write_block_bytes, size_bytes);
        let Some((range, access)) = claim else { return true };
        slot.blocks = Some(access);
        slot.is_partial_write = access == Access::Alone;
        let owner = Owner { worker: self.worker, slot: number };
        let is_granted = self.shared.block_locks.acquire(Claim { owner, range, access });
        if !is_granted {
            slot.step = Step::WaitForBlocks;
        }
        is_granted
    }

    /// Lets go of the blocks of a request that has ended. Requests of this worker that have waited for them begin in this poll
    /// iteration or the next, those of others when their workers hear of it.
    #[cold]
    pub(super) fn let_go_of_blocks(&mut self, number: u32, access: Access) {
        for owner in self.shared.block_locks.release(Owner { worker: self.worker, slot: number }, access) {
            if owner.worker == self.worker {
                self.granted.push(owner.slot);
            } else {
                self.granted_elsewhere.push(owner);
            }
        }
    }

    /// Takes a request of another worker that has its blocks now: that worker is to be told.
    #[inline]
    pub(in crate::engine) fn take_granted_elsewhere(&mut self) -> Option<Owner> {
        self.granted_elsewhere.pop()
    }

    /// A request that waited has its blocks.
    pub(in crate::engine) fn grant(&mut self, number: u32) {
        self.granted.push(number);
    }

    /// Begins requests that have their blocks now. False: there are none.
    #[inline]
    pub(in crate::engine) fn begin_granted(&mut self) -> bool {
        let mut busy = false;
        // A request that fails at once lets go of its blocks, which another one may have waited for.
        while let Some(number) = self.granted.pop() {
            self.begin_with_blocks(number);
            busy = true;
        }
        busy
    }
}

/// The blocks that a request changes, and how it wants them. `None`: it changes nothing.
fn claimed(operation: &Operation, data_bytes: u32, block_bytes: u32, size_bytes: u64) -> Option<(Range<u64>, Access)> {
    let block = u64::from(block_bytes);
    let (range, access) = match *operation {
        Operation::Read { .. } | Operation::Flush | Operation::GetId => return None,
        // The kernel zeroes parts of blocks by itself.
        Operation::Discard(range) | Operation::WriteZeroes { range, .. } => (range, Access::Shared),
        Operation::Write { offset_bytes } => {
            let range = ByteRange { offset_bytes, len_bytes: data_bytes.into() };
            let is_whole = (range.offset_bytes | range.len_bytes) & (block - 1) == 0;
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
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn of(operation: Operation, data_bytes: u32, size_bytes: u64) -> Option<(Range<u64>, Access)> {
        claimed(&operation, data_bytes, 4096, size_bytes)
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
