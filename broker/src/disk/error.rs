//! Why a disk cannot be opened.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FileType;

use super::holders::DeviceUse;
use crate::processes::ProcessName;

mod message_parts;

use message_parts::{
    access, after, device_uses, devices_over, empty_hint, held_for, lock_holders, open_hint, shell_word, tail_hint,
};

/// Why [`Disk::open`](super::Disk::open) refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// `open(2)` failed.
    #[error("cannot open disk {path:?} {}: {error}{}", access(*.read_only), open_hint(.path, *.read_only, .error))]
    Open {
        /// The path as it was given.
        path: PathBuf,
        /// Whether the disk was to be opened for reading only.
        read_only: bool,
        /// The error that the kernel returned.
        error: io::Error,
    },
    /// The path leads neither to a regular file nor to a block device.
    #[error("{path:?} is {kind}: a disk is a regular file or a block device")]
    WrongKind {
        /// The path as it was given.
        path: PathBuf,
        /// What the path leads to.
        kind: FileKind,
    },
    /// A file in which the kernel reports about itself.
    #[error("{path:?} is a kernel file ({file_system}), not a disk: give a disk image or a block device")]
    KernelFile {
        /// The path as it was given.
        path: PathBuf,
        /// The file system.
        file_system: &'static str,
    },
    /// Every write would fail.
    #[error("disk {path:?} cannot be written: {why}. Either open it read-only, or {change}")]
    NotWritable {
        /// The path as it was given.
        path: PathBuf,
        /// Why.
        why: &'static str,
        /// The remedy.
        change: &'static str,
    },
    /// The configuration demands direct I/O ([`DirectIo::On`](super::DirectIo::On)).
    #[error(
        "the file system of {path:?} has no direct I/O (O_DIRECT) for this file: use the page cache (direct I/O off or \
         auto), or put the image on a file system with direct I/O, such as ext4 or XFS"
    )]
    NoDirectIo {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The file has no bytes, or the device has no medium or is not set up.
    #[error("disk {path:?} has a size of zero bytes{}", empty_hint(.path, *.is_block_device))]
    Empty {
        /// The path as it was given.
        path: PathBuf,
        /// Whether it is a block device.
        is_block_device: bool,
    },
    /// The size is not a multiple of the logical block: a guest could not reach the last bytes.
    #[error(
        "disk {path:?} has {size_bytes} bytes, which is not a multiple of its {logical_block_bytes}-byte blocks: a \
         guest could not reach the last {}. {}",
        .size_bytes % u64::from(*.logical_block_bytes),
        tail_hint(.path, *.size_bytes, *.logical_block_bytes, *.is_block_device)
    )]
    PartialBlock {
        /// The path as it was given.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
        /// Its logical block in bytes.
        logical_block_bytes: u32,
        /// Whether it is a block device.
        is_block_device: bool,
    },
    /// The requested logical block is not a power of two, or is smaller than the disk's own.
    #[error(
        "a logical block of {wanted_bytes} bytes is not possible on {path:?}: {} {own_bytes} or a larger power of two, or \
         leave it out",
        if *.is_block_device { format!("the device has blocks of {own_bytes} bytes. Use") } else { "use".into() }
    )]
    LogicalBlock {
        /// The path as it was given.
        path: PathBuf,
        /// The requested block in bytes.
        wanted_bytes: u32,
        /// The disk's own logical block.
        own_bytes: u32,
        /// Whether it is a block device.
        is_block_device: bool,
    },
    /// The block device is set read-only, so every write would fail.
    #[error("block device {path:?} is write-protected: open it read-only, or allow writes with `blockdev --setrw {}`",
        shell_word(.path))]
    WriteProtected {
        /// The path as it was given.
        path: PathBuf,
    },
    /// Another process has the OFD lock.
    #[error("disk {path:?} is locked{}{}: {}{}",
        after(*.waited), held_for(*.read_only), lock_holders(.holders), devices_over(.devices))]
    Locked {
        /// The path as it was given.
        path: PathBuf,
        /// Whether the disk was to be opened for reading only.
        read_only: bool,
        /// The processes that have the lock, as far as the kernel tells.
        holders: Vec<ProcessName>,
        /// The nodes of devices that have storage of this disk and are in exclusive use: the lock may be for them.
        devices: Vec<PathBuf>,
        /// How long [`Disk::open`](super::Disk::open) waited for the lock.
        waited: Duration,
    },
    /// Another process has locked the storage of the disk: the file behind a loop device.
    #[error("disk {path:?} lies on {storage:?}, which is locked{}{}: {}{}",
        after(*.waited), held_for(*.read_only), lock_holders(.holders), devices_over(.devices))]
    StorageLocked {
        /// The path as it was given.
        path: PathBuf,
        /// The locked file or device.
        storage: PathBuf,
        /// Whether the disk was to be opened for reading only.
        read_only: bool,
        /// The processes that have the lock, as far as the kernel tells.
        holders: Vec<ProcessName>,
        /// The nodes of other devices that have storage of this disk and are in exclusive use: the lock may be for them.
        devices: Vec<PathBuf>,
        /// How long [`Disk::open`](super::Disk::open) waited for the lock.
        waited: Duration,
    },
    /// Another device, which has storage of the disk, is in exclusive use: a loop device over the disk, for example.
    #[error("disk {path:?} has the same storage as {device:?}, which is in use{}: {}",
        after(*.waited), device_uses(.uses))]
    StorageInUse {
        /// The path as it was given.
        path: PathBuf,
        /// The node of the other device.
        device: PathBuf,
        /// What uses that device, as far as the kernel tells.
        uses: Vec<DeviceUse>,
        /// How long [`Disk::open`](super::Disk::open) waited for the device.
        waited: Duration,
    },
    /// The block device is in exclusive use.
    #[error("block device {path:?} is in use{}: {}", after(*.waited), device_uses(.uses))]
    InUse {
        /// The path as it was given.
        path: PathBuf,
        /// What uses the device, as far as the kernel tells.
        uses: Vec<DeviceUse>,
        /// How long [`Disk::open`](super::Disk::open) waited for the device.
        waited: Duration,
    },
    /// The file system cannot lock.
    #[error(
        "cannot lock disk {path:?}: {error}. Without a lock two brokers could write to it: put it on a file system \
         with OFD locks (for NFS: version 4, or a lock manager)"
    )]
    Lock {
        /// The path as it was given.
        path: PathBuf,
        /// The error that the kernel returned.
        error: io::Error,
    },
    /// A query on the open file failed.
    #[error("cannot read {what} of disk {path:?}: {error}")]
    Query {
        /// The path as it was given.
        path: PathBuf,
        /// The property that could not be read.
        what: &'static str,
        /// The error that the kernel returned.
        error: io::Error,
    },
}

