//! The three areas of a split queue (VIRTIO 1.2, 2.7), located in guest memory once.
//!
//! Why not `virtio_queue::Queue`: it translates the address of every single access, about ten for a request. That takes
//! about 100 ns with three memory regions and more with several hundred: a tenth of what a request may cost.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use vm_memory::{GuestAddress, GuestMemoryMmap, VolatileSlice};

use super::error::QueueError;
use super::shared_memory::SharedMemory;

/// The largest queue, in descriptors (VIRTIO 1.2, 2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;

const DESCRIPTOR_BYTES: usize = 16;
/// The available ring: `flags`, `idx`, the entries, `used_event`.
const AVAIL_FLAGS_OFFSET: usize = 0;
const AVAIL_IDX_OFFSET: usize = 2;
const AVAIL_ENTRIES_OFFSET: usize = 4;
const AVAIL_ENTRY_BYTES: usize = 2;
/// The used ring: `flags`, `idx`, the entries (`id` and `len`), `avail_event`.
const USED_FLAGS_OFFSET: usize = 0;
const USED_IDX_OFFSET: usize = 2;
const USED_ENTRIES_OFFSET: usize = 4;
const USED_ENTRY_BYTES: usize = 8;
const USED_ENTRY_LEN_OFFSET: usize = 4;
/// Size of `used_event` and `avail_event`, which exist only with VIRTIO_RING_F_EVENT_IDX.
const EVENT_BYTES: usize = 2;

/// The driver's addresses of the three areas: guest-physical, unchecked.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingAddresses {
    pub(super) desc_table: GuestAddress,
    pub(super) avail_ring: GuestAddress,
    pub(super) used_ring: GuestAddress,
}

/// Some bytes of the used ring, by their offset from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UsedBytes {
    pub(super) offset: usize,
    pub(super) len: usize,
}

/// The three areas. They stay mapped as long as this lives, even if the guest memory around them goes away.
#[derive(Debug)]
pub(super) struct Rings {
    size: u16,
    desc_table_gpa: GuestAddress,
    desc_table: SharedMemory,
    avail: SharedMemory,
    used: SharedMemory,
}

impl Rings {
    /// Finds the areas of a queue of `size` descriptors. Without `event_idx` the event indexes need not be in memory,
    /// and the caller must not access them.
    pub(super) fn locate(
        size: u16,
        addresses: RingAddresses,
        event_idx: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, QueueError> {
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(QueueError::Size { size });
        }
        let entries = usize::from(size);
        let locate = |ring, gpa: GuestAddress, alignment_bytes: usize, len: usize| {
            let misaligned = || QueueError::Misaligned { ring, gpa: gpa.0, alignment_bytes: alignment_bytes as u64 };
            if gpa.0 % (alignment_bytes as u64) != 0 {
                return Err(misaligned());
            }
            let area = SharedMemory::in_guest(memory, gpa, len).ok_or(QueueError::OutsideMemory {
                ring,
                gpa: gpa.0,
                len_bytes: len as u64,
            })?;
            // A front-end may map a region at an odd address.
            if area.is_aligned(alignment_bytes) { Ok(area) } else { Err(misaligned()) }
        };
        let event_bytes = if event_idx { EVENT_BYTES } else { 0 };
        let avail_bytes = AVAIL_ENTRIES_OFFSET + entries * AVAIL_ENTRY_BYTES + event_bytes;
        let used_bytes = USED_ENTRIES_OFFSET + entries * USED_ENTRY_BYTES + event_bytes;
        Ok(Self {
            size,
            desc_table_gpa: addresses.desc_table,
            desc_table: locate("descriptor table", addresses.desc_table, 16, entries * DESCRIPTOR_BYTES)?,
            avail: locate("available ring", addresses.avail_ring, 2, avail_bytes)?,
            used: locate("used ring", addresses.used_ring, 4, used_bytes)?,
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn desc_table_gpa(&self) -> GuestAddress {
        self.desc_table_gpa
    }

    /// The whole descriptor table.
    #[inline]
    pub(super) fn desc_table(&self) -> VolatileSlice<'_> {
        self.desc_table.as_slice()
    }

    /// `avail.flags`: a hint, so the load needs no ordering.
    pub(super) fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail.atomic::<AtomicU16>(AVAIL_FLAGS_OFFSET).load(Ordering::Relaxed))
    }

