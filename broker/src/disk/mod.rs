//! The disk that guests read and write: a regular file or a block device of the host.
//!
//! A [`Disk`] is one *open file description* with a lock on it. Rings register that description, so the lock is held
//! until the last file descriptor is closed *and* the last ring that registered the description has ended, with all its
//! I/O. Code that knows that there is no such ring and no I/O can call [`Disk::close`] instead: it returns when others
//! can open the disk. A later broker cannot open the disk before that, even if the earlier broker was killed:
//!
//! - An OFD lock over the whole file (`fcntl(2)`, `F_OFD_SETLK`): a write lock, or for a read-only disk a read lock,
//!   so that read-only disks share a file. The lock also keeps QEMU away, which locks its images the same way.
//! - On a block device that is opened for writing also an exclusive claim (`O_EXCL`, `open(2)`). The OFD lock belongs
//!   to the device *node*, and a device can have several; the claim belongs to the device, and it keeps out mounts,
//!   RAID and device mapper too.
//!
//! One storage has one writer, also through several devices:
//!
//! - *Partitions.* The kernel's claim on a partition and its claim on the whole disk bar each other.
//! - *Device mapper, RAID, mounts.* They claim the device that they use.
//! - *Loop devices* claim nothing. So the broker that serves one also has an OFD lock on the part of the file or device
//!   that the loop device shows, and so on downwards; and a broker that writes looks for claims on other devices that
//!   have storage of its disk. The second catches what has no lock: I/O of a broker that was killed, and mounts.
//!
//! A reader beside a writer is not always caught: on two nodes of one device, and below a device mapper. The reader then
//! sees data change; nothing is damaged.
//!
//! Code that must answer questions about a disk before it can open the disk uses a [`LocatedDisk`], and a [`DiskLease`]
//! to acquire the disk and release it.

mod acquire;
mod block_device;
mod byte_range;
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
mod looks;
mod loop_device;
mod neighbours;
mod ofd;
mod open;
mod part_lock;
mod place;
mod stack;
mod start_up;
mod storage;
mod write_chains;

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
pub use start_up::{DiskAtStart, StartUp};

use acquire::Acquisition;
use geometry::Geometry;
use open::{Anchor, Found};
use storage::{StorageLock, StorageSource};

/// Linux's sector: the unit of sizes in the block layer and in virtio-blk, and therefore the smallest block of a disk.
const SECTOR_BYTES: u32 = 512;
/// `f_type` of tmpfs (`TMPFS_MAGIC`, `statfs(2)`).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Whether I/O bypasses the host's page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DirectIo {
    /// `O_DIRECT` if the file system has it, otherwise the page cache.
    #[default]
    Auto,
    /// `O_DIRECT`; without it opening fails with [`DiskError::NoDirectIo`].
    On,
    /// Through the page cache.
    Off,
}

/// The logical block of a disk: the unit in which a guest reads and writes the disk, and in which the data on the disk
/// counts offsets (a partition table names blocks, not bytes). So the writer of the data has chosen the
/// logical block, which must stay the same on any storage. The demands of direct I/O ([`DirectAlignment`]) are a separate
/// matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LogicalBlock {
    /// 512 bytes for a file; the device's own block (`BLKSSZGET`) for a block device.
    #[default]
    Own,
    /// As the operator says: a power of two, not smaller than the disk's own block.
    Bytes(u32),
    /// The block of direct I/O on the current storage: for a disk that holds no data of its guest yet.
    DirectIo,
}

/// Which disk to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskConfig {
    /// The file or the device node. Symbolic links (`/dev/disk/by-id/...`) are followed.
    pub path: PathBuf,
    /// Open the disk for reading only: a guest cannot write to it, and several brokers can share it.
    pub read_only: bool,
    /// Whether to bypass the page cache.
    pub direct_io: DirectIo,
    /// The unit in which the guest reads and writes.
    pub logical_block: LogicalBlock,
    /// How long to wait for the lock and the claim while another process has them. `None`: do not wait.
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

    /// Sets [`read_only`](Self#structfield.read_only).
    #[must_use]
    pub fn read_only(self, read_only: bool) -> Self {
        Self { read_only, ..self }
    }

    /// Sets [`direct_io`](Self#structfield.direct_io).
    #[must_use]
    pub fn direct_io(self, direct_io: DirectIo) -> Self {
        Self { direct_io, ..self }
    }

    /// Sets [`logical_block`](Self#structfield.logical_block).
    #[must_use]
    pub fn logical_block(self, logical_block: LogicalBlock) -> Self {
        Self { logical_block, ..self }
    }

    /// Sets [`lock_wait`](Self#structfield.lock_wait).
    #[must_use]
    pub fn lock_wait(self, lock_wait: impl Into<Option<Duration>>) -> Self {
        Self { lock_wait: lock_wait.into(), ..self }
    }
}

/// What a disk is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskKind {
    /// A file of a file system. Guests could make it grow: see [`crate::limits::cap_file_growth`].
    RegularFile,
    /// A block device.
    BlockDevice,
}

/// An open, locked disk. Block sizes are those at the time of opening; the size is the one that was read last.
#[derive(Debug)]
pub struct Disk {
    file: OwnedFd,
    /// The same file without `O_DIRECT`, for writes that are smaller than direct I/O allows.
    page_cache: Option<OwnedFd>,
    path: PathBuf,
    kind: DiskKind,
    read_only: bool,
    geometry: Geometry,
    size_bytes: AtomicU64,
    // The last field: what lies under the disk is released after the disk.
    storage_lock: StorageLock,
}

