//! Acquiring a disk for a time, and waiting for it without blocking the caller.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::acquire::{Attempt, BackOff};
use super::looks::Looks;
use super::{Disk, DiskAtStart, DiskError, LocatedDisk, StartUp};

/// How often [`DiskLease::release_while`] asks whether the release is still wanted.
const RELEASE_LOOK: Duration = Duration::from_millis(50);
/// The pause before the next try at a disk that failed rather than was busy.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// A disk that is acquired, released and acquired again: `Released` → `Waiting` → `Held` → `Released`.
///
/// The lease's own thread does the waiting. Guest requests may be executed only between the call of `on_held` and
/// [`Self::release`].
#[derive(Debug)]
pub struct DiskLease {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The state of a lease.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LeaseState {
    /// Not acquired, and not waiting.
    Released,
    /// The lease waits for the disk.
    Waiting {
        /// When [`DiskLease::acquire`] was called.
        since: Instant,
    },
    /// The lease has the disk.
    Held(Arc<Disk>),
}

#[derive(Debug)]
struct Shared {
    located: Arc<LocatedDisk>,
    inner: Mutex<Inner>,
    /// Signalled when `inner` has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    state: LeaseState,
    /// A disk that another thread of this process has acquired, until the lease's thread takes it over.
    taken: Option<Disk>,
    /// The thread tries to acquire the disk, or is in `on_held`.
    is_busy: bool,
    is_ending: bool,
}

impl DiskLease {
    /// A lease in the state [`LeaseState::Released`]. The lease's thread calls `on_held` each time that it has acquired
    /// the disk; `on_held` should only pass the disk on. [`Self::release`] waits for that call.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new(located: Arc<LocatedDisk>, on_held: impl FnMut(Arc<Disk>) + Send + 'static) -> io::Result<Self> {
        let inner = Mutex::new(Inner { state: LeaseState::Released, taken: None, is_busy: false, is_ending: false });
        let shared = Arc::new(Shared { located, inner, changed: Condvar::new() });
        let thread = thread::Builder::new().name("disk-lease".into()).spawn({
            let shared = shared.clone();
            move || shared.run(on_held)
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The disk of this lease.
    pub fn located(&self) -> &Arc<LocatedDisk> {
        &self.shared.located
    }

    /// Begins to wait for the disk, unless the lease waits for it or has it already. Returns at once.
    pub fn acquire(&self) {
        let mut inner = self.shared.inner();
        if matches!(inner.state, LeaseState::Released) {
            inner.state = LeaseState::Waiting { since: Instant::now() };
            self.shared.changed.notify_all();
        }
    }

    /// Releases the disk, or stops waiting for it.
    ///
    /// When this returns, `on_held` is not running, and is not called before the next [`Self::acquire`]. The lease
    /// itself holds nothing of the disk: others can open it, unless references remain that `on_held` has passed on, or
    /// rings that have the disk registered. So call this first, then [close](Disk::close) the disks that `on_held` has
    /// passed on.
    pub fn release(&self) {
        self.release_while(&|| true);
    }

    /// The same for as long as `is_wanted` returns true, which is asked repeatedly: an attempt to open a disk that does
    /// not answer can take any time.
    pub fn release_while(&self, is_wanted: &dyn Fn() -> bool) {
        let mut inner = self.shared.inner();
        let was = std::mem::replace(&mut inner.state, LeaseState::Released);
        let taken = inner.taken.take();
        self.shared.changed.notify_all();
        while inner.is_busy && is_wanted() {
            inner = self.shared.wait(inner, Some(RELEASE_LOOK));
        }
        drop(inner);
        // Closing a disk can take long, so the mutex is released first.
        let held = if let LeaseState::Held(disk) = was { Arc::into_inner(disk) } else { None };
        held.into_iter().chain(taken).for_each(Disk::close);
    }

    /// The state of the lease.
    pub fn state(&self) -> LeaseState {
        self.shared.inner().state.clone()
    }

    /// Stops waiting for the disk; a disk that the lease already has stays with it. The next [`Self::acquire`] waits
    /// again.
    pub fn stop_waiting(&self) {
        let mut inner = self.shared.inner();
        if matches!(inner.state, LeaseState::Waiting { .. }) {
            inner.state = LeaseState::Released;
            self.shared.changed.notify_all();
        }
    }

    /// For the start of a program: continues as [`LocatedDisk::start_up`] decided. Returns when the lease has the disk,
    /// if that decision includes one.
    pub fn begin(&self, start: DiskAtStart) {
        match start {
            DiskAtStart::NotRequested => {}
            DiskAtStart::Awaited => self.acquire(),
            DiskAtStart::Acquired(disk) => {
                self.shared.inner().taken = Some(disk);
                self.acquire();
                let mut inner = self.shared.inner();
                while matches!(inner.state, LeaseState::Waiting { .. }) {
                    inner = self.shared.wait(inner, None);
                }
            }
        }
    }

    /// [`LocatedDisk::start_up`] and [`Self::begin`].
    ///
    /// # Errors
    /// Those of [`LocatedDisk::start_up`]. The lease is released.
    pub fn start_up(&self, how: StartUp) -> Result<(), DiskError> {
        self.begin(self.located().start_up(how)?);
        Ok(())
    }
}

impl Drop for DiskLease {
    fn drop(&mut self) {
        self.shared.inner().is_ending = true;
        self.shared.changed.notify_all();
        // A panic of the thread has been printed already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a change or until the time is up; can also return spuriously.
    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, limit: Option<Duration>) -> MutexGuard<'a, Inner> {
        match limit {
            Some(limit) => self.changed.wait_timeout(inner, limit).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn run(&self, mut on_held: impl FnMut(Arc<Disk>)) {
        loop {
            let mut inner = self.inner();
            let since = loop {
                match inner.state {
                    _ if inner.is_ending => return,
                    LeaseState::Waiting { since } => break since,
                    _ => inner = self.wait(inner, None),
                }
            };
            inner.is_busy = true;
            drop(inner);
            if let Some(disk) = self.wait_for_disk(since) {
                self.pass_on(since, disk, &mut on_held);
            }
            // `release` waits for this: from here on the lease holds nothing of the disk but what it passed on.
            self.inner().is_busy = false;
            self.changed.notify_all();
        }
    }

    /// Passes the disk on, if it is still wanted.
    fn pass_on(&self, since: Instant, disk: Disk, on_held: &mut impl FnMut(Arc<Disk>)) {
        let mut inner = self.inner();
        if !inner.is_waiting(since) {
            drop(inner);
            return disk.close();
        }
        let disk = Arc::new(disk);
        inner.state = LeaseState::Held(disk.clone());
        drop(inner);
        on_held(disk);
    }

    /// `None`: the disk is no longer wanted.
    fn wait_for_disk(&self, since: Instant) -> Option<Disk> {
        let mut looks = Looks::new(since);
        if let Some(disk) = self.inner().taken.take() {
            looks.report_success(&disk);
            return Some(disk);
        }
        let mut acquisition = self.located.acquisition();
        let mut back_off = BackOff::default();
        loop {
            let (obstacle, pause) = match acquisition.attempt() {
                Ok(Attempt::Got(disk)) => {
                    looks.report_success(&disk);
                    return Some(disk);
                }
                Ok(Attempt::Busy) => (looks.is_due().then(|| acquisition.obstacle(since.elapsed())), back_off.next()),
                Err(error) => (Some(error), FAILURE_PAUSE),
            };
            if let Some(obstacle) = &obstacle {
                looks.report(obstacle);
            }
            if !self.pause(since, pause) {
                return None;
            }
        }
    }

    /// Sleeps. Returns false early, as soon as the disk is no longer wanted.
    fn pause(&self, since: Instant, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        let mut inner = self.inner();
        while inner.is_waiting(since) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            inner = self.wait(inner, Some(left));
        }
        false
    }
}

impl Inner {
    /// Whether the lease still waits, for the same call of `acquire`.
    fn is_waiting(&self, begun: Instant) -> bool {
        !self.is_ending && matches!(self.state, LeaseState::Waiting { since } if since == begun)
    }
}

#[cfg(test)]
mod tests;
