//! Size and block sizes of an open disk.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, OFlags, SeekFrom, StatxFlags, fcntl_getfl, fcntl_setfl, fstat, fstatfs, ioctl_blkpbszget, ioctl_blksszget,
    seek, statx,
};

use super::open::{Found, query_error};
use super::{DirectIo, DiskConfig, DiskError, DiskKind};

/// Linux's sector: the unit of sizes in the block layer and in virtio-blk, and so the smallest block of a disk.
const SECTOR_BYTES: u32 = 512;
/// Demanded alignments above this are not known to exist where the file system does not tell.
const UNTOLD_ALIGNMENT_MAX_BYTES: u32 = 4096;
/// Network file systems name 1 MiB and more as `st_blksize`; that is what they like to transfer, no unit of writes.
const PHYSICAL_BLOCK_MAX_BYTES: u32 = 64 << 10;
/// `f_type` of tmpfs (`TMPFS_MAGIC`, `statfs(2)`).
pub(super) const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What a guest must know of the disk to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) size_bytes: u64,
    pub(super) logical_block_bytes: u32,
    pub(super) physical_block_bytes: u32,
    pub(super) memory_alignment_bytes: u32,
    pub(super) direct_io: bool,
}

/// What direct I/O demands, each a power of two in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    /// Of offsets and lengths, and so the logical block.
    block_bytes: u32,
    /// Of buffer addresses; at most the block.
    memory_bytes: u32,
}

impl Geometry {
    /// Reads it and refuses what no guest could use. Turns `O_DIRECT` off where the file has none.
    pub(super) fn read(found: &Found, config: &DiskConfig) -> Result<Self, DiskError> {
        let geometry = match found.kind {
            DiskKind::RegularFile => Self::of_file(found, config)?,
            DiskKind::BlockDevice => Self::of_device(found, &config.path)?,
        };
        geometry.check(&config.path, found.kind)?;
        Ok(geometry)
    }

    fn of_file(found: &Found, config: &DiskConfig) -> Result<Self, DiskError> {
        let query = |what| move |errno| query_error(&config.path, what, errno);
        let stat = fstat(&found.file).map_err(query("the size"))?;
        let preferred_bytes = u32::try_from(stat.st_blksize).unwrap_or(SECTOR_BYTES);
        let alignment = if found.direct_io { direct_alignment(found, config, preferred_bytes)? } else { None };
        if found.direct_io && alignment.is_none() {
            let flags = fcntl_getfl(&found.file).map_err(query("the flags"))?;
            fcntl_setfl(&found.file, flags - OFlags::DIRECT).map_err(query("the flags"))?;
        }
        let logical_block_bytes = alignment.map_or(SECTOR_BYTES, |alignment| alignment.block_bytes);
        Ok(Self {
            size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
            logical_block_bytes,
            physical_block_bytes: physical_block(preferred_bytes, logical_block_bytes),
            memory_alignment_bytes: alignment.map_or(1, |alignment| alignment.memory_bytes),
            direct_io: alignment.is_some(),
        })
    }

    fn of_device(found: &Found, path: &Path) -> Result<Self, DiskError> {
        let query = |what| move |errno| query_error(path, what, errno);
        let logical_block_bytes = ioctl_blksszget(&found.file).map_err(query("the logical block size"))?;
        let physical_block_bytes = ioctl_blkpbszget(&found.file).map_err(query("the physical block size"))?;
        let memory_alignment_bytes =
            if found.direct_io { device_memory_alignment(found, logical_block_bytes) } else { 1 };
        Ok(Self {
            size_bytes: device_size(&found.file).map_err(query("the size"))?,
            logical_block_bytes,
            physical_block_bytes: physical_block_bytes.max(logical_block_bytes),
            memory_alignment_bytes,
            direct_io: found.direct_io,
        })
    }

    /// The size in bytes that the disk has by now, if a guest could use it; blocks do not change while it is open.
    pub(super) fn read_size(&self, file: impl AsFd, path: &Path, kind: DiskKind) -> Result<u64, DiskError> {
        let size_bytes = match kind {
            DiskKind::RegularFile => fstat(file).map(|stat| u64::try_from(stat.st_size).unwrap_or(0)),
            DiskKind::BlockDevice => device_size(file),
        };
        let size_bytes = size_bytes.map_err(|errno| query_error(path, "the size", errno))?;
        Self { size_bytes, ..*self }.check(path, kind)?;
        Ok(size_bytes)
    }

    fn check(&self, path: &Path, kind: DiskKind) -> Result<(), DiskError> {
        let is_block_device = kind == DiskKind::BlockDevice;
        if self.size_bytes == 0 {
            return Err(DiskError::Empty { path: path.to_owned(), is_block_device });
        }
        if !self.size_bytes.is_multiple_of(self.logical_block_bytes.into()) {
            return Err(DiskError::PartialBlock {
                path: path.to_owned(),
                size_bytes: self.size_bytes,
                logical_block_bytes: self.logical_block_bytes,
                is_block_device,
            });
        }
        Ok(())
    }
}

