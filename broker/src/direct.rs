//! A device in direct mode: one disk, one guest's memory, and queues that are rings of the host kernel.
//!
//! [`DirectDevice::attach`] has the order of set-up in one place. [`DirectQueue::close`] undoes its steps in the
//! opposite order, and everything that I/O may still touch stays until the ring's real end.

mod config;
mod queue;

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use ringpass_restrictions::CompiledPolicy;

pub use config::{DirectConfig, QueueConfig, QueuePlacement, SubmissionConfig};
pub use queue::DirectQueue;

use queue::{Running, lock};

use crate::disk::Disk;
use crate::memory::{ChangedSlots, GuestMemory, MemoryError, PinnedMemory, RegionConfig};
use crate::ring::{
    DoorbellThread, IoWorkers, KernelRing, Placement, RingCloser, RingEnd, RingError, SqThread, Submission,
    check_eventfd, refuse_unsafe,
};

/// What the rings of a device have as their fixed file 0. Closed when the device and the last of its rings have ended.
pub(crate) trait RingFile: AsFd + fmt::Debug + Send + Sync {}

impl RingFile for Disk {}
impl RingFile for OwnedFd {}

/// One guest's device in direct mode.
#[derive(Debug)]
pub struct DirectDevice {
    file: Arc<dyn RingFile>,
    policy: CompiledPolicy,
    workers: IoWorkers,
    submission: Submission,
    doorbells: Arc<DoorbellThread>,
    closer: RingCloser,
    state: Mutex<DeviceState>,
    /// Held while memory is being plugged, which takes too long to hold `state`.
    plugging: Mutex<()>,
}

#[derive(Debug)]
struct DeviceState {
    pinned: Arc<PinnedMemory>,
    /// Rings that have not ended.
    rings: Vec<Ring>,
}

/// A ring of this device, from its creation to its end.
#[derive(Debug)]
struct Ring {
    /// The guest-physical areas to which the ring writes. None for a window.
    areas: Option<[Range<u64>; 2]>,
    end: RingEnd,
    queue: Weak<Mutex<Option<Running>>>,
}

impl DirectDevice {
    /// Pins the guest's memory and starts the threads. Takes as long as [`PinnedMemory::pin`].
    ///
    /// Drop privileges before: the SQ thread keeps the privileges of this moment, and memory that was pinned with other
    /// privileges cannot be shared with queues later.
    ///
    /// # Errors
    ///
    /// [`RingError::UnsafePolicy`] for a policy with lint errors that were not
    /// [accepted](CompiledPolicy::accept_unsafe); [`RingError::FinerBlocks`] for a disk whose logical block is smaller
    /// than that of direct I/O ([`Disk::finer_than_direct_io`]); [`RingError::IntegrityProfile`] for a block device
    /// that keeps protection information; the memory cannot be pinned; the CPU of the SQ thread cannot be used.
    pub fn new(
        disk: Arc<Disk>,
        memory: &GuestMemory,
        policy: CompiledPolicy,
        config: DirectConfig,
    ) -> Result<Self, RingError> {
        Self::new_while(disk, memory, policy, config, &|| true)
    }

