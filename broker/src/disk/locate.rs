//! A disk whose properties are known, but which this process has not acquired.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::acquire::Acquisition;
use super::capabilities::Capabilities;
use super::geometry::Geometry;
use super::open::{self, Anchor};
use super::storage::StorageSource;
use super::write_chains;
use super::{DirectAlignment, Disk, DiskConfig, DiskError, DiskKind, error, integrity};

/// A disk whose properties are known to answer a guest, and on which no I/O is possible: it is neither locked nor
/// claimed, and need not be free. The value stays with the file that the path led to at first, even if the path leads
/// elsewhere later.
///
/// Between queries the disk is not open: other processes do not see the value, and a device can be removed. Only the
/// file behind a loop device stays open, without a lock, because a sandbox may forbid to open it later.
#[derive(Debug)]
pub struct LocatedDisk {
    anchor: Anchor,
    config: DiskConfig,
    storage: StorageSource,
    geometry: Geometry,
    capabilities: Capabilities,
    chains_writes: bool,
    size_bytes: AtomicU64,
}

impl LocatedDisk {
    pub(super) fn new(config: &DiskConfig) -> Result<Self, DiskError> {
        let anchor = Anchor::new(config)?;
        let found = open::open_for_questions(&anchor, config)?;
        let geometry = Geometry::read(&found, config)?;
        let capabilities = Capabilities::read(&found, config, &geometry);
        let chains_writes = write_chains::chains_writes(&found, &geometry);
        let storage = StorageSource::new(&anchor, config);
        let size_bytes = geometry.size_bytes.into();
        Ok(Self { anchor, config: config.clone(), storage, geometry, capabilities, chains_writes, size_bytes })
    }

    /// Acquires the disk, if no other process has it.
    ///
    /// # Errors
    /// As [`Disk::open`], which opens the disk by its path and can wait.
    pub fn try_lock(&self) -> Result<Disk, DiskError> {
        self.acquisition().within(None)
    }

    pub(super) fn acquisition(&self) -> Acquisition<'_> {
        Acquisition::new(&self.anchor, &self.config, &self.storage)
    }

    /// The file or device node itself, as an `O_PATH` descriptor.
    pub fn anchor(&self) -> BorrowedFd<'_> {
        self.anchor.as_fd()
    }

    /// Size in bytes when it was last read: a multiple of [`Self::logical_block_bytes`], never zero. The disk's holder
    /// can change the size, so I/O must go by [`Disk::size_bytes`].
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Reads the current size of the disk in bytes, which can be larger or smaller than before, and returns it.
    ///
    /// # Errors
    /// [`DiskError::Open`], [`DiskError::Empty`], [`DiskError::PartialBlock`], [`DiskError::Query`]; the old size then
    /// stays.
    pub fn refresh_size(&self) -> Result<u64, DiskError> {
        let found = open::open_for_questions(&self.anchor, &self.config)?;
        let size_bytes = self.geometry.read_size(&found.file, &self.config.path, self.anchor.kind)?;
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        Ok(size_bytes)
    }

    /// As [`Disk::logical_block_bytes`].
    pub fn logical_block_bytes(&self) -> u32 {
        self.geometry.logical_block_bytes
    }

    /// As [`Disk::physical_block_bytes`].
    pub fn physical_block_bytes(&self) -> u32 {
        self.geometry.physical_block_bytes
    }

    /// As [`Disk::direct_alignment`].
    pub fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.geometry.direct
    }

    /// As [`Disk::finer_than_direct_io`].
    pub fn finer_than_direct_io(&self) -> Option<u32> {
        self.geometry.finer_than_direct_io(self.config.read_only)
    }

    /// What the disk can do besides reading and writing.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether io_uring executes writes that would block as a chain, one after the other, which it finishes even after
    /// its ring is closed: a regular file, unless direct I/O on ext4 or XFS. A guest with a ring decides how long that
    /// takes.
    pub fn chains_writes(&self) -> bool {
        self.chains_writes
    }

    /// Whether the disk is opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.config.read_only
    }

    /// Whether I/O bypasses the host's page cache.
    pub fn is_direct_io(&self) -> bool {
        self.geometry.direct.is_some()
    }

    /// What the disk is on the host.
    pub fn kind(&self) -> DiskKind {
        self.anchor.kind
    }

    /// The name of the integrity profile, if the disk is a block device that keeps protection information beside its
    /// blocks (`integrity/format` in sysfs, e.g. `T10-DIF-TYPE1-CRC`). Direct mode refuses such a device to every
    /// guest.
    ///
    /// # Errors
    /// [`DiskError::Query`]: sysfs does not know the device.
    pub fn integrity_profile(&self) -> Result<Option<String>, DiskError> {
        integrity::profile(self.anchor(), self.kind())
            .map_err(|error| error::query_error(self.path(), "the integrity profile (in /sys/dev/block)", error))
    }

    /// The path by which the disk was located.
    pub fn path(&self) -> &Path {
        &self.config.path
    }
}

#[cfg(test)]
mod tests;
