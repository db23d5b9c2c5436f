//! A small driver: descriptor tables and rings in guest memory, as in VIRTIO 1.2, 2.7.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtqueue::{InflightQueue, InflightRegion, QueueSetup};

pub(super) const DESC_TABLE: u64 = 0x1000;
pub(super) const AVAIL_RING: u64 = 0x9000;
pub(super) const USED_RING: u64 = 0xb000;
/// Free for buffers and indirect tables.
pub(super) const FREE: u64 = 0x1_0000;
pub(super) const MEMORY_BYTES: u64 = 0x2_0000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// The driver's side of one queue of at most 1024 descriptors.
pub(super) struct Driver {
    pub(super) memory: GuestMemoryMmap,
    pub(super) size: u16,
    pub(super) avail_idx: u16,
    pub(super) used_idx: u16,
}

impl Driver {
    pub(super) fn new(size: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).expect("guest memory");
        Self { memory, size, avail_idx: 0, used_idx: 0 }
    }

    /// A driver whose rings have been used up to this index.
    pub(super) fn at_index(size: u16, idx: u16) -> Self {
        let mut driver = Self::new(size);
        driver.avail_idx = idx;
        driver.used_idx = idx;
        driver.store(AVAIL_RING + 2, idx);
        driver.store(USED_RING + 2, idx);
        driver
    }

    pub(super) fn setup(&self) -> QueueSetup {
        QueueSetup {
            size: self.size,
            desc_table: GuestAddress(DESC_TABLE),
            avail_ring: GuestAddress(AVAIL_RING),
            used_ring: GuestAddress(USED_RING),
            next_avail: self.used_idx,
            driver_features: 0,
            used_log_gpa: None,
            inflight: None,
        }
    }

    pub(super) fn store(&self, gpa: u64, value: u16) {
        self.memory.write_obj(value.to_le(), GuestAddress(gpa)).expect("inside");
    }

    pub(super) fn load(&self, gpa: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(gpa)).expect("inside"))
    }

    /// Writes entry `index` of the table at `table_gpa`.
    pub(super) fn descriptor(&self, table_gpa: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let gpa = GuestAddress(table_gpa + 16 * u64::from(index));
        self.memory.write_obj(Descriptor::new(addr, len, flags, next), gpa).expect("inside");
    }

    /// Writes a chain of one descriptor whose address is `id`, and makes it available.
    pub(super) fn submit(&mut self, head: u16, id: u64) {
        self.descriptor(DESC_TABLE, head, id, 1, 0, 0);
        self.make_available(head);
    }

    pub(super) fn make_available(&mut self, head: u16) {
        self.store(AVAIL_RING + 4 + 2 * u64::from(self.avail_idx % self.size), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.store(AVAIL_RING + 2, self.avail_idx);
    }

    /// The next entry of the used ring: head and length.
    pub(super) fn reap(&mut self) -> Option<(u32, u32)> {
        if self.load(USED_RING + 2) == self.used_idx {
            return None;
        }
        let gpa = USED_RING + 4 + 8 * u64::from(self.used_idx % self.size);
        self.used_idx = self.used_idx.wrapping_add(1);
        let field = |gpa| u32::from_le(self.memory.read_obj(GuestAddress(gpa)).expect("inside"));
        Some((field(gpa), field(gpa + 4)))
    }

    pub(super) fn set_avail_flags(&self, flags: u16) {
        self.store(AVAIL_RING, flags);
    }

    pub(super) fn used_flags(&self) -> u16 {
        self.load(USED_RING)
    }

    pub(super) fn set_used_event(&self, idx: u16) {
        self.store(AVAIL_RING + 4 + 2 * u64::from(self.size), idx);
    }

    pub(super) fn avail_event(&self) -> u16 {
        self.load(USED_RING + 4 + 8 * u64::from(self.size))
    }
}

/// A new in-flight region for one queue.
pub(super) fn inflight_queue(size: u16) -> InflightQueue {
    let file = InflightRegion::create(1, size).expect("a memfd");
    let region = InflightRegion::from_fd(file.fd, 0, file.size_bytes, 1, size).expect("our own region");
    region.queue(0).expect("its only queue")
}
