//! A device in direct mode: one disk, one guest's memory, and queues that are rings of the host kernel.
//!
//! [`DirectDevice::attach`] is the order of set-up in one place. What it makes is undone in the opposite order by
//! [`DirectQueue::close`], and whatever I/O may still touch stays until the ring's real end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ringpass_guest_abi::RingLayout;
use ringpass_restrictions::CompiledPolicy;
use vmm_sys_util::eventfd::EventFd;

use crate::disk::Disk;
use crate::memory::{GuestMemory, PinnedMemory, RegionConfig, Sharing};
use crate::ring::{
    BellId, DoorbellThread, Enabled, IoWorkers, KernelRing, Placement, RingConfig, RingEnd, RingError, RingWindow,
    SqThread, SqThreadConfig, Submission, check_eventfd,
};

/// How a device executes its queues.
#[derive(Clone, Copy, Debug)]
pub struct DirectConfig {
    /// Who consumes the SQs.
    pub submission: SubmissionConfig,
    /// Limits of the kernel threads behind the rings.
    pub workers: IoWorkers,
    /// How queues share the pinned memory: [`Sharing::Clone`] from Linux 6.12 on.
    pub sharing: Sharing,
}

/// Who consumes the SQs of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmissionConfig {
    /// One kernel thread, which polls.
    SqThread(SqThreadConfig),
    /// A thread of the broker, at each doorbell.
    Doorbell,
}

/// What a queue is to be.
#[derive(Debug)]
pub struct QueueConfig {
    /// Size of the ring.
    pub ring: RingConfig,
    /// Where the ring's memory is to be.
    pub placement: QueuePlacement,
    /// Signalled by the guest when the ring's doorbell rule says so. None: nobody listens; only for guests of an SQ
    /// thread that never sleeps before they end.
    pub doorbell: Option<EventFd>,
    /// Signalled by the kernel at completions that the guest has not muted. None: the guest only polls.
    pub completion: Option<EventFd>,
}

/// Where a queue's ring is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueuePlacement {
    /// In guest RAM, at the driver's addresses ([`Placement::GuestRam`]).
    GuestRam {
        /// Guest-physical address of the rings area.
        rings_gpa: u64,
        /// Guest-physical address of the SQE area.
        sqes_gpa: u64,
    },
    /// In pages of the kernel ([`Placement::Window`]).
    Window,
}

/// One guest's device in direct mode.
#[derive(Debug)]
pub struct DirectDevice {
    disk: Arc<Disk>,
    policy: CompiledPolicy,
    workers: IoWorkers,
    submission: Submission,
    doorbells: Arc<DoorbellThread>,
    state: Mutex<State>,
    /// Held while memory is being plugged, which is too long for `state`.
    plugging: Mutex<()>,
}

#[derive(Debug)]
struct State {
    pinned: Arc<PinnedMemory>,
    queues: Vec<Weak<Mutex<Option<Running>>>>,
}

/// A queue of a device: a ring that the guest drives. Closed when dropped.
#[derive(Debug)]
pub struct DirectQueue {
    layout: RingLayout,
    running: Arc<Mutex<Option<Running>>>,
    doorbells: Arc<DoorbellThread>,
}

#[derive(Debug)]
struct Running {
    ring: KernelRing<Enabled>,
    bell: Option<BellId>,
    /// The memory the ring was given, which its I/O may use.
    pinned: Vec<Arc<PinnedMemory>>,
    disk: Arc<Disk>,
}

impl DirectDevice {
    /// Pins the guest's memory and starts the threads. Takes as long as [`PinnedMemory::pin`].
    pub fn new(
        disk: Arc<Disk>,
        memory: &GuestMemory,
        policy: CompiledPolicy,
        config: DirectConfig,
    ) -> Result<Self, RingError> {
        let doorbells = Arc::new(DoorbellThread::start()?);
        let submission = match config.submission {
            SubmissionConfig::SqThread(config) => Submission::SqThread(Arc::new(SqThread::start(config)?)),
            SubmissionConfig::Doorbell => Submission::Doorbell,
        };
        let pinned = Arc::new(PinnedMemory::pin(memory, config.sharing)?);
        Ok(Self {
            disk,
            policy,
            workers: config.workers,
            submission,
            doorbells,
            state: Mutex::new(State { pinned, queues: Vec::new() }),
            plugging: Mutex::new(()),
        })
    }

