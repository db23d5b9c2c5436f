//! What direct I/O demands of buffers and offsets.

use nix::libc::iovec;

use crate::virtio_blk::{Operation, SegmentList};

/// What `O_DIRECT` demands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    /// Bits that must be zero in the address of each piece of a buffer.
    pub(super) address_mask: usize,
    /// The unit of offsets, and of lengths of each piece of a buffer, of a read.
    pub(super) read_block_bytes: u32,
    /// The same of a write.
    pub(super) write_block_bytes: u32,
    /// The guest can write parts of blocks: see [`super::execution::block_locks`].
    pub(super) is_coarser_than_guest: bool,
}

impl Alignment {
    /// The unit of offsets and lengths.
    #[inline]
    pub(super) fn block_bytes(&self, operation: &Operation) -> u32 {
        match operation {
            Operation::Write { .. } => self.write_block_bytes,
            _ => self.read_block_bytes,
        }
    }

    /// Whether the kernel takes a read or write as the guest has sent it.
    #[inline]
    pub(super) fn takes(&self, operation: &Operation, offset_bytes: u64, segments: &SegmentList) -> bool {
        let block_mask = self.block_bytes(operation) as usize - 1;
        let bad_bits = |iovec: &iovec| iovec.iov_base.addr() & self.address_mask | iovec.iov_len & block_mask;
        offset_bytes as usize & block_mask == 0 && segments.iovecs().iter().all(|iovec| bad_bits(iovec) == 0)
    }
}
