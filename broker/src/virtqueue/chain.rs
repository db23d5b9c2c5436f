//! One descriptor chain (VIRTIO 1.2, 2.7.4 and 2.7.5), walked once.

use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice};

use super::rings::Rings;

/// Size of a descriptor in bytes.
const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// Indirect tables may have this many entries also in queues that are smaller.
///
/// VIRTIO wants no chain longer than the queue (2.7.5.3.1), but Linux only looks at the number of segments that the
/// device allows, and a front-end may give the queue a smaller size than the device's configuration was made for.
const INDIRECT_ENTRIES_MIN_LIMIT: u32 = 1024;

/// The buffers of all descriptors of a chain are at most this long together (VIRTIO 1.2, 2.7.5.2).
const CHAIN_BYTES_MAX: u64 = 1 << 32;

/// What is wrong with a chain. Whatever was read of it before is as the driver wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// A descriptor names a next one that is not in its table.
    #[error("descriptor {index} is named in a table of {table_entries}")]
    IndexOutOfRange {
        /// The index that was named.
        index: u16,
        /// Number of entries of the table.
        table_entries: u32,
    },
    /// More descriptors than the table has: some come twice.
    #[error("the chain is a loop: it did not end after the {table_entries} entries of its table")]
    Loop {
        /// Number of entries of the table.
        table_entries: u32,
    },
    /// A descriptor is not in guest memory.
    #[error("the descriptor at {gpa:#x} is not in guest memory")]
    OutsideMemory {
        /// Guest-physical address of the descriptor.
        gpa: u64,
    },
    /// A descriptor of an indirect table refers to an indirect table (VIRTIO 1.2, 2.7.5.3.1).
    #[error("an indirect table inside an indirect table")]
    IndirectInIndirect,
    /// A descriptor that refers to an indirect table and to a next descriptor (VIRTIO 1.2, 2.7.5.3.1).
    #[error("a descriptor with both INDIRECT and NEXT")]
    IndirectWithNext,
    /// An indirect table is not a whole number of descriptors, empty, or longer than a chain may be.
    #[error("an indirect table of {len_bytes} bytes: it must have 1 to {entries_max} descriptors of 16 bytes")]
    IndirectLength {
        /// Its length in bytes.
        len_bytes: u32,
        /// How many entries it may have.
        entries_max: u32,
    },
    /// The buffers are longer than 4 GiB together (VIRTIO 1.2, 2.7.5.2).
    #[error("the buffers of the chain are longer than 4 GiB together")]
    TooManyBytes,
}

/// One descriptor chain: an iterator over its descriptors, each copied out of guest memory once.
///
/// Indirect tables are followed; what comes out are the descriptors of buffers only. They are followed for drivers that have not
/// accepted VIRTIO_RING_F_INDIRECT_DESC, too: VIRTIO forbids those to use them (2.7.5.3.1) and does not say what a device does.
/// QEMU and SPDK follow them as well, and for the device it is no more work or risk than a chain in the queue's own table. Nothing is known yet of where the
/// buffers are. After an error, or its last descriptor, it yields nothing more. It ends for every input: it yields at
/// most the descriptors of two tables.
#[derive(Debug)]
pub struct DescriptorChain<'m> {
    memory: &'m GuestMemoryMmap,
    head: u16,
    table: Table<'m>,
    /// The descriptor that comes next.
    next: Option<u16>,
    /// How many descriptors of the table may still come.
    entries_left: u32,
    /// How many entries an indirect table may have.
    indirect_entries_max: u32,
    is_indirect: bool,
    bytes: u64,
}

/// A descriptor table.
#[derive(Clone, Copy, Debug)]
struct Table<'m> {
    gpa: GuestAddress,
    entries: u32,
    /// The whole table, translated, if it does not cross a boundary of memory regions.
    slice: Option<VolatileSlice<'m>>,
}

impl<'m> Table<'m> {
    fn new(memory: &'m GuestMemoryMmap, gpa: GuestAddress, entries: u32) -> Self {
        let slice = memory.get_slice(gpa, entries as usize * size_of::<Descriptor>()).ok();
        Self { gpa, entries, slice }
    }

