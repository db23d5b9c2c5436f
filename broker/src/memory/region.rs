//! The guest's RAM as regions of (guest-physical address, file, offset).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use ringpass_guest_abi::{FixedAddressing, GPA_LIMIT};

use super::layout::{SCRATCH_BYTES, limit_gpa, slot_shift_for};
use super::{IOVA_BASE, IovaLayout, MemoryError};
use crate::limits::grow_beyond_cap;

/// `f_type` of tmpfs, memfds included (`<linux/magic.h>`).
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `f_type` of hugetlbfs, memfds with huge pages included (`<linux/magic.h>`).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A region as a front-end describes it, not checked yet.
#[derive(Clone, Debug)]
pub struct RegionConfig {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// The file with its pages, open for reading and writing.
    pub file: Arc<File>,
    /// The offset of the region in the file, in bytes.
    pub file_offset_bytes: u64,
}

/// The kind of file that holds a region's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// A memfd or tmpfs file with ordinary pages.
    Shmem,
    /// A hugetlbfs file, or a memfd with huge pages of this size.
    Hugetlb {
        /// Size of a huge page in bytes.
        page_bytes: u64,
    },
}

impl Backing {
    /// The granularity of mappings of such a file, in bytes.
    pub fn page_bytes(self) -> u64 {
        match self {
            Self::Shmem => 4096,
            Self::Hugetlb { page_bytes } => page_bytes,
        }
    }
}

impl RegionConfig {
    /// Whether both name the same pages at the same address.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (self.gpa, self.len_bytes, self.file_offset_bytes) == (other.gpa, other.len_bytes, other.file_offset_bytes)
            && Arc::ptr_eq(&self.file, &other.file)
    }
}

/// A checked region.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) config: RegionConfig,
    pub(crate) backing: Backing,
}

impl Region {
    /// The guest-physical addresses of the region. They do not overflow: the region ends at or below 16 TiB.
    fn range(&self) -> Range<u64> {
        self.config.gpa..self.config.gpa + self.config.len_bytes
    }

    /// Whether both name the same pages at the same address.
    fn is_same(&self, other: &Self) -> bool {
        self.config.is_same(&other.config)
    }
}

/// The guest's RAM: checked, and mapped so that areas in it have host addresses.
///
/// The mapping is shared with the guest and never referenced: all accesses are [`vm_memory`]'s volatile operations, or
/// the kernel's.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    mapped: GuestMemoryMmap,
    layout: IovaLayout,
    scratch: Arc<OwnedFd>,
}

impl GuestMemory {
    /// Checks the regions and maps them. Nothing is pinned yet.
    ///
    /// The slots are as small as the table of 16384 fixed buffers allows for these regions, because no check but the
    /// bounds of a slot limits how much work one SQE of the guest is: 4 MiB for guests whose RAM ends below 64 GiB.
    ///
    /// # Errors
    ///
    /// Names the first region that is empty, not aligned to its file's pages, above 16 TiB, overlapping another, longer
    /// than its file, not writable, or on a file system whose pages the kernel cannot pin.
    pub fn new(configs: impl IntoIterator<Item = RegionConfig>) -> Result<Self, MemoryError> {
        Self::with_room_up_to(configs, 0)
    }