impl Disk {
    /// Opens and locks a disk. Nothing on the disk changes.
    ///
    /// Blocks for at most [`DiskConfig::lock_wait`] (plus the time to look for the lock's holder, which reads `/proc`).
    /// Needs `/proc`.
    ///
    /// # Errors
    /// Each kind of [`DiskError`]; its message says what to do.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let anchor = Anchor::new(config)?;
        let storage = StorageSource::new(&anchor, config);
        Acquisition::new(&anchor, config, &storage).within(config.lock_wait)
    }

    /// Finds a disk and its properties, without locking it, claiming it or waiting for another process.
    ///
    /// # Errors
    /// Those of [`Self::open`], except [`DiskError::Locked`], [`DiskError::InUse`], [`DiskError::StorageLocked`],
    /// [`DiskError::StorageInUse`] and [`DiskError::Lock`].
    pub fn locate(config: &DiskConfig) -> Result<LocatedDisk, DiskError> {
        LocatedDisk::new(config)
    }

    fn new(
        found: Found,
        page_cache: Option<OwnedFd>,
        config: &DiskConfig,
        geometry: Geometry,
        storage_lock: StorageLock,
    ) -> Self {
        Self {
            file: found.file,
            page_cache,
            path: config.path.clone(),
            kind: found.kind,
            read_only: config.read_only,
            size_bytes: geometry.size_bytes.into(),
            geometry,
            storage_lock,
        }
    }

    /// Size in bytes when it was last read: a multiple of [`Self::logical_block_bytes`], never zero.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Reads the current size of the disk in bytes, which can be larger or smaller than before, and returns it.
    ///
    /// # Errors
    /// [`DiskError::Empty`], [`DiskError::PartialBlock`], [`DiskError::Query`]; the old size then stays in force.
    pub fn refresh_size(&self) -> Result<u64, DiskError> {
        let size_bytes = self.geometry.read_size(&self.file, &self.path, self.kind)?;
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        Ok(size_bytes)
    }

    /// The unit in bytes in which the guest reads and writes: a power of two, at least 512 ([`LogicalBlock`]). Direct
    /// I/O can demand a larger one: [`Self::direct_alignment`].
    pub fn logical_block_bytes(&self) -> u32 {
        self.geometry.logical_block_bytes
    }

    /// The unit in bytes below which a write may cost a read first: a power of two, at least
    /// [`Self::logical_block_bytes`] and the block of direct writes. For a block device `BLKPBSZGET`, for a file
    /// `st_blksize`, at most 64 KiB.
    pub fn physical_block_bytes(&self) -> u32 {
        self.geometry.physical_block_bytes
    }

    /// The alignment that requests to the disk must have. `None`: I/O goes through the page cache and needs no
    /// alignment.
    ///
    /// For a block device its own block, for a file the demands of the file system (`statx(2)`, `STATX_DIOALIGN` from
    /// Linux 6.1, `STATX_DIO_READ_ALIGN` from 6.14). For file systems that report nothing: their block size, at most
    /// 4096.
    pub fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.geometry.direct
    }

    /// The block of direct I/O in bytes, if the guest's blocks are smaller: then not all requests can go to the disk as
    /// the guest sends them. On a read-only disk this is the block of reads.
    pub fn finer_than_direct_io(&self) -> Option<u32> {
        self.geometry.finer_than_direct_io(self.read_only)
    }

    /// The alignment in bytes that the address of a buffer needs: 1 through the page cache.
    pub fn memory_alignment_bytes(&self) -> u32 {
        self.geometry.direct.map_or(1, |direct| direct.memory_bytes)
    }

    /// The same file through the page cache: for the end of a file that is not a whole block of direct I/O. Present
    /// only if the disk is writable and [finer than direct I/O](Self::finer_than_direct_io). This descriptor has no
    /// lock of its own; the disk's lock is held until the ring that registered both has ended.
    pub(crate) fn page_cache(&self) -> Option<BorrowedFd<'_>> {
        self.page_cache.as_ref().map(AsFd::as_fd)
    }

    /// Whether the disk was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The same disk, which this crate then treats as if its storage took direct I/O in larger blocks only.
    #[cfg(test)]
    pub(crate) fn with_direct_block(mut self, block_bytes: u32) -> Self {
        let direct = self.geometry.direct.as_mut().expect("a disk with direct I/O");
        (direct.read_block_bytes, direct.write_block_bytes) = (block_bytes, block_bytes);
        let again = std::fs::File::options().read(true).write(true).open(&self.path).unwrap();
        self.page_cache = Some(again.into());
        self
    }

    /// Whether I/O bypasses the host's page cache.
    pub fn is_direct_io(&self) -> bool {
        self.geometry.direct.is_some()
    }

    /// What the disk is on the host.
    pub fn kind(&self) -> DiskKind {
        self.kind
    }

    /// The name of the integrity profile, if the disk is a block device that keeps protection information beside its
    /// blocks (`integrity/format` in sysfs, e.g. `T10-DIF-TYPE1-CRC`). Direct mode refuses such a device to every
    /// guest.
    ///
    /// # Errors
    /// [`DiskError::Query`]: sysfs does not know the device.
    pub fn integrity_profile(&self) -> Result<Option<String>, DiskError> {
        integrity::profile(&self.file, self.kind)
            .map_err(|error| error::query_error(&self.path, "the integrity profile (in /sys/dev/block)", error))
    }

    /// The path by which the disk was opened.
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
