//! Disks on which io_uring executes writes as a chain.
//!
//! A write that would block goes to a kernel thread of the ring (io-wq). Writes to one regular file go there one after
//! the other, because most file systems take them so anyway: a thread takes all that wait as one chain, and executes it
//! to its end, also when the ring has been closed (`io_get_next_work` in `io_uring/io-wq.c`). A guest decides how long
//! the chain is, so nothing bounds the end of its ring. Measured on Linux 6.18: with 4083 writes of 4 MiB through the
//! page cache outstanding, the ring ended after 3.8 s.
//!
//! Block devices, and file systems that take direct writes side by side (`FOP_DIO_PARALLEL_WRITE`), have no chains:
//! there the kernel cancels what has not begun.

use rustix::fs::fstatfs;

use super::DiskKind;
use super::geometry::Geometry;
use super::open::Found;

/// `f_type` of the file systems that take direct writes side by side (Linux 6.4 and later): ext4 and XFS. ext2 and ext3
/// have the same number as ext4; today's kernels mount them with the driver of ext4, unless they were built with a
/// driver for ext2.
const PARALLEL_FILE_SYSTEMS: [u32; 2] = [0xef53, 0x5846_5342];

/// Whether blocked writes of a ring to this disk become a chain.
pub(super) fn chains_writes(found: &Found, geometry: &Geometry) -> bool {
    // The width of the field differs between architectures; its 32 bits do not.
    let file_system = || fstatfs(&found.file).ok().map(|file_system| file_system.f_type as u32);
    chains(found.kind, geometry.direct.is_some(), file_system)
}

fn chains(kind: DiskKind, is_direct_io: bool, file_system: impl FnOnce() -> Option<u32>) -> bool {
    kind == DiskKind::RegularFile
        && !(is_direct_io && file_system().is_some_and(|magic| PARALLEL_FILE_SYSTEMS.contains(&magic)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_chains_unless_their_file_system_takes_direct_writes_side_by_side() {
        const TMPFS: u32 = 0x0102_1994;
        let of = |kind, is_direct_io, magic| chains(kind, is_direct_io, || magic);
        assert!(!of(DiskKind::RegularFile, true, Some(0xef53)), "ext4");
        assert!(!of(DiskKind::RegularFile, true, Some(0x5846_5342)), "XFS");
        assert!(of(DiskKind::RegularFile, false, Some(0xef53)), "ext4 through the page cache");
        assert!(of(DiskKind::RegularFile, true, Some(TMPFS)));
        assert!(of(DiskKind::RegularFile, true, None));
        assert!(!of(DiskKind::BlockDevice, false, None));
        assert!(!of(DiskKind::BlockDevice, true, None));
    }
}
