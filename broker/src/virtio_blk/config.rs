//! The features and the configuration space of the device.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{
    DiscardLimits, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, RequestLimits, SECTOR_BYTES, Serial,
    WriteZeroesLimits,
};
use crate::virtqueue::QUEUE_SIZE_MAX;

/// Length of the configuration space: `struct virtio_blk_config` up to and including `unused1` (VIRTIO 1.2, 5.2.4). The
/// fields behind it belong to features that the device does not offer.
pub const CONFIG_SPACE_BYTES: usize = 60;

/// Offset of `writeback`, the only field that a driver may write.
pub(super) const WRITEBACK_OFFSET_BYTES: usize = 32;

const LOGICAL_BLOCK_MAX_BYTES: u32 = 64 << 10;
/// A chain has a header, a status and at least one buffer of data.
const QUEUE_SIZE_MIN: u16 = 4;
/// The descriptors of a request that hold no data: the header and the status.
const FRAME_DESCRIPTORS: u16 = 2;
/// A chain must not be longer than the queue, but Linux relies on `seg_max` alone, and a front-end may give its queues
/// a size other than this device's. QEMU's queues have 128 entries by default: larger requests than fit there would
/// break the specification, and without indirect descriptors they would hang the guest.
const SEG_MAX_QUEUE_SIZE: u16 = 128;
/// With at most 126 segments of this size a request stays below the limit of one read or write of Linux
/// (`MAX_RW_COUNT`, 2 GiB - 4 KiB). The size is no larger because SeaBIOS 1.16 keeps only 16 bits of the number of
/// blocks in such a request, which must not become zero.
const SIZE_MAX_BYTES: u32 = 1 << 20;
/// Linux sends several ranges in one request if the device allows it. For the host each range is an operation of its
/// own anyway.
const MAX_RANGES: u32 = 1;

/// The parameters of a device; [`BlkConfig::new`] checks them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlkParameters {
    /// Size of the disk.
    pub size_bytes: u64,
    /// The unit in which the guest must read and write: a power of two from 512 to 65536, no smaller than the disk's own.
    pub logical_block_bytes: u32,
    /// The unit in which the guest should read and write: a power of two. Counts only if it is larger than the logical
    /// block.
    pub physical_block_bytes: u32,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// Number of queues: at least 1.
    pub num_queues: u16,
    /// The queue size that the device is made for: a power of two from 4 to 32768. A front-end may choose another size.
    pub queue_size: u16,
    /// The serial number that the guest sees.
    pub serial: Serial,
    /// How the disk discards. `None`: it cannot discard.
    pub discard: Option<DiscardLimits>,
    /// How the disk writes zeroes. `None`: it cannot, so the guest must send zeroes as data.
    pub write_zeroes: Option<WriteZeroesLimits>,
}

impl BlkParameters {
    /// A disk that can be written, with blocks of 512 bytes, one queue of 256 entries, no serial number, no discard and no
    /// write zeroes.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            logical_block_bytes: SECTOR_BYTES,
            physical_block_bytes: SECTOR_BYTES,
            read_only: false,
            num_queues: 1,
            queue_size: 256,
            serial: Serial::default(),
            discard: None,
            write_zeroes: None,
        }
    }

    /// Sets [`logical_block_bytes`](Self#structfield.logical_block_bytes).
    #[must_use]
    pub fn logical_block_bytes(self, logical_block_bytes: u32) -> Self {
        Self { logical_block_bytes, ..self }
    }

    /// Sets [`physical_block_bytes`](Self#structfield.physical_block_bytes).
    #[must_use]
    pub fn physical_block_bytes(self, physical_block_bytes: u32) -> Self {
        Self { physical_block_bytes, ..self }
    }

    /// Sets [`read_only`](Self#structfield.read_only).
    #[must_use]
    pub fn read_only(self, read_only: bool) -> Self {
        Self { read_only, ..self }
    }

    /// Sets [`num_queues`](Self#structfield.num_queues).
    #[must_use]
    pub fn num_queues(self, num_queues: u16) -> Self {
        Self { num_queues, ..self }
    }

    /// Sets [`queue_size`](Self#structfield.queue_size).
    #[must_use]
    pub fn queue_size(self, queue_size: u16) -> Self {
        Self { queue_size, ..self }
    }

    /// Sets [`serial`](Self#structfield.serial).
    #[must_use]
    pub fn serial(self, serial: Serial) -> Self {
        Self { serial, ..self }
    }

    /// Sets [`discard`](Self#structfield.discard).
    #[must_use]
    pub fn discard(self, discard: impl Into<Option<DiscardLimits>>) -> Self {
        Self { discard: discard.into(), ..self }
    }

    /// Sets [`write_zeroes`](Self#structfield.write_zeroes).
    #[must_use]
    pub fn write_zeroes(self, write_zeroes: impl Into<Option<WriteZeroesLimits>>) -> Self {
        Self { write_zeroes: write_zeroes.into(), ..self }
    }
}

