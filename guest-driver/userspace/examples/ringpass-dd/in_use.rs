//! Checks whether a file is the served disk, or in use otherwise.
//!
//! The server does not tell which file it serves, and may see other paths. But it holds a lock on the disk while it
//! executes requests (a lock of the open file, `F_OFD_SETLK`), like other programs that use disk images, and the kernel
//! reports locks by file, regardless of the path. A loop device and its backing file, and a partition and its device,
//! are the same disk with different locks: this module checks all of them.
//!
//! The check does not find a disk behind several layers (device mapper on a file), on a file system without locks, or
//! locked on another machine.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// No usual machine has more files for one disk.
const FILES_MAX: usize = 64;

/// Opens a file for overwriting, without changing it. Creates a missing file.
///
/// # Errors
///
/// The file cannot be opened, or is a block device that is in use.
pub(crate) fn open_for_writing(path: &Path) -> Result<File> {
    let name = path.display();
    let is_device = fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let mut options = OpenOptions::new();
    options.write(true);
    if is_device {
        // Exclusive, because mounts and servers open block devices exclusively, too.
        options.custom_flags(libc::O_EXCL);
    } else {
        options.create(true);
    }
    let file = options.open(path);
    ensure!(
        !file.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy),
        "{name} is in use: a server serves it, or it is mounted; give another --output"
    );
    file.with_context(|| format!("cannot open {name} for writing"))
}

/// # Errors
///
/// Another process has a lock on the file, or on another file that is the same disk.
pub(crate) fn check(file: &File, name: &str) -> Result<()> {
    for (other, other_name) in same_disk(file) {
        ensure!(
            !is_locked(&other),
            "{name} is in use{}: it is the disk to read, or another server or virtual machine uses it; give another --output",
            if other_name == Path::new("") { String::new() } else { format!(" as {}", other_name.display()) }
        );
    }
    Ok(())
}

fn is_locked(file: &File) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        // Length 0: to the end of the file.
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}

/// The file, and other files with the same content, with their paths.
fn same_disk(file: &File) -> Vec<(File, PathBuf)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next: Vec<(File, PathBuf)> = file.try_clone().map(|file| (file, PathBuf::new())).into_iter().collect();
    while let Some((file, path)) = next.pop() {
        let Ok(metadata) = file.metadata() else { continue };
        if !seen.insert((metadata.dev(), metadata.ino())) || seen.len() > FILES_MAX {
            continue;
        }
        let others = if metadata.file_type().is_block_device() {
            device_relatives(metadata.rdev())
        } else if metadata.is_file() {
            loop_devices_on(&metadata)
        } else {
            Vec::new()
        };
        for other in others {
            // Opened only to query its locks.
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&other);
            next.extend(opened.map(|file| (file, other)));
        }
        found.push((file, path));
    }
    found
}

/// The backing file of a loop device, the device of a partition, and the partitions of a device.
fn device_relatives(device: u64) -> Vec<PathBuf> {
    let sys = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let Ok(sys) = fs::canonicalize(sys) else { return Vec::new() };
    let mut relatives: Vec<PathBuf> = backing_file(&sys).into_iter().collect();
    if sys.join("partition").exists() {
        relatives.extend(sys.parent().and_then(node));
    }
    let entries = fs::read_dir(&sys).into_iter().flatten().flatten();
    let partitions = entries.map(|entry| entry.path()).filter(|path| path.join("partition").exists());
    relatives.extend(partitions.filter_map(|path| node(&path)));
    relatives
}

/// The loop devices that are backed by a file.
fn loop_devices_on(file: &fs::Metadata) -> Vec<PathBuf> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten().map(|entry| entry.path());
    let is_on_it = |device: &PathBuf| {
        let backing = backing_file(device).and_then(|path| fs::metadata(path).ok());
        backing.is_some_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
    };
    devices.filter(is_on_it).filter_map(|device| node(&device)).collect()
}

fn backing_file(sys: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(sys.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// The device node of a block device, by its directory in sysfs.
fn node(sys: &Path) -> Option<PathBuf> {
    Some(Path::new("/dev").join(sys.file_name()?.to_str()?.replace('!', "/")))
}
