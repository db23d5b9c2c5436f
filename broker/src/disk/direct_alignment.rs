//! The demands of direct I/O on requests: units of offsets and lengths, and alignment of addresses.
//!
//! These are demands of the file system and of the device below it, and they change while the data stays: XFS reports
//! 4096 bytes instead of 512 once a file shares extents (`cp --reflink`, which plain `cp` does by default). So the
//! guest's logical block never follows them: see [`super::LogicalBlock`].

use std::path::Path;

use rustix::fs::{AtFlags, Statx, StatxFlags, fstatfs, statx};

use super::error::query_error;
use super::open::Found;
use super::{DiskError, SECTOR_BYTES, TMPFS_MAGIC};

/// `STATX_DIO_READ_ALIGN` (Linux 6.14): `stx_dio_read_offset_align` is valid, or the file system has nothing to add.
const DIO_READ_ALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2_0000);
/// The highest alignment known of file systems that do not report theirs.
const UNREPORTED_ALIGNMENT_MAX_BYTES: u32 = 4096;
/// A file system with larger units (XFS with large real-time extents that are shared) is used through the page cache:
/// each finer write would cost two transfers of that size.
const BLOCK_MAX_BYTES: u32 = 64 << 10;

/// The demands of direct I/O (`O_DIRECT`) on a disk. Each value is a power of two in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Offsets and lengths of reads are multiples of this, also the length of each piece of a vectored read: from 512
    /// to [`Self::write_block_bytes`].
    pub read_block_bytes: u32,
    /// The same for writes: at most 64 KiB.
    pub write_block_bytes: u32,
    /// Addresses of buffers are multiples of this: at most [`Self::read_block_bytes`].
    pub memory_bytes: u32,
}

impl DirectAlignment {
    /// The demands of a file. `None`: the file has no direct I/O, although `open(2)` accepted the flag.
    ///
    /// A file system that reports nothing (btrfs; all before Linux 6.1) gets its block size, at most 4096.
    pub(super) fn of_file(found: &Found, path: &Path, preferred_bytes: u32) -> Result<Option<Self>, DiskError> {
        let query = |what| move |errno| query_error(path, what, errno);
        if let Some(reported) = read_statx(found).map_err(query("the direct I/O alignment"))? {
            let read_bytes = reported_read_block(&reported);
            return Ok(Self::reported(reported.stx_dio_offset_align, read_bytes, reported.stx_dio_mem_align));
        }
        // From Linux 6.6 tmpfs accepts the flag and ignores it.
        let has_none = fstatfs(&found.file).map_err(query("the file system"))?.f_type == TMPFS_MAGIC;
        Ok((!has_none).then(|| Self::unreported(preferred_bytes)))
    }

    /// The demands of a block device: whole blocks, and the address alignment that it reports (Linux 6.1), else a
    /// block.
    pub(super) fn of_device(found: &Found, own_block_bytes: u32) -> Self {
        let reported = read_statx(found).ok().flatten().map(|reported| reported.stx_dio_mem_align);
        let memory_bytes = reported.filter(|bytes| bytes.is_power_of_two()).map_or(own_block_bytes, |bytes| bytes);
        Self {
            read_block_bytes: own_block_bytes,
            write_block_bytes: own_block_bytes,
            memory_bytes: memory_bytes.min(own_block_bytes),
        }
    }

    /// From `STATX_DIOALIGN`, where zero means that there is no direct I/O (encrypted or verity files, journaled data).
    ///
    /// Blocks are at least as large as the alignment of buffers, so that each block of a buffer is aligned.
    fn reported(write_bytes: u32, read_bytes: u32, memory_bytes: u32) -> Option<Self> {
        if !write_bytes.is_power_of_two() || !memory_bytes.is_power_of_two() {
            return None;
        }
        let read_bytes = if read_bytes.is_power_of_two() { read_bytes.min(write_bytes) } else { write_bytes };
        let block = |bytes: u32| bytes.max(memory_bytes).max(SECTOR_BYTES);
        let alignment =
            Self { read_block_bytes: block(read_bytes), write_block_bytes: block(write_bytes), memory_bytes };
        (alignment.write_block_bytes <= BLOCK_MAX_BYTES).then_some(alignment)
    }

