//! The channel between a worker and its writer thread: a ring of jobs, a ring of results, and the handshake by which each side
//! sleeps without missing what the other one sends.
//!
//! | store | load | order |
//! | --- | --- | --- |
//! | `sent`, by the worker | by the thread | release and acquire: the thread sees the job |
//! | `done`, by the thread | by the worker | release and acquire: the worker sees the result |
//! | `is_worker_asleep`, then `done`, at the worker | `done`, then `is_worker_asleep`, at the thread | a full fence between the two on both sides: the worker sees the result, or the thread sees that the worker sleeps |
//!
//! The thread sleeps in `park`, whose token keeps a wake-up that comes before it.
//!
//! `model` compiles this file a second time, with the atomics of loom, and checks the table in every interleaving.

use std::sync::Arc;

use super::atomics::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use crate::engine::cache_line::CacheLine;

/// What both threads have. Each ring has room for all jobs that can be outstanding.
#[derive(Debug)]
struct Channel<J> {
    jobs: Box<[J]>,
    results: Box<[AtomicU64]>,
    sent: CacheLine<AtomicU32>,
    done: CacheLine<AtomicU32>,
    /// The worker sleeps and wants to be woken by the next result.
    is_worker_asleep: CacheLine<AtomicBool>,
    is_ended: AtomicBool,
}

/// The worker's end: it sends jobs and takes their results.
#[derive(Debug)]
pub(super) struct WorkerEnd<J> {
    channel: Arc<Channel<J>>,
    /// Jobs sent, and results taken. Both wrap.
    sent: u32,
    taken: u32,
    /// Jobs were sent since the thread was woken last.
    has_new_jobs: bool,
}

/// The thread's end: it carries jobs out.
#[derive(Debug)]
pub(super) struct ThreadEnd<J> {
    channel: Arc<Channel<J>>,
}

/// What the thread does besides the channel.
pub(super) trait Thread<J> {
    /// Carries a job out and gives its result. The sender of the job keeps everything that it names until the result was taken.
    fn carry_out(&mut self, job: &J) -> u64;

    /// Wakes the worker.
    fn wake_worker(&mut self);

    /// There is no job: returns when there may be one, at the latest when the thread is unparked.
    fn pause(&mut self);
}

/// A channel for at most `jobs_max` outstanding jobs.
pub(super) fn channel<J: Default>(jobs_max: usize) -> (WorkerEnd<J>, ThreadEnd<J>) {
    let room = jobs_max.next_power_of_two();
    let channel = Arc::new(Channel {
        jobs: (0..room).map(|_| J::default()).collect(),
        results: (0..room).map(|_| AtomicU64::default()).collect(),
        sent: CacheLine::default(),
        done: CacheLine::default(),
        is_worker_asleep: CacheLine::default(),
        is_ended: AtomicBool::default(),
    });
    (WorkerEnd { channel: channel.clone(), sent: 0, taken: 0, has_new_jobs: false }, ThreadEnd { channel })
}

impl<J> WorkerEnd<J> {
    /// Whether results are still to come.
    #[inline]
    pub(super) fn is_busy(&self) -> bool {
        self.sent != self.taken
    }

    /// Sends the job that `fill` writes into a slot. The thread may begin at once; if it sleeps, it has to be
    /// [woken](Self::has_to_wake_thread).
    #[inline]
    pub(super) fn send(&mut self, fill: impl FnOnce(&J)) {
        let channel = &*self.channel;
        debug_assert!(
            (self.sent.wrapping_sub(self.taken) as usize) < channel.jobs.len(),
            "more jobs than there can be"
        );
        fill(&channel.jobs[self.sent as usize & (channel.jobs.len() - 1)]);
        self.sent = self.sent.wrapping_add(1);
        channel.sent.0.store(self.sent, Ordering::Release);
        self.has_new_jobs = true;
    }

    /// Whether jobs were sent since the last call: then the caller unparks the thread.
    #[inline]
    pub(super) fn has_to_wake_thread(&mut self) -> bool {
        std::mem::take(&mut self.has_new_jobs)
    }

    /// Whether a result has come. While none can come, nothing that the two threads share is looked at.
    #[inline]
    pub(super) fn has_result(&self) -> bool {
        self.is_busy() && self.channel.done.0.load(Ordering::Acquire) != self.taken
    }

    /// The next result, in the order of the jobs.
    #[inline]
    pub(super) fn take(&mut self) -> Option<u64> {
        if !self.has_result() {
            return None;
        }
        let results = &self.channel.results;
        let result = results[self.taken as usize & (results.len() - 1)].load(Ordering::Relaxed);
        self.taken = self.taken.wrapping_add(1);
        Some(result)
    }

    /// Has the thread wake the worker with its next result. False: there is a result already.
    pub(super) fn announce_sleep(&self) -> bool {
        if !self.is_busy() {
            return true;
        }
        self.channel.is_worker_asleep.0.store(true, Ordering::Relaxed);
        // Pairs with the fence in `ThreadEnd::work`.
        fence(Ordering::SeqCst);
        self.channel.done.0.load(Ordering::Relaxed) == self.taken
    }

    /// The worker is awake.
    pub(super) fn announce_waking(&self) {
        self.channel.is_worker_asleep.0.store(false, Ordering::Relaxed);
    }

    /// Has the thread end once it has carried out what was sent. The caller unparks it.
    pub(super) fn end(&self) {
        self.channel.is_ended.store(true, Ordering::Release);
    }
}

impl<J> ThreadEnd<J> {
    /// Carries jobs out until the worker's end says that there will be no more.
    pub(super) fn work(&self, thread: &mut impl Thread<J>) {
        let channel = &*self.channel;
        let mut done = 0u32;
        loop {
            if channel.sent.0.load(Ordering::Acquire) != done {
                let result = thread.carry_out(&channel.jobs[done as usize & (channel.jobs.len() - 1)]);
                channel.results[done as usize & (channel.results.len() - 1)].store(result, Ordering::Relaxed);
                done = done.wrapping_add(1);
                channel.done.0.store(done, Ordering::Release);
                // Pairs with the fence in `WorkerEnd::announce_sleep`.
                fence(Ordering::SeqCst);
                let is_worker_asleep = &channel.is_worker_asleep.0;
                // The exchange is dear, and the worker is awake as a rule. It stores nothing if the worker woke up meanwhile.
                if is_worker_asleep.load(Ordering::Relaxed)
                    && is_worker_asleep.compare_exchange(true, false, Ordering::Relaxed, Ordering::Relaxed).is_ok()
                {
                    thread.wake_worker();
                }
                continue;
            }
            if channel.is_ended.load(Ordering::Acquire) {
                // A job may have been sent since the look above, and before the end.
                if channel.sent.0.load(Ordering::Acquire) == done {
                    return;
                }
                continue;
            }
            thread.pause();
        }
    }
}
