//! The disk that guests read and write: a regular file or a block device of the host.
//!
//! A [`Disk`] is one *open file description* with a lock on it. Rings register that description, so the lock is held
//! until the last file descriptor is closed *and* the last ring that registered it has ended, with all its I/O; or until
//! someone who knows that there is no such ring and no I/O calls [`Disk::close`], which returns when others can have the disk. A
//! broker that comes later cannot open the disk before that, not even when the earlier one was killed:
//!
//! - An OFD lock over the whole file (`fcntl(2)`, `F_OFD_SETLK`): a write lock, or for a read-only disk a read lock,
//!   so that read-only disks share a file. It also keeps QEMU away, which locks its images the same way.
//! - On a block device that is opened for writing also an exclusive claim (`O_EXCL`, `open(2)`). The OFD lock belongs
//!   to the device *node*, and a device can have several; the claim belongs to the device, and it keeps out mounts,
//!   RAID and device mapper too.
//!
//! What neither catches: a read-only disk and a writer on two different nodes of one device. The reader then sees
//! data change; nothing is damaged.
//!
//! Who must answer questions about a disk before it can be had uses a [`LocatedDisk`], and a [`DiskLease`] to have it
//! and give it back.

mod acquire;
mod capabilities;
mod close;
mod direct_alignment;
mod error;
mod geometry;
mod holders;
mod integrity;
mod lease;
mod locate;
mod lock;
mod open;
mod place;
mod start_up;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use crate::processes::ProcessName;
pub use capabilities::{Capabilities, RangeLimits};
pub use direct_alignment::DirectAlignment;
pub use error::{DiskError, FileKind};
pub use holders::DeviceUse;
pub use lease::{DiskLease, LeaseState};
pub use locate::LocatedDisk;
pub use start_up::{Start, StartUp};

use acquire::Acquisition;
use geometry::Geometry;
use open::{Anchor, Found};

/// Whether I/O goes past the host's page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DirectIo {
    /// `O_DIRECT` where the file system has it, the page cache where not.
    #[default]
    Auto,
    /// `O_DIRECT`, or [`DiskError::NoDirectIo`].
    On,
    /// Through the page cache.
    Off,
}

/// The logical block of a disk: the unit in which a guest reads and writes it, and in which the data on it counts its
/// places (a partition table names blocks, not bytes). So it is what the data was written for, and it must be the same
/// whatever storage the disk lies on today. What direct I/O demands ([`DirectAlignment`]) is another matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogicalBlock {
    /// 512 bytes for a file; the device's own block (`BLKSSZGET`) for a block device.
    #[default]
    Own,
    /// As the operator says: a power of two, not smaller than the disk's own.
    Bytes(u32),
    /// What direct I/O takes on the storage of today: for a disk that holds no data of its guest yet.
    DirectIo,
}

/// Which disk to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The file or the device node. Symbolic links (`/dev/disk/by-id/...`) are followed.
    pub path: PathBuf,
    /// Open it for reading only: nothing that a guest does can then write to it, and several brokers can share it.
    pub read_only: bool,
    /// Whether to go past the page cache.
    pub direct_io: DirectIo,
    /// The unit in which the guest reads and writes.
    pub logical_block: LogicalBlock,
    /// How long to wait for the lock and the claim when somebody has them. `None`: do not wait.
    pub lock_wait: Option<Duration>,
}

impl DiskConfig {
    /// The disk at `path`: read-write, [`DirectIo::Auto`], [`LogicalBlock::Own`], no waiting for the lock.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct_io: DirectIo::Auto,
            logical_block: LogicalBlock::Own,
            lock_wait: None,
        }
    }
}

/// What a disk is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A file of a file system. Guests could make it grow: see [`crate::limits::cap_file_growth`].
    RegularFile,
    /// A block device.
    BlockDevice,
}

/// An open, locked disk. Block sizes are those at the time of opening, the size that of the last look.
#[derive(Debug)]
pub struct Disk {
    file: OwnedFd,
    /// The same file without `O_DIRECT`, where a guest can write less than direct I/O takes.
    page_cache: Option<OwnedFd>,
    path: PathBuf,
    kind: DiskKind,
    read_only: bool,
    geometry: Geometry,
    size_bytes: AtomicU64,
}

