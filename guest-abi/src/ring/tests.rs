//! [`DriverRing`] against a mock of the other side: an honest one in random histories, and one that lies.

use std::collections::VecDeque;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::FixedAddress;
use crate::layout::tests::kernel_like;
use crate::test_memory::TestMemory;

/// A ring that has already been used: its SQ indexes stand at `sq_start`, its CQ indexes at `cq_start`.
fn used_ring(layout: RingLayout, sq_start: u32, cq_start: u32) -> (TestMemory, DriverRing<TestMemory>) {
    let memory = TestMemory::new(&layout);
    for (offset_bytes, index) in [
        (layout.sq_head_offset, sq_start),
        (layout.sq_tail_offset, sq_start),
        (layout.cq_head_offset, cq_start),
        (layout.cq_tail_offset, cq_start),
    ] {
        memory.store_relaxed(offset_bytes, index);
    }
    let mut ring = DriverRing::new(memory.clone(), layout).expect("a kernel-like layout is valid");
    (ring.sq_tail, ring.sq_tail_published, ring.cq_head) = (sq_start, sq_start, cq_start);
    (memory, ring)
}

fn request(number: u64) -> Sqe {
    let address = FixedAddress { buf_index: number as u16, addr: number << 12 };
    Sqe::write_fixed(address, 512, number * 512, number)
}

/// Start values of an index, most of them about to wrap around.
fn start() -> impl Strategy<Value = u32> {
    prop_oneof![3 => (0..40u32).prop_map(|below| u32::MAX - below), 1 => any::<u32>()]
}

fn doorbell() -> impl Strategy<Value = Doorbell> {
    prop_oneof![Just(Doorbell::WhenAsleep), Just(Doorbell::Always)]
}

#[derive(Clone, Debug)]
enum Step {
    Push,
    Publish,
    Reap,
    Mute,
    Unmute,
    /// The kernel takes up to this many SQEs.
    Take(u32),
    /// The kernel tells how far it has taken SQEs.
    CommitHead,
    /// The kernel completes one of the requests it has taken.
    Complete(prop::sample::Index, i32),
    /// The SQ thread falls asleep or wakes.
    Sleep(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => Just(Step::Push),
        3 => Just(Step::Publish),
        4 => Just(Step::Reap),
        1 => Just(Step::Mute),
        1 => Just(Step::Unmute),
        3 => (1..4u32).prop_map(Step::Take),
        2 => Just(Step::CommitHead),
        4 => (any::<prop::sample::Index>(), any::<i32>()).prop_map(|(which, res)| Step::Complete(which, res)),
        1 => any::<bool>().prop_map(Step::Sleep),
    ];
    prop::collection::vec(step, 1..200)
}

/// An honest kernel, and what must be true of the ring at each moment.
struct History {
    layout: RingLayout,
    memory: TestMemory,
    ring: DriverRing<TestMemory>,
    sq_start: u32,
    cq_start: u32,
    pushed: u64,
    published: u64,
    taken: u64,
    /// SQEs that the kernel has told it has taken.
    committed: u64,
    executing: Vec<Sqe>,
    posted: VecDeque<Cqe>,
    completed: u64,
    reaped: u64,
    asleep: bool,
}

impl History {
    fn new(layout: RingLayout, sq_start: u32, cq_start: u32) -> Self {
        let (memory, ring) = used_ring(layout, sq_start, cq_start);
        let (pushed, published, taken, committed, completed, reaped) = Default::default();
        let (executing, posted, asleep) = Default::default();
        Self {
            layout,
            memory,
            ring,
            sq_start,
            cq_start,
            pushed,
            published,
            taken,
            committed,
            executing,
            posted,
            completed,
            reaped,
            asleep,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Push => self.push(),
            Step::Publish => self.publish(),
            Step::Reap => self.reap(),
            Step::Mute => {
                self.ring.mute_interrupts();
                assert_eq!(self.memory.load_relaxed(self.layout.cq_flags_offset), CQ_EVENTFD_DISABLED);
            }
            Step::Unmute => {
                assert_eq!(self.ring.unmute_interrupts(), !self.posted.is_empty());
                assert_eq!(self.memory.load_relaxed(self.layout.cq_flags_offset), 0);
            }
            Step::Take(count) => (0..count).for_each(|_| self.take()),
            Step::CommitHead => {
                self.committed = self.taken;
                let head = self.sq_start.wrapping_add(self.committed as u32);
                self.memory.store_release(self.layout.sq_head_offset, head);
            }
            Step::Complete(which, res) => self.complete(which, res),
            Step::Sleep(asleep) => {
                self.asleep = asleep;
                self.memory.store_relaxed(self.layout.sq_flags_offset, if asleep { SQ_NEED_WAKEUP } else { 0 });
            }
        }
        assert_eq!(u64::from(self.ring.outstanding()), self.pushed - self.reaped);
        assert!(self.ring.outstanding() <= self.layout.cq_entries);
    }

