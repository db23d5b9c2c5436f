//! The RAM of a guest, mapped in this process region by region.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use ringpass_guest_abi::GPA_LIMIT;
use rustix::fs::fstat;

use super::PAGE_BYTES;
use super::free::FreeRam;

/// A range of guest-physical addresses and the file that holds its bytes.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion<'a> {
    /// First byte, guest-physical; a multiple of 4096.
    pub gpa: u64,
    /// Length in bytes; a multiple of 4096 (of the page size, for huge pages), not 0.
    pub len_bytes: u64,
    /// A memfd, or a file on tmpfs or hugetlbfs, open for reading and writing.
    pub file: BorrowedFd<'a>,
    /// Start of the region in the file; a multiple of 4096 (of the page size, for huge pages).
    pub offset_bytes: u64,
}

/// The reason why regions cannot be the RAM of a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// There is no region.
    #[error("a guest needs at least one region of RAM")]
    NoRegions,
    /// A region has no bytes, or does not consist of whole pages.
    #[error(
        "the region at guest-physical {gpa:#x} ({len_bytes:#x} bytes, file offset {offset_bytes:#x}) must consist of \
         whole 4096-byte pages, at least one"
    )]
    NotPages {
        /// Start of the region.
        gpa: u64,
        /// Length of the region.
        len_bytes: u64,
        /// Offset of the region in the file.
        offset_bytes: u64,
    },
    /// A region ends above 16 TiB.
    #[error("the region of {len_bytes:#x} bytes at guest-physical {gpa:#x} does not end below 16 TiB")]
    TooHigh {
        /// Start of the region.
        gpa: u64,
        /// Length of the region.
        len_bytes: u64,
    },
    /// Two regions share addresses.
    #[error("the regions at guest-physical {lower_gpa:#x} ({lower_len_bytes:#x} bytes) and {upper_gpa:#x} overlap")]
    Overlap {
        /// Start of the lower region.
        lower_gpa: u64,
        /// Length of the lower region.
        lower_len_bytes: u64,
        /// Start of the upper region.
        upper_gpa: u64,
    },
    /// A region does not lie inside its file.
    #[error(
        "the region at guest-physical {gpa:#x} ends at byte {end_bytes:#x} of its file, which has {file_bytes:#x} bytes"
    )]
    FileTooShort {
        /// Start of the region.
        gpa: u64,
        /// End of the region in the file.
        end_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The kernel refuses to map a region.
    #[error("cannot map the region of {len_bytes:#x} bytes at guest-physical {gpa:#x}: {source}")]
    Map {
        /// Start of the region.
        gpa: u64,
        /// Length of the region.
        len_bytes: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The only allocator of this RAM has been taken.
    #[error("the allocator of this RAM has already been taken: two allocators would hand out the same bytes")]
    AllocatorTaken,
}

/// A guest's RAM, mapped in this process.
#[derive(Debug)]
pub struct GuestRam {
    /// By ascending address.
    regions: Vec<Region>,
    is_allocator_taken: AtomicBool,
    free: Mutex<FreeRam>,
}

#[derive(Debug)]
struct Region {
    gpa: u64,
    len_bytes: u64,
    mapping: MmapRaw,
}

impl GuestRam {
    /// [`GuestRam::map`] without its contract: the caller accesses no bytes, or keeps the contract.
    pub(crate) fn map_checked(regions: &[RamRegion<'_>]) -> Result<Self, RamError> {
        if regions.is_empty() {
            return Err(RamError::NoRegions);
        }
        let mut regions = regions.to_vec();
        regions.sort_by_key(|region| region.gpa);
        for region in &regions {
            check(region)?;
        }
        for pair in regions.windows(2) {
            let (lower, upper) = (&pair[0], &pair[1]);
            if lower.gpa + lower.len_bytes > upper.gpa {
                return Err(RamError::Overlap {
                    lower_gpa: lower.gpa,
                    lower_len_bytes: lower.len_bytes,
                    upper_gpa: upper.gpa,
                });
            }
        }
        let free = FreeRam::new(regions.iter().map(|region| (region.gpa, region.len_bytes)));
        let regions = regions.iter().map(Region::map).collect::<Result<_, _>>()?;
        Ok(Self { regions, is_allocator_taken: AtomicBool::new(false), free: Mutex::new(free) })
    }

    /// The regions as (guest-physical address, length in bytes), by ascending address.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> {
        self.regions.iter().map(|region| (region.gpa, region.len_bytes))
    }

    /// Notes that the allocator is taken.
    ///
    /// # Errors
    ///
    /// [`RamError::AllocatorTaken`] at the second call.
    pub(super) fn take_allocator(&self) -> Result<(), RamError> {
        match self.is_allocator_taken.swap(true, Ordering::Relaxed) {
            true => Err(RamError::AllocatorTaken),
            false => Ok(()),
        }
    }

    /// The ranges that no area covers.
    pub(super) fn free(&self) -> MutexGuard<'_, FreeRam> {
        // A change of the free ranges does not panic half-way, so the state is valid also after a panic.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address in this process of the `len_bytes` bytes at `gpa`. `None` if they do not all lie in one region.
    pub fn pointer(&self, gpa: u64, len_bytes: u64) -> Option<NonNull<u8>> {
        let end = gpa.checked_add(len_bytes.max(1))?;
        let region = self.regions.iter().find(|region| region.gpa <= gpa && end <= region.gpa + region.len_bytes)?;
        region.byte(usize::try_from(gpa - region.gpa).ok()?)
    }
}

impl Region {
    fn map(region: &RamRegion<'_>) -> Result<Self, RamError> {
        let &RamRegion { gpa, len_bytes, file, offset_bytes } = region;
        let failed = |source| RamError::Map { gpa, len_bytes, source };
        let file_bytes = fstat(file).map_err(|error| failed(error.into()))?.st_size as u64;
        match offset_bytes.checked_add(len_bytes) {
            Some(end_bytes) if end_bytes <= file_bytes => {}
            end => return Err(RamError::FileTooShort { gpa, end_bytes: end.unwrap_or(u64::MAX), file_bytes }),
        }
        let len = usize::try_from(len_bytes).map_err(|error| failed(io::Error::other(error)))?;
        let mapping = MmapOptions::new().offset(offset_bytes).len(len).map_raw(file.as_raw_fd()).map_err(failed)?;
        Ok(Self { gpa, len_bytes, mapping })
    }

    /// The address of one byte of the mapping. `None` behind its end.
    fn byte(&self, offset: usize) -> Option<NonNull<u8>> {
        if offset >= self.mapping.len() {
            return None;
        }
        NonNull::new(self.mapping.as_mut_ptr().wrapping_add(offset))
    }
}

fn check(region: &RamRegion<'_>) -> Result<(), RamError> {
    let &RamRegion { gpa, len_bytes, offset_bytes, .. } = region;
    if len_bytes == 0 || [gpa, len_bytes, offset_bytes].iter().any(|bytes| bytes % PAGE_BYTES != 0) {
        return Err(RamError::NotPages { gpa, len_bytes, offset_bytes });
    }
    match gpa.checked_add(len_bytes) {
        Some(end) if end <= GPA_LIMIT => Ok(()),
        _ => Err(RamError::TooHigh { gpa, len_bytes }),
    }
}
