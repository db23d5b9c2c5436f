//! A mapped piece of a file that the front-end shares with us.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use thiserror::Error;
use vm_memory::{AtomicAccess, AtomicInteger, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Why a file of the front-end cannot be mapped.
#[derive(Debug, Error)]
pub enum SharedMemoryError {
    /// There is nothing to map.
    #[error("a shared area of 0 bytes")]
    Empty,
    /// mmap(2) wants whole pages.
    #[error(
        "a shared area at offset {offset_bytes} of its file, which is not a multiple of the page size {page_bytes}"
    )]
    OffsetUnaligned {
        /// Where in the file it was to begin.
        offset_bytes: u64,
        /// The page size.
        page_bytes: u64,
    },
    /// Touching what is beyond the end of the file would be SIGBUS.
    #[error("a shared area of {size_bytes} bytes at offset {offset_bytes} of a file of {file_bytes} bytes")]
    BeyondFile {
        /// Where in the file it was to begin.
        offset_bytes: u64,
        /// How long it was to be.
        size_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// A piece of a file, mapped shared. Others write to it at any time: it is accessed by whole integers only.
#[derive(Debug)]
pub(super) struct SharedMemory {
    mapping: MmapRegion,
}

impl SharedMemory {
    /// Maps `size_bytes` of the file from `offset_bytes` on.
    pub(super) fn map(fd: OwnedFd, offset_bytes: u64, size_bytes: u64) -> Result<Self, SharedMemoryError> {
        if size_bytes == 0 {
            return Err(SharedMemoryError::Empty);
        }
        let page_bytes = rustix::param::page_size() as u64;
        if !offset_bytes.is_multiple_of(page_bytes) {
            return Err(SharedMemoryError::OffsetUnaligned { offset_bytes, page_bytes });
        }
        let file = File::from(fd);
        let stat = rustix::fs::fstat(&file)
            .map_err(|errno| SharedMemoryError::System { what: "fstat of a shared file", source: errno.into() })?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let beyond = || SharedMemoryError::BeyondFile { offset_bytes, size_bytes, file_bytes };
        if offset_bytes.checked_add(size_bytes).is_none_or(|end_bytes| end_bytes > file_bytes) {
            return Err(beyond());
        }
        let len = usize::try_from(size_bytes).map_err(|_| beyond())?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset_bytes), len).map_err(|error| {
            let source = match error {
                vm_memory::mmap::MmapRegionError::Mmap(source) => source,
                other => std::io::Error::other(other),
            };
            SharedMemoryError::System { what: "mapping a shared file", source }
        })?;
        Ok(Self { mapping })
    }

    /// Length in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Loads one integer.
    ///
    /// # Panics
    ///
    /// `offset` is not aligned to the integer, or outside: the callers have checked that when they mapped.
    pub(super) fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> T {
        self.mapping.as_volatile_slice().load(offset, order).expect("an aligned offset within the mapping")
    }

    /// Stores one integer.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    pub(super) fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) {
        #[cfg(test)]
        super::crash::before_store();
        self.mapping.as_volatile_slice().store(value, offset, order).expect("an aligned offset within the mapping");
    }

    /// One integer for atomic operations.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    pub(super) fn atomic<A: AtomicInteger>(&self, offset: usize) -> &A {
        #[cfg(test)]
        super::crash::before_store();
        self.mapping.get_atomic_ref(offset).expect("an aligned offset within the mapping")
    }
}