    /// The same, with slots that also reach memory up to `end_gpa` that comes later, at most 16 TiB.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_room_up_to(configs: impl IntoIterator<Item = RegionConfig>, end_gpa: u64) -> Result<Self, MemoryError> {
        let scratch = scratch_file().map_err(MemoryError::system("making the scratch file for holes in guest RAM"))?;
        let regions = configs.into_iter().map(check).collect::<Result<Vec<_>, _>>()?;
        let end_gpa = regions.iter().map(|region| region.range().end).max().unwrap_or(0).max(end_gpa.min(GPA_LIMIT));
        let slot_shift = slot_shift_for(end_gpa).expect("regions end at or below 16 TiB");
        Self::build(regions, Arc::new(scratch), slot_shift)
    }

    /// The same memory with one more region. The slots keep their size.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`MemoryError::AboveSlots`].
    pub fn with_region(&self, config: RegionConfig) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(check(config)?);
        Self::build(regions, self.scratch.clone(), self.layout.slot_shift())
    }

    /// The memory with these regions instead; a region that is the same as here, file included, stays the same memory.
    /// The slots keep their size.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`MemoryError::AboveSlots`].
    pub fn with_regions(&self, configs: impl IntoIterator<Item = RegionConfig>) -> Result<Self, MemoryError> {
        let regions = configs.into_iter().map(check).collect::<Result<_, _>>()?;
        Self::build(regions, self.scratch.clone(), self.layout.slot_shift())
    }

    fn build(mut regions: Vec<Region>, scratch: Arc<OwnedFd>, slot_shift: u32) -> Result<Self, MemoryError> {
        if regions.is_empty() {
            return Err(MemoryError::NoRegions);
        }
        let limit_gpa = limit_gpa(slot_shift);
        if let Some(Region { config, .. }) = regions.iter().find(|region| region.range().end > limit_gpa) {
            return Err(MemoryError::AboveSlots { gpa: config.gpa, len_bytes: config.len_bytes, limit_gpa });
        }
        regions.sort_by_key(|region| region.config.gpa);
        for pair in regions.windows(2) {
            let (earlier, later) = (&pair[0], &pair[1]);
            if later.range().start < earlier.range().end {
                return Err(MemoryError::Overlap {
                    gpa: later.config.gpa,
                    len_bytes: later.config.len_bytes,
                    other_gpa: earlier.config.gpa,
                    other_len_bytes: earlier.config.len_bytes,
                });
            }
        }
        let mapped = regions.iter().map(map).collect::<Result<Vec<_>, _>>()?;
        let mapped = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| MemoryError::System { what: "mapping guest memory", source: io::Error::other(error) })?;
        let layout =
            IovaLayout::new(slot_shift, regions.iter().map(|region| (region.config.gpa, region.config.len_bytes)));
        Ok(Self { regions, mapped, layout, scratch })
    }

    /// The memory as `vm-memory` sees it.
    pub fn mapped(&self) -> &GuestMemoryMmap {
        &self.mapped
    }

    /// The memory as fixed buffers.
    pub fn layout(&self) -> &IovaLayout {
        &self.layout
    }

    /// The rule for addresses in the SQEs of rings over this memory.
    pub fn addressing(&self) -> FixedAddressing {
        FixedAddressing::new(IOVA_BASE, self.layout.slot_shift()).expect("both are in range")
    }

    /// Bytes of RAM.
    pub fn len_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.config.len_bytes).sum()
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub(super) fn scratch(&self) -> &OwnedFd {
        &self.scratch
    }

    /// Whether `span` of this memory holds the same pages in `other`.
    pub(super) fn has_same_span(&self, span: &super::Span, other: &Self) -> bool {
        let Some(theirs) = other.layout.spans().iter().find(|theirs| theirs.index == span.index) else { return false };
        let same_piece = |(mine, theirs): (&super::Piece, &super::Piece)| match (mine.source, theirs.source) {
            (super::Source::Region { region, .. }, super::Source::Region { region: their_region, .. }) => {
                mine.gpa == theirs.gpa
                    && mine.len_bytes == theirs.len_bytes
                    && self.regions[region].is_same(&other.regions[their_region])
            }
            _ => mine == theirs,
        };
        span.pieces.len() == theirs.pieces.len() && span.pieces.iter().zip(&theirs.pieces).all(same_piece)
    }

    /// The host address of `len_bytes` bytes at `gpa`, which must lie inside one region.
    pub(crate) fn host_address(&self, gpa: u64, len_bytes: u64) -> Result<*mut u8, MemoryError> {
        let outside = || MemoryError::OutsideRam { gpa, len_bytes };
        let len = usize::try_from(len_bytes).map_err(|_| outside())?;
        let slice = self.mapped.get_slice(GuestAddress(gpa), len).map_err(|_| outside())?;
        Ok(slice.ptr_guard_mut().as_ptr())
    }

    /// Writes zeroes over `len_bytes` bytes at `gpa`.
    pub(crate) fn zero(&self, gpa: u64, len_bytes: u64) -> Result<(), MemoryError> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len_bytes {
            let chunk = (len_bytes - done).min(ZEROES.len() as u64);
            self.mapped
                .write_slice(&ZEROES[..chunk as usize], GuestAddress(gpa + done))
                .map_err(|_| MemoryError::OutsideRam { gpa, len_bytes })?;
            done += chunk;
        }
        Ok(())
    }
}