/// A virtio-blk device as its driver sees it (VIRTIO 1.2, 5.2.3 and 5.2.4).
///
/// - `capacity` is the size of the disk, which consists of whole logical blocks.
/// - `seg_max` is 126 (less, if queues are smaller than 128) and `size_max` 1 MiB: the host executes a request with one
///   system call.
/// - Discard and write zeroes requests have one range each, of at most 256 MiB and 64 MiB.
/// - [`CacheMode`](super::CacheMode) decides `writeback`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    parameters: BlkParameters,
    capacity_sectors: u64,
}

impl BlkConfig {
    /// Checks the parameters. Lowers the limits of discard and write zeroes to whole logical blocks and to the maximum
    /// of a request, and ignores them on a read-only disk.
    ///
    /// # Errors
    ///
    /// A parameter is out of its range, or the disk is smaller than one logical block or ends within one.
    pub fn new(parameters: BlkParameters) -> Result<Self, BlkConfigError> {
        let BlkParameters { logical_block_bytes, num_queues, queue_size, .. } = parameters;
        if !logical_block_bytes.is_power_of_two()
            || !(SECTOR_BYTES..=LOGICAL_BLOCK_MAX_BYTES).contains(&logical_block_bytes)
        {
            return Err(BlkConfigError::LogicalBlock { logical_block_bytes });
        }
        if num_queues == 0 {
            return Err(BlkConfigError::NoQueues);
        }
        if !queue_size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&queue_size) {
            return Err(BlkConfigError::QueueSize { queue_size });
        }
        let mut config = Self { parameters, capacity_sectors: 0 };
        config.parameters.discard = config.usable_discard();
        config.parameters.write_zeroes = config.usable_write_zeroes();
        config.set_size_bytes(parameters.size_bytes)?;
        Ok(config)
    }

    /// Sets the size of the disk. True if that changes the capacity.
    ///
    /// # Errors
    ///
    /// The disk is smaller than one logical block, or ends within one; the capacity stays unchanged.
    pub fn set_size_bytes(&mut self, size_bytes: u64) -> Result<bool, BlkConfigError> {
        let logical_block_bytes = self.parameters.logical_block_bytes;
        let blocks = size_bytes / u64::from(logical_block_bytes);
        if blocks == 0 {
            return Err(BlkConfigError::TooSmall { size_bytes, logical_block_bytes });
        }
        if size_bytes % u64::from(logical_block_bytes) != 0 {
            return Err(BlkConfigError::PartialBlock { size_bytes, logical_block_bytes });
        }
        let before_sectors = self.capacity_sectors;
        self.parameters.size_bytes = size_bytes;
        self.capacity_sectors = blocks * u64::from(self.logical_block_sectors());
        Ok(self.capacity_sectors != before_sectors)
    }

    /// The feature bits of the device and of its rings.
    pub fn device_features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
        ];
        let sometimes = [
            (VIRTIO_BLK_F_RO, self.parameters.read_only),
            (VIRTIO_BLK_F_DISCARD, self.parameters.discard.is_some()),
            (VIRTIO_BLK_F_WRITE_ZEROES, self.parameters.write_zeroes.is_some()),
        ];
        let offered = sometimes.into_iter().filter_map(|(bit, offered)| offered.then_some(bit));
        always.into_iter().chain(offered).fold(0, |features, bit| features | 1 << bit)
    }

    /// The configuration space. [`CacheMode::writeback`](super::CacheMode::writeback) gives the value of `writeback`.
    ///
    /// Fields of features that the device does not offer are zero.
    pub fn to_bytes(&self, writeback: bool) -> [u8; CONFIG_SPACE_BYTES] {
        let discard = self.parameters.discard.unwrap_or(DiscardLimits { max_sectors: 0, alignment_sectors: 0 });
        let write_zeroes =
            self.parameters.write_zeroes.unwrap_or(WriteZeroesLimits { max_sectors: 0, may_unmap: false });
        let max_discard_ranges = if self.parameters.discard.is_some() { MAX_RANGES } else { 0 };
        let max_write_zeroes_ranges = if self.parameters.write_zeroes.is_some() { MAX_RANGES } else { 0 };
        let blocks_per_physical = self.blocks_per_physical_block();

        let mut space = [0; CONFIG_SPACE_BYTES];
        let mut put = |offset: usize, field: &[u8]| space[offset..offset + field.len()].copy_from_slice(field);
        put(0, &self.capacity_sectors.to_le_bytes());
        put(8, &SIZE_MAX_BYTES.to_le_bytes());
        put(12, &u32::from(self.seg_max()).to_le_bytes());
        // 16..20: geometry, which the device does not offer.
        put(20, &self.parameters.logical_block_bytes.to_le_bytes());
        put(24, &[blocks_per_physical.trailing_zeros() as u8]); // physical_block_exp
        put(25, &[0]); // alignment_offset: disks and files begin with a whole physical block.
        put(26, &u16::try_from(blocks_per_physical).unwrap_or(0).to_le_bytes()); // min_io_size; 0: not specified
        put(28, &0_u32.to_le_bytes()); // opt_io_size: no size is better than others
        put(WRITEBACK_OFFSET_BYTES, &[writeback.into()]);
        put(34, &self.parameters.num_queues.to_le_bytes());
        put(36, &discard.max_sectors.to_le_bytes());
        put(40, &max_discard_ranges.to_le_bytes());
        put(44, &discard.alignment_sectors.to_le_bytes());
        put(48, &write_zeroes.max_sectors.to_le_bytes());
        put(52, &max_write_zeroes_ranges.to_le_bytes());
        put(56, &[write_zeroes.may_unmap.into()]);
        space
    }

    /// The limits against which the device checks requests. They change with the capacity.
    pub fn request_limits(&self) -> RequestLimits {
        RequestLimits {
            capacity_sectors: self.capacity_sectors,
            logical_block_sectors: self.logical_block_sectors(),
            read_only: self.parameters.read_only,
            discard: self.parameters.discard,
            write_zeroes: self.parameters.write_zeroes,
        }
    }

    /// How many segments a [`SegmentList`](super::SegmentList) needs room for: those of drivers that respect `seg_max`,
    /// even if a few segments cross two regions of the guest's memory.
    pub fn segment_capacity(&self) -> usize {
        usize::from(self.seg_max() + FRAME_DESCRIPTORS)
    }

    /// Size of the disk in sectors of 512 bytes: whole logical blocks.
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// The unit in which the guest reads and writes, in bytes.
    pub fn logical_block_bytes(&self) -> u32 {
        self.parameters.logical_block_bytes
    }

    /// Number of queues.
    pub fn num_queues(&self) -> u16 {
        self.parameters.num_queues
    }

    /// The queue size that the device is made for.
    pub fn queue_size(&self) -> u16 {
        self.parameters.queue_size
    }

    /// The serial number that the guest sees.
    pub fn serial(&self) -> &Serial {
        &self.parameters.serial
    }

    fn seg_max(&self) -> u16 {
        self.parameters.queue_size.min(SEG_MAX_QUEUE_SIZE) - FRAME_DESCRIPTORS
    }

    fn logical_block_sectors(&self) -> u32 {
        self.parameters.logical_block_bytes / SECTOR_BYTES
    }

    /// Logical blocks per physical block: a power of two.
    fn blocks_per_physical_block(&self) -> u32 {
        let blocks = self.parameters.physical_block_bytes / self.parameters.logical_block_bytes;
        if blocks.is_power_of_two() { blocks } else { 1 }
    }

    fn usable_discard(&self) -> Option<DiscardLimits> {
        let limits = self.parameters.discard.filter(|_| !self.parameters.read_only)?;
        let block_sectors = self.logical_block_sectors();
        Some(DiscardLimits {
            max_sectors: self.usable_range_sectors(limits.max_sectors, MAX_DISCARD_SECTORS)?,
            alignment_sectors: limits.alignment_sectors.max(1).checked_next_multiple_of(block_sectors)?,
        })
    }

    fn usable_write_zeroes(&self) -> Option<WriteZeroesLimits> {
        let limits = self.parameters.write_zeroes.filter(|_| !self.parameters.read_only)?;
        Some(WriteZeroesLimits {
            max_sectors: self.usable_range_sectors(limits.max_sectors, MAX_WRITE_ZEROES_SECTORS)?,
            may_unmap: limits.may_unmap,
        })
    }

    /// `None` if not even one logical block fits.
    fn usable_range_sectors(&self, told_sectors: u32, most_sectors: u32) -> Option<u32> {
        let block_sectors = self.logical_block_sectors();
        let sectors = told_sectors.min(most_sectors) / block_sectors * block_sectors;
        (sectors > 0).then_some(sectors)
    }
}