    fn push(&mut self) {
        let sqe = request(self.pushed);
        let outstanding = self.pushed - self.reaped;
        match self.ring.push(&sqe) {
            Ok(()) => {
                self.pushed += 1;
                assert!(outstanding < u64::from(self.layout.cq_entries), "more outstanding than the CQ holds");
                assert!(self.pushed - self.taken <= u64::from(self.layout.sq_entries), "an SQE was overwritten");
            }
            Err(PushError { sqe: returned, reason }) => {
                assert_eq!(returned, sqe);
                match reason {
                    PushErrorReason::CqFull => assert_eq!(outstanding, u64::from(self.layout.cq_entries)),
                    PushErrorReason::SqFull => {
                        assert!(self.pushed - self.committed >= u64::from(self.layout.sq_entries), "a slot is free");
                        // Whoever sleeps on this is woken: a completion is still to come.
                        assert!(outstanding >= u64::from(self.layout.sq_entries));
                    }
                }
            }
        }
    }

    fn publish(&mut self) {
        let is_new = self.published != self.pushed;
        let expected = is_new && (self.layout.doorbell == Doorbell::Always || self.asleep);
        assert_eq!(self.ring.publish(), expected);
        self.published = self.pushed;
        let tail = self.sq_start.wrapping_add(self.published as u32);
        assert_eq!(self.memory.load_relaxed(self.layout.sq_tail_offset), tail);
    }

    fn take(&mut self) {
        let tail = self.memory.load_acquire(self.layout.sq_tail_offset);
        let next = self.sq_start.wrapping_add(self.taken as u32);
        assert_eq!(u64::from(tail.wrapping_sub(next)), self.published - self.taken);
        if tail != next {
            let sqe = self.memory.sqe(next & (self.layout.sq_entries - 1));
            assert_eq!(sqe, request(self.taken));
            self.executing.push(sqe);
            self.taken += 1;
        }
    }

    fn complete(&mut self, which: prop::sample::Index, res: i32) {
        if self.executing.is_empty() {
            return;
        }
        let head = self.memory.load_acquire(self.layout.cq_head_offset);
        let tail = self.cq_start.wrapping_add(self.completed as u32);
        assert!(tail.wrapping_sub(head) < self.layout.cq_entries, "the CQ overflowed");
        let sqe = self.executing.swap_remove(which.index(self.executing.len()));
        let cqe = Cqe { user_data: sqe.user_data, res, flags: !res as u32 };
        let index = tail & (self.layout.cq_entries - 1);
        self.memory.write_cqe(self.layout.cqes_offset + 16 * index, cqe);
        self.memory.store_release(self.layout.cq_tail_offset, tail.wrapping_add(1));
        self.posted.push_back(cqe);
        self.completed += 1;
    }

    fn reap(&mut self) {
        assert_eq!(self.ring.has_completion(), !self.posted.is_empty());
        let expected = self.posted.pop_front();
        assert_eq!(self.ring.reap(), expected);
        self.reaped += u64::from(expected.is_some());
        let head = self.cq_start.wrapping_add(self.reaped as u32);
        assert_eq!(self.memory.load_relaxed(self.layout.cq_head_offset), head);
    }
}

#[derive(Clone, Debug)]
enum Lie {
    Push,
    Publish,
    Reap,
    Unmute,
    /// Any value in any of the six shared words.
    Word(prop::sample::Index, u32),
    /// Any completion in any place.
    Completion(prop::sample::Index, u64, i32),
}