fn device_size(file: impl AsFd) -> rustix::io::Result<u64> {
    // The end of a block device is what BLKGETSIZE64 tells; this needs no raw ioctl. The file position that it moves is
    // nobody's: rings name an offset in each request.
    seek(file, SeekFrom::End(0))
}

/// From `STATX_DIOALIGN` (block devices: Linux 6.1), else as it always was: a logical block.
fn device_memory_alignment(found: &Found, logical_block_bytes: u32) -> u32 {
    let told = statx(&found.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told = told.filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    told.map(|told| told.stx_dio_mem_align)
        .filter(|bytes| bytes.is_power_of_two())
        .map_or(logical_block_bytes, |bytes| bytes.min(logical_block_bytes))
}

/// What direct I/O on the file demands. `None`: the file has no direct I/O, although `open(2)` took the flag.
fn direct_alignment(found: &Found, config: &DiskConfig, preferred_bytes: u32) -> Result<Option<Alignment>, DiskError> {
    let query = |what| move |errno| query_error(&config.path, what, errno);
    let told =
        statx(&found.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).map_err(query("the direct I/O alignment"))?;
    let alignment = if told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        told_alignment(told.stx_dio_offset_align, told.stx_dio_mem_align)
    } else if fstatfs(&found.file).map_err(query("the file system"))?.f_type == TMPFS_MAGIC {
        // From Linux 6.6 tmpfs takes the flag and ignores it.
        None
    } else {
        Some(untold_alignment(preferred_bytes))
    };
    if alignment.is_none() && config.direct_io == DirectIo::On {
        return Err(DiskError::NoDirectIo { path: config.path.clone() });
    }
    Ok(alignment)
}

/// From `STATX_DIOALIGN`, where zero means that there is no direct I/O (encrypted or verity files, journaled data).
///
/// The block is no smaller than what buffers need: in direct mode the guest's driver knows the block only.
fn told_alignment(offset_bytes: u32, memory_bytes: u32) -> Option<Alignment> {
    let usable = offset_bytes.is_power_of_two() && memory_bytes.is_power_of_two();
    usable.then(|| Alignment { block_bytes: offset_bytes.max(memory_bytes).max(SECTOR_BYTES), memory_bytes })
}

/// Where the file system tells nothing its block size is safe.
fn untold_alignment(preferred_bytes: u32) -> Alignment {
    let bytes = if preferred_bytes.is_power_of_two() {
        preferred_bytes.clamp(SECTOR_BYTES, UNTOLD_ALIGNMENT_MAX_BYTES)
    } else {
        UNTOLD_ALIGNMENT_MAX_BYTES
    };
    Alignment { block_bytes: bytes, memory_bytes: bytes }
}

fn physical_block(preferred_bytes: u32, logical_block_bytes: u32) -> u32 {
    if preferred_bytes.is_power_of_two() {
        preferred_bytes.min(PHYSICAL_BLOCK_MAX_BYTES).max(logical_block_bytes)
    } else {
        logical_block_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stricter_of_the_two_told_alignments_counts() {
        let told = |offset_bytes, memory_bytes| {
            told_alignment(offset_bytes, memory_bytes).map(|told| (told.block_bytes, told.memory_bytes))
        };
        assert_eq!(told(512, 4), Some((512, 4)));
        assert_eq!(told(4096, 512), Some((4096, 512)));
        assert_eq!(told(512, 4096), Some((4096, 4096)));
        assert_eq!(told(1, 1), Some((512, 1)));
    }

    #[test]
    fn a_told_alignment_of_zero_is_no_direct_io() {
        assert_eq!(told_alignment(0, 0), None);
        assert_eq!(told_alignment(512, 0), None);
    }

    #[test]
    fn a_file_system_that_tells_nothing_gets_its_block_size_up_to_4096() {
        let untold = |preferred_bytes| {
            let alignment = untold_alignment(preferred_bytes);
            assert_eq!(alignment.block_bytes, alignment.memory_bytes);
            alignment.block_bytes
        };
        assert_eq!(untold(512), 512);
        assert_eq!(untold(4096), 4096);
        assert_eq!(untold(1 << 20), 4096);
        assert_eq!(untold(0), 4096);
        assert_eq!(untold(3000), 4096);
    }

    #[test]
    fn the_physical_block_is_a_power_of_two_and_no_smaller_than_the_logical_one() {
        assert_eq!(physical_block(4096, 512), 4096);
        assert_eq!(physical_block(512, 4096), 4096);
        assert_eq!(physical_block(1 << 20, 512), 64 << 10);
        assert_eq!(physical_block(3000, 512), 512);
        assert_eq!(physical_block(0, 512), 512);
    }

    #[test]
    fn a_device_whose_last_block_is_not_whole_is_refused() {
        let geometry = Geometry {
            size_bytes: 4096 * 3 + 512,
            logical_block_bytes: 4096,
            physical_block_bytes: 4096,
            memory_alignment_bytes: 512,
            direct_io: true,
        };
        let refused = geometry.check(Path::new("/dev/x"), DiskKind::BlockDevice).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "disk \"/dev/x\" has 12800 bytes, which is no multiple of its blocks of 4096 bytes: a guest could not \
             reach the last 512. Change the size of the device"
        );
    }
}
