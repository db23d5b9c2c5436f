//! The locks on the storage under a disk, so that one storage has one writer, through whichever device.
//!
//! A broker that serves a loop device also locks the part of the file (or device) that the loop device shows, and so on
//! downwards. A disk that is a file or a device of its own has nothing to lock here: the [lock and the
//! claim](super::lock) on the disk itself are enough.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;

use super::block_device::{BlockDevice, Sysfs};
use super::byte_range::ByteRange;
use super::loop_device::{Backing, StorageId};
use super::open::Anchor;
use super::part_lock::{self, Use};
use super::stack::{self, Layer};
use super::{DiskConfig, DiskError, ProcessName, neighbours, ofd};

/// The storage of a disk, which is found once and again whenever a device has been set up anew.
#[derive(Debug)]
pub(super) struct StorageSource {
    current: Mutex<Arc<Storage>>,
}

impl StorageSource {
    /// Finds the storage and opens the files that are to be locked: a sandbox may forbid that later.
    pub(super) fn new(anchor: &Anchor, config: &DiskConfig) -> Self {
        Self { current: Mutex::new(Arc::new(Storage::find(anchor, config))) }
    }

    /// The storage as it is now.
    pub(super) fn now(&self, anchor: &Anchor, config: &DiskConfig) -> Arc<Storage> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if incarnation(&current.layers) != current.incarnation {
            *current = Arc::new(Storage::find(anchor, config));
        }
        current.clone()
    }
}

/// The storage of a disk.
#[derive(Debug)]
pub(super) struct Storage {
    /// The disk, and all storage under it.
    layers: Vec<Layer>,
    incarnation: String,
    /// The files and devices behind loop devices, lowest first.
    files: Vec<StorageFile>,
    /// Whether a [`StorageLock`] exists. The locks belong to the open files, so there can be one at a time.
    is_locked: AtomicBool,
}

/// A file or device behind a loop device.
#[derive(Debug)]
pub(super) struct StorageFile {
    file: OwnedFd,
    pub(super) path: PathBuf,
    range: ByteRange,
    how: Use,
}

/// What stands in the way of a lock on the storage.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// A file under the disk is locked: the index of [`Storage::files`].
    Locked(usize),
    /// This process has the lock, for another [`Disk`](super::Disk).
    OwnLock,
}

impl Storage {
    fn find(anchor: &Anchor, config: &DiskConfig) -> Self {
        let sysfs = Sysfs::default();
        let layers = stack::walk(anchor.storage, &sysfs, |device| {
            backing(device, anchor).map_err(|errno| warn(config, device, errno)).ok()
        });
        let files = layers.iter().rev().filter_map(|layer| StorageFile::open(layer, config)).collect();
        Self { incarnation: incarnation(&layers), layers, files, is_locked: AtomicBool::new(false) }
    }

    /// Locks what lies under the disk. Does not wait.
    pub(super) fn try_lock(self: &Arc<Self>) -> Result<Result<StorageLock, Obstacle>, DiskError> {
        if self.is_locked.swap(true, Ordering::Acquire) {
            return Ok(Err(Obstacle::OwnLock));
        }
        // From here on the drop unlocks what is locked.
        let locked = StorageLock(self.clone());
        for (index, below) in self.files.iter().enumerate() {
            if !part_lock::try_lock(&below.file, &below.path, below.range, below.how)? {
                return Ok(Err(Obstacle::Locked(index)));
            }
        }
        Ok(Ok(locked))
    }

    /// The first device with storage of this disk that is in exclusive use, other than the disk.
    pub(super) fn claimed(&self) -> Option<BlockDevice> {
        neighbours::claimed(&self.layers)
    }

    pub(super) fn file(&self, index: usize) -> &StorageFile {
        &self.files[index]
    }
}

impl StorageFile {
    /// `None`: this is not the storage of a loop device, or cannot be opened, which a warning says.
    fn open(layer: &Layer, config: &DiskConfig) -> Option<Self> {
        let device = layer.loop_device.as_ref()?;
        let path = device.backing_path()?;
        let how = match (config.read_only, layer.is_shared) {
            (true, _) => Use::Reads,
            (false, true) => Use::WritesPieces,
            (false, false) => Use::Writes,
        };
        let file = open_storage(layer.id, &path).map_err(|errno| warn(config, device, errno)).ok()?;
        Some(Self { file, path, range: layer.range, how })
    }

    /// The processes whose locks conflict with ours.
    pub(super) fn holders(&self) -> Vec<ProcessName> {
        part_lock::holders(&self.file, self.range, self.how)
    }
}

/// The lock on what lies under a disk; the drop releases it.
#[derive(Debug)]
pub(super) struct StorageLock(Arc<Storage>);

impl Drop for StorageLock {
    fn drop(&mut self) {
        self.0.files.iter().for_each(|below| ofd::unlock(&below.file));
        self.0.is_locked.store(false, Ordering::Release);
    }
}

/// The storage behind a loop device, of which the disk's own node is at hand.
fn backing(device: &BlockDevice, anchor: &Anchor) -> Result<Backing, Errno> {
    if StorageId::Device(device.number) == anchor.storage {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Backing::of(open(anchor.path(), flags, Mode::empty())?)
    } else {
        Backing::of(neighbours::open_node(device, OFlags::empty())?)
    }
}

/// Opens the storage behind a loop device for reading, if the path leads to that storage.
fn open_storage(id: StorageId, path: &Path) -> Result<OwnedFd, Errno> {
    // Nothing is opened before it is known: a path can lead elsewhere, for example to a FIFO.
    let anchor = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if StorageId::of(&fstat(&anchor)?) != id {
        return Err(Errno::NOENT);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    open(format!("/proc/self/fd/{}", anchor.as_raw_fd()), flags, Mode::empty())
}

fn warn(config: &DiskConfig, device: &BlockDevice, errno: Errno) {
    let why = match errno {
        Errno::NOENT => "its path leads nowhere or elsewhere".into(),
        errno => errno.to_string(),
    };
    let (disk, file) = (&config.path, device.backing_path().unwrap_or_default());
    tracing::warn!(
        "the file {file:?} behind /dev/{} is not locked: {why} (keep other servers and virtual machines away from that \
         file while {disk:?} is served, or serve the file itself)",
        device.name
    );
}

/// What changes when one of the devices is set up anew.
fn incarnation(layers: &[Layer]) -> String {
    let sysfs = Sysfs::default();
    let device = |layer: &Layer| match layer.id {
        StorageId::Device(number) => Some(sysfs.device(number)?.incarnation()),
        StorageId::File { .. } => None,
    };
    layers.iter().filter_map(device).collect::<Vec<_>>().join("\n")
}
