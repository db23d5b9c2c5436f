use std::fs::{self, File};
use std::path::PathBuf;

use super::*;
use crate::disk::{Capabilities, DirectIo};

fn image(size_bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    (dir, path)
}

#[test]
fn a_locked_disk_is_located_as_if_it_were_free() {
    let (_dir, path) = image(8192);
    for direct_io in [DirectIo::Off, DirectIo::Auto] {
        let config = DiskConfig { direct_io, ..DiskConfig::new(&path) };
        let disk = Disk::open(&config).unwrap();
        let located = Disk::locate(&config).unwrap();
        assert_eq!(located.size_bytes(), disk.size_bytes());
        assert_eq!(located.logical_block_bytes(), disk.logical_block_bytes());
        assert_eq!(located.physical_block_bytes(), disk.physical_block_bytes());
        assert_eq!(located.direct_alignment(), disk.direct_alignment());
        assert_eq!(located.is_direct_io(), disk.is_direct_io());
        assert!(located.try_lock().unwrap_err().is_busy());
        drop(disk);
        located.try_lock().unwrap();
    }
}

#[test]
fn locating_a_disk_does_not_change_it() {
    use std::os::unix::fs::MetadataExt;
    let (dir, path) = image(1 << 20);
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let look = || {
        let found = fs::metadata(&path).unwrap();
        (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec(), found.blocks(), found.len())
    };
    let before = look();
    Disk::locate(&DiskConfig::new(&path)).unwrap();
    assert_eq!(look(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_located_disk_stays_with_the_file_that_was_there_at_first() {
    let (dir, path) = image(8192);
    let located = Disk::locate(&DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(&path) }).unwrap();
    let moved = dir.path().join("moved.img");
    fs::rename(&path, &moved).unwrap();
    fs::write(&path, [0; 512]).unwrap();
    let disk = located.try_lock().unwrap();
    assert_eq!(disk.size_bytes(), 8192);
    assert_eq!(rustix::fs::fstat(&disk).unwrap().st_ino, rustix::fs::stat(&moved).unwrap().st_ino);
}

#[test]
fn a_new_size_is_read_and_an_unusable_size_is_refused() {
    let (_dir, path) = image(8192);
    let config = DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(&path) };
    let located = Disk::locate(&config).unwrap();
    let disk = located.try_lock().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for size_bytes in [16384, 512] {
        file.set_len(size_bytes).unwrap();
        assert_eq!(located.refresh_size().unwrap(), size_bytes);
        assert_eq!(disk.refresh_size().unwrap(), size_bytes);
        assert_eq!((located.size_bytes(), disk.size_bytes()), (size_bytes, size_bytes));
    }
    for (size_bytes, expected) in [(1000, "not a multiple of its 512-byte blocks"), (0, "a size of zero bytes")] {
        file.set_len(size_bytes).unwrap();
        for refused in [located.refresh_size(), disk.refresh_size()] {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert_eq!((located.size_bytes(), disk.size_bytes()), (512, 512));
    }
}

#[test]
fn the_disk_does_exactly_the_operations_that_are_reported() {
    use rustix::fs::{FallocateFlags, fallocate};
    let (_dir, path) = image(1 << 20);
    let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
    let memory_path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory)));
    for path in [path, memory_path] {
        let located = Disk::locate(&DiskConfig::new(&path)).unwrap();
        let capabilities = located.capabilities();
        let disk = located.try_lock().unwrap();
        for (mode, reported) in [
            (FallocateFlags::PUNCH_HOLE, capabilities.punch_hole),
            (FallocateFlags::ZERO_RANGE, capabilities.zero_range),
        ] {
            let done = fallocate(&disk, mode | FallocateFlags::KEEP_SIZE, 4096, 8192);
            assert_eq!(reported.is_some(), done.is_ok(), "{path:?} {mode:?} {done:?}");
            assert!(reported.is_none_or(|limits| {
                limits.alignment_bytes.is_power_of_two() && limits.max_bytes % u64::from(limits.alignment_bytes) == 0
            }));
        }
    }
}

#[test]
fn a_read_only_disk_reports_no_operation_that_changes_it() {
    let (_dir, path) = image(8192);
    let located = Disk::locate(&DiskConfig { read_only: true, ..DiskConfig::new(&path) }).unwrap();
    assert_eq!(located.capabilities(), Capabilities::default());
    assert!(located.is_read_only());
}

#[test]
fn a_disk_in_the_page_cache_needs_no_aligned_memory() {
    let (_dir, path) = image(8192);
    let located = Disk::locate(&DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(&path) }).unwrap();
    assert_eq!(located.direct_alignment(), None);
}
