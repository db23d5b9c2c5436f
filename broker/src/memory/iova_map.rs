//! Mapping a span at its IOVA while its slots are being registered. The unsafe code of guest memory.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::region::{GuestMemory, file_name};
use super::{IOVA_BASE, MemoryError, Piece, Source, Span};

/// Held while a span is mapped: all guests of a process are registered at the same addresses, one span at a time.
static ADDRESSES: Mutex<()> = Mutex::new(());

/// The memory to fault in at a time: short enough that a caller who waits does not notice it.
const POPULATE_BYTES: u64 = 32 << 20;

/// The pieces of a span, each mapped at `IOVA_BASE + gpa` with every page present. Unmapped when dropped.
pub(super) struct MappedSpan {
    /// Ascending, not touching each other.
    mapped: Vec<Range<u64>>,
    _addresses: MutexGuard<'static, ()>,
}

impl MappedSpan {
    /// Maps `span` of `memory` and faults in all of its pages, unless `is_wanted` returns false meanwhile.
    pub(super) fn map(memory: &GuestMemory, span: &Span, is_wanted: &dyn Fn() -> bool) -> Result<Self, MemoryError> {
        let addresses = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mapped = Self { mapped: Vec::new(), _addresses: addresses };
        for piece in &span.pieces {
            mapped.append(memory, piece)?;
            mapped.populate(memory, piece, is_wanted)?;
        }
        Ok(mapped)
    }

    /// Maps the next piece, which lies above the mapped pieces.
    fn append(&mut self, memory: &GuestMemory, piece: &Piece) -> Result<(), MemoryError> {
        let address = IOVA_BASE + piece.gpa;
        let (fd, offset_bytes) = match piece.source {
            Source::Region { region, offset_bytes } => {
                let config = &memory.regions()[region].config;
                (config.file.as_fd(), config.file_offset_bytes + offset_bytes)
            }
            Source::Scratch => (memory.scratch().as_fd(), 0),
        };
        let start = address as *mut c_void;
        let len = piece.len_bytes as usize;
        // Without NORESERVE a lack of huge pages would fail here as a lack of memory; with it, populating fails below
        // and names the pages.
        let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE | MapFlags::NORESERVE;
        // SAFETY: FIXED_NOREPLACE never touches a mapping that exists: the range is free, or the call fails.
        let result =
            unsafe { rustix::mm::mmap(start, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset_bytes) };
        match result {
            Ok(_) => {
                let end = address + piece.len_bytes;
                match self.mapped.last_mut().filter(|range| range.end == address) {
                    Some(range) => range.end = end,
                    None => self.mapped.push(address..end),
                }
                Ok(())
            }
            Err(Errno::EXIST) => Err(MemoryError::AddressTaken { address }),
            Err(source) => Err(MemoryError::System { what: "mapping guest memory at its IOVA", source: source.into() }),
        }
    }

    /// Faults in the pages of a mapped piece.
    fn populate(&self, memory: &GuestMemory, piece: &Piece, is_wanted: &dyn Fn() -> bool) -> Result<(), MemoryError> {
        let address = IOVA_BASE + piece.gpa;
        debug_assert!(self.holds(address, piece.len_bytes));
        let mut done_bytes = 0;
        while done_bytes < piece.len_bytes {
            if !is_wanted() {
                return Err(MemoryError::NotWanted);
            }
            let part_bytes = POPULATE_BYTES.min(piece.len_bytes - done_bytes);
            let start = (address + done_bytes) as *mut c_void;
            // SAFETY: this value mapped the range, and no other code knows of it; populating changes no byte.
            match unsafe { rustix::mm::madvise(start, part_bytes as usize, Advice::LinuxPopulateWrite) } {
                Ok(()) => done_bytes += part_bytes,
                // Linux before 5.14 has no such advice: the registration faults in the pages itself, more slowly.
                Err(Errno::INVAL) => return Ok(()),
                Err(source) => {
                    let file = match piece.source {
                        Source::Region { region, .. } => file_name(&memory.regions()[region].config.file),
                        Source::Scratch => "scratch".into(),
                    };
                    let source = io::Error::from(source);
                    return Err(MemoryError::Populate { gpa: piece.gpa, len_bytes: piece.len_bytes, file, source });
                }
            }
        }
        Ok(())
    }

    /// Whether all of these bytes are mapped.
    pub(super) fn holds(&self, address: u64, len_bytes: u64) -> bool {
        self.mapped.iter().any(|range| range.start <= address && address + len_bytes <= range.end)
    }
}

impl Drop for MappedSpan {
    fn drop(&mut self) {
        for range in &self.mapped {
            // SAFETY: exactly a range that this value mapped; no reference to it was ever made, and the kernel's
            // registrations hold pages, not the mapping.
            let result = unsafe { rustix::mm::munmap(range.start as *mut c_void, (range.end - range.start) as usize) };
            debug_assert!(result.is_ok(), "unmapping a range that we mapped: {result:?}");
        }
    }
}