    /// Where the file system reports nothing, its block size is safe.
    fn unreported(preferred_bytes: u32) -> Self {
        let bytes = if preferred_bytes.is_power_of_two() {
            preferred_bytes.clamp(SECTOR_BYTES, UNREPORTED_ALIGNMENT_MAX_BYTES)
        } else {
            UNREPORTED_ALIGNMENT_MAX_BYTES
        };
        Self { read_block_bytes: bytes, write_block_bytes: bytes, memory_bytes: bytes }
    }
}

/// `None`: the kernel or the file system does not report its demands.
fn read_statx(found: &Found) -> rustix::io::Result<Option<Statx>> {
    let reported = statx(&found.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN | DIO_READ_ALIGN)?;
    Ok((reported.stx_mask & StatxFlags::DIOALIGN.bits() != 0).then_some(reported))
}

/// Zero: reads have the block of writes.
fn reported_read_block(reported: &Statx) -> u32 {
    if reported.stx_mask & DIO_READ_ALIGN.bits() != 0 { reported.stx_dio_read_offset_align } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The blocks of reads and of writes, and the alignment of memory.
    fn reported(write_bytes: u32, read_bytes: u32, memory_bytes: u32) -> Option<(u32, u32, u32)> {
        DirectAlignment::reported(write_bytes, read_bytes, memory_bytes)
            .map(|reported| (reported.read_block_bytes, reported.write_block_bytes, reported.memory_bytes))
    }

    #[test]
    fn reads_of_a_reflinked_file_may_be_finer_than_its_writes() {
        assert_eq!(reported(4096, 512, 512), Some((512, 4096, 512)));
        assert_eq!(reported(4096, 0, 512), Some((4096, 4096, 512)));
        assert_eq!(reported(4096, 4096, 512), Some((4096, 4096, 512)));
        assert_eq!(reported(4096, 8192, 512), Some((4096, 4096, 512)), "reads are never coarser than writes");
        assert_eq!(reported(4096, 1000, 512), Some((4096, 4096, 512)));
    }

    #[test]
    fn a_block_is_at_least_the_memory_alignment_and_a_sector() {
        assert_eq!(reported(512, 0, 4), Some((512, 512, 4)));
        assert_eq!(reported(512, 512, 4096), Some((4096, 4096, 4096)));
        assert_eq!(reported(1, 1, 1), Some((512, 512, 1)));
    }

    #[test]
    fn a_reported_alignment_of_zero_or_above_the_limit_means_no_direct_io() {
        assert_eq!(reported(0, 0, 0), None);
        assert_eq!(reported(512, 512, 0), None);
        assert_eq!(reported(3 * 4096, 512, 512), None);
        assert_eq!(reported(64 << 10, 512, 512), Some((512, 64 << 10, 512)));
        assert_eq!(reported(128 << 10, 512, 512), None);
    }

    #[test]
    fn a_file_system_that_reports_nothing_gets_its_block_size_up_to_4096() {
        let unreported = |preferred_bytes| {
            let alignment = DirectAlignment::unreported(preferred_bytes);
            assert_eq!(alignment.read_block_bytes, alignment.write_block_bytes);
            assert_eq!(alignment.read_block_bytes, alignment.memory_bytes);
            alignment.write_block_bytes
        };
        assert_eq!(unreported(512), 512);
        assert_eq!(unreported(4096), 4096);
        assert_eq!(unreported(1 << 20), 4096);
        assert_eq!(unreported(0), 4096);
        assert_eq!(unreported(3000), 4096);
    }
}
