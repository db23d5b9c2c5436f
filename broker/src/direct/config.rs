//! How a direct device, and each of its queues, is set up.

use std::ops::Range;

use ringpass_guest_abi::{rings_area_bytes, sqes_area_bytes};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Sharing;
#[cfg(doc)]
use crate::ring::Placement;
use crate::ring::{IoWorkers, RingConfig, SqThreadConfig};

/// How a device executes its queues.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DirectConfig {
    /// What consumes the SQs.
    pub submission: SubmissionConfig,
    /// Limits of the kernel threads behind the rings.
    pub workers: IoWorkers,
    /// How queues share the pinned memory, usually [`Sharing::for_kernel`].
    pub sharing: Sharing,
}

impl DirectConfig {
    /// With the limits of [`IoWorkers::default`].
    pub fn new(submission: SubmissionConfig, sharing: Sharing) -> Self {
        Self { submission, workers: IoWorkers::default(), sharing }
    }

    /// Sets the limits of the kernel threads behind the rings.
    #[must_use]
    pub fn workers(self, workers: IoWorkers) -> Self {
        Self { workers, ..self }
    }
}

/// What consumes the SQs of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SubmissionConfig {
    /// One kernel thread, which polls.
    SqThread(SqThreadConfig),
    /// A thread of the broker, at each doorbell.
    Doorbell,
}

/// The configuration of a queue.
#[derive(Debug)]
#[non_exhaustive]
pub struct QueueConfig {
    /// Size of the ring.
    pub ring: RingConfig,
    /// The place of the ring's memory.
    pub placement: QueuePlacement,
    /// The guest signals this eventfd when the ring's doorbell rule says so. Each queue needs its own: two queues with
    /// one doorbell would miss each other's signals. The eventfd becomes non-blocking for all its holders. None: no
    /// thread answers a doorbell; only for guests of an SQ thread that never sleeps before they end.
    pub doorbell: Option<EventFd>,
    /// The kernel signals this eventfd at completions that the guest has not muted. None: the guest only polls.
    pub completion: Option<EventFd>,
}

impl QueueConfig {
    /// A queue without eventfds: its guest polls, and its SQ thread never sleeps.
    pub fn new(ring: RingConfig, placement: QueuePlacement) -> Self {
        Self { ring, placement, doorbell: None, completion: None }
    }

    /// Sets [`doorbell`](Self#structfield.doorbell).
    #[must_use]
    pub fn doorbell(self, doorbell: impl Into<Option<EventFd>>) -> Self {
        Self { doorbell: doorbell.into(), ..self }
    }

    /// Sets [`completion`](Self#structfield.completion).
    #[must_use]
    pub fn completion(self, completion: impl Into<Option<EventFd>>) -> Self {
        Self { completion: completion.into(), ..self }
    }
}

/// The place of a queue's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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

impl QueueConfig {
    /// The guest-physical areas of the ring. Saturating: an area at the very top is refused later as outside RAM.
    pub(super) fn areas(&self) -> Option<[Range<u64>; 2]> {
        let QueuePlacement::GuestRam { rings_gpa, sqes_gpa } = self.placement else { return None };
        let area = |gpa: u64, len_bytes| gpa..gpa.saturating_add(len_bytes);
        Some([
            area(rings_gpa, rings_area_bytes(self.ring.cq_entries)),
            area(sqes_gpa, sqes_area_bytes(self.ring.sq_entries)),
        ])
    }
}