impl DiskError {
    /// Whether another process has the disk, so that a later try can succeed.
    pub fn is_busy(&self) -> bool {
        matches!(
            self,
            Self::Locked { .. } | Self::InUse { .. } | Self::StorageLocked { .. } | Self::StorageInUse { .. }
        )
    }

    /// Whether the error names a living holder of the disk: a process, or a use in the kernel that was set up on a
    /// device. If not, the holder is most likely I/O of a process that has ended, or that has been killed and waits for
    /// that I/O.
    pub fn names_living_holder(&self) -> bool {
        match self {
            Self::Locked { holders, .. } | Self::StorageLocked { holders, .. } => {
                holders.iter().any(|process| !process.is_ending)
            }
            Self::InUse { uses, .. } | Self::StorageInUse { uses, .. } => uses.iter().any(|found| match found {
                DeviceUse::ReadBy(_) => false,
                DeviceUse::OpenIn(process) => !process.is_ending,
                DeviceUse::Mounted { .. } | DeviceUse::Swap { .. } | DeviceUse::PartOf { .. } => true,
            }),
            _ => false,
        }
    }
}

/// What a path leads to, if not to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A character device.
    CharacterDevice,
    /// A socket.
    Socket,
    /// Anything else.
    Other,
}

impl From<FileType> for FileKind {
    fn from(kind: FileType) -> Self {
        match kind {
            FileType::Directory => Self::Directory,
            FileType::Fifo => Self::Fifo,
            FileType::CharacterDevice => Self::CharacterDevice,
            FileType::Socket => Self::Socket,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Directory => "a directory",
            Self::Fifo => "a named pipe",
            Self::CharacterDevice => "a character device",
            Self::Socket => "a socket",
            Self::Other => "a special file",
        })
    }
}

/// The error of a query on the disk at `path`.
pub(super) fn query_error(path: &Path, what: &'static str, error: impl Into<io::Error>) -> DiskError {
    DiskError::Query { path: path.to_owned(), what, error: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_living_process_that_does_not_merely_read_a_device_counts_as_a_holder() {
        let process = |is_ending| ProcessName { pid: 7, comm: "other".into(), is_ending };
        let in_use = |uses| DiskError::InUse { path: "/dev/x".into(), uses, waited: Duration::ZERO };
        let locked = |is_ending| DiskError::Locked {
            path: "d.img".into(),
            read_only: false,
            holders: vec![process(is_ending)],
            devices: Vec::new(),
            waited: Duration::ZERO,
        };
        let storage_locked = |is_ending| DiskError::StorageLocked {
            path: "/dev/x".into(),
            storage: "d.img".into(),
            read_only: false,
            holders: vec![process(is_ending)],
            devices: Vec::new(),
            waited: Duration::ZERO,
        };
        let storage_in_use = |uses| DiskError::StorageInUse {
            path: "d.img".into(),
            device: "/dev/x".into(),
            uses,
            waited: Duration::ZERO,
        };
        for (error, is_living) in [
            (in_use(vec![]), false),
            (in_use(vec![DeviceUse::ReadBy(process(false))]), false),
            (in_use(vec![DeviceUse::ReadBy(process(false)), DeviceUse::OpenIn(process(false))]), true),
            (in_use(vec![DeviceUse::OpenIn(process(true))]), false),
            (in_use(vec![DeviceUse::Swap { path: "/dev/x".into() }]), true),
            (locked(false), true),
            (locked(true), false),
            (storage_locked(false), true),
            (storage_locked(true), false),
            (storage_in_use(vec![]), false),
            (storage_in_use(vec![DeviceUse::PartOf { device: "x".into(), upper: "dm-0".into() }]), true),
        ] {
            assert!(error.is_busy());
            assert_eq!(error.names_living_holder(), is_living, "{error}");
        }
    }
}
