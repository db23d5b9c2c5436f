//! The driver's memory orderings, model-checked.
//!
//! loom runs [`DriverRing`] against a model of the kernel's side in every interleaving, with every value that each
//! load may return under C11. A model fails when an SQE or CQE is accessed without being ordered (a data race), when
//! a thread sleeps for ever (a lost doorbell or interrupt), or when a request or completion arrives wrong. Further
//! tests remove each of the six orderings of the table in `src/ring.rs` alone, and loom must find the failure. This
//! shows that the models can fail.
//!
//! Limits of these tests:
//! - The kernel orders its load of `cq.head` before its stores to a freed CQE by a control dependency, which C11 does
//!   not have. The model has an acquire there.
//! - loom executes the accesses of a thread in program order and lets loads return old values. It never moves a load
//!   behind a later store (load buffering), so what it finds for `cq.head` is the missing happens-before, as a race.
//! - loom's fences are C11's. Linux's `smp_mb` is at least as strong.
//! - The model of the whole ring is explored up to four preemptions, all others without a bound.
//! - A `DriverRing` never has more requests outstanding than the CQ holds. The driver pushes a request into the last
//!   free slot only after it has reaped a CQE, so the release of `sq.tail` also covers the CQE that was read, and a
//!   whole ring shows no failure without the release of `cq.head`. In the models of the CQ alone the kernel posts
//!   completions without requests; there this release is needed, and Linux documents it as part of the protocol.

mod kernel;
mod memory;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kernel::{Event, Kernel, SLEEPS_FOR_EVER};
use loom::model::Builder;
use loom::thread;
use memory::{DriverMemory, SharedRing, Weakened};
use ringpass_guest_abi::{Cqe, Doorbell, DriverRing, FixedAddress, PushErrorReason, Sqe};

/// Number of requests or completions that go through a ring: one more than the smallest ring holds, so that a slot is
/// reused.
const ROUNDS: u32 = 2;

fn driver(shared: &Arc<SharedRing>, weakened: Option<Weakened>) -> DriverRing<DriverMemory> {
    let memory = DriverMemory::new(shared.clone(), weakened);
    DriverRing::new(memory, shared.layout(Doorbell::WhenAsleep)).expect("the layout of the model is valid")
}

/// Request number `round`: no two have a field in common.
fn request(round: u32) -> Sqe {
    let address = FixedAddress { buf_index: round as u16 + 1, addr: (u64::from(round) + 1) << 32 };
    Sqe::read_fixed(address, 512 * (round + 1), 4096 * u64::from(round + 1), u64::from(round))
}

fn completion(sqe: &Sqe) -> Cqe {
    Cqe { user_data: sqe.user_data, res: sqe.len_bytes as i32, flags: 0 }
}

/// The driver submits requests one by one to an SQ thread that falls asleep as soon as it has nothing to do.
fn submissions(sq_entries: u32, weakened: Option<Weakened>) {
    let shared = SharedRing::new(sq_entries as usize, ROUNDS as usize);
    let doorbell = Event::new();
    let mut ring = driver(&shared, weakened);
    let sq_thread = thread::spawn({
        let doorbell = doorbell.clone();
        move || {
            let mut expected = 0;
            Kernel::new(shared).sq_thread(ROUNDS, &doorbell, |_, sqe| {
                assert_eq!(sqe, request(expected), "the kernel read another SQE than was pushed");
                expected += 1;
            });
        }
    });
    for round in 0..ROUNDS {
        while let Err(refused) = ring.push(&request(round)) {
            assert_eq!(refused.reason, PushErrorReason::SqFull);
            thread::yield_now();
        }
        if ring.publish() {
            doorbell.signal();
        }
    }
    sq_thread.join().expect("the SQ thread ends");
}

/// The kernel posts completions without requests through a one-entry CQ as soon as it is free; the driver polls.
fn completions(weakened: Option<Weakened>) {
    let shared = SharedRing::new(1, 1);
    let interrupt = Event::new();
    let mut ring = driver(&shared, weakened);
    let mut kernel = Kernel::new(shared);
    let poster = thread::spawn(move || {
        for round in 0..ROUNDS {
            while !kernel.has_free_cqe() {
                thread::yield_now();
            }
            kernel.post_cqe(completion(&request(round)), &interrupt);
        }
    });
    for round in 0..ROUNDS {
        let cqe = loop {
            match ring.reap() {
                Some(cqe) => break cqe,
                None => thread::yield_now(),
            }
        };
        assert_eq!(cqe, completion(&request(round)), "the driver read another CQE than was posted");
    }
    poster.join().expect("the poster ends");
}

