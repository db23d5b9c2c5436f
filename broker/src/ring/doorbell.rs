//! The thread that answers guests' doorbells.
//!
//! One thread serves all queues of a device. With an SQ thread a doorbell only wakes that thread, and the guest rings
//! it only while the thread sleeps. Without an SQ thread, the doorbell thread enters the ring at each doorbell;
//! requests and their completions then belong to the doorbell thread, so it must outlive their I/O: rings hand an
//! [`Arc`] of it to their [`RingEnd`](super::RingEnd).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::RingError;
use crate::ring_fd::RingFd;

/// epoll's user data for the request to stop.
const STOP: u64 = u64::MAX;
/// The pause before the thread repeats a submission for which the kernel had no memory.
const RETRY_MS: i32 = 10;
/// The number of SQEs consumed between two checks whether the doorbell is still to be answered: the guest decides how
/// long the kernel is busy with each.
const BATCH_SQES: u32 = 32;

/// The effect of a doorbell.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// Wakes the SQ thread.
    WakeSqThread(Arc<RingFd>),
    /// Submits the entries of the SQ.
    Submit { ring: Arc<RingFd>, sq_entries: u32 },
}

/// A doorbell eventfd and its effect.
#[derive(Debug)]
struct Doorbell {
    eventfd: EventFd,
    target: Target,
    /// A submission failed for a temporary reason.
    retry: AtomicBool,
    /// The doorbell must not be answered any more.
    removed: AtomicBool,
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    stop: EventFd,
    stopping: AtomicBool,
    /// Not held while the thread is in a ring, which can take as long as the guest likes.
    doorbells: Mutex<Doorbells>,
}

#[derive(Debug, Default)]
struct Doorbells {
    next_id: u64,
    by_id: HashMap<u64, Arc<Doorbell>>,
}

/// The thread that answers the doorbells of a device's queues. Ends when dropped.
#[derive(Debug)]
pub struct DoorbellThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The number of a doorbell that the thread answers, until it is removed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DoorbellId(u64);

impl DoorbellThread {
    /// Starts the thread.
    pub fn start() -> Result<Self, RingError> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(RingError::system("making an eventfd"))?;
        let epoll = Epoll::new().map_err(RingError::system("making an epoll instance"))?;
        let shared = Arc::new(Shared { epoll, stop, stopping: AtomicBool::new(false), doorbells: Mutex::default() });
        shared
            .epoll
            .ctl(ControlOperation::Add, shared.stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))
            .map_err(RingError::system("watching an eventfd"))?;
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("ring-doorbell".into())
            .spawn(move || theirs.run())
            .map_err(RingError::system("starting the doorbell thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Answers `eventfd` from now on, including a signal that came before.
    pub(crate) fn add(&self, eventfd: EventFd, target: Target) -> Result<DoorbellId, RingError> {
        // Another holder may read the eventfd between our epoll and our read; then our read must not block.
        let fd = borrow(&eventfd);
        let flags = rustix::fs::fcntl_getfl(fd).map_err(RingError::system("reading the doorbell's flags"))?;
        rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(RingError::system("making the doorbell non-blocking"))?;
        let raw = eventfd.as_raw_fd();
        let mut doorbells = self.shared.doorbells();
        let id = doorbells.next_id;
        doorbells.next_id += 1;
        let doorbell = Doorbell { eventfd, target, retry: AtomicBool::new(false), removed: AtomicBool::new(false) };
        doorbells.by_id.insert(id, Arc::new(doorbell));
        let added = self.shared.epoll.ctl(ControlOperation::Add, raw, EpollEvent::new(EventSet::IN, id));
        if let Err(source) = added {
            doorbells.by_id.remove(&id);
            return Err(RingError::System { what: "watching the doorbell eventfd", source });
        }
        Ok(DoorbellId(id))
    }

    /// Rings a doorbell in the guest's place, for signals that came before there was a ring.
    pub(crate) fn ring(&self, id: &DoorbellId) {
        let Some(doorbell) = self.shared.doorbells().by_id.get(&id.0).cloned() else { return };
        match doorbell.eventfd.write(1) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::error!(%error, "cannot ring a doorbell");
            }
            _ => {}
        }
    }

    /// Stops answering a doorbell. Returns at once: the thread may still be in the ring, and holds the ring until it is
    /// out.
    pub(crate) fn remove(&self, id: &DoorbellId) {
        let Some(doorbell) = self.shared.doorbells().by_id.remove(&id.0) else { return };
        doorbell.removed.store(true, Ordering::Relaxed);
        let fd = doorbell.eventfd.as_raw_fd();
        if let Err(error) = self.shared.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
            tracing::error!(%error, "cannot stop watching a doorbell");
        }
    }
}