fn lies() -> impl Strategy<Value = Vec<Lie>> {
    let value = prop_oneof![any::<u32>(), 0..64u32, (0..64u32).prop_map(|below| u32::MAX - below)];
    let lie = prop_oneof![
        3 => Just(Lie::Push),
        1 => Just(Lie::Publish),
        3 => Just(Lie::Reap),
        1 => Just(Lie::Unmute),
        3 => (any::<prop::sample::Index>(), value).prop_map(|(which, value)| Lie::Word(which, value)),
        1 => (any::<prop::sample::Index>(), any::<u64>(), any::<i32>()).prop_map(|(at, data, res)| Lie::Completion(at, data, res)),
    ];
    prop::collection::vec(lie, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn every_request_arrives_and_completes_once_across_the_wrap_of_the_indexes(
        steps in steps(), sq_shift in 0..5u32, cq_shift in 0..6u32, sq_start in start(), cq_start in start(),
        doorbell in doorbell(),
    ) {
        let layout = kernel_like(1 << sq_shift, 1 << cq_shift, doorbell);
        let mut history = History::new(layout, sq_start, cq_start);
        steps.into_iter().for_each(|step| history.step(step));
    }

    #[test]
    fn a_lying_device_cannot_make_the_driver_panic_or_leave_its_areas(
        lies in lies(), sq_shift in 0..5u32, cq_shift in 0..6u32, doorbell in doorbell(),
    ) {
        let layout = kernel_like(1 << sq_shift, 1 << cq_shift, doorbell);
        // Exactly as large as the parts need: one byte further is outside.
        let rings_bytes = u64::from(layout.cqes_offset) + 16 * u64::from(layout.cq_entries);
        let layout = RingLayout { rings_bytes, sqes_bytes: 64 * u64::from(layout.sq_entries), ..layout };
        let (memory, mut ring) = used_ring(layout, 0, 0);
        let words = [
            layout.sq_head_offset, layout.sq_tail_offset, layout.sq_flags_offset,
            layout.cq_head_offset, layout.cq_tail_offset, layout.cq_flags_offset,
        ];
        for (number, lie) in lies.into_iter().enumerate() {
            let before = ring.outstanding();
            match lie {
                Lie::Push => {
                    let sqe = request(number as u64);
                    match ring.push(&sqe) {
                        Ok(()) => prop_assert_eq!(ring.outstanding(), before + 1),
                        Err(refused) => prop_assert_eq!(refused.sqe, sqe),
                    }
                }
                Lie::Publish => {
                    let _ = ring.publish();
                }
                Lie::Reap => {
                    let reaped = u32::from(ring.reap().is_some());
                    prop_assert_eq!(ring.outstanding(), before.saturating_sub(reaped));
                }
                Lie::Unmute => {
                    let _ = ring.unmute_interrupts();
                }
                Lie::Word(which, value) => memory.store_relaxed(*which.get(&words), value),
                Lie::Completion(at, user_data, res) => {
                    let index = at.index(layout.cq_entries as usize) as u32;
                    memory.write_cqe(layout.cqes_offset + 16 * index, Cqe { user_data, res, flags: 0 });
                }
            }
            prop_assert!(ring.outstanding() <= layout.cq_entries);
        }
    }
}

#[test]
fn a_push_to_a_full_sq_or_cq_returns_the_request() {
    let (memory, mut ring) = used_ring(kernel_like(2, 4, Doorbell::Always), u32::MAX, u32::MAX);
    let refused = |sqe, reason| Err(PushError { sqe, reason });
    assert_eq!((ring.push(&request(0)), ring.push(&request(1))), (Ok(()), Ok(())));
    assert_eq!(ring.push(&request(2)), refused(request(2), PushErrorReason::SqFull));
    assert!(ring.publish());
    memory.store_release(ring.layout().sq_head_offset, 1);
    assert_eq!((ring.push(&request(2)), ring.push(&request(3))), (Ok(()), Ok(())));
    memory.store_release(ring.layout().sq_head_offset, 3);
    assert_eq!(ring.push(&request(4)), refused(request(4), PushErrorReason::CqFull));
    assert_eq!(ring.outstanding(), 4);
}

#[test]
fn an_sq_is_not_full_of_requests_whose_completions_were_reaped() {
    let (memory, mut ring) = used_ring(kernel_like(1, 2, Doorbell::Always), 7, 7);
    ring.push(&request(0)).unwrap();
    assert!(ring.publish());
    // The kernel has completed the request of a batch and has not moved the SQ head yet.
    memory.store_release(ring.layout().cq_tail_offset, 8);
    assert!(ring.reap().is_some());
    assert_eq!(ring.push(&request(1)), Ok(()));
}

#[test]
fn publish_without_new_sqes_needs_no_doorbell() {
    let (memory, mut ring) = used_ring(kernel_like(4, 8, Doorbell::WhenAsleep), 0, 0);
    memory.store_relaxed(ring.layout().sq_flags_offset, SQ_NEED_WAKEUP);
    assert!(!ring.publish());
    ring.push(&request(0)).unwrap();
    assert!(ring.publish());
    assert!(!ring.publish());
}

#[test]
fn a_ring_with_a_bad_layout_is_refused() {
    let layout = RingLayout { sq_entries: 3, ..kernel_like(4, 8, Doorbell::Always) };
    let refused = DriverRing::new(TestMemory::new(&layout), layout).map(|_| ());
    assert_eq!(refused, Err(LayoutError::Entries { field: "sq_entries", entries: 3 }));
}

#[test]
fn the_overflow_flag_is_seen_among_other_flags() {
    let (memory, ring) = used_ring(kernel_like(4, 8, Doorbell::Always), 0, 0);
    assert!(!ring.has_overflowed());
    memory.store_relaxed(ring.layout().sq_flags_offset, SQ_NEED_WAKEUP);
    assert!(!ring.has_overflowed());
    memory.store_relaxed(ring.layout().sq_flags_offset, SQ_NEED_WAKEUP | SQ_CQ_OVERFLOW);
    assert!(ring.has_overflowed());
}

#[test]
fn the_error_of_a_refused_push_states_what_is_full() {
    let message = |reason| std::format!("{}", PushError { sqe: Sqe::default(), reason });
    assert_eq!(message(PushErrorReason::SqFull), "the submission queue is full");
    assert_eq!(
        message(PushErrorReason::CqFull),
        "as many requests are outstanding as the completion queue has entries"
    );
}