impl Disk {
    /// Opens and locks a disk. Nothing on the disk changes.
    ///
    /// Blocks for at most [`DiskConfig::lock_wait`] (plus the time to look for who has the lock, which reads `/proc`).
    /// Needs `/proc`.
    ///
    /// # Errors
    /// Each kind of [`DiskError`]; its message says what to do.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let anchor = Anchor::new(config)?;
        Acquisition::new(&anchor, config).within(config.lock_wait)
    }

    /// Finds a disk and what it is, without locking it, claiming it or waiting for anybody.
    ///
    /// # Errors
    /// Those of [`Self::open`], except [`DiskError::Locked`], [`DiskError::InUse`] and [`DiskError::Lock`].
    pub fn locate(config: &DiskConfig) -> Result<LocatedDisk, DiskError> {
        LocatedDisk::new(config)
    }

    fn new(found: Found, page_cache: Option<OwnedFd>, config: &DiskConfig, geometry: Geometry) -> Self {
        Self {
            file: found.file,
            page_cache,
            path: config.path.clone(),
            kind: found.kind,
            read_only: config.read_only,
            size_bytes: geometry.size_bytes.into(),
            geometry,
        }
    }

    /// Size in bytes when it was last looked at: a multiple of [`Self::logical_block_bytes`], never zero.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Looks at the size in bytes that the disk has by now, larger or smaller, and returns it.
    ///
    /// # Errors
    /// [`DiskError::Empty`], [`DiskError::PartialBlock`], [`DiskError::Query`]; then the old size stays in force.
    pub fn refresh_size(&self) -> Result<u64, DiskError> {
        let size_bytes = self.geometry.read_size(&self.file, &self.path, self.kind)?;
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        Ok(size_bytes)
    }

    /// The unit in bytes in which the guest reads and writes: a power of two, at least 512 ([`LogicalBlock`]). Direct I/O
    /// can demand a larger one: [`Self::direct_alignment`].
    pub fn logical_block_bytes(&self) -> u32 {
        self.geometry.logical_block_bytes
    }

    /// The unit in bytes below which a write may cost a read first: a power of two, at least
    /// [`Self::logical_block_bytes`] and what a direct write takes. For a block device `BLKPBSZGET`, for a file
    /// `st_blksize`, at most 64 KiB.
    pub fn physical_block_bytes(&self) -> u32 {
        self.geometry.physical_block_bytes
    }

    /// What requests to the disk must keep to. `None`: I/O goes through the page cache and may be as it likes.
    ///
    /// For a block device its own block, for a file what the file system demands (`statx(2)`, `STATX_DIOALIGN` from Linux
    /// 6.1, `STATX_DIO_READ_ALIGN` from 6.14). File systems that do not tell get their block size, at most 4096.
    pub fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.geometry.direct
    }

    /// The block of direct I/O in bytes, if the guest's are smaller: then not all requests can go to the disk as the guest
    /// sends them. On a disk that is only read it is that of reads.
    pub fn finer_than_direct_io(&self) -> Option<u32> {
        self.geometry.finer_than_direct_io(self.read_only)
    }

    /// What the address of a buffer must be a multiple of, in bytes: 1 through the page cache.
    pub fn memory_alignment_bytes(&self) -> u32 {
        self.geometry.direct.map_or(1, |direct| direct.memory_bytes)
    }

    /// The same file through the page cache: for the end of a file that is no whole block of direct I/O. There only if
    /// the disk is written and [finer than direct I/O](Self::finer_than_direct_io). It has no lock of its own; the lock
    /// is held for as long as the ring that registered both has not ended.
    pub(crate) fn page_cache(&self) -> Option<BorrowedFd<'_>> {
        self.page_cache.as_ref().map(AsFd::as_fd)
    }

    /// Whether it was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The same disk, on storage that takes direct I/O in larger blocks only, as far as this crate knows.
    #[cfg(test)]
    pub(crate) fn with_direct_block(mut self, block_bytes: u32) -> Self {
        let direct = self.geometry.direct.as_mut().expect("a disk with direct I/O");
        (direct.read_block_bytes, direct.write_block_bytes) = (block_bytes, block_bytes);
        let again = std::fs::File::options().read(true).write(true).open(&self.path).unwrap();
        self.page_cache = Some(again.into());
        self
    }

    /// Whether I/O goes past the host's page cache.
    pub fn is_direct_io(&self) -> bool {
        self.geometry.direct.is_some()
    }

    /// What it is on the host.
    pub fn kind(&self) -> DiskKind {
        self.kind
    }

    /// The name of the integrity profile, if it is a block device that keeps protection information beside its blocks
    /// (`integrity/format` in sysfs, e.g. `T10-DIF-TYPE1-CRC`). No guest may have such a device in direct mode.
    ///
    /// # Errors
    /// [`DiskError::Query`]: sysfs does not know the device.
    pub fn integrity_profile(&self) -> Result<Option<String>, DiskError> {
        integrity::profile(&self.file, self.kind)
            .map_err(|error| open::query_error(&self.path, "the integrity profile (in /sys/dev/block)", error))
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests;
