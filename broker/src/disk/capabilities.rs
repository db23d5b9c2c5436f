//! What a disk can do besides reading, writing and flushing.
//!
//! The broker does not try operations on the disk itself: `fallocate(2)` waits for direct I/O that is in flight (of a
//! broker that was killed, for example), and changes the times of the file. The abilities of the usual file systems are
//! known. On other file systems the broker tries the operations on an unnamed file that disappears at once; it does not
//! do so everywhere, because creating a file waits while the file system is frozen.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, fstatfs, open as sys_open};

use super::TMPFS_MAGIC;
use super::geometry::Geometry;
use super::open::Found;
use super::{DiskConfig, DiskKind};

/// `FALLOC_FL_PUNCH_HOLE`, which requires the second flag.
const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// `FALLOC_FL_ZERO_RANGE` that cannot make a file grow.
const ZERO_RANGE: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// The longest range of a file in one call. The file's other I/O waits for the call: 1 GiB takes milliseconds.
const FILE_RANGE_MAX_BYTES: u64 = 1 << 30;
/// The longest range that the kernel has to fill with written zeros: takes tens of milliseconds.
const WRITTEN_RANGE_MAX_BYTES: u64 = 16 << 20;

/// What `fallocate(2)` can do on a disk. A read-only disk has neither operation.
///
/// Both operations leave the size as it is, and their range then reads as zeroes. An operation that is offered can
/// still fail with `EOPNOTSUPP`: a device behind a device mapper may be replaced by one with fewer abilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// `FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`: frees the storage, where that is possible. For discards, and
    /// for write zeroes with unmap.
    pub punch_hole: Option<RangeLimits>,
    /// `FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE`: keeps the storage. For write zeroes without unmap. On a block
    /// device without that command the kernel writes zeros.
    pub zero_range: Option<RangeLimits>,
}

/// The range that one call can cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// The longest range in bytes of one call: a multiple of [`Self::alignment_bytes`], never zero.
    pub max_bytes: u64,
    /// The unit in bytes in which storage is freed: a power of two. A range may begin and end on any logical block, but
    /// only the whole units in it are freed.
    pub alignment_bytes: u32,
}

impl Capabilities {
    pub(super) fn read(found: &Found, config: &DiskConfig, geometry: &Geometry) -> Self {
        match found.kind {
            _ if config.read_only => Self::default(),
            DiskKind::RegularFile => Self::of_file(found, geometry.physical_block_bytes),
            DiskKind::BlockDevice => Self::of_device(&Queue::of(found), geometry.logical_block_bytes),
        }
    }

    fn of_file(found: &Found, alignment_bytes: u32) -> Self {
        let modes = known_modes(found).unwrap_or_else(|| tried_modes(found, alignment_bytes.into()));
        let can = |mode: FallocateFlags| modes.contains(mode);
        let limits = RangeLimits { max_bytes: FILE_RANGE_MAX_BYTES, alignment_bytes };
        Self { punch_hole: can(PUNCH_HOLE).then_some(limits), zero_range: can(ZERO_RANGE).then_some(limits) }
    }

    /// `blkdev_fallocate` (`block/fops.c`) punches holes only with the device's own write zeroes command.
    fn of_device(queue: &Queue, logical_block_bytes: u32) -> Self {
        let granularity = queue.discard_granularity_bytes;
        let alignment_bytes =
            if granularity.is_power_of_two() { granularity.max(logical_block_bytes) } else { logical_block_bytes };
        let limits = |max_bytes: u64| RangeLimits {
            max_bytes: (max_bytes - max_bytes % u64::from(alignment_bytes)).max(alignment_bytes.into()),
            alignment_bytes,
        };
        let own_max_bytes = queue.write_zeroes_max_bytes.min(FILE_RANGE_MAX_BYTES);
        let has_own = own_max_bytes > 0;
        Self {
            punch_hole: has_own.then(|| limits(own_max_bytes)),
            zero_range: Some(limits(if has_own { own_max_bytes } else { WRITTEN_RANGE_MAX_BYTES })),
        }
    }
}

