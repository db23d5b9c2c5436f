//! What a user of the driver chooses.

use std::time::Duration;

use super::RingSize;

/// How queues are to be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Way {
    /// As rings of the host's io_uring if the device offers that, otherwise as virtqueues.
    #[default]
    Auto,
    /// As rings; it is an error if they cannot be had.
    Ring,
    /// As virtqueues.
    Virtqueue,
}

/// What a driver wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How much RAM the driver makes and offers, in bytes. All of it is pinned while there are rings.
    pub memory_bytes: u64,
    /// Queues besides queue 0; fewer if the device has fewer.
    pub queues: u16,
    /// Descriptors of each virtqueue: a power of two, 16 to 32768. A third of it can be outstanding.
    pub queue_size: u16,
    /// Sizes of the rings.
    pub ring: RingSize,
    /// How queues are executed.
    pub way: Way,
    /// Keep a region in which a device notes what it has taken. Without it requests on virtqueues can be lost, or done
    /// twice, when the device is killed; those on rings cannot.
    pub inflight: bool,
    /// How long the device may be silent when something is asked of it, before the call fails: while connecting (another front-end
    /// may have the device), until a queue is a ring (pinning takes half a second for each GiB of memory), for flush and the like,
    /// for changes of memory, and when the disk is dropped. Requests on queues have no such limit.
    pub patience: Duration,
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
