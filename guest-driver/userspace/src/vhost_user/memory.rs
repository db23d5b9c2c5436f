//! The RAM of the driver: memfds, and files of others, which the device gets region by region.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{MemfdFlags, SealFlags};

use super::Error;
use crate::ram::{AllocateError, GuestRam, PAGE_BYTES, RamAllocator, RamArea, RamRegion, map_sealed};

/// A piece of RAM at a guest-physical address.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) gpa: u64,
    pub(super) len_bytes: u64,
    pub(super) file: Arc<File>,
    ram: Arc<GuestRam>,
}

impl Region {
    /// The address of the region in this process, for vhost-user messages. The device only calculates with it.
    pub(super) fn user_address(&self) -> u64 {
        self.ram.pointer(self.gpa, self.len_bytes).map_or(0, |pointer| pointer.as_ptr().addr() as u64)
    }
}

/// The RAM of the driver, which it hands out in [`RamArea`]s. Their drop returns them. A region that others own as well
/// has no allocator.
#[derive(Debug)]
pub(super) struct Memory {
    regions: Mutex<Regions>,
}

#[derive(Debug, Default)]
struct Regions {
    present: Vec<(Region, Option<RamAllocator>)>,
    removed: Vec<Removed>,
}

/// A region that was removed. No other region may have its addresses as long as an area of it exists: a request that
/// names them may be under way, and the driver may send the request again.
#[derive(Debug)]
struct Removed {
    gpa: u64,
    len_bytes: u64,
    ram: Weak<GuestRam>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { regions: Mutex::default() }
    }

    /// Makes a region of whole pages at an address that no region has.
    pub(super) fn add(&self, gpa: u64, len_bytes: u64) -> Result<Region, Error> {
        let file = memfd(len_bytes).map_err(Error::system("making guest RAM"))?;
        let region = RamRegion { gpa, len_bytes, file: file.as_fd(), offset_bytes: 0 };
        let ram = Arc::new(map_sealed(&[region])?);
        let allocator = ram.allocator()?;
        self.insert(Region { gpa, len_bytes, file: Arc::new(file), ram }, Some(allocator))
    }

    /// Adds RAM that others use, too. The device gets it, and the driver hands out nothing of it.
    pub(super) fn add_foreign(&self, gpa: u64, file: File, len_bytes: u64) -> Result<Region, Error> {
        let region = RamRegion { gpa, len_bytes, file: file.as_fd(), offset_bytes: 0 };
        // The driver needs only the address of the mapping. It accesses no bytes without an area, so it need not keep
        // the contract of `GuestRam::map`.
        let ram = Arc::new(GuestRam::map_checked(&[region])?);
        self.insert(Region { gpa, len_bytes, file: Arc::new(file), ram }, None)
    }

    fn insert(&self, region: Region, allocator: Option<RamAllocator>) -> Result<Region, Error> {
        let Region { gpa, len_bytes, .. } = region;
        let mut regions = self.lock();
        let overlaps = |other_gpa: u64, other_bytes: u64| gpa < other_gpa + other_bytes && other_gpa < gpa + len_bytes;
        if let Some((other, _)) = regions.present.iter().find(|(other, _)| overlaps(other.gpa, other.len_bytes)) {
            return Err(Error::RegionsOverlap { gpa, len_bytes, other_gpa: other.gpa });
        }
        regions.removed.retain(|removed| removed.ram.strong_count() > 0);
        if let Some(removed) = regions.removed.iter().find(|removed| overlaps(removed.gpa, removed.len_bytes)) {
            return Err(Error::RegionInUse { gpa, len_bytes, other_gpa: removed.gpa });
        }
        regions.present.push((region.clone(), allocator));
        Ok(region)
    }

    /// Removes a region. Areas that are in use stay mapped in this process.
    pub(super) fn remove(&self, gpa: u64) -> Option<Region> {
        let mut regions = self.lock();
        let index = regions.present.iter().position(|(region, _)| region.gpa == gpa)?;
        let (region, _) = regions.present.remove(index);
        let (len_bytes, ram) = (region.len_bytes, Arc::downgrade(&region.ram));
        regions.removed.push(Removed { gpa, len_bytes, ram });
        Some(region)
    }

    pub(super) fn regions(&self) -> Vec<Region> {
        self.lock().present.iter().map(|(region, _)| region.clone()).collect()
    }

    /// The first free area of this length.
    pub(super) fn allocate(&self, len_bytes: u64) -> Result<RamArea, Error> {
        self.allocate_aligned(len_bytes, PAGE_BYTES)
    }

    /// The first free area of this length that starts at a multiple of `align_bytes`, a power of two from 4096 on.
    pub(super) fn allocate_aligned(&self, len_bytes: u64, align_bytes: u64) -> Result<RamArea, Error> {
        let mut regions = self.lock();
        let mut refusal: Option<AllocateError> = None;
        for allocator in regions.present.iter_mut().filter_map(|(_, allocator)| allocator.as_mut()) {
            match allocator.allocate_aligned(len_bytes, align_bytes) {
                Ok(area) => return Ok(area),
                Err(error) => refusal = Some(refusal.map_or(error, |before| before.combined_with(error))),
            }
        }
        Err(refusal.map_or(Error::NoMemory, Error::Allocate))
    }

    /// Number of free bytes of all regions.
    pub(super) fn free_bytes(&self) -> u64 {
        self.lock().present.iter().filter_map(|(_, allocator)| allocator.as_ref()).map(RamAllocator::free_bytes).sum()
    }

    /// The first free area in the region at `gpa`.
    pub(super) fn allocate_in(&self, gpa: u64, len_bytes: u64) -> Result<RamArea, Error> {
        let mut regions = self.lock();
        let found = regions.present.iter_mut().find(|(region, _)| region.gpa == gpa);
        let allocator = found.and_then(|(_, allocator)| allocator.as_mut()).ok_or(Error::NoMemory)?;
        Ok(allocator.allocate(len_bytes)?)
    }

    fn lock(&self) -> MutexGuard<'_, Regions> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A memfd whose length is sealed.
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
    fn the_driver_hands_out_nothing_of_memory_that_others_use() {
        let memory = Memory::new();
        memory.add_foreign(0x10_0000, memfd(8192).unwrap(), 8192).unwrap();
        assert!(matches!(memory.allocate(4096), Err(Error::NoMemory)));
        assert!(matches!(memory.allocate_in(0x10_0000, 4096), Err(Error::NoMemory)));
        memory.add(0x20_0000, 4096).unwrap();
        let area = memory.allocate(4096).unwrap();
        assert_eq!((area.gpa(), memory.free_bytes(), memory.regions().len()), (0x20_0000, 0, 2));
        let longer = memory.add_foreign(0x30_0000, memfd(4096).unwrap(), 8192);
        assert!(matches!(longer, Err(Error::Ram(_))), "{longer:?}");
    }

    #[test]
    fn a_refusal_says_how_many_bytes_were_wanted_and_how_many_all_regions_have() {
        let memory = Memory::new();
        memory.add(0x10_0000, 3 * 4096).unwrap();
        memory.add(0x20_0000, 2 * 4096).unwrap();
        let first = memory.allocate(4096).unwrap();
        let message = memory.allocate(3 * 4096).unwrap_err().to_string();
        let expected = "no free piece of guest RAM holds 12288 bytes at a multiple of 4096: 16384 bytes are free, the longest piece has 8192";
        assert!(message.starts_with(expected), "{message}");
        drop(first);
        assert_eq!(memory.allocate(3 * 4096).unwrap().gpa(), 0x10_0000, "the dropped area is free again");
        assert_eq!(memory.allocate_aligned(4096, 0x20_0000).unwrap().gpa(), 0x20_0000);
    }

    #[test]
    fn a_lent_or_leaked_area_is_not_handed_out_again() {
        let memory = Memory::new();
        memory.add(0x10_0000, 3 * 4096).unwrap();
        let mut lent = memory.allocate(4096).unwrap();
        lent.lend();
        drop(lent);
        memory.allocate(4096).unwrap().leak();
        assert_eq!(memory.free_bytes(), 4096);
        let mut returned = memory.allocate(4096).unwrap();
        assert_eq!(returned.gpa(), 0x10_2000);
        returned.lend();
        returned.take_back();
        drop(returned);
        assert_eq!(memory.free_bytes(), 4096);
    }

    #[test]
    fn no_region_comes_to_addresses_that_an_area_of_a_removed_region_has() {
        let memory = Memory::new();
        memory.add(0x10_0000, 0x2000).unwrap();
        let area = memory.allocate(4096).unwrap();
        memory.remove(0x10_0000).unwrap();
        let error = memory.add(0x10_1000, 0x2000).unwrap_err();
        assert!(matches!(error, Error::RegionInUse { other_gpa: 0x10_0000, .. }), "{error}");
        memory.add(0x10_2000, 0x1000).unwrap();
        drop(area);
        memory.add(0x10_0000, 0x2000).unwrap();
        assert_eq!(memory.free_bytes(), 0x3000);
    }
}