/// An unnamed file in the directory of the disk, if that directory is on the same file system.
fn unnamed_file_beside(found: &Found) -> Option<impl AsFd + use<>> {
    let real_path = fs::read_link(format!("/proc/self/fd/{}", found.file.as_raw_fd())).ok()?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = sys_open(real_path.parent()?, flags, Mode::RUSR | Mode::WUSR).ok()?;
    // A file can be a mount point itself, or have lost its name.
    (fstat(&file).ok()?.st_dev == fstat(&found.file).ok()?.st_dev).then_some(file)
}

fn tried_modes(found: &Found, length_bytes: u64) -> FallocateFlags {
    let Some(trial) = unnamed_file_beside(found) else { return FallocateFlags::empty() };
    let tried = [PUNCH_HOLE, ZERO_RANGE].into_iter().filter(|&mode| fallocate(&trial, mode, 0, length_bytes).is_ok());
    tried.fold(FallocateFlags::empty(), FallocateFlags::union)
}

/// The operations of the file systems that usually hold images. ext4 lacks `ZERO_RANGE` for files without extents, and
/// reports that when the operation is requested.
fn known_modes(found: &Found) -> Option<FallocateFlags> {
    /// `statfs(2)`: ext4, XFS, btrfs, F2FS, bcachefs.
    const HAVE_BOTH: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0xca45_1a4e];
    match fstatfs(&found.file).ok()?.f_type {
        magic if HAVE_BOTH.contains(&magic) => Some(PUNCH_HOLE | ZERO_RANGE),
        TMPFS_MAGIC => Some(PUNCH_HOLE),
        _ => None,
    }
}

/// The limits of a block device (`Documentation/ABI/stable/sysfs-block`); zero where the kernel reports none.
#[derive(Debug, Default)]
struct Queue {
    write_zeroes_max_bytes: u64,
    discard_granularity_bytes: u32,
}

impl Queue {
    fn of(found: &Found) -> Self {
        let device = PathBuf::from(format!("/sys/dev/block/{}", found.device));
        // A partition has the queue of its disk.
        let own = device.join("queue");
        let dir = if own.exists() { own } else { device.join("../queue") };
        Self {
            write_zeroes_max_bytes: attribute(&dir, "write_zeroes_max_bytes").unwrap_or(0),
            discard_granularity_bytes: attribute(&dir, "discard_granularity")
                .and_then(|bytes| bytes.try_into().ok())
                .unwrap_or(0),
        }
    }
}

fn attribute(dir: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_write_zeroes_gets_written_zeros_and_no_holes() {
        let queue = Queue { write_zeroes_max_bytes: 0, discard_granularity_bytes: 0 };
        let found = Capabilities::of_device(&queue, 512);
        assert_eq!(found.punch_hole, None);
        let limits = found.zero_range.unwrap();
        assert_eq!((limits.max_bytes, limits.alignment_bytes), (WRITTEN_RANGE_MAX_BYTES, 512));
    }

    #[test]
    fn the_ranges_of_a_device_are_bounded_multiples_of_its_unit() {
        let device = |write_zeroes_max_bytes, discard_granularity_bytes| {
            let queue = Queue { write_zeroes_max_bytes, discard_granularity_bytes };
            let found = Capabilities::of_device(&queue, 512);
            assert_eq!(found.punch_hole, found.zero_range);
            found.punch_hole.map(|limits| (limits.max_bytes, limits.alignment_bytes)).unwrap()
        };
        assert_eq!(device(4_294_966_784, 4096), (1 << 30, 4096));
        assert_eq!(device(65_536 + 512, 4096), (65_536, 4096));
        assert_eq!(device(512, 4096), (4096, 4096));
        assert_eq!(device(65_536, 3000), (65_536, 512));
        assert_eq!(device(65_536, 0), (65_536, 512));
    }
}
