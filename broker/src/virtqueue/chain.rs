//! One descriptor chain (VIRTIO 1.2, 2.7.4 and 2.7.5), walked once.

use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice};

use super::rings::Rings;

/// Size of a descriptor in bytes.
const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// Indirect tables may have this many entries even in smaller queues.
///
/// VIRTIO allows no chain longer than the queue (2.7.5.3.1), but Linux only looks at the number of segments that the
/// device allows, and a front-end may choose a smaller queue size than the device's configuration was made for.
const INDIRECT_ENTRIES_MIN_LIMIT: u32 = 1024;

/// The maximum total length of the buffers of a chain (VIRTIO 1.2, 2.7.5.2).
const CHAIN_BYTES_MAX: u64 = 1 << 32;

/// What is wrong with a chain. The descriptors that the iterator returned before the error are those that the driver
/// wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A descriptor names a next descriptor outside its table.
    #[error("the chain names descriptor {index}, but its table has {table_entries}")]
    IndexOutOfRange {
        /// The index that the chain names.
        index: u16,
        /// Number of entries of the table.
        table_entries: u32,
    },
    /// The chain has more descriptors than its table, so it contains some of them twice.
    #[error("the chain is a loop: it did not end after the {table_entries} entries of its table")]
    Loop {
        /// Number of entries of the table.
        table_entries: u32,
    },
    /// A descriptor is outside guest memory.
    #[error("the descriptor at {gpa:#x} is not in guest memory")]
    OutsideMemory {
        /// Guest-physical address of the descriptor.
        gpa: u64,
    },
    /// A descriptor of an indirect table refers to an indirect table (VIRTIO 1.2, 2.7.5.3.1).
    #[error("a descriptor in an indirect table refers to another indirect table")]
    IndirectInIndirect,
    /// A descriptor refers to an indirect table and to a next descriptor (VIRTIO 1.2, 2.7.5.3.1).
    #[error("a descriptor has both INDIRECT and NEXT")]
    IndirectWithNext,
    /// An indirect table is empty, longer than a chain may be, or not a whole number of descriptors.
    #[error("the indirect table has {len_bytes} bytes: it must have 1 to {entries_max} descriptors of 16 bytes")]
    IndirectLength {
        /// Length of the table in bytes.
        len_bytes: u32,
        /// Maximum number of entries.
        entries_max: u32,
    },
    /// The total length of the buffers exceeds 4 GiB (VIRTIO 1.2, 2.7.5.2).
    #[error("the buffers of the chain are longer than 4 GiB in total")]
    TooManyBytes,
}

/// One descriptor chain: an iterator that copies each descriptor out of guest memory once.
///
/// The iterator follows indirect tables and returns only the descriptors of buffers. It follows them even for drivers
/// that have not accepted VIRTIO_RING_F_INDIRECT_DESC. VIRTIO forbids those drivers to use them (2.7.5.3.1) and does
/// not say what a device does; QEMU and SPDK follow them as well, and for the device this is no more work or risk than
/// a chain in the queue's own table. The iterator does not check the addresses of the buffers. After an error, or its
/// last descriptor, it returns nothing more. It ends for every input: it returns at most the descriptors of two tables.
#[derive(Debug)]
pub struct DescriptorChain<'m> {
    memory: &'m GuestMemoryMmap,
    table: Table<'m>,
    /// The next descriptor.
    next: Option<u16>,
    /// How many descriptors of the table may still follow.
    entries_left: u32,
    /// Maximum number of entries of an indirect table.
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
            // Loads two words, each once, because a copy of 16 bytes would be a function call.
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

    /// The same for a table that is already translated.
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
            table,
            next: Some(head),
            entries_left: table.entries,
            indirect_entries_max: table.entries.max(INDIRECT_ENTRIES_MIN_LIMIT),
            is_indirect: false,
            bytes: 0,
        }
    }

    /// The memory that the chain's addresses refer to.
    pub fn memory(&self) -> &'m GuestMemoryMmap {
        self.memory
    }

    /// The descriptor of the next buffer. The caller has taken `next` of the chain.
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
        if entries == 0 || entries > entries_max || entries * DESCRIPTOR_BYTES as u32 != len_bytes {
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
