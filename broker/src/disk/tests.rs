//! Tests of disks without a block device; those with one are in the end-to-end tests.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::time::Instant;

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, fcntl_getfl, memfd_create, mkfifoat};

use super::*;

fn image(size_bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    (dir, path)
}

fn in_page_cache(path: &Path) -> DiskConfig {
    DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(path) }
}

/// Asserts that the message of the refusal names the path and contains all of `parts`.
fn assert_refused(config: &DiskConfig, parts: &[&str]) {
    let message = Disk::open(config).unwrap_err().to_string();
    for part in parts.iter().chain([&config.path.to_str().unwrap()]) {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[test]
fn a_file_in_the_page_cache_has_blocks_of_512_bytes() {
    let (_dir, path) = image(3 * 512);
    let disk = Disk::open(&in_page_cache(&path)).unwrap();
    assert_eq!(disk.size_bytes(), 3 * 512);
    assert_eq!(disk.logical_block_bytes(), 512);
    assert!(disk.physical_block_bytes().is_power_of_two());
    assert!(disk.physical_block_bytes() >= 512);
    assert_eq!(disk.kind(), DiskKind::RegularFile);
    assert!(!disk.is_direct_io());
    assert!(!disk.is_read_only());
    assert_eq!(disk.path(), path);
}

#[test]
fn the_size_is_checked_against_the_logical_block_at_the_start_and_at_each_refresh() {
    let (_dir, path) = image(3 * 4096);
    let logical_block = LogicalBlock::Bytes(4096);
    let disk = Disk::open(&DiskConfig { logical_block, ..DiskConfig::new(&path) }).unwrap();
    assert_eq!(disk.logical_block_bytes(), 4096);
    for size_bytes in [4 * 4096 + 512, 512, 0] {
        rustix::fs::ftruncate(&disk, size_bytes).unwrap();
        assert!(disk.refresh_size().is_err(), "{size_bytes}");
        assert_eq!(disk.size_bytes(), 3 * 4096, "the old size stays");
    }
    rustix::fs::ftruncate(&disk, 8192).unwrap();
    assert_eq!(disk.refresh_size().unwrap(), 8192);
    drop(disk);
    File::options().write(true).open(&path).unwrap().set_len(8192 + 512).unwrap();
    assert_refused(
        &DiskConfig { logical_block, ..DiskConfig::new(&path) },
        &["8704 bytes", "not a multiple of its 4096-byte blocks", "or leave out --logical-block-size"],
    );
    let disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    assert_eq!((disk.logical_block_bytes(), disk.size_bytes()), (512, 8704));
}

#[test]
fn direct_io_is_reported_as_the_open_file_has_it() {
    let (_dir, path) = image(1 << 20);
    let disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    let flags = fcntl_getfl(&disk).unwrap();
    assert_eq!(flags.contains(OFlags::DIRECT), disk.is_direct_io());
    assert!(disk.logical_block_bytes().is_power_of_two());
    assert!(rustix::io::fcntl_getfd(&disk).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    assert!(!flags.contains(OFlags::NONBLOCK), "io_uring fails instead of waiting on such a file");
}

#[test]
fn a_tmpfs_file_is_opened_without_direct_io_and_refused_when_direct_io_is_demanded() {
    let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 4096).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
    let disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    assert!(!disk.is_direct_io());
    assert!(!fcntl_getfl(&disk).unwrap().contains(OFlags::DIRECT));
    drop(disk);
    assert_refused(
        &DiskConfig { direct_io: DirectIo::On, ..DiskConfig::new(&path) },
        &["has no direct I/O (O_DIRECT)", "use the page cache", "ext4 or XFS"],
    );
}

#[test]
fn a_file_system_that_refuses_o_direct_is_served_from_the_page_cache_unless_direct_io_is_demanded() {
    // hugetlbfs: its open(2) gives EINVAL for O_DIRECT. No huge page is needed for a file without content.
    let Ok(file) = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) else {
        eprintln!("skipped: this kernel has no huge pages");
        return;
    };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let config = |direct_io| DiskConfig { read_only: true, direct_io, ..DiskConfig::new(&path) };
    assert_refused(&config(DirectIo::On), &["has no direct I/O (O_DIRECT)"]);
    assert_refused(&config(DirectIo::Auto), &["a size of zero bytes"]);
}

#[test]
fn a_read_only_disk_cannot_be_written() {
    let (_dir, path) = image(4096);
    let disk = Disk::open(&DiskConfig { read_only: true, ..in_page_cache(&path) }).unwrap();
    assert!(disk.is_read_only());
    assert_eq!(rustix::io::pwrite(&disk, &[1; 512], 0).unwrap_err(), rustix::io::Errno::BADF);
}

#[test]
fn a_symbolic_link_is_followed() {
    let (dir, path) = image(4096);
    let link = dir.path().join("by-id");
    symlink(&path, &link).unwrap();
    let disk = Disk::open(&in_page_cache(&link)).unwrap();
    assert_refused(&in_page_cache(&path), &["is locked"]);
    assert_eq!(disk.path(), link);
}

#[test]
fn a_path_to_something_else_is_refused_by_its_kind_and_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    assert_refused(&DiskConfig::new(dir.path()), &["is a directory: a disk is a regular file or a block device"]);
    assert_refused(&DiskConfig::new("/dev/null"), &["is a character device"]);
    let fifo = dir.path().join("fifo");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    for read_only in [false, true] {
        assert_refused(&DiskConfig { read_only, ..DiskConfig::new(&fifo) }, &["is a named pipe"]);
    }
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert_refused(&DiskConfig::new(&socket), &["is a socket"]);
}

