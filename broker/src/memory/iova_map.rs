//! Mapping a slot at its IOVA for the moment in which it is registered. The unsafe code of guest memory.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::region::{GuestMemory, file_name};
use super::{IOVA_BASE, MemoryError, Piece, Slot, Source};

/// All guests of a process are registered at the same addresses, one slot at a time.
static ADDRESSES: Mutex<()> = Mutex::new(());

/// One slot, mapped at `IOVA_BASE + gpa` with every page present. Unmapped when dropped.
pub(super) struct MappedSlot {
    address: u64,
    mapped_bytes: u64,
    _addresses: MutexGuard<'static, ()>,
}

impl MappedSlot {
    /// Maps `slot` of `memory` and faults all of its pages in.
    pub(super) fn map(memory: &GuestMemory, slot: &Slot) -> Result<Self, MemoryError> {
        let addresses = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mapped = Self { address: IOVA_BASE + slot.gpa, mapped_bytes: 0, _addresses: addresses };
        for piece in &slot.pieces {
            mapped.append(memory, piece)?;
        }
        Ok(mapped)
    }

    /// Maps the next piece behind what is mapped.
    fn append(&mut self, memory: &GuestMemory, piece: &Piece) -> Result<(), MemoryError> {
        let address = self.address + self.mapped_bytes;
        debug_assert_eq!(address, IOVA_BASE + piece.gpa);
        let (name, fd, offset_bytes) = match piece.source {
            Source::Region { region, offset_bytes } => {
                let config = &memory.regions()[region].config;
                (file_name(&config.file), config.file.as_fd(), config.file_offset_bytes + offset_bytes)
            }
            Source::Scratch => ("scratch".into(), memory.scratch().as_fd(), 0),
        };
        let start = address as *mut c_void;
        let len = piece.len_bytes as usize;
        // Without NORESERVE a lack of huge pages would fail here, as a lack of memory; so it fails below, by its name.
        let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE | MapFlags::NORESERVE;
        // SAFETY: FIXED_NOREPLACE never touches a mapping that exists: the range is free, or the call fails.
        let result =
            unsafe { rustix::mm::mmap(start, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset_bytes) };
        match result {
            Ok(_) => self.mapped_bytes += piece.len_bytes,
            Err(Errno::EXIST) => return Err(MemoryError::AddressTaken { address }),
            Err(source) => {
                return Err(MemoryError::System { what: "mapping guest memory at its IOVA", source: source.into() });
            }
        }
        // SAFETY: the range was mapped by this value just now and nobody else knows of it; populating changes no byte.
        match unsafe { rustix::mm::madvise(start, len, Advice::LinuxPopulateWrite) } {
            // Before Linux 5.14 there is no such advice: the registration faults the pages in itself, more slowly.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(source) => Err(MemoryError::Populate {
                gpa: piece.gpa,
                len_bytes: piece.len_bytes,
                file: name,
                source: io::Error::from(source),
            }),
        }
    }

    /// Address of the first byte.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        self.mapped_bytes
    }
}

impl Drop for MappedSlot {
    fn drop(&mut self) {
        if self.mapped_bytes == 0 {
            return;
        }
        // SAFETY: exactly the range that this value mapped; no reference to it was ever made, and the kernel's
        // registrations hold pages, not the mapping.
        let result = unsafe { rustix::mm::munmap(self.address as *mut c_void, self.mapped_bytes as usize) };
        debug_assert!(result.is_ok(), "unmapping a range that we mapped: {result:?}");
    }
}