    #[inline]
    fn read(&self, memory: &GuestMemoryMmap, index: u16) -> Result<Descriptor, ChainError> {
        let offset_bytes = u64::from(index) * DESCRIPTOR_BYTES;
        let outside = || ChainError::OutsideMemory { gpa: self.gpa.0.wrapping_add(offset_bytes) };
        if let Some(slice) = self.slice {
            // Two words, each loaded once, rather than a copy of 16 bytes: that would be a call.
            let word = |offset| slice.get_atomic_ref::<AtomicU64>(offset).map(|word| word.load(Ordering::Relaxed));
            let offset = offset_bytes as usize;
            // An indirect table may be at any address (VIRTIO 1.2, 2.7.5.3).
            if let (Ok(gpa), Ok(rest)) = (word(offset), word(offset + 8)) {
                let (gpa, rest) = (u64::from_le(gpa), u64::from_le(rest));
                return Ok(Descriptor::new(gpa, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16));
            }
        }
        let gpa = self.gpa.checked_add(offset_bytes).ok_or_else(outside)?;
        memory.read_obj(gpa).map_err(|_| outside())
    }
}

impl<'m> DescriptorChain<'m> {
    /// The chain whose first descriptor is entry `head` of the table of `queue_size` descriptors at `table_gpa`.
    pub fn new(memory: &'m GuestMemoryMmap, table_gpa: GuestAddress, queue_size: u16, head: u16) -> Self {
        Self::in_table(memory, Table::new(memory, table_gpa, queue_size.into()), head)
    }

    /// The same for a table that is translated already.
    #[inline]
    pub(super) fn in_queue(memory: &'m GuestMemoryMmap, rings: &'m Rings, head: u16) -> Self {
        let table =
            Table { gpa: rings.desc_table_gpa(), entries: rings.size().into(), slice: Some(rings.desc_table()) };
        Self::in_table(memory, table, head)
    }

    #[inline]
    fn in_table(memory: &'m GuestMemoryMmap, table: Table<'m>, head: u16) -> Self {
        Self {
            memory,
            head,
            table,
            next: Some(head),
            entries_left: table.entries,
            indirect_entries_max: table.entries.max(INDIRECT_ENTRIES_MIN_LIMIT),
            is_indirect: false,
            bytes: 0,
        }
    }

    /// Index of the first descriptor: by this the chain is completed.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The memory that the chain's addresses are in.
    pub fn memory(&self) -> &'m GuestMemoryMmap {
        self.memory
    }

    /// The descriptor of the next buffer. `next` of the chain is taken already.
    fn step(&mut self, mut index: u16) -> Result<Descriptor, ChainError> {
        loop {
            let table_entries = self.table.entries;
            if u32::from(index) >= table_entries {
                return Err(ChainError::IndexOutOfRange { index, table_entries });
            }
            self.entries_left = self.entries_left.checked_sub(1).ok_or(ChainError::Loop { table_entries })?;
            let descriptor = self.table.read(self.memory, index)?;
            if descriptor.refers_to_indirect_table() {
                self.enter_indirect(&descriptor)?;
                index = 0;
                continue;
            }
            self.bytes += u64::from(descriptor.len());
            if self.bytes > CHAIN_BYTES_MAX {
                return Err(ChainError::TooManyBytes);
            }
            self.next = descriptor.has_next().then(|| descriptor.next());
            return Ok(descriptor);
        }
    }

    fn enter_indirect(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        if self.is_indirect {
            return Err(ChainError::IndirectInIndirect);
        }
        if descriptor.has_next() {
            return Err(ChainError::IndirectWithNext);
        }
        let len_bytes = descriptor.len();
        let entries_max = self.indirect_entries_max;
        let entries = len_bytes / DESCRIPTOR_BYTES as u32;
        if entries == 0 || entries > entries_max || !len_bytes.is_multiple_of(DESCRIPTOR_BYTES as u32) {
            return Err(ChainError::IndirectLength { len_bytes, entries_max });
        }
        self.is_indirect = true;
        self.table = Table::new(self.memory, descriptor.addr(), entries);
        self.entries_left = entries;
        Ok(())
    }
}

impl Iterator for DescriptorChain<'_> {
    type Item = Result<Descriptor, ChainError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next.take()?;
        Some(self.step(index))
    }
}
