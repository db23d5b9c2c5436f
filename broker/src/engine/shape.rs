//! What an engine takes of the machine. It is known before the engine starts.

use std::thread;

#[cfg(doc)]
use super::EngineConfig;
use super::EngineError;
use super::ring::{self, RingPolicy};

/// The most requests that a worker has under way. More wait in their queues.
const SLOTS_PER_WORKER_MAX: usize = 4096;
/// Open files of a worker: its eventfd and its ring.
const FILES_PER_WORKER: u64 = 2;

/// How many workers an engine has, and how large their rings are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineShape {
    /// Queues of the device.
    pub queues: u16,
    /// Requests of a queue that are executed at a time.
    pub queue_size: u16,
    /// As [`EngineConfig::workers`].
    pub workers: Option<usize>,
}

impl EngineShape {
    /// How many workers there are.
    pub fn workers(&self) -> usize {
        let available = || thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(available).clamp(1, usize::from(self.queues.max(1)))
    }

    /// Requests under way of a worker with that many queues.
    pub(super) fn slots_max(&self, queues: usize) -> usize {
        (queues * usize::from(self.queue_size)).min(SLOTS_PER_WORKER_MAX)
    }

    /// The largest number of completions that can be outstanding on the ring of such a worker.
    pub(super) fn completions_max(&self, queues: usize) -> u32 {
        // Each queue's kicks, taken back and new; the commands; the timer, likewise.
        (self.slots_max(queues) + 3 * queues + 1 + 3) as u32
    }

    /// For each worker, the completions that can be outstanding on its ring.
    fn rings(&self) -> impl Iterator<Item = u32> {
        let (queues, workers) = (usize::from(self.queues), self.workers());
        (0..workers).map(move |number| self.completions_max((number..queues).step_by(workers).len()))
    }

    /// The memory of the workers' rings in bytes. Linux 6.14 and later charge it to the user, within `RLIMIT_MEMLOCK`.
    pub fn ring_bytes(&self) -> u64 {
        self.rings().map(ring::memory_bytes).sum()
    }

    /// Files that the workers have open.
    pub fn files(&self) -> u64 {
        self.workers() as u64 * FILES_PER_WORKER
    }

    /// Makes the rings of all workers, as the engine makes them, and closes them again. The calling thread keeps the limit of kernel
    /// threads that workers set for themselves (`IORING_REGISTER_IOWQ_MAX_WORKERS`).
    ///
    /// # Errors
    ///
    /// [`EngineError::Ring`], [`EngineError::Eventfd`]: an engine of this shape would not start.
    pub fn try_rings(&self) -> Result<(), EngineError> {
        let policy = RingPolicy::of_this_kernel();
        let rings = self.rings().map(|completions_max| ring::open(completions_max, &policy));
        rings.collect::<Result<Vec<_>, _>>().map(drop)
    }

    /// The shape of an engine with these queues; `workers` as in [`EngineConfig::workers`].
    pub fn new(queues: u16, queue_size: u16, workers: Option<usize>) -> Self {
        Self { queues, queue_size, workers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_divided_among_workers() {
        let shape = EngineShape { queues: 5, queue_size: 256, workers: Some(2) };
        assert_eq!(shape.rings().collect::<Vec<_>>(), [3 * 256 + 3 * 3 + 4, 2 * 256 + 2 * 3 + 4]);
        assert_eq!(EngineShape { workers: Some(9), ..shape }.workers(), 5);
        assert_eq!(EngineShape { queues: 1, ..shape }.workers(), 1);
        shape.try_rings().unwrap();
    }

    #[test]
    fn the_memory_of_a_ring_is_its_entries_and_a_header_in_whole_pages() {
        let shape = EngineShape { queues: 2, queue_size: 256, workers: Some(1) };
        // 256 SQEs of 64 bytes; 1024 CQEs of 16.
        assert_eq!(shape.ring_bytes(), (16 << 10) + (20 << 10));
    }
}
