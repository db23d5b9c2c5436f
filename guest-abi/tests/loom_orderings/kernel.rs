//! A model of the kernel's side, with the same steps as Linux 6.6 to 6.19 (comments name the functions).

use std::sync::Arc;

use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;
use ringpass_guest_abi::{CQ_EVENTFD_DISABLED, Cqe, SQ_NEED_WAKEUP, Sqe};

use crate::memory::SharedRing;

/// Rounds that a sleeper waits. A thread that yields runs again only when every other thread has ended, waits for it,
/// or has yielded too, so a signal that has not come after a few rounds never comes.
const WAIT_ROUNDS: u32 = 4;

/// An eventfd: the doorbell in one direction, the interrupt in the other.
///
/// A mutex and a condition variable would do, but unwinding a sleeper's guard after loom found a failure aborts.
pub(crate) struct Event(AtomicU32);

impl Event {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(AtomicU32::new(0)))
    }

    pub(crate) fn signal(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    /// Sleeps until it was signalled.
    pub(crate) fn wait(&self) {
        for _ in 0..WAIT_ROUNDS {
            if self.0.swap(0, Ordering::AcqRel) != 0 {
                return;
            }
            thread::yield_now();
        }
        panic!("{SLEEPS_FOR_EVER}");
    }
}

/// What [`Event::wait`] panics with.
pub(crate) const SLEEPS_FOR_EVER: &str = "a thread sleeps and no thread is left to wake it";

/// The kernel's side of the ring, with its private indexes.
pub(crate) struct Kernel {
    shared: Arc<SharedRing>,
    cached_sq_head: u32,
    cached_cq_tail: u32,
    /// `wq_has_sleeper` is called between the CQ tail and the CQ flags. False for IORING_SETUP_DEFER_TASKRUN.
    wakes_cq_waiters: bool,
}

impl Kernel {
    pub(crate) fn new(shared: Arc<SharedRing>) -> Self {
        Self { shared, cached_sq_head: 0, cached_cq_tail: 0, wakes_cq_waiters: true }
    }

    /// The kernel's side of a ring with `IORING_SETUP_DEFER_TASKRUN`.
    pub(crate) fn with_deferred_task_work(shared: Arc<SharedRing>) -> Self {
        Self { wakes_cq_waiters: false, ..Self::new(shared) }
    }

    /// `io_sqring_entries`.
    fn sqring_entries(&self) -> u32 {
        self.shared.sq_tail.load(Ordering::Acquire).wrapping_sub(self.cached_sq_head)
    }

    /// `io_submit_sqes`: reads and issues each SQE, then `io_commit_sqring`. Returns the number of SQEs.
    ///
    /// As in the kernel, completions of requests that `issue` completes at once are posted before the head moves.
    fn submit_sqes(&mut self, issue: &mut impl FnMut(&mut Self, Sqe)) -> u32 {
        let entries = self.sqring_entries();
        for _ in 0..entries {
            let slot = self.cached_sq_head as usize % self.shared.sqes.len();
            self.cached_sq_head = self.cached_sq_head.wrapping_add(1);
            // SAFETY: loom has checked that no write is concurrent, and no code keeps the pointer.
            let sqe = self.shared.sqes[slot].with(|cell| unsafe { *cell });
            issue(self, sqe);
        }
        if entries != 0 {
            self.shared.sq_head.store(self.cached_sq_head, Ordering::Release);
        }
        entries
    }

    /// `io_sq_thread` with an idle time of zero, until it has submitted `requests` SQEs: hands each to `issue`.
    pub(crate) fn sq_thread(&mut self, requests: u32, doorbell: &Event, mut issue: impl FnMut(&mut Self, Sqe)) {
        let mut submitted = 0;
        while submitted < requests {
            let entries = self.submit_sqes(&mut issue);
            submitted += entries;
            if entries == 0 {
                // `atomic_or` and `atomic_andnot` of Linux have no ordering; `smp_mb__after_atomic` does.
                self.shared.sq_flags.fetch_or(SQ_NEED_WAKEUP, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if self.sqring_entries() == 0 {
                    doorbell.wait();
                }
                self.shared.sq_flags.fetch_and(!SQ_NEED_WAKEUP, Ordering::Relaxed);
            }
        }
    }

    /// `io_cqe_cache_refill`: whether a CQ slot is free.
    ///
    /// The kernel loads `cq.head` with READ_ONCE and relies on the control dependency to its later stores. C11 has no
    /// control dependencies: acquire is how it says the same.
    pub(crate) fn has_free_cqe(&self) -> bool {
        let events = self.cached_cq_tail.wrapping_sub(self.shared.cq_head.load(Ordering::Acquire));
        (events as usize) < self.shared.cqes.len()
    }

    /// `io_fill_cqe_req`, then `__io_cq_unlock_post`.
    pub(crate) fn post_cqe(&mut self, cqe: Cqe, interrupt: &Event) {
        assert!(self.has_free_cqe(), "the CQ overflowed");
        let index = self.cached_cq_tail as usize % self.shared.cqes.len();
        // SAFETY: loom has checked that no other access is concurrent, and no code keeps the pointer.
        self.shared.cqes[index].with_mut(|cell| unsafe { *cell = cqe });
        self.cached_cq_tail = self.cached_cq_tail.wrapping_add(1);
        // `io_commit_cqring`
        self.shared.cq_tail.store(self.cached_cq_tail, Ordering::Release);
        if self.wakes_cq_waiters {
            // `io_cqring_wake`: the `smp_mb` of `wq_has_sleeper`
            fence(Ordering::SeqCst);
        }
        // `io_commit_cqring_flush`, down to `io_eventfd_grab`
        if self.shared.cq_flags.load(Ordering::Relaxed) & CQ_EVENTFD_DISABLED == 0 {
            interrupt.signal();
        }
    }
}
