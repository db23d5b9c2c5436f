//! Guest RAM: regions of memfds at guest-physical addresses.

use std::{fs::File, sync::Arc};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MmapRegion,
};

/// Where the front-end says that guest address 0 is in its own address space. Any number will do: the back-end only
/// calculates with it. It differs from the guest-physical addresses, so that a back-end that confuses them fails.
const USER_BASE: u64 = 0x5100_0000_0000;

/// A region of guest RAM.
#[derive(Debug, Clone)]
pub struct RamRegion {
    gpa: u64,
    len_bytes: u64,
    offset_bytes: u64,
    user_addr: u64,
    file: Arc<File>,
    mapped: Arc<GuestRegionMmap>,
}

impl RamRegion {
    /// New memory of `len_bytes` at `gpa`, both multiples of the page size, in a memfd of its own.
    ///
    /// # Errors
    ///
    /// The machine has no memory left.
    pub fn new(gpa: u64, len_bytes: u64) -> Result<Self> {
        Self::of_file(new_file(len_bytes)?, 0, gpa, len_bytes)
    }

    /// The part of a file from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// The file cannot be mapped.
    pub fn of_file(file: Arc<File>, offset_bytes: u64, gpa: u64, len_bytes: u64) -> Result<Self> {
        let part = FileOffset::from_arc(file.clone(), offset_bytes);
        let mapping = MmapRegion::from_file(part, usize::try_from(len_bytes)?).context("cannot map guest RAM")?;
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(gpa)).context("a region past the last address")?;
        // Regions that adjoin for the guest do not adjoin for the front-end.
        let user_addr = USER_BASE + 2 * gpa;
        Ok(Self { gpa, len_bytes, offset_bytes, user_addr, file, mapped: Arc::new(mapped) })
    }

    /// Guest-physical address of the region.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length of the region.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The file that the region is a part of.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The region in the messages of vhost-user.
    pub fn message(&self) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(self.gpa, self.len_bytes, self.user_addr, self.offset_bytes)
    }

    /// An arena of the whole region.
    pub fn arena(&self) -> Arena {
        Arena::new(self.gpa, self.len_bytes)
    }
}

/// Guest RAM: the regions, and the guest's access to them.
#[derive(Debug, Clone)]
pub struct Ram {
    regions: Vec<RamRegion>,
    memory: GuestMemoryMmap,
}

impl Ram {
    /// These regions, in the order in which the front-end tells them to the back-end.
    ///
    /// # Errors
    ///
    /// There are none, or two overlap.
    pub fn new(regions: impl IntoIterator<Item = RamRegion>) -> Result<Self> {
        let regions: Vec<RamRegion> = regions.into_iter().collect();
        let mut sorted: Vec<Arc<GuestRegionMmap>> = regions.iter().map(|region| region.mapped.clone()).collect();
        sorted.sort_by_key(|region| region.start_addr());
        let memory = GuestRegionCollection::from_arc_regions(sorted).context("cannot make guest RAM")?;
        Ok(Self { regions, memory })
    }

    /// One region of `len_bytes` at guest address 0.
    ///
    /// # Errors
    ///
    /// The machine has no memory left.
    pub fn single(len_bytes: u64) -> Result<Self> {
        Self::new([RamRegion::new(0, len_bytes)?])
    }

    /// One memfd of `len_bytes` in two regions from guest address 0 on, which adjoin for the guest and are two
    /// mappings.
    ///
    /// # Errors
    ///
    /// The machine has no memory left.
    pub fn in_two_regions(len_bytes: u64) -> Result<Self> {
        let (file, half_bytes) = (new_file(len_bytes)?, len_bytes / 2);
        let half = |number: u64| RamRegion::of_file(file.clone(), number * half_bytes, number * half_bytes, half_bytes);
        Self::new([half(0)?, half(1)?])
    }

    /// The same RAM in other mappings, as the device has it.
    ///
    /// # Errors
    ///
    /// A file cannot be mapped.
    pub fn map_again(&self) -> Result<Self> {
        let again = |region: &RamRegion| {
            RamRegion::of_file(region.file.clone(), region.offset_bytes, region.gpa, region.len_bytes)
        };
        Self::new(self.regions.iter().map(again).collect::<Result<Vec<_>>>()?)
    }

    /// The regions.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The guest's access.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The front-end's address of a guest address, for `SET_VRING_ADDR`.
    ///
    /// # Errors
    ///
    /// There is no RAM at `gpa`.
    pub fn user_addr(&self, gpa: u64) -> Result<u64> {
        let region = self.regions.iter().find(|region| (region.gpa..region.gpa + region.len_bytes).contains(&gpa));
        let region = region.with_context(|| format!("no RAM at {gpa:#x}"))?;
        Ok(region.user_addr + (gpa - region.gpa))
    }
}

fn new_file(len_bytes: u64) -> Result<Arc<File>> {
    let file = File::from(memfd_create("ringpass-test-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(len_bytes)?;
    Ok(Arc::new(file))
}

/// A piece of guest RAM, which the arena hands out from its start to its end.
#[derive(Debug, Clone)]
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// The RAM from `gpa` on.
    pub fn new(gpa: u64, len_bytes: u64) -> Self {
        Self { next: gpa, end: gpa + len_bytes }
    }

    /// Hands out `len_bytes` at a multiple of `align_bytes`.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn take(&mut self, len_bytes: u64, align_bytes: u64) -> Result<u64> {
        let gpa = self.next.next_multiple_of(align_bytes);
        let left = self.end.saturating_sub(gpa);
        let end = gpa.checked_add(len_bytes).filter(|&end| end <= self.end);
        self.next = end.with_context(|| format!("{len_bytes} bytes of RAM asked for, {left} left"))?;
        Ok(gpa)
    }
}
