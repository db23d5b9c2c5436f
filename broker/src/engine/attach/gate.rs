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
    /// Its worker has been told of a DETACH and has not heard it yet.
    is_detach_told: bool,
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

    /// The driver asks for a queue back. True: its worker is to be told. It may be busy, and is told once, or a guest could fill the
    /// host's memory with what waits for it.
    pub(in crate::engine) fn tell_detach(&self, queue: u16) -> bool {
        !std::mem::replace(&mut self.state().queues[usize::from(queue)].is_detach_told, true)
    }

    /// The worker of a queue hears of it.
    pub(in crate::engine) fn hear_detach(&self, queue: u16) {
        self.state().queues[usize::from(queue)].is_detach_told = false;
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

    /// A queue's ring, if there is one, runs on in another table with the same memory under it.
    pub(in crate::engine) fn ring_moves(&self, queue: u16, memory: &DeviceMemory) {
        if let Some(ring) = &mut self.state().queues[usize::from(queue)].ring {
            ring.memory = memory.clone();
        }
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

    /// Whether a queue has ranges.
    pub(in crate::engine) fn is_in_use(&self) -> bool {
        self.state().queues.iter().any(|queue| queue.ranges.is_some())
    }

    /// Memory was discarded while it was pinned: no rings until [`begin_again`](Self::begin_again).
    pub(in crate::engine) fn note_discard(&self) {
        self.state().is_discarded = true;
    }

    /// The driver has reset the device, or the front-end is another one: there are no requests that could have been touched.
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

#[cfg(test)]
pub(in crate::engine) mod tests {
    use ringpass_guest_abi::attach::{AreaAddress, AttachLimits, AttachPayload};

    use super::*;

    /// A geometry of one page for each range, from page `first` on.
    pub(in crate::engine) fn geometry(first: u64) -> Geometry {
        let page = |number: u64| ((first + number) * 4096).into();
        let payload = AttachPayload {
            sq_entries: 8.into(),
            cq_entries: 16.into(),
            control_gpa: page(0),
            areas: [1, 3].map(|n| AreaAddress { rings_gpa: page(n), sqes_gpa: page(n + 1) }),
            ..AttachPayload::default()
        };
        let limits = AttachLimits { features: 0, sq_entries_max: 8, cq_entries_max: 16, page_bytes: 4096 };
        payload.check(&limits).unwrap()
    }

    #[test]
    fn no_two_queues_have_a_byte_in_common() {
        let gate = Gate::new(3);
        gate.enter(1, &geometry(10)).unwrap();
        for first in [6, 10, 14] {
            let error = gate.enter(2, &geometry(first)).unwrap_err();
            assert_eq!(error.code, ErrorCode::Busy, "page {first}");
        }
        gate.enter(2, &geometry(15)).unwrap();
        assert!(!gate.leave(1) && gate.is_in_use());
        assert!(gate.leave(2) && !gate.is_in_use(), "it was the last one");
        gate.enter(2, &geometry(10)).unwrap();
    }

    #[test]
    fn a_worker_is_told_of_one_detach_at_a_time() {
        let gate = Gate::new(2);
        assert!(gate.tell_detach(1) && !gate.tell_detach(1) && gate.tell_detach(0));
        gate.hear_detach(1);
        assert!(gate.tell_detach(1) && !gate.tell_detach(0));
    }

    #[test]
    fn a_log_closes_the_gate_and_its_end_is_news_only_if_nothing_else_does() {
        let gate = Gate::new(2);
        assert!(!gate.set_logging(false), "it was open");
        assert!(!gate.set_logging(true));
        assert_eq!(gate.enter(1, &geometry(0)).unwrap_err().code, ErrorCode::Mode);
        gate.note_discard();
        assert!(!gate.set_logging(false), "discarded memory keeps it closed");
        assert_eq!(gate.enter(1, &geometry(0)).unwrap_err().code, ErrorCode::Discarded);
        gate.begin_again();
        gate.enter(1, &geometry(0)).unwrap();
    }

    #[test]
    fn indexes_that_wrap_are_counted_on() {
        let memory = DeviceMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let layout = RingLayout {
            sq_entries: 8,
            cq_entries: 16,
            sq_head_offset: 0,
            sq_tail_offset: 4,
            sq_flags_offset: 8,
            cq_head_offset: 12,
            cq_tail_offset: 16,
            cq_flags_offset: 20,
            cqes_offset: 64,
            rings_bytes: 4096,
            sqes_bytes: 4096,
            doorbell: ringpass_guest_abi::Doorbell::Always,
        };
        let gate = Gate::new(1);
        gate.ring_opens(0, memory.clone(), 0, layout);
        for (sq_tail, cq_tail) in [(0xf000_0000_u32, 0xefff_fff0_u32), (5, 3)] {
            memory.store(sq_tail, GuestAddress(4), Ordering::Relaxed).unwrap();
            memory.store(cq_tail, GuestAddress(16), Ordering::Relaxed).unwrap();
            gate.sample();
        }
        let expected = RingCounts { submitted: (1 << 32) + 5, completed: (1 << 32) + 3 };
        assert_eq!(gate.status().queues[0].counts, expected);
        gate.ring_closes(0);
        gate.ring_opens(0, memory.clone(), 0, layout);
        memory.store(1_u32, GuestAddress(4), Ordering::Relaxed).unwrap();
        memory.store(0_u32, GuestAddress(16), Ordering::Relaxed).unwrap();
        let counts = gate.status().queues[0].counts;
        assert_eq!(counts.submitted, expected.submitted + 1);
    }
}
