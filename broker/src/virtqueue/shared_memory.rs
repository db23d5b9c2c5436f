//! Mapped memory that others write to at any time: rings, in-flight regions, dirty logs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{
    AtomicInteger, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
    VolatileMemory, VolatileSlice,
};

use crate::lost_memory::{Purpose, Watched};

/// Why the back-end cannot map a file of the front-end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SharedMemoryError {
    /// The area is empty.
    #[error("a shared area of 0 bytes: it must not be empty")]
    Empty,
    /// mmap(2) needs whole pages.
    #[error(
        "a shared area at offset {offset_bytes} of its file: the offset must be a multiple of the page size \
         {page_bytes}"
    )]
    OffsetUnaligned {
        /// Requested offset in the file.
        offset_bytes: u64,
        /// The page size.
        page_bytes: u64,
    },
    /// An access beyond the end of the file would raise SIGBUS.
    #[error(
        "a shared area of {size_bytes} bytes at offset {offset_bytes} of a file of {file_bytes} bytes: it must end \
         inside the file"
    )]
    BeyondFile {
        /// Requested offset in the file.
        offset_bytes: u64,
        /// Requested length.
        size_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// What the back-end was doing.
        what: &'static str,
        /// The kernel's error.
        source: std::io::Error,
    },
}

/// A piece of a shared mapping, which it keeps mapped. Others write to it at any time, so the code accesses it by
/// whole, aligned integers only.
#[derive(Clone, Debug)]
pub(super) struct SharedMemory {
    /// Before the mapping, so that it is dropped first. `None`: guest RAM, which the memory table watches.
    _watched: Option<Arc<Watched>>,
    mapping: Arc<MmapRegion>,
    /// Start of the piece in the mapping.
    start: usize,
    len: usize,
}

impl SharedMemory {
    /// Maps `size_bytes` of the file from `offset_bytes` on.
    ///
    /// The front-end may shorten the file later, sealed or not. The process survives that if it has called
    /// [`handle_lost_memory`](crate::lost_memory::handle_lost_memory).
    pub(super) fn map(
        fd: OwnedFd,
        offset_bytes: u64,
        size_bytes: u64,
        purpose: Purpose,
    ) -> Result<Self, SharedMemoryError> {
        if size_bytes == 0 {
            return Err(SharedMemoryError::Empty);
        }
        let page_bytes = rustix::param::page_size() as u64;
        if offset_bytes % page_bytes != 0 {
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
        let watched = Watched::new(&mapping, purpose);
        Ok(Self { _watched: Some(Arc::new(watched)), mapping: Arc::new(mapping), start: 0, len })
    }

    /// `len` bytes of guest memory from `gpa` on. `None`: they are not in one region.
    pub(super) fn in_guest(memory: &GuestMemoryMmap, gpa: GuestAddress, len: usize) -> Option<Self> {
        let (region, offset) = memory.to_region_addr(gpa)?;
        let start = usize::try_from(offset.0).ok()?;
        (region.len() - offset.0 >= len as u64).then(|| Self { _watched: None, mapping: region.get_mmap(), start, len })
    }

    /// `len` bytes of this piece from `offset` on. `None`: this piece is too short.
    pub(super) fn part(&self, offset: usize, len: usize) -> Option<Self> {
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let (watched, mapping) = (self._watched.clone(), Arc::clone(&self.mapping));
        is_inside.then(|| Self { _watched: watched, mapping, start: self.start + offset, len })
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether its first byte is at a multiple of `alignment_bytes` in this process.
    pub(super) fn is_aligned(&self, alignment_bytes: usize) -> bool {
        (self.mapping.as_ptr() as usize + self.start) % alignment_bytes == 0
    }

    /// The whole piece, for copying out.
    pub(super) fn as_slice(&self) -> VolatileSlice<'_> {
        self.mapping.get_slice(self.start, self.len).expect("the constructor checked the range")
    }

    /// One integer, to load it.
    ///
    /// # Panics
    ///
    /// `offset` is outside, or not aligned to the integer: a bug in this module's users, which must check length and
    /// alignment when they make this.
    #[inline]
    pub(super) fn atomic<A: AtomicInteger>(&self, offset: usize) -> &A {
        debug_assert!(offset + size_of::<A>() <= self.len, "offset {offset} of {}", self.len);
        self.mapping.get_atomic_ref(self.start + offset).expect("an aligned offset inside")
    }

    /// One integer, to store it. Tests can stop the process before any of these stores.
    ///
    /// # Panics
    ///
    /// As [`atomic`](Self::atomic).
    #[inline]
    pub(super) fn to_store<A: AtomicInteger>(&self, offset: usize) -> &A {
        #[cfg(test)]
        super::crash::before_store();
        self.atomic(offset)
    }
}
