//! Whether a file is the disk that is served, or in use otherwise.
//!
//! The server does not say which file it serves, and may see other paths. But it holds a lock on the disk for as long as it executes
//! requests (a lock of the open file, `F_OFD_SETLK`), as other programs with disk images do, and the kernel tells of locks by the
//! file itself, whatever its path. A loop device and the file behind it, and a partition and its device, are the same disk with
//! different locks: all of them are looked at.
//!
//! Not found is a disk that is behind several layers (device mapper on a file), on a file system without locks, or locked on another
//! machine.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// More would be a strange machine.
const FILES_MAX: usize = 64;

/// Opens a file to be overwritten, without changing it. Makes it if it is not there.
///
/// # Errors
///
/// It cannot be opened, or is a block device that is in use.
pub(crate) fn open_for_writing(path: &Path) -> Result<File> {
    let name = path.display();
    let is_device = fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let mut options = OpenOptions::new();
    options.write(true);
    if is_device {
        // Exclusive, as those who mount or serve it have it.
        options.custom_flags(libc::O_EXCL);
    } else {
        options.create(true);
    }
    let file = options.open(path);
    ensure!(
        !file.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy),
        "{name} is in use: a server has it, or it is mounted; give another --output"
    );
    file.with_context(|| format!("making {name}"))
}

/// # Errors
///
/// Another process has a lock on the file, or on what is the same disk.
pub(crate) fn check(file: &File, name: &str) -> Result<()> {
    for (other, other_name) in same_disk(file) {
        ensure!(
            !is_locked(&other),
            "{name} is in use{}: it is the disk that is read, or another server or virtual machine has it; give another --output",
            if other_name == Path::new("") { String::new() } else { format!(" as {}", other_name.display()) }
        );
    }
    Ok(())
}

fn is_locked(file: &File) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        // To the end of the file, wherever that is.
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}

/// The file, and others that have the same content, by their paths.
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
            // Only to ask for its locks.
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&other);
            next.extend(opened.map(|file| (file, other)));
        }
        found.push((file, path));
    }
    found
}

/// The file behind a loop device, the device of a partition, and the partitions of a device.
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

/// The loop devices that show a file.
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

/// The node of a block device, by the directory that tells of it.
fn node(sys: &Path) -> Option<PathBuf> {
    Some(Path::new("/dev").join(sys.file_name()?.to_str()?.replace('!', "/")))
}