    /// The same, cancelled when `is_wanted` returns false while memory is being pinned ([`PinnedMemory::pin_while`]).
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`MemoryError::NotWanted`].
    pub fn new_while(
        disk: Arc<Disk>,
        memory: &GuestMemory,
        policy: CompiledPolicy,
        config: DirectConfig,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, RingError> {
        check_disk(&disk)?;
        Self::of_file(disk, memory, policy, config, is_wanted)
    }

    /// The same for the file of a disk that was [checked](check_disk).
    pub(crate) fn of_file(
        file: Arc<dyn RingFile>,
        memory: &GuestMemory,
        policy: CompiledPolicy,
        config: DirectConfig,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, RingError> {
        // Before the pinning, which takes half a second for each GiB.
        refuse_unsafe(&policy)?;
        let (submission, pinned) = on_own_thread(|| -> Result<_, RingError> {
            let submission = match config.submission {
                SubmissionConfig::SqThread(config) => Submission::SqThread(Arc::new(SqThread::new(config)?)),
                SubmissionConfig::Doorbell => Submission::Doorbell,
            };
            Ok((submission, PinnedMemory::pin_while(memory, config.sharing, is_wanted)?))
        })?;
        Ok(Self {
            file,
            policy,
            workers: config.workers,
            submission,
            doorbells: Arc::new(DoorbellThread::start()?),
            closer: RingCloser::start()?,
            state: Mutex::new(DeviceState { pinned: Arc::new(pinned), rings: Vec::new() }),
            plugging: Mutex::new(()),
        })
    }

    /// Makes a queue and lets it run.
    ///
    /// # Errors
    ///
    /// See [`KernelRing::create`]; [`RingError::AreaInUse`] for areas of a ring that has not ended. A ring that fails
    /// half-way is closed, and its areas are in use until it has ended; nothing else of the queue remains.
    pub fn attach(&self, config: QueueConfig) -> Result<DirectQueue, RingError> {
        // Before there is a ring: a ring that is abandoned still writes to its areas for a while.
        for (what, eventfd) in [("doorbell", &config.doorbell), ("completion", &config.completion)] {
            eventfd.iter().try_for_each(|eventfd| check_eventfd(what, eventfd))?;
        }
        if config.doorbell.is_none() && matches!(self.submission, Submission::Doorbell) {
            return Err(RingError::NoDoorbell);
        }
        let mut guard = self.state();
        let state: &mut DeviceState = &mut guard;
        let areas = config.areas();
        state.check_free(areas.as_ref())?;
        let pinned = state.pinned.clone();
        on_own_thread(|| self.attach_in_order(config, areas, &pinned, state))
    }

    /// The order is the design: first everything that the guest may use, then the restrictions, then the ring runs.
    fn attach_in_order(
        &self,
        config: QueueConfig,
        areas: Option<[Range<u64>; 2]>,
        pinned: &Arc<PinnedMemory>,
        state: &mut DeviceState,
    ) -> Result<DirectQueue, RingError> {
        let placement = match config.placement {
            QueuePlacement::GuestRam { rings_gpa, sqes_gpa } => {
                Placement::GuestRam { memory: pinned.memory(), rings_gpa, sqes_gpa }
            }
            QueuePlacement::Window => Placement::Window,
        };
        let ring =
            KernelRing::create(config.ring, self.submission.clone(), &placement, self.file.as_fd(), &self.closer)?;
        // From here on the areas are in use, even if a later step fails.
        let running = Arc::new(Mutex::new(None));
        let end = ring.end();
        state.rings.push(Ring { areas, end: end.clone(), queue: Arc::downgrade(&running) });

        let ring = ring.attach_memory(pinned)?.limit_workers(self.workers)?;
        let ring = match &config.completion {
            Some(completion) => ring.attach_completion(completion)?,
            None => ring,
        };
        let ring = ring.restrict(&self.policy)?;
        let layout = *ring.layout();
        let doorbell = config.doorbell.map(|eventfd| self.doorbells.add(eventfd, ring.doorbell())).transpose()?;
        let ring = ring.enable().inspect_err(|_| {
            doorbell.iter().for_each(|doorbell| self.doorbells.remove(doorbell));
        })?;
        // A doorbell that rang while the ring was disabled was answered without effect.
        doorbell.iter().for_each(|doorbell| self.doorbells.ring(doorbell));

        *lock(&running) = Some(Running { ring, doorbell, pinned: pinned.clone(), file: self.file.clone() });
        let addressing = pinned.memory().addressing();
        Ok(DirectQueue { layout, addressing, running, end, doorbells: self.doorbells.clone() })
    }

    /// Adds a region of RAM while the queues run. Blocks as long as pinning it takes (about half a second per GiB of
    /// new 4 KiB pages), so call it on a thread that may block; running queues are touched for microseconds, each
    /// between two of its batches.
    ///
    /// # Errors
    ///
    /// As for [`GuestMemory::with_region`] and [`PinnedMemory::pin`]; the memory is as it was.
    pub fn plug(&self, region: RegionConfig) -> Result<(), RingError> {
        self.change_memory(|memory| memory.with_region(region), &|| true)
    }

    /// Replaces the guest's RAM by these regions while the queues run, in the same way. When this returns, no request
    /// that the guest submits from then on reaches a region that is not among them; the pages of a removed region are
    /// unpinned when the requests that were under way have ended.
    ///
    /// # Errors
    ///
    /// As for [`GuestMemory::with_regions`] and [`PinnedMemory::pin`]; the memory is as it was.
    pub fn set_memory(&self, regions: impl IntoIterator<Item = RegionConfig>) -> Result<(), RingError> {
        self.set_memory_while(regions, &|| true)
    }

    /// The same, cancelled when `is_wanted` returns false while memory is being pinned.
    ///
    /// # Errors
    ///
    /// As for [`set_memory`](Self::set_memory), and [`MemoryError::NotWanted`].
    pub fn set_memory_while(
        &self,
        regions: impl IntoIterator<Item = RegionConfig>,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), RingError> {
        self.change_memory(|memory| memory.with_regions(regions), is_wanted)
    }

    fn change_memory(
        &self,
        change: impl FnOnce(&GuestMemory) -> Result<GuestMemory, MemoryError>,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), RingError> {
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.state().pinned.clone();
        let memory = change(before.memory())?;
        let (other, slots) = on_own_thread(|| before.changed_to_while(&memory, is_wanted))?;
        let other = Arc::new(other);

        let mut state = self.state();
        let queues: Vec<_> = state.rings.iter().filter_map(|ring| ring.queue.upgrade()).collect();
        for (index, queue) in queues.iter().enumerate() {
            if let Some(running) = lock(queue).as_mut() {
                if let Err(error) = running.ring.replace_memory(&other, slots) {
                    undo_change(&queues[..index], &before, &other, slots);
                    return Err(error);
                }
                running.pinned = other.clone();
            }
        }
        state.pinned = other;
        Ok(())
    }

    /// Whether no I/O can reach memory any more that [`set_memory`](Self::set_memory) removed: nothing is pinned but
    /// the guest's current memory. For a process with one device; pinned memory of another device in the same process
    /// would count.
    ///
    /// False does not promise a later true: closed rings keep their memory until they have ended.
    ///
    /// # Errors
    ///
    /// `/proc` does not tell how much this process has pinned.
    pub(crate) fn has_drained(&self) -> Result<bool, RingError> {
        Ok(self.state().pinned.is_all_that_is_pinned()?)
    }

    /// The ends of this device's rings that have not ended: the rings of its queues, and closed, dropped or abandoned
    /// rings that still have I/O under way. Guest memory may be reused, handed back, or given to another device once
    /// all of them have ended: only this device knows the areas to which its rings still write.
    pub fn ends(&self) -> Vec<RingEnd> {
        let mut state = self.state();
        state.forget_ended();
        state.rings.iter().map(|ring| ring.end.clone()).collect()
    }

    /// The guest's memory, plugged memory included.
    pub fn memory(&self) -> GuestMemory {
        self.state().pinned.memory().clone()
    }

    fn state(&self) -> MutexGuard<'_, DeviceState> {
        lock(&self.state)
    }
}