#[test]
fn a_missing_file_is_refused_with_the_command_that_creates_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("no such disk");
    assert_refused(
        &DiskConfig::new(&path),
        &["cannot open disk", "for reading and writing", "No such file", "truncate -s 10G '", "no such disk'`"],
    );
    assert!(!path.exists());
}

#[test]
fn an_error_of_open_is_passed_on_with_the_remedy() {
    let (_dir, path) = image(512);
    let error = |errno: rustix::io::Errno, read_only| {
        DiskError::Open { path: path.clone(), read_only, error: errno.into() }.to_string()
    };
    let denied = error(rustix::io::Errno::ACCESS, false);
    assert!(denied.contains("Permission denied"), "{denied}");
    assert!(denied.contains("`ls -l ") && denied.ends_with("or open it read-only"), "{denied}");
    let denied = error(rustix::io::Errno::ACCESS, true);
    assert!(denied.contains("for reading:") && denied.ends_with("disk.img`"), "{denied}");
    assert!(error(rustix::io::Errno::ROFS, false).ends_with("Open it read-only"));
    assert!(error(rustix::io::Errno::NXIO, false).ends_with("No driver serves this device number"));
    // Not shown with a running program: Linux 6.11 and 6.12 let it be opened.
    assert!(error(rustix::io::Errno::TXTBSY, false).ends_with("It is being executed or used as swap space"));
    assert!(error(rustix::io::Errno::NOMEDIUM, false).ends_with("Insert a medium"));
}

#[test]
fn no_advice_is_given_that_the_operator_cannot_follow() {
    let open = |path: &str, read_only, errno: rustix::io::Errno| {
        DiskError::Open { path: path.into(), read_only, error: errno.into() }.to_string()
    };
    let missing = open("no.img", true, rustix::io::Errno::NOENT);
    assert!(!missing.contains("truncate") && missing.ends_with("Check the path"), "{missing}");
    let missing = open("/dev/no-disk", false, rustix::io::Errno::NOENT);
    assert!(!missing.contains("truncate") && missing.contains("`lsblk`"), "{missing}");
    let denied = open("/no/file/that/anybody/may/read", false, rustix::io::Errno::ACCESS);
    assert!(!denied.contains("read-only") && denied.contains("`ls -l "), "{denied}");
    let size_bytes = i64::MAX as u64;
    let partial =
        DiskError::PartialBlock { path: "d.img".into(), size_bytes, logical_block_bytes: 512, is_block_device: false };
    let largest = format!("`truncate -s {} d.img`", size_bytes - 511);
    assert!(partial.to_string().ends_with(&largest), "{partial}");
}

#[test]
fn an_empty_file_is_refused() {
    let (_dir, path) = image(0);
    assert_refused(&in_page_cache(&path), &["a size of zero bytes", "truncate -s 10G "]);
}

#[test]
fn a_file_with_a_partial_block_is_refused_and_left_as_it_was() {
    let (_dir, path) = image(1000);
    assert_refused(
        &in_page_cache(&path),
        &["1000 bytes", "not a multiple of its 512-byte blocks", "could not reach the last 488", "truncate -s 1024 "],
    );
    assert_eq!(fs::metadata(&path).unwrap().len(), 1000);
}

