//! A small guest: a few regions of memory, and a queue with one chain.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::virtqueue::{DescriptorChain, QueueSetup, SplitQueue};

/// The guest's memory: two adjacent regions, one apart from the others, and one that reaches to the last but one
/// guest-physical address. Region sizes are not multiples of a page, so that the last bits of their ends also differ.
const REGIONS: [(u64, usize); 4] =
    [(0x1_0000, 0x4000), (0x1_4000, 0x1200), (0x2_0000, 0xe00), (u64::MAX - 0x1000, 0x1000)];

/// Entries of the descriptor table, and of the indirect table.
pub(in super::super) const TABLE_ENTRIES: u16 = 16;
const TABLE_GPA: u64 = 0x1_0000;
const AVAIL_GPA: u64 = 0x1_0100;
const USED_GPA: u64 = 0x1_0200;
/// Address of an indirect table in tests.
pub(in super::super) const INDIRECT_GPA: u64 = 0x1_0400;
/// Address of a request header in tests.
pub(in super::super) const HEADER_GPA: u64 = 0x1_0600;

/// An address close to the start or the end of a region.
pub(super) fn near_a_boundary(which: u8, distance: u8) -> u64 {
    let (start, len_bytes) = REGIONS[usize::from(which) % REGIONS.len()];
    let distance = u64::from(distance) * 16;
    match which / 4 % 3 {
        0 => start.wrapping_add(distance),
        1 => start.wrapping_add(len_bytes as u64).wrapping_sub(distance),
        _ => start.wrapping_add(0x800 + distance),
    }
}

/// Guest memory with a queue.
pub(in super::super) struct Scene {
    memory: GuestMemoryMmap<()>,
    queue: SplitQueue,
    avail_idx: u16,
}

impl Scene {
    /// Zeroed memory, and an empty queue of 16 entries.
    pub(in super::super) fn new() -> Self {
        let ranges = REGIONS.map(|(start, len_bytes)| (GuestAddress(start), len_bytes));
        let memory = GuestMemoryMmap::from_ranges(&ranges).expect("the regions are sorted and apart");
        let setup = QueueSetup {
            size: TABLE_ENTRIES,
            desc_table: GuestAddress(TABLE_GPA),
            avail_ring: GuestAddress(AVAIL_GPA),
            used_ring: GuestAddress(USED_GPA),
            next_avail: 0,
            driver_features: 0,
            used_log_gpa: None,
            inflight: None,
        };
        let queue = SplitQueue::new(setup, &memory).expect("the rings are in memory and aligned");
        Self { memory, queue, avail_idx: 0 }
    }

    pub(in super::super) fn table_gpa(&self) -> GuestAddress {
        GuestAddress(TABLE_GPA)
    }

    pub(in super::super) fn put(&self, gpa: GuestAddress, bytes: &[u8]) {
        self.memory.write_slice(bytes, gpa).expect("an address inside memory");
    }

    /// `struct virtio_blk_req` up to its data.
    pub(in super::super) fn put_header(&self, gpa: GuestAddress, request_type: u32, sector: u64) {
        let fields = [&request_type.to_le_bytes()[..], &[0xa5; 4], &sector.to_le_bytes()];
        self.put(gpa, &fields.concat());
    }

    /// `struct virtio_blk_discard_write_zeroes`.
    pub(in super::super) fn put_range(&self, gpa: GuestAddress, sector: u64, sectors: u32, flags: u32) {
        let fields = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()];
        self.put(gpa, &fields.concat());
    }

    pub(in super::super) fn put_descriptor(&self, table: GuestAddress, index: u16, descriptor: Descriptor) {
        let gpa = GuestAddress(table.0 + 16 * u64::from(index));
        self.memory.write_obj(descriptor, gpa).expect("a table inside memory");
    }

    /// Makes the chain available.
    pub(in super::super) fn offer(&mut self, head: u16) {
        let entry = GuestAddress(AVAIL_GPA + 4 + 2 * u64::from(self.avail_idx % TABLE_ENTRIES));
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put(entry, &head.to_le_bytes());
        self.put(GuestAddress(AVAIL_GPA + 2), &self.avail_idx.to_le_bytes());
    }

    /// Takes the available chain.
    pub(in super::super) fn take(&mut self) -> DescriptorChain<'_> {
        let popped = self.queue.pop_recorded(&self.memory).expect("a valid ring");
        popped.expect("an available chain").1
    }

    /// The host address of a byte of guest memory, found by a search that shares no code with the parser's.
    pub(super) fn host_byte(&self, gpa: u64) -> Option<*mut u8> {
        let region = self.memory.iter().find(|region| {
            let start = u128::from(region.start_addr().0);
            (start..start + u128::from(region.len())).contains(&u128::from(gpa))
        })?;
        Some(region.as_ptr().wrapping_add((gpa - region.start_addr().0) as usize))
    }

    /// One byte of guest memory.
    pub(super) fn byte(&self, gpa: u64) -> Option<u8> {
        self.memory.read_obj(GuestAddress(gpa)).ok()
    }
}
