//! The options of the driver.

use std::time::Duration;

use super::RingSize;

/// The way in which the device executes queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Way {
    /// As rings of the host's io_uring if the device offers them, otherwise as virtqueues.
    #[default]
    Auto,
    /// As rings. If the device offers none, [`Disk::queue`](super::Disk::queue) fails.
    Ring,
    /// As virtqueues.
    Virtqueue,
}

/// The options of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Size of the RAM that the driver creates and offers to the device, in bytes. The device pins all of it while
    /// there are rings.
    pub memory_bytes: u64,
    /// Number of queues in addition to queue 0. The disk has fewer if the device has fewer.
    pub queues: u16,
    /// Number of descriptors of each virtqueue: a power of two, 16 to 32768. At most a third of this number of requests
    /// can be outstanding on a queue.
    pub queue_size: u16,
    /// Sizes of the rings.
    pub ring: RingSize,
    /// The way in which the device executes queues.
    pub way: Way,
    /// Whether to keep an in-flight region, in which the device records the requests that it has taken. Without it,
    /// requests on virtqueues can be lost or executed twice if a device is killed, and the device gives no rings.
    pub inflight: bool,
    /// How long the device may take to answer before a call fails: while connecting (the device may have another
    /// front-end), until a queue is a ring (pinning takes half a second for each GiB of memory), for flush and similar
    /// requests, for changes of memory, and for the stop in the drop of the disk. Requests on queues have no such
    /// limit.
    pub patience: Duration,
}

impl Options {
    /// Sets [`memory_bytes`](Self#structfield.memory_bytes).
    #[must_use]
    pub fn memory_bytes(self, memory_bytes: u64) -> Self {
        Self { memory_bytes, ..self }
    }

    /// Sets [`queues`](Self#structfield.queues).
    #[must_use]
    pub fn queues(self, queues: u16) -> Self {
        Self { queues, ..self }
    }

    /// Sets [`queue_size`](Self#structfield.queue_size).
    #[must_use]
    pub fn queue_size(self, queue_size: u16) -> Self {
        Self { queue_size, ..self }
    }

    /// Sets [`ring`](Self#structfield.ring).
    #[must_use]
    pub fn ring(self, ring: RingSize) -> Self {
        Self { ring, ..self }
    }

    /// Sets [`way`](Self#structfield.way).
    #[must_use]
    pub fn way(self, way: Way) -> Self {
        Self { way, ..self }
    }

    /// Sets [`inflight`](Self#structfield.inflight).
    #[must_use]
    pub fn inflight(self, inflight: bool) -> Self {
        Self { inflight, ..self }
    }

    /// Sets [`patience`](Self#structfield.patience).
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_bytes: 16 << 20,
            queues: 1,
            queue_size: 512,
            ring: RingSize { sq_entries: 128, cq_entries: 128 },
            way: Way::Auto,
            inflight: true,
            patience: Duration::from_secs(60),
        }
    }
}
