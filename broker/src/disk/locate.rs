//! A disk that is known and not had.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::acquire::Acquisition;
use super::capabilities::Capabilities;
use super::geometry::Geometry;
use super::open::{self, Anchor};
use super::{DirectAlignment, Disk, DiskConfig, DiskError, DiskKind};

/// A disk of which everything is known that a guest asks, and on which no I/O is possible: it is neither locked nor
/// claimed, and need not be free. It keeps to the very file that the path led to at first, whatever comes there later.
///
/// While nobody asks, it has nothing open: others do not see it, and a device can be removed.
#[derive(Debug)]
pub struct LocatedDisk {
    anchor: Anchor,
    config: DiskConfig,
    geometry: Geometry,
    capabilities: Capabilities,
    size_bytes: AtomicU64,
}

impl LocatedDisk {
    pub(super) fn new(config: &DiskConfig) -> Result<Self, DiskError> {
        let anchor = Anchor::new(config)?;
        let found = open::open_for_questions(&anchor, config)?;
        let geometry = Geometry::read(&found, config)?;
        let capabilities = Capabilities::read(&found, config, &geometry);
        Ok(Self { anchor, config: config.clone(), geometry, capabilities, size_bytes: geometry.size_bytes.into() })
    }

    /// Takes the disk, if nobody else has it.
    ///
    /// # Errors
    /// As [`Disk::open`], which does the same by the path and can wait.
    pub fn try_lock(&self) -> Result<Disk, DiskError> {
        self.acquisition().within(None)
    }

    pub(super) fn acquisition(&self) -> Acquisition<'_> {
        Acquisition::new(&self.anchor, &self.config)
    }

    /// The file or device node itself, not opened for anything (`O_PATH`).
    pub fn anchor(&self) -> BorrowedFd<'_> {
        self.anchor.as_fd()
    }

    /// Size in bytes when it was last looked at: a multiple of [`Self::logical_block_bytes`], never zero. Whoever has
    /// the disk can change it: what counts for I/O is [`Disk::size_bytes`].
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Looks at the size in bytes that the disk has by now, larger or smaller, and returns it.
    ///
    /// # Errors
    /// [`DiskError::Open`], [`DiskError::Empty`], [`DiskError::PartialBlock`], [`DiskError::Query`]; then the old size
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

    /// What it can do besides reading and writing.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether it is opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.config.read_only
    }

    /// Whether I/O goes past the host's page cache.
    pub fn is_direct_io(&self) -> bool {
        self.geometry.direct.is_some()
    }

    /// What it is on the host.
    pub fn kind(&self) -> DiskKind {
        self.anchor.kind
    }

    /// The path by which it was located.
    pub fn path(&self) -> &Path {
        &self.config.path
    }
}

#[cfg(test)]
mod tests;