/// Refuses a region that direct mode cannot use; the error names the reason.
fn check(config: RegionConfig) -> Result<Region, MemoryError> {
    let RegionConfig { gpa, len_bytes, ref file, file_offset_bytes } = config;
    if len_bytes == 0 {
        return Err(MemoryError::Empty { gpa });
    }
    if gpa.checked_add(len_bytes).is_none_or(|end| end > GPA_LIMIT) {
        return Err(MemoryError::TooHigh { gpa, len_bytes });
    }
    let flags = rustix::fs::fcntl_getfl(file).map_err(MemoryError::system("reading the flags of a memory file"))?;
    if !flags.contains(OFlags::RDWR) {
        return Err(MemoryError::NotWritable { gpa, file: file_name(file) });
    }
    let backing = backing_of(gpa, file)?;
    let page_bytes = backing.page_bytes();
    for (what, value) in [("address", gpa), ("length", len_bytes), ("file offset", file_offset_bytes)] {
        if value % page_bytes != 0 {
            return Err(MemoryError::Unaligned { gpa, what, value, page_bytes, file: file_name(file) });
        }
    }
    let file_bytes = file.metadata().map_err(MemoryError::system("reading the size of a memory file"))?.len();
    let needed_bytes = file_offset_bytes.saturating_add(len_bytes);
    if needed_bytes > file_bytes {
        return Err(MemoryError::FileTooShort { gpa, file: file_name(file), needed_bytes, file_bytes });
    }
    Ok(Region { config, backing })
}

/// The kind of a region's file, by its file system.
fn backing_of(gpa: u64, file: &File) -> Result<Backing, MemoryError> {
    let stat = rustix::fs::fstatfs(file).map_err(MemoryError::system("looking up the file system of a memory file"))?;
    match stat.f_type as u64 {
        TMPFS_MAGIC => Ok(Backing::Shmem),
        HUGETLBFS_MAGIC => Ok(Backing::Hugetlb { page_bytes: stat.f_bsize as u64 }),
        other => Err(MemoryError::NotPinnable { gpa, file: file_name(file), file_system: file_system_name(other) }),
    }
}

/// Names of the file systems on which guest memory is likely to lie by mistake (`<linux/magic.h>`).
fn file_system_name(f_type: u64) -> String {
    match f_type {
        0xef53 => "ext4".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        0x2fc1_2fc1 => "zfs".into(),
        0x794c_7630 => "overlayfs".into(),
        0x6969 => "nfs".into(),
        0x6573_5546 => "fuse".into(),
        other => format!("a file system of type {other:#x}"),
    }
}

/// The name of the file in `/proc`, for errors only.
pub(super) fn file_name(file: &File) -> String {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_or_else(|_| "its file".into(), |path| path.display().to_string())
}

/// Maps a region shared, at an address that the kernel chooses.
fn map(region: &Region) -> Result<GuestRegionMmap, MemoryError> {
    const PROT: i32 = nix::libc::PROT_READ | nix::libc::PROT_WRITE;
    const FLAGS: i32 = nix::libc::MAP_SHARED | nix::libc::MAP_NORESERVE;
    let RegionConfig { gpa, len_bytes, ref file, file_offset_bytes } = region.config;
    let failed = |source: io::Error| MemoryError::System { what: "mapping a region of guest memory", source };
    let len = usize::try_from(len_bytes).map_err(|error| failed(io::Error::other(error)))?;
    let mmap: MmapRegion = MmapRegionBuilder::new(len)
        .with_mmap_prot(PROT)
        .with_mmap_flags(FLAGS)
        .with_file_offset(FileOffset::from_arc(file.clone(), file_offset_bytes))
        .with_hugetlbfs(matches!(region.backing, Backing::Hugetlb { .. }))
        .build()
        .map_err(|error| failed(io::Error::other(error)))?;
    GuestRegionMmap::new(mmap, GuestAddress(gpa)).ok_or(MemoryError::TooHigh { gpa, len_bytes })
}

/// The memory that fills holes inside a slot: it belongs to this guest alone and has a fixed size.
fn scratch_file() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let scratch = rustix::fs::memfd_create("ringpass-scratch", flags)?;
    // The process may limit the size of files because of its disk.
    grow_beyond_cap(SCRATCH_BYTES, || Ok(rustix::fs::ftruncate(&scratch, SCRATCH_BYTES)?))?;
    rustix::fs::fcntl_add_seals(&scratch, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(scratch)
}
