//! Whether rings are given out, and which memory belongs to which queue's.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ringpass_guest_abi::RingLayout;
use ringpass_guest_abi::attach::{AttachError, Geometry, GpaRange};
use ringpass_guest_abi::epoch::device::State;
use ringpass_guest_abi::request::{ErrorCode, NO_FIELD};
use vm_memory::{Bytes, GuestAddress};

use crate::vhost_user::DeviceMemory;

/// What all queues of a device share about rings.
#[derive(Debug)]
pub(in crate::engine) struct Gate {
    state: Mutex<GateState>,
}

#[derive(Debug)]
struct GateState {
    /// Pages that the device writes are logged, which a ring's are not.
    is_logging: bool,
    /// Memory was discarded while it was pinned, and the driver has not reset the device since.
    is_discarded: bool,
    queues: Vec<QueueState>,
}

/// One queue.
#[derive(Debug, Default)]
struct QueueState {
    ranges: Option<[GpaRange; 5]>,
    machine: Option<State>,
    ring: Option<LiveWords>,
    counts: RingCounts,
    refused: Option<Refused>,
}

/// Why a queue got no ring, or lost it, last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What the driver was told.
    pub code: ErrorCode,
    /// The reason, for people.
    pub why: String,
}

/// What a ring's own words say, since the engine began. They are in the guest's memory: an honest guest's count is exact,
/// and another guest deceives only whoever believes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounts {
    /// SQEs that the driver published (SQ tail).
    pub submitted: u64,
    /// CQEs that were posted (CQ tail).
    pub completed: u64,
}

/// Where the indexes of a ring that runs are.
#[derive(Debug)]
struct LiveWords {
    memory: DeviceMemory,
    rings_gpa: u64,
    layout: RingLayout,
    /// What they were when they were looked at last.
    sq_tail: u32,
    cq_tail: u32,
}

/// One queue's ring, for people who look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingStatus {
    /// Where its epochs are. `None`: the queue is an ordinary virtqueue.
    pub state: Option<State>,
    /// The ring that runs.
    pub layout: Option<RingLayout>,
    /// What its words say.
    pub counts: RingCounts,
    /// Why it got no ring, or lost it, last.
    pub refused: Option<Refused>,
}

/// Whether rings are given out, and the queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateStatus {
    /// Why no rings are given out now.
    pub closed: Option<Refused>,
    /// Each queue.
    pub queues: Vec<RingStatus>,
}