/// Why the parameters make no valid device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlkConfigError {
    /// The logical block size is unusable for guests.
    #[error(
        "the logical block size of {logical_block_bytes} bytes is invalid: it must be a power of two from 512 to 65536"
    )]
    LogicalBlock {
        /// The requested size.
        logical_block_bytes: u32,
    },
    /// There are no queues.
    #[error("the device has no queues: it needs at least one")]
    NoQueues,
    /// VIRTIO does not allow this queue size.
    #[error("the queue size of {queue_size} entries is invalid: it must be a power of two from 4 to 32768")]
    QueueSize {
        /// The requested size.
        queue_size: u16,
    },
    /// The disk ends within a logical block.
    #[error(
        "the disk has {size_bytes} bytes, which is not a multiple of its logical block of {logical_block_bytes} bytes: \
         a guest could not reach the end of it"
    )]
    PartialBlock {
        /// Size of the disk.
        size_bytes: u64,
        /// Size of the logical block.
        logical_block_bytes: u32,
    },
    /// The disk does not hold a single logical block.
    #[error("the disk has {size_bytes} bytes, less than one logical block of {logical_block_bytes} bytes")]
    TooSmall {
        /// Size of the disk.
        size_bytes: u64,
        /// Size of the logical block.
        logical_block_bytes: u32,
    },
}

#[cfg(test)]
mod tests;
