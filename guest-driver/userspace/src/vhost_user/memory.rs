//! The RAM of a guest that brings its own: memfds, given to the device region by region.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};

use super::Error;
use crate::{GuestRam, RamAllocator, RamArea, RamRegion, raw};

/// A piece of RAM at a guest-physical address.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) gpa: u64,
    pub(super) len_bytes: u64,
    pub(super) file: Arc<File>,
    ram: Arc<GuestRam>,
}

impl Region {
    /// Where it is in this process, for messages: the device calculates with it only.
    pub(super) fn user_address(&self) -> u64 {
        self.ram.pointer(self.gpa, self.len_bytes).map_or(0, |pointer| pointer.as_ptr().addr() as u64)
    }
}

/// The RAM of a guest. It is given away in [`RamArea`]s and does not come back. RAM that is somebody else's has no allocator.
#[derive(Debug)]
pub(super) struct Memory {
    regions: Mutex<Vec<(Region, Option<RamAllocator>)>>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { regions: Mutex::new(Vec::new()) }
    }

    /// Makes a region, of whole pages, at an address where there is none.
    pub(super) fn add(&self, gpa: u64, len_bytes: u64) -> Result<Region, Error> {
        let file = memfd(len_bytes).map_err(Error::system("making guest RAM"))?;
        let region = RamRegion { gpa, len_bytes, file: file.as_fd(), offset_bytes: 0 };
        let ram = Arc::new(raw::map_own(&[region])?);
        let allocator = ram.allocator()?;
        self.insert(Region { gpa, len_bytes, file: Arc::new(file), ram }, Some(allocator))
    }

    /// Takes in RAM that is somebody else's: it is offered to the device, and nothing of it is given away.
    pub(super) fn add_foreign(&self, gpa: u64, file: File, len_bytes: u64) -> Result<Region, Error> {
        let region = RamRegion { gpa, len_bytes, file: file.as_fd(), offset_bytes: 0 };
        // Mapped for its address only. Nobody gets at the bytes without an area, so nothing has to be promised about them.
        let ram = Arc::new(GuestRam::map_checked(&[region])?);
        self.insert(Region { gpa, len_bytes, file: Arc::new(file), ram }, None)
    }

    fn insert(&self, region: Region, allocator: Option<RamAllocator>) -> Result<Region, Error> {
        let Region { gpa, len_bytes, .. } = region;
        let mut regions = self.lock();
        let overlaps = |other: &Region| gpa < other.gpa + other.len_bytes && other.gpa < gpa + len_bytes;
        if let Some((other, _)) = regions.iter().find(|(other, _)| overlaps(other)) {
            return Err(Error::RegionsOverlap { gpa, len_bytes, other_gpa: other.gpa });
        }
        regions.push((region.clone(), allocator));
        Ok(region)
    }

    /// Takes a region out. What was given away of it stays mapped here, and is unknown to the device.
    pub(super) fn remove(&self, gpa: u64) -> Option<Region> {
        let mut regions = self.lock();
        let index = regions.iter().position(|(region, _)| region.gpa == gpa)?;
        Some(regions.remove(index).0)
    }

    pub(super) fn regions(&self) -> Vec<Region> {
        self.lock().iter().map(|(region, _)| region.clone()).collect()
    }

    /// The first free area of this length.
    pub(super) fn allocate(&self, len_bytes: u64) -> Result<RamArea, Error> {
        let mut regions = self.lock();
        let mut refusal = None;
        for allocator in regions.iter_mut().filter_map(|(_, allocator)| allocator.as_mut()) {
            match allocator.allocate(len_bytes) {
                Ok(area) => return Ok(area),
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.map_or(Error::NoMemory, Error::Allocate))
    }

    /// The first free area in the region at `gpa`.
    pub(super) fn allocate_in(&self, gpa: u64, len_bytes: u64) -> Result<RamArea, Error> {
        let mut regions = self.lock();
        let found = regions.iter_mut().find(|(region, _)| region.gpa == gpa);
        let allocator = found.and_then(|(_, allocator)| allocator.as_mut()).ok_or(Error::NoMemory)?;
        Ok(allocator.allocate(len_bytes)?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Region, Option<RamAllocator>)>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A memfd that nobody can make shorter or longer.
fn memfd(len_bytes: u64) -> io::Result<File> {
    let file = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, len_bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_given_away_of_memory_that_is_somebody_else_s() {
        let memory = Memory::new();
        memory.add_foreign(0x10_0000, memfd(8192).unwrap(), 8192).unwrap();
        assert!(matches!(memory.allocate(4096), Err(Error::NoMemory)));
        assert!(matches!(memory.allocate_in(0x10_0000, 4096), Err(Error::NoMemory)));
        memory.add(0x20_0000, 4096).unwrap();
        assert_eq!(memory.allocate(4096).unwrap().gpa(), 0x20_0000);
        assert_eq!(memory.regions().len(), 2);
        let longer = memory.add_foreign(0x30_0000, memfd(4096).unwrap(), 8192);
        assert!(matches!(longer, Err(Error::Ram(_))), "{longer:?}");
    }
}
