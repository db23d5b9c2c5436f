//! Acquiring a disk: claim, lock, and waiting for both.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::block_device::BlockDevice;
use super::geometry::Geometry;
use super::open::{self, Anchor, Found};
use super::storage::{Obstacle, Storage, StorageLock, StorageSource};
use super::{Disk, DiskConfig, DiskError, holders, lock, ofd};
use crate::processes::Process;

/// Tries to acquire one disk, repeatedly. A try keeps the claim that it got for the next try.
#[derive(Debug)]
pub(super) struct Acquisition<'a> {
    anchor: &'a Anchor,
    config: &'a DiskConfig,
    storage: &'a StorageSource,
    found: Option<Found>,
    obstacle: BusyWith,
}

/// The outcome of a try.
#[derive(Debug)]
pub(super) enum Attempt {
    /// The caller has the disk.
    Got(Disk),
    /// Another process has the disk.
    Busy,
}

/// What the last try found in its way.
#[derive(Debug)]
enum BusyWith {
    /// The lock or the claim on the disk itself.
    Disk,
    /// The lock on a storage under the disk.
    Storage(Arc<Storage>, Obstacle),
    /// Another device with storage of the disk.
    Neighbour(BlockDevice),
}

impl<'a> Acquisition<'a> {
    pub(super) fn new(anchor: &'a Anchor, config: &'a DiskConfig, storage: &'a StorageSource) -> Self {
        Self { anchor, config, storage, found: None, obstacle: BusyWith::Disk }
    }

    /// Tries once, without waiting.
    ///
    /// The locks come before the claim, because only one broker gets the lock on the lowest storage. That broker alone
    /// then looks at the claims of the others. It looks again when it has its own claim: a broker whose locks are
    /// elsewhere (on another node of a device, or on a partition) may have come meanwhile, and one of the two sees the
    /// other. A broker that fails keeps nothing that another could wait for.
    pub(super) fn attempt(&mut self) -> Result<Attempt, DiskError> {
        let storage = self.storage.now(self.anchor, self.config);
        let storage_lock = match storage.try_lock()? {
            Ok(locked) => locked,
            Err(obstacle) => return Ok(self.busy_with(BusyWith::Storage(storage, obstacle))),
        };
        let is_claimed = self.anchor.is_claimed(self.config);
        if is_claimed {
            if let Some(neighbour) = storage.claimed() {
                return Ok(self.busy_with(BusyWith::Neighbour(neighbour)));
            }
        }
        let found = match self.found.take() {
            Some(found) => found,
            None => match open::open(self.anchor, self.config)? {
                Some(found) => found,
                None => return Ok(self.busy_with(BusyWith::Disk)),
            },
        };
        if !lock::try_lock(&found.file, &self.config.path, self.config.read_only)? {
            self.found = Some(found);
            return Ok(self.busy_with(BusyWith::Disk));
        }
        if !self.config.read_only {
            if let Some(neighbour) = storage.claimed() {
                ofd::unlock(&found.file);
                return Ok(self.busy_with(BusyWith::Neighbour(neighbour)));
            }
        }
        self.finish(found, storage_lock).map(Attempt::Got)
    }

    fn busy_with(&mut self, obstacle: BusyWith) -> Attempt {
        self.obstacle = obstacle;
        Attempt::Busy
    }

    fn finish(&self, found: Found, storage_lock: StorageLock) -> Result<Disk, DiskError> {
        // Not earlier: the previous holder of the lock may have resized the disk.
        let geometry = Geometry::read(&found, self.config)?;
        let has_partial_writes = !self.config.read_only && geometry.finer_than_direct_io(false).is_some();
        let page_cache = has_partial_writes.then(|| open::open_page_cache(self.anchor, self.config)).transpose()?;
        Ok(Disk::new(found, page_cache, self.config, geometry, storage_lock))
    }

