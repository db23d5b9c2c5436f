//! The front-end's memory table: regions of files at guest-physical addresses.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::device::DeviceMemory;
use super::message::RegionDescription;
use crate::lost_memory::watch_ram;

/// How many regions a table can have (VHOST_USER_GET_MAX_MEM_SLOTS). QEMU hands out at most 512, KVM has 509 for
/// memory devices on most machines.
pub const MAX_REGIONS: usize = 512;

/// `f_type` of hugetlbfs, memfds with huge pages included (`<linux/magic.h>`).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Why a region or a table is refused. The table in force stays unchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryTableError {
    /// The region has no bytes.
    #[error("the memory region at guest address {gpa:#x} is empty")]
    Empty {
        /// Guest address of the region.
        gpa: u64,
    },
    /// The end of the region does not fit into 64 bits.
    #[error("the memory region at guest address {gpa:#x}: its {field} and length {size_bytes:#x} exceed 64 bits")]
    Wraps {
        /// Guest address of the region.
        gpa: u64,
        /// The field that is too high.
        field: &'static str,
        /// Length of the region.
        size_bytes: u64,
    },
    /// Two regions overlap for the guest.
    #[error("the memory region at guest address {gpa:#x} overlaps the one at {other_gpa:#x}")]
    Overlap {
        /// Guest address of one region.
        gpa: u64,
        /// Guest address of the other region.
        other_gpa: u64,
    },
    /// The table is full.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// Other kinds of files have no reliable length.
    #[error("the memory region at guest address {gpa:#x} is not in a regular file (memfd, tmpfs, hugetlbfs, ...)")]
    NotRegular {
        /// Guest address of the region.
        gpa: u64,
    },
    /// An access beyond the end of a file raises SIGBUS.
    #[error(
        "the memory region at guest address {gpa:#x} ends at byte {end_bytes:#x} of a file of {file_bytes:#x} bytes"
    )]
    BeyondFile {
        /// Guest address of the region.
        gpa: u64,
        /// Where the region ends in its file.
        end_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The kernel maps whole pages.
    #[error(
        "the memory region at guest address {gpa:#x}: its {field} {value:#x} is not a multiple of its file's page size \
         {page_bytes:#x}"
    )]
    Unaligned {
        /// Guest address of the region.
        gpa: u64,
        /// The field that is not aligned.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The page size.
        page_bytes: u64,
    },
    /// The front-end wants to remove a region that it never added.
    #[error(
        "there is no memory region of {size_bytes:#x} bytes at guest address {gpa:#x}, user address {user_address:#x}"
    )]
    Unknown {
        /// Guest address of the region.
        gpa: u64,
        /// Its length.
        size_bytes: u64,
        /// Its user address.
        user_address: u64,
    },
    /// A system call failed.
    #[error("the memory region at guest address {gpa:#x}: {what} failed: {source}")]
    System {
        /// Guest address of the region.
        gpa: u64,
        /// What the back-end was doing.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A mapped region.
#[derive(Debug, Clone)]
struct Region {
    description: RegionDescription,
    /// Device and inode of its file.
    file: (u64, u64),
    mapping: Arc<GuestRegionMmap<()>>,
}

/// The regions in force, ordered by guest address. A change makes a new table, which shares the mappings that stay.
///
/// The memory belongs to the guest, which may write to it at any time, and to the front-end, which may still shorten
/// the file. Shortening ends this process with SIGBUS at the next access, and one log line names the region.
#[derive(Debug, Clone)]
pub struct MemoryTable {
    regions: Vec<Region>,
    memory: Arc<DeviceMemory>,
}

impl Default for MemoryTable {
    fn default() -> Self {
        Self { regions: Vec::new(), memory: Arc::new(DeviceMemory::new()) }
    }
}

impl MemoryTable {
    /// The table in the form that the device uses.
    pub fn memory(&self) -> Arc<DeviceMemory> {
        Arc::clone(&self.memory)
    }

    /// Whether the table has no memory.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// A table of exactly these regions (VHOST_USER_SET_MEM_TABLE). Regions that this table already has keep their
    /// mapping.
    ///
    /// # Errors
    ///
    /// Names the region that cannot be mapped.
    pub fn replaced(
        &self,
        regions: impl IntoIterator<Item = (RegionDescription, OwnedFd)>,
    ) -> Result<Self, MemoryTableError> {
        let map = |(description, fd)| {
            let file = CheckedFile::new(&description, fd)?;
            match self.regions.iter().find(|known| known.description == description && known.file == file.identity) {
                Some(known) => Ok(known.clone()),
                None => file.map(description),
            }
        };
        Self::of(regions.into_iter().map(map).collect::<Result<_, _>>()?)
    }

    /// This table with one more region (VHOST_USER_ADD_MEM_REG).
    ///
    /// # Errors
    ///
    /// The region cannot be mapped, or the table has no place for it.
    pub fn with(&self, description: RegionDescription, fd: OwnedFd) -> Result<Self, MemoryTableError> {
        if self.regions.len() == MAX_REGIONS {
            return Err(MemoryTableError::TooMany);
        }
        let mut regions = self.regions.clone();
        regions.push(CheckedFile::new(&description, fd)?.map(description)?);
        Self::of(regions)
    }

    /// This table without a region (VHOST_USER_REM_MEM_REG), which is identified by its addresses and its size.
    ///
    /// # Errors
    ///
    /// This table has no such region.
    pub fn without(&self, description: &RegionDescription) -> Result<Self, MemoryTableError> {
        let RegionDescription { gpa, size_bytes, user_address, .. } = *description;
        let is_meant = |known: &RegionDescription| {
            known.gpa == gpa && known.size_bytes == size_bytes && known.user_address == user_address
        };
        let mut regions = self.regions.clone();
        regions.retain(|region| !is_meant(&region.description));
        if regions.len() == self.regions.len() {
            return Err(MemoryTableError::Unknown { gpa, size_bytes, user_address });
        }
        Self::of(regions)
    }

    fn of(mut regions: Vec<Region>) -> Result<Self, MemoryTableError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryTableError::TooMany);
        }
        regions.sort_by_key(|region| region.description.gpa);
        for pair in regions.windows(2) {
            let [earlier, later] = [&pair[0].description, &pair[1].description];
            // No overflow: `CheckedFile::new` has checked it.
            if earlier.gpa + (earlier.size_bytes - 1) >= later.gpa {
                return Err(MemoryTableError::Overlap { gpa: later.gpa, other_gpa: earlier.gpa });
            }
        }
        let Some(first) = regions.first() else { return Ok(Self::default()) };
        let gpa = first.description.gpa;
        let mappings = regions.iter().map(|region| Arc::clone(&region.mapping)).collect();
        let memory = DeviceMemory::from_arc_regions(mappings).map_err(|error| MemoryTableError::System {
            gpa,
            what: "building the table",
            source: io::Error::other(error),
        })?;
        Ok(Self { regions, memory: Arc::new(memory) })
    }

    /// Translates the address of an area in the front-end to its guest address. The area must lie in one region.
    pub fn translate(&self, user_address: u64, size_bytes: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let RegionDescription { gpa, size_bytes: region_bytes, user_address: start, .. } = region.description;
            let offset_bytes = user_address.checked_sub(start)?;
            let end_bytes = offset_bytes.checked_add(size_bytes)?;
            (offset_bytes < region_bytes && end_bytes <= region_bytes).then(|| GuestAddress(gpa + offset_bytes))
        })
    }
}

