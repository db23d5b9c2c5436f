//! The limits against which the device checks requests.

use super::SECTOR_BYTES;

/// The longest discard range that the device offers: 256 MiB.
///
/// A stopping queue waits for its requests, and the guest waits with it, so each request must be short. Discards of
/// this size are short even on a fragmented file, and a terabyte still takes only 4096 requests.
pub const MAX_DISCARD_SECTORS: u32 = (256 << 20) / SECTOR_BYTES;

/// The longest range of zeroes that the device offers: 64 MiB, for the same reason. It is shorter than a discard
/// because a disk without an operation for zeroes really writes them.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = (64 << 20) / SECTOR_BYTES;

/// How the device discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// The longest range (`max_discard_sectors`), at least one logical block.
    pub max_sectors: u32,
    /// The alignment at which ranges should start to have an effect (`discard_sector_alignment`): the allocation unit
    /// of the file, or the discard granularity of the block device.
    pub alignment_sectors: u32,
}

/// How the device writes zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroesLimits {
    /// The longest range (`max_write_zeroes_sectors`), at least one logical block.
    pub max_sectors: u32,
    /// Whether a request with the unmap flag can deallocate its range (`write_zeroes_may_unmap`).
    pub may_unmap: bool,
}

/// The limits for each request: a copy of the relevant numbers in [`BlkConfig`](super::BlkConfig).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    pub(super) capacity_sectors: u64,
    pub(super) logical_block_sectors: u32,
    pub(super) read_only: bool,
    pub(super) discard: Option<DiscardLimits>,
    pub(super) write_zeroes: Option<WriteZeroesLimits>,
}

impl RequestLimits {
    /// Size of the disk in sectors of 512 bytes: whole logical blocks.
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// Offsets and lengths of reads and writes must be multiples of this, in bytes.
    pub fn logical_block_bytes(&self) -> u32 {
        self.logical_block_sectors * SECTOR_BYTES
    }

    /// Whether the device refuses all requests that would change the disk.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
}