impl DeviceState {
    fn forget_ended(&mut self) {
        self.rings.retain(|ring| !ring.end.has_ended());
    }

    /// Refuses areas to which a ring may still write.
    fn check_free(&mut self, areas: Option<&[Range<u64>; 2]>) -> Result<(), RingError> {
        self.forget_ended();
        let Some(areas) = areas else { return Ok(()) };
        let overlaps =
            |theirs: &Range<u64>| areas.iter().any(|ours| ours.start < theirs.end && theirs.start < ours.end);
        let in_use = self.rings.iter().find(|ring| ring.areas.iter().flatten().any(overlaps));
        match in_use.map(|ring| ring.end.wait(Duration::ZERO)) {
            Some(Err(why)) => {
                let [rings_gpa, sqes_gpa] = [areas[0].start, areas[1].start];
                Err(RingError::AreaInUse { rings_gpa, sqes_gpa, why })
            }
            // The ring ended just now.
            Some(Ok(_)) | None => Ok(()),
        }
    }
}

/// Refuses a disk that no ring may have.
///
/// # Errors
///
/// [`RingError::FinerBlocks`], [`RingError::IntegrityProfile`]; or `/sys` cannot be read.
pub(crate) fn check_disk(disk: &Disk) -> Result<(), RingError> {
    refuse_finer_blocks(disk)?;
    refuse_integrity_profile(disk.path(), disk.integrity_profile()?)
}

/// Refuses smaller blocks: the guest's driver keeps only to the logical block, and no code checks its requests before
/// the kernel does.
fn refuse_finer_blocks(disk: &Disk) -> Result<(), RingError> {
    match disk.finer_than_direct_io() {
        None => Ok(()),
        Some(direct_block_bytes) => Err(RingError::FinerBlocks {
            path: disk.path().to_owned(),
            logical_block_bytes: disk.logical_block_bytes(),
            direct_block_bytes,
        }),
    }
}

/// No restriction prevents a guest from naming the buffer of the protection information: any address of this process.
fn refuse_integrity_profile(path: &Path, profile: Option<String>) -> Result<(), RingError> {
    match profile {
        None => Ok(()),
        Some(profile) => Err(RingError::IntegrityProfile { path: path.to_owned(), profile }),
    }
}

/// Undoes a change of memory in the queues that already have it.
fn undo_change(
    queues: &[Arc<Mutex<Option<Running>>>],
    before: &Arc<PinnedMemory>,
    grown: &PinnedMemory,
    slots: ChangedSlots,
) {
    let former = before.sized_like(grown).map_err(RingError::from);
    for queue in queues {
        if let Some(running) = lock(queue).as_mut() {
            let result = match &former {
                Ok(former) => running.ring.replace_memory(former, slots).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match result {
                Ok(()) => running.pinned = before.clone(),
                Err(error) => tracing::error!(%error, "cannot undo a failed plug: one queue still reaches the memory"),
            }
        }
    }
}

/// Runs `work` on a thread that ends with it.
///
/// A thread that creates a ring becomes one of the ring's tasks: the kernel interrupts its system calls when the ring
/// ends, and the ring's limits on io-wq workers become the thread's own. The embedder's threads must have neither.
fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests;
