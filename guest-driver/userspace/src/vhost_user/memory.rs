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

/// The RAM of a guest. It is given away in [`RamArea`]s and does not come back.
#[derive(Debug)]
pub(super) struct Memory {
    regions: Mutex<Vec<(Region, RamAllocator)>>,
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
        let region = Region { gpa, len_bytes, file: Arc::new(file), ram };
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
        for (_, allocator) in regions.iter_mut() {
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
        let (_, allocator) = found.ok_or(Error::NoMemory)?;
        Ok(allocator.allocate(len_bytes)?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Region, RamAllocator)>> {
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