/// The driver mutes interrupts while it reaps, and sleeps until an interrupt when nothing is left.
fn interrupts(weakened: Option<Weakened>, kernel: fn(Arc<SharedRing>) -> Kernel) {
    let shared = SharedRing::new(1, ROUNDS as usize);
    let interrupt = Event::new();
    let mut ring = driver(&shared, weakened);
    ring.mute_interrupts();
    let mut kernel = kernel(shared);
    let poster = thread::spawn({
        let interrupt = interrupt.clone();
        move || (0..ROUNDS).for_each(|round| kernel.post_cqe(completion(&request(round)), &interrupt))
    });
    for round in 0..ROUNDS {
        let cqe = loop {
            match ring.reap() {
                Some(cqe) => break cqe,
                None if ring.unmute_interrupts() => {}
                None => interrupt.wait(),
            }
            ring.mute_interrupts();
        };
        assert_eq!(cqe, completion(&request(round)), "the driver read another CQE than was posted");
    }
    poster.join().expect("the poster ends");
}

/// Everything at once: a ring of one entry, an SQ thread that sleeps, and a driver that sleeps until its completions.
fn whole_ring() {
    let shared = SharedRing::new(1, 1);
    let (doorbell, interrupt) = (Event::new(), Event::new());
    let mut ring = driver(&shared, None);
    let sq_thread = thread::spawn({
        let (doorbell, interrupt) = (doorbell.clone(), interrupt.clone());
        move || {
            // `post_cqe` asserts that the CQ has room: the kernel never has to hold a completion back.
            Kernel::new(shared)
                .sq_thread(ROUNDS, &doorbell, |kernel, sqe| kernel.post_cqe(completion(&sqe), &interrupt));
        }
    });
    for round in 0..ROUNDS {
        ring.mute_interrupts();
        ring.push(&request(round)).expect("the completion of the only request was reaped");
        if ring.publish() {
            doorbell.signal();
        }
        let cqe = loop {
            match ring.reap() {
                Some(cqe) => break cqe,
                None if ring.unmute_interrupts() => {}
                None => interrupt.wait(),
            }
        };
        assert_eq!(cqe, completion(&request(round)), "the driver read another CQE than was posted");
    }
    sq_thread.join().expect("the SQ thread ends");
}

/// Every interleaving.
fn check(model: impl Fn() + Send + Sync + 'static) {
    Builder::new().check(model);
}

/// Every interleaving with at most four preemptions: for a model that has too many otherwise.
fn check_four_preemptions(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(model);
}

/// The failure that loom finds in `model`.
fn failure(model: impl Fn() + Send + Sync + 'static) -> String {
    let panic = catch_unwind(AssertUnwindSafe(|| check(model))).expect_err("loom found no failure in this model");
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic.downcast::<&str>().expect("a panic's message is a string").to_string(),
    }
}

fn assert_data_race(model: impl Fn() + Send + Sync + 'static) {
    let found = failure(model);
    assert!(found.contains("Causality violation"), "expected a data race, loom found: {found}");
}

fn assert_sleeps_for_ever(model: impl Fn() + Send + Sync + 'static) {
    let found = failure(model);
    assert!(found.contains(SLEEPS_FOR_EVER), "expected a thread that sleeps for ever, loom found: {found}");
}

#[test]
fn no_submission_is_lost_to_a_sleeping_sq_thread() {
    check(|| submissions(ROUNDS, None));
}

#[test]
fn submissions_arrive_whole_and_in_order_through_a_reused_slot() {
    check(|| submissions(1, None));
}

#[test]
fn completions_arrive_whole_and_in_order() {
    check(|| completions(None));
}

#[test]
fn no_completion_is_lost_around_mute_and_unmute() {
    check(|| interrupts(None, Kernel::new));
}

#[test]
fn a_whole_ring_of_one_entry_works_and_never_overflows() {
    check_four_preemptions(whole_ring);
}

#[test]
fn without_release_of_the_sq_tail_an_sqe_races() {
    assert_data_race(|| submissions(1, Some(Weakened::SqTailRelease)));
}

#[test]
fn without_acquire_of_the_sq_head_an_sqe_slot_races() {
    assert_data_race(|| submissions(1, Some(Weakened::SqHeadAcquire)));
}

#[test]
fn without_acquire_of_the_cq_tail_a_cqe_races() {
    assert_data_race(|| completions(Some(Weakened::CqTailAcquire)));
}

#[test]
fn without_release_of_the_cq_head_a_cqe_slot_races() {
    assert_data_race(|| completions(Some(Weakened::CqHeadRelease)));
}

#[test]
fn without_the_fence_after_the_sq_tail_a_submission_is_lost() {
    assert_sleeps_for_ever(|| submissions(ROUNDS, Some(Weakened::FenceAfterSqTail)));
}

#[test]
fn without_the_fence_after_the_cq_flags_a_completion_is_lost() {
    assert_sleeps_for_ever(|| interrupts(Some(Weakened::FenceAfterCqFlags), Kernel::new));
}

#[test]
fn a_ring_with_deferred_task_work_loses_completions() {
    assert_sleeps_for_ever(|| interrupts(None, Kernel::with_deferred_task_work));
}
