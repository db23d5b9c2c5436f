//! Why a disk cannot be opened.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat};
use rustix::io::Errno;

use super::holders::DeviceUse;
use crate::processes::{ProcessName, list};

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

/// The longest file: its offsets are signed (`loff_t`).
const FILE_BYTES_MAX: u64 = i64::MAX as u64;

fn access(read_only: bool) -> &'static str {
    if read_only { "for reading" } else { "for reading and writing" }
}

fn open_hint(path: &Path, read_only: bool, error: &io::Error) -> String {
    let word = shell_word(path);
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) if path.starts_with("/dev") => ". `lsblk` lists the devices that are there".into(),
        Some(Errno::NOENT) if read_only => ". Check the path".into(),
        Some(Errno::NOENT) => {
            format!(". Check the path, or create the disk, for example with `truncate -s 10G {word}`")
        }
        Some(Errno::NOTDIR) => ". Check the path: a part of it is not a directory".into(),
        Some(Errno::ACCESS | Errno::PERM) if read_only => format!(". Check who may read it: `ls -l {word}`"),
        Some(Errno::ACCESS | Errno::PERM) if !may_read(path) => {
            format!(". Check who may read and write it: `ls -l {word}`")
        }
        Some(Errno::ACCESS | Errno::PERM) => {
            format!(". Check who may write to it (`ls -l {word}`, `lsattr {word}`), or open it read-only")
        }
        Some(Errno::ROFS) => ". Open it read-only".into(),
        Some(Errno::TXTBSY) => ". It is being executed or used as swap space".into(),
        Some(Errno::NXIO | Errno::NODEV) => ". No driver serves this device number".into(),
        Some(Errno::NOMEDIUM) => ". Insert a medium".into(),
        _ => String::new(),
    }
}

/// Whether this user may read the file, as far as its mode tells.
fn may_read(path: &Path) -> bool {
    accessat(CWD, path, Access::READ_OK, AtFlags::EACCESS).is_ok()
}

fn empty_hint(path: &Path, is_block_device: bool) -> String {
    if is_block_device {
        ": the device has no medium, or is not set up yet (`lsblk`)".into()
    } else {
        format!(": give the file a size, for example with `truncate -s 10G {}`", shell_word(path))
    }
}

fn tail_hint(path: &Path, size_bytes: u64, logical_block_bytes: u32, is_block_device: bool) -> String {
    if is_block_device {
        return "Change the size of the device".into();
    }
    let whole_bytes = size_bytes.next_multiple_of(logical_block_bytes.into());
    if whole_bytes > FILE_BYTES_MAX {
        let less_bytes = size_bytes - size_bytes % u64::from(logical_block_bytes);
        return format!("A file cannot be longer, so cut off its end: `truncate -s {less_bytes} {}`", shell_word(path));
    }
    let mut hint = format!("Extend it with `truncate -s {whole_bytes} {}`", shell_word(path));
    if logical_block_bytes > 512 && size_bytes % 512 == 0 {
        hint.push_str(", or leave out --logical-block-size, which makes its blocks 512 bytes");
    }
    hint
}

fn held_for(read_only: bool) -> &'static str {
    if read_only { " for writing" } else { "" }
}

fn after(waited: Duration) -> String {
    if waited.is_zero() { String::new() } else { format!(" (still so after waiting {:.1} s)", waited.as_secs_f64()) }
}

fn lock_holders(holders: &[ProcessName]) -> String {
    match holders {
        [] => "by I/O still in flight from a process that has ended, or by a process that this user cannot inspect: \
               run `lsof` as root to see"
            .into(),
        [holder] => format!("by {holder}. Stop that process first"),
        holders => format!("by {}. Stop these processes first", list(holders)),
    }
}

fn devices_over(devices: &[PathBuf]) -> String {
    match devices {
        [] => String::new(),
        devices => {
            let devices = devices.iter().map(|device| device.display().to_string()).collect::<Vec<_>>();
            format!(" (in use on the same storage: {})", list(&devices))
        }
    }
}

fn device_uses(uses: &[DeviceUse]) -> String {
    match uses {
        [] => "by I/O still in flight from a process that has ended, or by a process that this user cannot inspect: \
               run `lsof` and `lsblk` as root to see"
            .into(),
        uses => format!("{}. Free it first, or open it read-only", list(uses)),
    }
}

/// `path` as one word in a shell command.
fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) && !text.starts_with('-') {
        text.into_owned()
    } else if text.starts_with('-') {
        shell_word(&Path::new(".").join(path))
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
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

    #[test]
    fn a_path_in_a_command_is_one_word() {
        assert_eq!(shell_word(Path::new("/a/b-1.img")), "/a/b-1.img");
        assert_eq!(shell_word(Path::new("my disk's.img")), r"'my disk'\''s.img'");
        assert_eq!(shell_word(Path::new("-rf")), "./-rf");
    }
}