/// A file that is known to hold its region.
struct CheckedFile {
    file: File,
    identity: (u64, u64),
}

impl CheckedFile {
    fn new(description: &RegionDescription, fd: OwnedFd) -> Result<Self, MemoryTableError> {
        let RegionDescription { gpa, size_bytes, user_address, file_offset_bytes } = *description;
        if size_bytes == 0 {
            return Err(MemoryTableError::Empty { gpa });
        }
        let wraps = |field, address: u64| match address.checked_add(size_bytes) {
            Some(end) => Ok(end),
            None => Err(MemoryTableError::Wraps { gpa, field, size_bytes }),
        };
        wraps("guest address", gpa)?;
        wraps("user address", user_address)?;
        let end_bytes = wraps("offset in its file", file_offset_bytes)?;

        let file = File::from(fd);
        let system =
            |what| move |errno: rustix::io::Errno| MemoryTableError::System { gpa, what, source: errno.into() };
        let stat = rustix::fs::fstat(&file).map_err(system("fstat of its file"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryTableError::NotRegular { gpa });
        }
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if end_bytes > file_bytes {
            return Err(MemoryTableError::BeyondFile { gpa, end_bytes, file_bytes });
        }
        let file_system = rustix::fs::fstatfs(&file).map_err(system("fstatfs of its file"))?;
        let is_huge = file_system.f_type as u64 == HUGETLBFS_MAGIC;
        let page_bytes = if is_huge { file_system.f_bsize as u64 } else { rustix::param::page_size() as u64 };
        let aligned = |field, value: u64| match value % page_bytes == 0 {
            true => Ok(()),
            false => Err(MemoryTableError::Unaligned { gpa, field, value, page_bytes }),
        };
        aligned("offset in its file", file_offset_bytes)?;
        if is_huge {
            // munmap(2) takes whole huge pages only.
            aligned("length", size_bytes)?;
        }
        Ok(Self { file, identity: (stat.st_dev, stat.st_ino) })
    }

    fn map(self, description: RegionDescription) -> Result<Region, MemoryTableError> {
        let RegionDescription { gpa, size_bytes, file_offset_bytes, .. } = description;
        let what = "mapping it";
        let too_long = |_| MemoryTableError::Wraps { gpa, field: "host address", size_bytes };
        let len = usize::try_from(size_bytes).map_err(too_long)?;
        let mapping = MmapRegion::from_file(FileOffset::new(self.file, file_offset_bytes), len).map_err(|error| {
            let source = match error {
                MmapRegionError::Mmap(source) => source,
                other => io::Error::other(other),
            };
            MemoryTableError::System { gpa, what, source }
        })?;
        let wraps = || MemoryTableError::Wraps { gpa, field: "guest address", size_bytes };
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(wraps)?;
        let mapping = Arc::new(mapping);
        watch_ram(&mapping);
        Ok(Region { description, file: self.identity, mapping })
    }
}
