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

/// Why a region or a table is refused. The table in force has not changed.
#[derive(Debug, Error)]
pub enum MemoryTableError {
    /// A region of nothing.
    #[error("the memory region at guest address {gpa:#x} is empty")]
    Empty {
        /// Where it was to begin.
        gpa: u64,
    },
    /// An end that cannot be written down.
    #[error("the memory region at guest address {gpa:#x}: its {field} and length {size_bytes:#x} exceed 64 bits")]
    Wraps {
        /// Where it was to begin.
        gpa: u64,
        /// Which address is too high.
        field: &'static str,
        /// Its length.
        size_bytes: u64,
    },
    /// Two regions at one address.
    #[error("the memory region at guest address {gpa:#x} overlaps the one at {other_gpa:#x}")]
    Overlap {
        /// Where one begins.
        gpa: u64,
        /// Where the other begins.
        other_gpa: u64,
    },
    /// No room for another one.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// Nothing is known of the length of other files.
    #[error("the memory region at guest address {gpa:#x} is not in a regular file (memfd, tmpfs, hugetlbfs, ...)")]
    NotRegular {
        /// Where it was to begin.
        gpa: u64,
    },
    /// Touching what is beyond the end of a file is SIGBUS.
    #[error(
        "the memory region at guest address {gpa:#x} ends at byte {end_bytes:#x} of a file of {file_bytes:#x} bytes"
    )]
    BeyondFile {
        /// Where it was to begin.
        gpa: u64,
        /// Where it ends in its file.
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
        /// Where it was to begin.
        gpa: u64,
        /// What is not aligned.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The page size.
        page_bytes: u64,
    },
    /// The front-end wants to remove what it never added.
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
    /// The kernel refused.
    #[error("the memory region at guest address {gpa:#x}: {what}: {source}")]
    System {
        /// Where it was to begin.
        gpa: u64,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A region that is mapped.
#[derive(Debug, Clone)]
struct Region {
    description: RegionDescription,
    /// Device and inode of its file.
    file: (u64, u64),
    mapping: Arc<GuestRegionMmap<()>>,
}

/// The regions in force, ordered by guest address. A change makes a new table; mappings that stay are shared.
///
/// The memory belongs to the guest, which writes to it at any time, and to the front-end, which could still shorten
/// the file: that ends this process with SIGBUS at the next access, and one line says which region it was.
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
    /// The table as the device uses it.
    pub fn memory(&self) -> Arc<DeviceMemory> {
        Arc::clone(&self.memory)
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// A table of exactly these regions (VHOST_USER_SET_MEM_TABLE). Those of them that this table has keep their
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
    /// The region cannot be mapped or does not fit in.
    pub fn with(&self, description: RegionDescription, fd: OwnedFd) -> Result<Self, MemoryTableError> {
        if self.regions.len() == MAX_REGIONS {
            return Err(MemoryTableError::TooMany);
        }
        let mut regions = self.regions.clone();
        regions.push(CheckedFile::new(&description, fd)?.map(description)?);
        Self::of(regions)
    }

    /// This table without a region (VHOST_USER_REM_MEM_REG), which is known by its addresses and its size.
    ///
    /// # Errors
    ///
    /// There is no such region.
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
            // No overflow: `CheckedFile::new` has looked.
            if earlier.gpa + (earlier.size_bytes - 1) >= later.gpa {
                return Err(MemoryTableError::Overlap { gpa: later.gpa, other_gpa: earlier.gpa });
            }
        }
        let Some(first) = regions.first() else { return Ok(Self::default()) };
        let gpa = first.description.gpa;
        let mappings = regions.iter().map(|region| Arc::clone(&region.mapping)).collect();
        let memory = DeviceMemory::from_arc_regions(mappings).map_err(|error| MemoryTableError::System {
            gpa,
            what: "putting the table together",
            source: io::Error::other(error),
        })?;
        Ok(Self { regions, memory: Arc::new(memory) })
    }

    /// Where an area that the front-end has at `user_address` is for the guest. It must lie in one region.
    pub fn translate(&self, user_address: u64, size_bytes: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let RegionDescription { gpa, size_bytes: region_bytes, user_address: start, .. } = region.description;
            let offset_bytes = user_address.checked_sub(start)?;
            let end_bytes = offset_bytes.checked_add(size_bytes)?;
            (offset_bytes < region_bytes && end_bytes <= region_bytes).then(|| GuestAddress(gpa + offset_bytes))
        })
    }
}

/// A file that holds the region it is said to hold.
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
        let aligned = |field, value: u64| match value.is_multiple_of(page_bytes) {
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