    /// Makes a queue and lets it run.
    ///
    /// # Errors
    ///
    /// See [`KernelRing::create`]; nothing of the queue remains.
    pub fn attach(&self, config: QueueConfig) -> Result<DirectQueue, RingError> {
        // Before there is a ring: one that is given up goes on writing to its areas for a while.
        for (what, eventfd) in [("doorbell", &config.doorbell), ("completion", &config.completion)] {
            eventfd.iter().try_for_each(|eventfd| check_eventfd(what, eventfd))?;
        }
        let mut state = self.state();
        let pinned = state.pinned.clone();
        let placement = match config.placement {
            QueuePlacement::GuestRam { rings_gpa, sqes_gpa } => {
                Placement::GuestRam { memory: pinned.memory(), rings_gpa, sqes_gpa }
            }
            QueuePlacement::Window => Placement::Window,
        };

        // The order is the design: everything that the guest may use, then what it may not, then it runs.
        let ring = KernelRing::create(config.ring, self.submission.clone(), &placement)?
            .attach_memory(&pinned)?
            .attach_disk(&self.disk)?
            .limit_workers(self.workers)?;
        let ring = match &config.completion {
            Some(completion) => ring.attach_completion(completion)?,
            None => ring,
        };
        let ring = ring.restrict(&self.policy)?.enable()?;

        let layout = *ring.layout();
        let bell = config.doorbell.map(|eventfd| self.doorbells.add(eventfd, ring.doorbell())).transpose()?;
        let running = Running { ring, bell, pinned: vec![pinned], disk: self.disk.clone() };
        let running = Arc::new(Mutex::new(Some(running)));
        state.queues.retain(|queue| queue.strong_count() > 0);
        state.queues.push(Arc::downgrade(&running));
        Ok(DirectQueue { layout, running, doorbells: self.doorbells.clone() })
    }

    /// Adds a region of RAM while the queues run. Blocks for as long as pinning it takes (about half a second per GiB
    /// of new 4 KiB pages), so it is for a thread that may; running queues are touched for microseconds.
    ///
    /// # Errors
    ///
    /// As for [`GuestMemory::with_region`] and [`PinnedMemory::pin`]; the memory is as it was.
    pub fn plug(&self, region: RegionConfig) -> Result<(), RingError> {
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.state().pinned.clone();
        let memory = before.memory().with_region(region)?;
        let (grown, slots) = before.grown_to(&memory)?;
        let grown = Arc::new(grown);
        let mut state = self.state();
        for queue in state.queues.iter().filter_map(Weak::upgrade) {
            if let Some(running) = lock(&queue).as_mut() {
                running.ring.replace_memory(&grown, &slots)?;
                running.pinned.push(grown.clone());
            }
        }
        state.pinned = grown;
        Ok(())
    }

    /// The disk behind the queues.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The guest's memory, plugged memory included.
    pub fn memory(&self) -> GuestMemory {
        self.state().pinned.memory().clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl DirectQueue {
    /// Where the parts of the ring are, for the guest.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// The ring's pages, if the kernel allocated them. While anything holds them the ring goes on running, even closed.
    pub fn window(&self) -> Option<Arc<RingWindow>> {
        lock(&self.running).as_ref().and_then(|running| running.ring.window().cloned())
    }

    /// Changes the eventfd that completions signal; the new one is signalled once.
    pub fn replace_completion(&self, completion: Option<&EventFd>) -> Result<(), RingError> {
        match lock(&self.running).as_ref() {
            Some(running) => running.ring.replace_completion(completion),
            None => Ok(()),
        }
    }

    /// Ends the queue. Returns at once; [`RingEnd`] tells when its I/O has ended too.
    pub fn close(self) -> RingEnd {
        self.end().expect("only closed here or when dropped")
    }

    fn end(&self) -> Option<RingEnd> {
        let Running { ring, bell, pinned, disk } = lock(&self.running).take()?;
        if let Some(bell) = bell {
            self.doorbells.remove(&bell);
        }
        Some(ring.close(Box::new((pinned, disk, self.doorbells.clone()))))
    }
}

impl Drop for DirectQueue {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