    /// `avail.idx`. After this load, the entries before the index and their descriptors can be read.
    #[inline]
    pub(super) fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail.atomic::<AtomicU16>(AVAIL_IDX_OFFSET).load(Ordering::Acquire))
    }

    /// The entry of the available ring for index `idx`: any number.
    #[inline]
    pub(super) fn avail_entry(&self, idx: u16) -> u16 {
        let offset = AVAIL_ENTRIES_OFFSET + self.slot(idx) * AVAIL_ENTRY_BYTES;
        u16::from_le(self.avail.atomic::<AtomicU16>(offset).load(Ordering::Relaxed))
    }

    /// `avail.used_event`: a hint, so the load needs no ordering.
    pub(super) fn used_event(&self) -> u16 {
        let offset = AVAIL_ENTRIES_OFFSET + usize::from(self.size) * AVAIL_ENTRY_BYTES;
        u16::from_le(self.avail.atomic::<AtomicU16>(offset).load(Ordering::Relaxed))
    }

    /// `used.idx`. The device owns it, but it lies in the guest's memory: any number.
    pub(super) fn used_idx(&self) -> u16 {
        u16::from_le(self.used.atomic::<AtomicU16>(USED_IDX_OFFSET).load(Ordering::Acquire))
    }

    /// Writes the entry of the used ring for index `idx`. The driver does not look at it before
    /// [`set_used_idx`](Self::set_used_idx).
    #[inline]
    pub(super) fn set_used_entry(&self, idx: u16, head: u16, written_bytes: u32) -> UsedBytes {
        let offset = USED_ENTRIES_OFFSET + self.slot(idx) * USED_ENTRY_BYTES;
        self.used.to_store::<AtomicU32>(offset).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used.to_store::<AtomicU32>(offset + USED_ENTRY_LEN_OFFSET).store(written_bytes.to_le(), Ordering::Relaxed);
        UsedBytes { offset, len: USED_ENTRY_BYTES }
    }

    /// Writes `used.idx`. From then on the entries before it, and everything written earlier, belong to the driver.
    #[inline]
    pub(super) fn set_used_idx(&self, idx: u16) -> UsedBytes {
        self.used.to_store::<AtomicU16>(USED_IDX_OFFSET).store(idx.to_le(), Ordering::Release);
        UsedBytes { offset: USED_IDX_OFFSET, len: size_of::<u16>() }
    }

    /// Writes `used.flags`.
    pub(super) fn set_used_flags(&self, flags: u16) -> UsedBytes {
        self.used.to_store::<AtomicU16>(USED_FLAGS_OFFSET).store(flags.to_le(), Ordering::Relaxed);
        UsedBytes { offset: USED_FLAGS_OFFSET, len: size_of::<u16>() }
    }

    /// Writes `used.avail_event`.
    pub(super) fn set_avail_event(&self, idx: u16) -> UsedBytes {
        let offset = USED_ENTRIES_OFFSET + usize::from(self.size) * USED_ENTRY_BYTES;
        self.used.to_store::<AtomicU16>(offset).store(idx.to_le(), Ordering::Relaxed);
        UsedBytes { offset, len: EVENT_BYTES }
    }

    /// The whole used ring.
    pub(super) fn whole_used_ring(&self) -> UsedBytes {
        UsedBytes { offset: 0, len: self.used.len() }
    }

    /// The place of index `idx` in a ring. The size is a power of two.
    #[inline]
    fn slot(&self, idx: u16) -> usize {
        usize::from(idx & (self.size - 1))
    }
}
