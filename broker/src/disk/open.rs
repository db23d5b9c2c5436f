//! Opening a path as a disk, whether it leads to a file or to a device.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, accessat, fstat, open as sys_open};
use rustix::io::Errno;

use super::block_device::DeviceNumber;
use super::error::query_error;
use super::loop_device::StorageId;
use super::{DirectIo, DiskConfig, DiskError, DiskKind, place};

/// The file or device that a path led to. The anchor opens nothing (`O_PATH`): a FIFO does not block, a device is not
/// opened.
#[derive(Debug)]
pub(super) struct Anchor {
    fd: OwnedFd,
    pub(super) kind: DiskKind,
    /// The device of the node, if it is a block device.
    pub(super) device: DeviceNumber,
    /// What the node or file is.
    pub(super) storage: StorageId,
}

impl Anchor {
    /// Follows the path, and refuses anything but a regular file or a block device.
    pub(super) fn new(config: &DiskConfig) -> Result<Self, DiskError> {
        let fd = sys_open(&config.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| open_error(config, errno))?;
        let found = fstat(&fd).map_err(|errno| query_error(&config.path, "the kind", errno))?;
        let kind = match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => DiskKind::RegularFile,
            FileType::BlockDevice => DiskKind::BlockDevice,
            other => return Err(DiskError::WrongKind { path: config.path.clone(), kind: other.into() }),
        };
        Ok(Self { fd, kind, device: DeviceNumber::from_raw(found.st_rdev), storage: StorageId::of(&found) })
    }

    /// A path to the anchored file, even if the configured path leads elsewhere by now.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }

    /// Whether this is a block device that is opened for writing, and therefore claimed.
    pub(super) fn is_claimed(&self, config: &DiskConfig) -> bool {
        self.kind == DiskKind::BlockDevice && !config.read_only
    }

    /// Whether a block device, which this process has not claimed, is claimed.
    pub(super) fn is_claimed_by_another(&self) -> bool {
        // For reading: udev ignores the close of such a descriptor.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
        matches!(sys_open(self.path(), flags, Mode::empty()), Err(Errno::BUSY))
    }
}

impl AsFd for Anchor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An open disk, not yet locked.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) file: OwnedFd,
    pub(super) kind: DiskKind,
    /// The number of a block device.
    pub(super) device: DeviceNumber,
    /// Whether the kernel accepted `O_DIRECT`; some file systems accept the flag and ignore it.
    pub(super) direct_io: bool,
}

/// Opens the disk for I/O and claims it if it is a writable block device. `None`: another process has the claim.
pub(super) fn open(anchor: &Anchor, config: &DiskConfig) -> Result<Option<Found>, DiskError> {
    let mut flags = if config.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    flags.set(OFlags::EXCL, anchor.is_claimed(config));
    open_with(anchor, config, flags)
}

/// Opens the disk to read its properties, and finds all reasons for which [`open`] would fail, except a claim.
///
/// A block device is opened for reading only: that works beside a claim, and udev ignores the close.
pub(super) fn open_for_questions(anchor: &Anchor, config: &DiskConfig) -> Result<Found, DiskError> {
    let mut flags = OFlags::RDONLY;
    if anchor.is_claimed(config) {
        accessat(CWD, anchor.path(), Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS)
            .map_err(|errno| open_error(config, errno))?;
    } else if !config.read_only {
        flags = OFlags::RDWR;
    }
    let found = open_with(anchor, config, flags)?;
    // Only an exclusive open returns `None`.
    found.ok_or_else(|| open_error(config, Errno::BUSY))
}

/// Opens the file once more, for reading and writing through the page cache.
pub(super) fn open_page_cache(anchor: &Anchor, config: &DiskConfig) -> Result<OwnedFd, DiskError> {
    loop {
        match sys_open(anchor.path(), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(open_error(config, errno)),
        }
    }
}

fn open_with(anchor: &Anchor, config: &DiskConfig, access: OFlags) -> Result<Option<Found>, DiskError> {
    let mut flags = access | OFlags::CLOEXEC;
    flags.set(OFlags::DIRECT, config.direct_io != DirectIo::Off);
    let file = loop {
        match sys_open(anchor.path(), flags, Mode::empty()) {
            Ok(file) => break file,
            Err(Errno::INVAL) if flags.contains(OFlags::DIRECT) => {
                if config.direct_io == DirectIo::On {
                    return Err(DiskError::NoDirectIo { path: config.path.clone() });
                }
                flags.remove(OFlags::DIRECT);
            }
            Err(Errno::BUSY) if flags.contains(OFlags::EXCL) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(open_error(config, errno)),
        }
    };
    if anchor.kind == DiskKind::RegularFile {
        place::check(&file, config)?;
    }
    if anchor.is_claimed(config) && is_write_protected(&file, &config.path)? {
        return Err(DiskError::WriteProtected { path: config.path.clone() });
    }
    let direct_io = flags.contains(OFlags::DIRECT);
    Ok(Some(Found { file, kind: anchor.kind, device: anchor.device, direct_io }))
}

/// A write-protected device opens for writing, and then fails every write.
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
