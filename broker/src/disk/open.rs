//! Opening a path as a disk, whatever it turns out to be.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open as sys_open};
use rustix::io::Errno;

use super::holders::{self, DeviceNumber};
use super::lock::Wait;
use super::{DirectIo, DiskConfig, DiskError, DiskKind};

/// A disk that is open, not yet locked.
pub(super) struct Found {
    pub(super) file: OwnedFd,
    pub(super) kind: DiskKind,
    /// Whether the kernel accepted `O_DIRECT`; some file systems do and then ignore it.
    pub(super) direct_io: bool,
}

/// Opens the disk and, if it is a block device to be written, claims it.
pub(super) fn open(config: &DiskConfig, wait: &mut Wait) -> Result<Found, DiskError> {
    let anchor = sys_open(&config.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| open_error(config, errno))?;
    // An O_PATH descriptor opens nothing: no FIFO blocks, and no device notices that it was looked at.
    let found = fstat(&anchor).map_err(|errno| query_error(&config.path, "the kind", errno))?;
    let kind = match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => DiskKind::RegularFile,
        FileType::BlockDevice => DiskKind::BlockDevice,
        other => return Err(DiskError::WrongKind { path: config.path.clone(), kind: other.into() }),
    };
    // By way of /proc it is the very file that was looked at, whatever the path leads to by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", anchor.as_fd().as_raw_fd()));
    let mut flags = OFlags::CLOEXEC | if config.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    flags.set(OFlags::EXCL, kind == DiskKind::BlockDevice && !config.read_only);
    flags.set(OFlags::DIRECT, config.direct_io != DirectIo::Off);
    let file = loop {
        match sys_open(&path, flags, Mode::empty()) {
            Ok(file) => break file,
            Err(Errno::INVAL) if flags.contains(OFlags::DIRECT) => {
                if config.direct_io == DirectIo::On {
                    return Err(DiskError::NoDirectIo { path: config.path.clone() });
                }
                flags.remove(OFlags::DIRECT);
            }
            Err(Errno::BUSY) if flags.contains(OFlags::EXCL) => {
                wait_until_unused(config, DeviceNumber::from_raw(found.st_rdev), wait)?;
            }
            Err(errno) => return Err(open_error(config, errno)),
        }
    };
    if kind == DiskKind::BlockDevice && !config.read_only && is_write_protected(&file, &config.path)? {
        return Err(DiskError::WriteProtected { path: config.path.clone() });
    }
    Ok(Found { file, kind, direct_io: flags.contains(OFlags::DIRECT) })
}

/// Returns when it is time to try again.
fn wait_until_unused(config: &DiskConfig, device: DeviceNumber, wait: &mut Wait) -> Result<(), DiskError> {
    if wait.is_first() {
        let uses = holders::device_uses(device);
        tracing::info!(path = ?config.path, ?uses, limit = ?wait.limit(), "waiting for the block device to be unused");
    }
    if wait.pause() {
        return Ok(());
    }
    let uses = holders::device_uses(device);
    Err(DiskError::InUse { path: config.path.clone(), uses, waited: wait.waited() })
}

/// Such a device opens for writing, and then fails every write.
fn is_write_protected(file: &OwnedFd, path: &Path) -> Result<bool, DiskError> {
    /// `BLKROGET` of `<linux/fs.h>`: `_IO(0x12, 94)`.
    const BLKROGET: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 94);
    // SAFETY: BLKROGET stores one `int` (block/ioctl.c) and has no other effect.
    let getter = unsafe { rustix::ioctl::Getter::<BLKROGET, i32>::new() };
    // SAFETY: the getter above passes a pointer to a live `int`.
    let read_only = unsafe { rustix::ioctl::ioctl(file, getter) };
    Ok(read_only.map_err(|errno| query_error(path, "the write protection", errno))? != 0)
}

fn open_error(config: &DiskConfig, errno: Errno) -> DiskError {
    DiskError::Open { path: config.path.clone(), read_only: config.read_only, error: errno.into() }
}

pub(super) fn query_error(path: &Path, what: &'static str, error: impl Into<io::Error>) -> DiskError {
    DiskError::Query { path: path.to_owned(), what, error: error.into() }
}
