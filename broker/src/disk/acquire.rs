//! Acquiring a disk: claim, lock, and waiting for both.

use std::thread;
use std::time::{Duration, Instant};

use super::geometry::Geometry;
use super::open::{self, Anchor, Found};
use super::{Disk, DiskConfig, DiskError, holders, lock};

/// Tries to acquire one disk, repeatedly. A try keeps the claim that it got for the next try.
#[derive(Debug)]
pub(super) struct Acquisition<'a> {
    anchor: &'a Anchor,
    config: &'a DiskConfig,
    found: Option<Found>,
}

/// The outcome of a try.
#[derive(Debug)]
pub(super) enum Attempt {
    /// The caller has the disk.
    Got(Disk),
    /// Another process has the disk.
    Busy,
}

impl<'a> Acquisition<'a> {
    pub(super) fn new(anchor: &'a Anchor, config: &'a DiskConfig) -> Self {
        Self { anchor, config, found: None }
    }

    /// Tries once, without waiting.
    pub(super) fn attempt(&mut self) -> Result<Attempt, DiskError> {
        let found = match self.found.take() {
            Some(found) => found,
            None => match open::open(self.anchor, self.config)? {
                Some(found) => found,
                None => return Ok(Attempt::Busy),
            },
        };
        if !lock::try_lock(&found.file, &self.config.path, self.config.read_only)? {
            self.found = Some(found);
            return Ok(Attempt::Busy);
        }
        // Not earlier: the previous holder of the lock may have resized the disk.
        let geometry = Geometry::read(&found, self.config)?;
        let has_partial_writes = !self.config.read_only && geometry.finer_than_direct_io(false).is_some();
        let page_cache = has_partial_writes.then(|| open::open_page_cache(self.anchor, self.config)).transpose()?;
        Ok(Attempt::Got(Disk::new(found, page_cache, self.config, geometry)))
    }

    /// After [`Attempt::Busy`]: the refusal that names the disk's holder. Reads `/proc`, which takes milliseconds.
    pub(super) fn obstacle(&self, waited: Duration) -> DiskError {
        let path = self.config.path.clone();
        match &self.found {
            Some(found) => {
                let read_only = self.config.read_only;
                DiskError::Locked { path, read_only, holders: lock::holders(&found.file, read_only), waited }
            }
            None => DiskError::InUse { path, uses: holders::device_uses(self.anchor.device), waited },
        }
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
