//! What the engine counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread counts and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Only the owning thread calls this: two threads would lose counts. That saves the locked instruction.
    #[inline]
    pub(super) fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }
}

/// What a queue has done since the engine began. On a cache line of its own: its worker writes it at each request.
#[derive(Debug, Default)]
#[repr(align(128))]
#[non_exhaustive]
pub struct QueueCounters {
    /// Read requests that succeeded.
    pub reads: Counter,
    /// Bytes that they read.
    pub read_bytes: Counter,
    /// Write requests that succeeded.
    pub writes: Counter,
    /// Bytes that they wrote.
    pub written_bytes: Counter,
    /// Flush requests that succeeded.
    pub flushes: Counter,
    /// Discard requests that succeeded.
    pub discards: Counter,
    /// Write zeroes requests that succeeded.
    pub write_zeroes: Counter,
    /// Requests that the disk did not carry out.
    pub failed: Counter,
    /// Requests that were refused without asking the disk.
    pub refused: Counter,
    /// Requests that went through bounce buffers.
    pub bounced: Counter,
    /// Writes of parts of blocks of direct I/O: each has read what is around it, or gone through the page cache.
    pub partial_writes: Counter,
    /// Times that the driver's kick woke or reached the worker.
    pub kicks: Counter,
    /// Interrupts sent.
    pub signals: Counter,
    /// Times that the queue stopped because the driver or the front-end broke the rules.
    pub broken: Counter,
}