#[test]
fn a_file_with_a_partial_large_block_is_refused_with_both_remedies() {
    let error = DiskError::PartialBlock {
        path: "d.img".into(),
        size_bytes: 4096 + 512,
        logical_block_bytes: 4096,
        is_block_device: false,
    };
    let message = error.to_string();
    assert!(message.contains("`truncate -s 8192 d.img`, or leave out --logical-block-size"), "{message}");
}

#[test]
fn a_locked_file_is_refused_and_the_holder_is_named() {
    let (_dir, path) = image(4096);
    let held = Disk::open(&in_page_cache(&path)).unwrap();
    let own = format!("[{}]", std::process::id());
    assert_refused(&in_page_cache(&path), &["is locked: by ", &own, "Stop that process first"]);
    assert_refused(&DiskConfig { read_only: true, ..in_page_cache(&path) }, &["is locked for writing: by ", &own]);
    drop(held);
    Disk::open(&in_page_cache(&path)).unwrap();
}

#[test]
fn read_only_disks_share_a_file_and_keep_writers_out() {
    let (_dir, path) = image(4096);
    let read_only = DiskConfig { read_only: true, ..in_page_cache(&path) };
    let _first = Disk::open(&read_only).unwrap();
    let second = Disk::open(&read_only).unwrap();
    assert_refused(&in_page_cache(&path), &["is locked: by "]);
    drop(second);
    assert_refused(&in_page_cache(&path), &["is locked: by "]);
}

#[test]
fn the_lock_lasts_as_long_as_any_descriptor_of_the_disk() {
    let (_dir, path) = image(4096);
    let disk = Disk::open(&in_page_cache(&path)).unwrap();
    let other = disk.as_fd().try_clone_to_owned().unwrap();
    // Closing an unrelated descriptor of the file drops a POSIX lock; this one must stay.
    drop(File::open(&path).unwrap());
    drop(disk);
    assert_refused(&in_page_cache(&path), &["is locked"]);
    drop(other);
    Disk::open(&in_page_cache(&path)).unwrap();
}

#[test]
fn waiting_for_a_lock_is_bounded() {
    let (_dir, path) = image(4096);
    let _held = Disk::open(&in_page_cache(&path)).unwrap();
    let limit = Duration::from_millis(150);
    let started = Instant::now();
    assert_refused(
        &DiskConfig { lock_wait: Some(limit), ..in_page_cache(&path) },
        &["is locked (still so after waiting 0."],
    );
    assert!(started.elapsed() >= limit);
}

#[test]
fn waiting_for_a_lock_ends_when_it_is_released() {
    let (_dir, path) = image(4096);
    let held = Disk::open(&in_page_cache(&path)).unwrap();
    let config = DiskConfig { lock_wait: Some(Duration::from_secs(60)), ..in_page_cache(&path) };
    let waiting = std::thread::spawn(move || Disk::open(&config).map(|disk| disk.size_bytes()));
    std::thread::sleep(Duration::from_millis(30));
    assert!(!waiting.is_finished());
    // The size is read once the lock is ours.
    rustix::fs::ftruncate(&held, 8192).unwrap();
    drop(held);
    assert_eq!(waiting.join().unwrap().unwrap(), 8192);
}

#[test]
fn a_lock_without_a_visible_holder_is_explained() {
    let error = DiskError::Locked {
        path: "d.img".into(),
        read_only: false,
        holders: Vec::new(),
        devices: Vec::new(),
        waited: Duration::ZERO,
    };
    let message = error.to_string();
    assert!(message.contains("I/O still in flight from a process that has ended"), "{message}");
    let error = DiskError::InUse { path: "/dev/x".into(), uses: Vec::new(), waited: Duration::ZERO };
    assert!(error.to_string().contains("I/O still in flight from a process that has ended"), "{error}");
}

#[test]
fn a_file_system_without_locks_is_refused_with_the_reason() {
    let error = DiskError::Lock { path: "d.img".into(), error: rustix::io::Errno::NOLCK.into() };
    let message = error.to_string();
    assert!(message.contains("cannot lock disk \"d.img\": No locks available"), "{message}");
    assert!(message.contains("two brokers could write to it"), "{message}");
}