impl Gate {
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        let queues = (0..queue_count).map(|_| QueueState::default()).collect();
        Self { state: Mutex::new(GateState { is_logging: false, is_discarded: false, queues }) }
    }

    /// Gives a queue its ranges, if rings are given out and no other queue has any of them.
    pub(in crate::engine) fn enter(&self, queue: u16, geometry: &Geometry) -> Result<(), AttachError> {
        let mut state = self.state();
        if let Some(refused) = state.closed() {
            return Err(AttachError { code: refused.code, field_offset_bytes: NO_FIELD, value: 0 });
        }
        for (field_offset_bytes, range) in geometry.ranges() {
            let others = state.queues.iter().filter_map(|queue| queue.ranges).flatten();
            if others.into_iter().any(|other| other.gpa() < range.end_gpa() && range.gpa() < other.end_gpa()) {
                return Err(AttachError { code: ErrorCode::Busy, field_offset_bytes, value: range.gpa() });
            }
        }
        state.queues[usize::from(queue)].ranges = Some(geometry.ranges().map(|(_, range)| range));
        Ok(())
    }

    /// A queue uses its ranges no more. True: it was the last one.
    pub(in crate::engine) fn leave(&self, queue: u16) -> bool {
        let mut state = self.state();
        let left = &mut state.queues[usize::from(queue)];
        left.ranges = None;
        left.machine = None;
        state.queues.iter().all(|queue| queue.ranges.is_none())
    }

    /// Notes where the epochs of a queue are.
    pub(in crate::engine) fn note_state(&self, queue: u16, machine: State) {
        self.state().queues[usize::from(queue)].machine = Some(machine);
    }

    /// Notes why a queue got no ring.
    pub(in crate::engine) fn note_refusal(&self, queue: u16, refused: Refused) {
        self.state().queues[usize::from(queue)].refused = Some(refused);
    }

    /// A ring runs; its words count from 0.
    pub(in crate::engine) fn ring_opens(&self, queue: u16, memory: DeviceMemory, rings_gpa: u64, layout: RingLayout) {
        let mut state = self.state();
        let state = &mut state.queues[usize::from(queue)];
        state.sample();
        state.ring = Some(LiveWords { memory, rings_gpa, layout, sq_tail: 0, cq_tail: 0 });
        state.refused = None;
    }

    /// A ring is about to end: what it did counts, and its memory is let go.
    pub(in crate::engine) fn ring_closes(&self, queue: u16) {
        let mut state = self.state();
        let state = &mut state.queues[usize::from(queue)];
        state.sample();
        state.ring = None;
    }

    /// Looks at the words of all rings: often enough that none of them comes round unseen.
    pub(in crate::engine) fn sample(&self) {
        self.state().queues.iter_mut().for_each(QueueState::sample);
    }

    /// Pages are logged from now on, or not any more. True: rings may be asked for again.
    pub(in crate::engine) fn set_logging(&self, is_logging: bool) -> bool {
        let mut state = self.state();
        let was_closed = state.closed().is_some();
        state.is_logging = is_logging;
        was_closed && state.closed().is_none()
    }

    /// Memory was discarded while it was pinned: no rings until [`begin_again`](Self::begin_again). False: that was known.
    pub(in crate::engine) fn note_discard(&self) -> bool {
        !std::mem::replace(&mut self.state().is_discarded, true)
    }

    /// The driver has reset the device: it has no requests that could have been touched.
    pub(in crate::engine) fn begin_again(&self) {
        self.state().is_discarded = false;
    }

    /// Everything, for people who look.
    pub(in crate::engine) fn status(&self) -> GateStatus {
        let mut state = self.state();
        state.queues.iter_mut().for_each(QueueState::sample);
        let queues = state.queues.iter().map(|queue| RingStatus {
            state: queue.machine,
            layout: queue.ring.as_ref().map(|ring| ring.layout),
            counts: queue.counts,
            refused: queue.refused.clone(),
        });
        GateStatus { closed: state.closed(), queues: queues.collect() }
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        // Each change of it is whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GateState {
    fn closed(&self) -> Option<Refused> {
        if self.is_discarded {
            let why = "guest memory was discarded while it was pinned (balloon, free page reporting, virtio-mem or \
                       postcopy); no rings before the driver resets the device";
            return Some(Refused { code: ErrorCode::Discarded, why: why.into() });
        }
        self.is_logging.then(|| Refused {
            code: ErrorCode::Mode,
            why: "the guest is being migrated: what a ring writes cannot be logged".into(),
        })
    }
}

impl QueueState {
    fn sample(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let LiveWords { memory, rings_gpa, layout, .. } = &*ring;
        let load = |offset_bytes: u32| {
            memory.load::<u32>(GuestAddress(rings_gpa + u64::from(offset_bytes)), Ordering::Relaxed).ok()
        };
        let (sq_tail, cq_tail) = (load(layout.sq_tail_offset), load(layout.cq_tail_offset));
        let count = |total: &mut u64, last: &mut u32, now: Option<u32>| {
            let now = now.unwrap_or(*last);
            *total += u64::from(now.wrapping_sub(*last));
            *last = now;
        };
        count(&mut self.counts.submitted, &mut ring.sq_tail, sq_tail);
        count(&mut self.counts.completed, &mut ring.cq_tail, cq_tail);
    }
}