    /// After [`Attempt::Busy`]: the refusal that names the disk's holder. Reads `/proc`, which takes milliseconds.
    pub(super) fn obstacle(&self, waited: Duration) -> DiskError {
        let (path, read_only) = (self.config.path.clone(), self.config.read_only);
        match (&self.obstacle, &self.found) {
            (BusyWith::Storage(storage, Obstacle::Locked(index)), _) => {
                if let Some(obstacle) = self.obstacle_on_disk(waited) {
                    return obstacle;
                }
                let below = storage.file(*index);
                let (holders, devices) = (below.holders(), claimed_nodes(storage));
                DiskError::StorageLocked { path, storage: below.path.clone(), read_only, holders, devices, waited }
            }
            (BusyWith::Storage(_, Obstacle::OwnLock), _) => {
                let holders = vec![Process::with_pid(std::process::id()).name()];
                DiskError::Locked { path, read_only, holders, devices: Vec::new(), waited }
            }
            (BusyWith::Neighbour(device), _) => {
                let uses = holders::device_uses(device.number);
                DiskError::StorageInUse { path, device: device.node(), uses, waited }
            }
            (BusyWith::Disk, Some(found)) => {
                let holders = lock::holders(&found.file, read_only);
                let devices = claimed_nodes(&self.storage.now(self.anchor, self.config));
                DiskError::Locked { path, read_only, holders, devices, waited }
            }
            (BusyWith::Disk, None) => DiskError::InUse { path, uses: holders::device_uses(self.anchor.device), waited },
        }
    }

    /// The same for what is in the way on the disk itself: a process that has the same device has the storage as well.
    fn obstacle_on_disk(&self, waited: Duration) -> Option<DiskError> {
        let (path, read_only) = (self.config.path.clone(), self.config.read_only);
        if self.anchor.is_claimed(self.config) && self.anchor.is_claimed_by_another() {
            return Some(DiskError::InUse { path, uses: holders::device_uses(self.anchor.device), waited });
        }
        let found = open::open_for_questions(self.anchor, self.config).ok()?;
        let is_locked = lock::is_locked_by_another(&found.file, read_only);
        let holders = is_locked.then(|| lock::holders(&found.file, read_only))?;
        Some(DiskError::Locked { path, read_only, holders, devices: Vec::new(), waited })
    }

    /// Tries until the caller has the disk or the time is up.
    pub(super) fn within(mut self, limit: Option<Duration>) -> Result<Disk, DiskError> {
        let mut wait = Wait::new(limit);
        loop {
            if let Attempt::Got(disk) = self.attempt()? {
                return Ok(disk);
            }
            if wait.is_first() {
                tracing::info!(limit = ?wait.limit, "waiting for the disk: {}", self.obstacle(Duration::ZERO));
            }
            if !wait.pause() {
                return Err(self.obstacle(wait.waited()));
            }
        }
    }
}

/// The node of a device through which the holder of a lock may use the storage.
fn claimed_nodes(storage: &Storage) -> Vec<PathBuf> {
    storage.claimed().iter().map(BlockDevice::node).collect()
}

/// The pause between two tries. The first is too short for a person to notice; the last is so long that trying costs no CPU
/// time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    pauses: u32,
}

impl BackOff {
    const FIRST: Duration = Duration::from_millis(1);
    const LONGEST: Duration = Duration::from_millis(64);

    /// The next pause.
    pub(super) fn next(&mut self) -> Duration {
        let pause = Self::FIRST.saturating_mul(1 << self.pauses.min(10)).min(Self::LONGEST);
        self.pauses += 1;
        pause
    }
}

/// A bounded wait.
struct Wait {
    limit: Option<Duration>,
    started: Instant,
    back_off: BackOff,
}

impl Wait {
    fn new(limit: Option<Duration>) -> Self {
        Self { limit, started: Instant::now(), back_off: BackOff::default() }
    }

    /// Whether a wait begins and none of it is over: the time for a log line.
    fn is_first(&self) -> bool {
        self.back_off.pauses == 0 && self.limit.is_some_and(|limit| !limit.is_zero())
    }

    /// Sleeps, longer each time. Returns false without sleeping when the time is up.
    fn pause(&mut self) -> bool {
        let left = self.limit.unwrap_or_default().saturating_sub(self.started.elapsed());
        if left.is_zero() {
            return false;
        }
        thread::sleep(self.back_off.next().min(left));
        true
    }

    /// How long the wait has lasted so far; zero if there was no wait.
    fn waited(&self) -> Duration {
        if self.back_off.pauses == 0 { Duration::ZERO } else { self.started.elapsed() }
    }
}