impl Drop for DoorbellThread {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Err(error) = self.shared.stop.write(1) {
            tracing::error!(%error, "cannot stop the doorbell thread");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the doorbell thread panicked");
        }
    }
}

impl Shared {
    fn doorbells(&self) -> MutexGuard<'_, Doorbells> {
        self.doorbells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut events = [EpollEvent::default(); 16];
        let mut retry = false;
        while !self.stopping.load(Ordering::Relaxed) {
            let count = match self.epoll.wait(if retry { RETRY_MS } else { -1 }, &mut events) {
                Ok(count) => count,
                // Completions of our own requests interrupt the wait.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the doorbell thread cannot wait: doorbells are no longer answered");
                    return;
                }
            };
            for event in &events[..count] {
                // None: the doorbell was removed after the event.
                let doorbell = self.doorbells().by_id.get(&event.data()).cloned();
                if let Some(doorbell) = doorbell {
                    doorbell.answer();
                }
            }
            if retry {
                self.retrying().iter().for_each(|doorbell| doorbell.ring());
            }
            retry = !self.retrying().is_empty();
        }
    }

    fn retrying(&self) -> Vec<Arc<Doorbell>> {
        self.doorbells().by_id.values().filter(|doorbell| doorbell.retry.load(Ordering::Relaxed)).cloned().collect()
    }
}

impl Doorbell {
    /// Takes the signal first, then acts: a doorbell that rings in between is not lost.
    fn answer(&self) {
        match self.eventfd.read() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::error!(%error, "cannot read a doorbell");
            }
            _ => {}
        }
        self.ring();
    }

    fn ring(&self) {
        let result = match &self.target {
            Target::WakeSqThread(ring) => ring.wake_sq_thread(),
            Target::Submit { ring, sq_entries } => self.submit(ring, *sq_entries),
        };
        let retry = match result {
            Ok(()) => false,
            // No memory for requests, or the guest lets its CQ overflow.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EAGAIN | nix::libc::EBUSY)) => true,
            // The guest's SQ thread or ring has failed for good; the guest sees no completions.
            Err(error) => {
                tracing::debug!(%error, "cannot answer a doorbell");
                false
            }
        };
        self.retry.store(retry, Ordering::Relaxed);
    }

    /// Consumes the entries of the SQ, at most about a whole SQ: for more entries the guest rings again.
    fn submit(&self, ring: &RingFd, sq_entries: u32) -> io::Result<()> {
        let mut left = sq_entries;
        while left != 0 && !self.removed.load(Ordering::Relaxed) {
            // Fewer than requested need not be all: the kernel also stops early when it runs out of memory.
            match ring.submit(left.min(BATCH_SQES))? {
                0 => break,
                consumed => left = left.saturating_sub(consumed),
            }
        }
        Ok(())
    }
}

/// Refuses a file that is not an eventfd: its owner in another process may have sent any kind of file.
pub(crate) fn check_eventfd(what: &'static str, eventfd: &EventFd) -> Result<(), RingError> {
    match RingFd::takes_eventfd(borrow(eventfd)).map_err(RingError::system("asking the kernel about an eventfd"))? {
        true => Ok(()),
        false => Err(RingError::NotAnEventfd { what }),
    }
}

/// The descriptor of an `EventFd`, which itself offers only the raw descriptor.
pub(crate) fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the EventFd, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
