//! The channel's memory orderings and its handshake, model-checked.
//!
//! loom runs `channel.rs` itself, compiled with loom's atomics, in every interleaving (with at most three preemptions) and with
//! every value that each load may return under C11. A model fails when a job or a result arrives wrong, or when one side sleeps and nothing wakes it. Each of
//! the orderings of the table in `channel.rs` is then taken away alone, and loom must find the failure: so the model is known
//! to be able to fail. (loom takes accesses that are sequentially consistent for weaker ones; its fences are exact. That is
//! why the channel has fences.)

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use loom::model::Builder;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use channel::{Thread, channel};

#[allow(
    dead_code,
    clippy::duplicate_mod,
    reason = "the same source with other atomics; the model does not use all of it"
)]
#[path = "channel.rs"]
mod channel;

/// The atomics of loom, with one of the orderings weakened if a test says so.
mod atomics {
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::{Side, Weakened, is_weakened, side};

    #[derive(Debug, Default)]
    pub(super) struct AtomicU32(loom::sync::atomic::AtomicU32);

    impl AtomicU32 {
        pub(super) fn load(&self, order: Ordering) -> u32 {
            let weakened = match side() {
                Side::Worker => Weakened::LoadOfDone,
                Side::Thread => Weakened::LoadOfSent,
            };
            self.0.load(if is_weakened(weakened) { Ordering::Relaxed } else { order })
        }

        pub(super) fn store(&self, value: u32, order: Ordering) {
            let weakened = match side() {
                Side::Worker => Weakened::StoreOfSent,
                Side::Thread => Weakened::StoreOfDone,
            };
            self.0.store(value, if is_weakened(weakened) { Ordering::Relaxed } else { order });
        }
    }

    pub(super) fn fence(order: Ordering) {
        let weakened = match side() {
            Side::Worker => Weakened::FenceOfWorker,
            Side::Thread => Weakened::FenceOfThread,
        };
        if !is_weakened(weakened) {
            loom::sync::atomic::fence(order);
        }
    }
}

/// One of the channel's orderings, taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weakened {
    StoreOfSent,
    LoadOfSent,
    StoreOfDone,
    LoadOfDone,
    FenceOfWorker,
    FenceOfThread,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Worker,
    Thread,
}

std::thread_local! {
    // loom runs all threads of a model on the thread of the test.
    static WEAKENED: Cell<Option<Weakened>> = const { Cell::new(None) };
}

loom::thread_local! {
    static SIDE: Cell<Side> = Cell::new(Side::Worker);
}

fn is_weakened(ordering: Weakened) -> bool {
    WEAKENED.get() == Some(ordering)
}

fn side() -> Side {
    SIDE.with(Cell::get)
}

/// Rounds that a sleeper waits. A thread that yields runs again only when every other thread has ended, waits for it, or has
/// yielded too, so a signal that has not come after a few rounds never comes.
const WAIT_ROUNDS: u32 = 4;
const SLEEPS_FOR_EVER: &str = "the worker sleeps and nothing is left to wake it";

/// The worker's eventfd.
#[derive(Default)]
struct Bell(AtomicU32);

impl Bell {
    fn ring(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    /// Sleeps until it was rung.
    fn wait(&self) {
        for _ in 0..WAIT_ROUNDS {
            if self.0.swap(0, Ordering::AcqRel) != 0 {
                return;
            }
            thread::yield_now();
        }
        panic!("{SLEEPS_FOR_EVER}");
    }
}

/// A job is a number; its result is another.
#[derive(Debug, Default)]
struct Job(AtomicU32);

fn result_of(number: u32) -> u64 {
    u64::from(number) << 32 | 7
}

struct WriterThread(Arc<Bell>);

impl Thread<Job> for WriterThread {
    fn carry_out(&mut self, job: &Job) -> u64 {
        result_of(job.0.load(Ordering::Relaxed))
    }

    fn wake_worker(&mut self) {
        self.0.ring();
    }

    fn pause(&mut self) {
        thread::park();
    }
}

/// A worker sends two jobs, at most `jobs_max` at a time, and sleeps whenever there is no result. The thread sleeps whenever
/// there is no job.
fn jobs(jobs_max: usize) {
    const JOBS: u32 = 2;
    let bell = Arc::new(Bell::default());
    let (mut worker, end) = channel::<Job>(jobs_max);
    let writer = thread::spawn({
        let bell = bell.clone();
        move || {
            SIDE.with(|side| side.set(Side::Thread));
            end.work(&mut WriterThread(bell));
        }
    });
    let (mut sent, mut taken) = (0, 0);
    while taken < JOBS {
        while sent < JOBS && sent - taken < jobs_max as u32 {
            sent += 1;
            worker.send(|job| job.0.store(sent, Ordering::Relaxed));
        }
        if worker.has_to_wake_thread() {
            writer.thread().unpark();
        }
        while let Some(result) = worker.take() {
            taken += 1;
            assert_eq!(result, result_of(taken), "another job was carried out, or another result arrived");
        }
        if worker.is_busy() {
            if worker.announce_sleep() {
                bell.wait();
            }
            worker.announce_waking();
        }
    }
    assert!(worker.announce_sleep(), "without jobs the worker may sleep");
    worker.end();
    writer.thread().unpark();
    writer.join().expect("the thread ends");
}

/// A worker sends a job and leaves at once.
fn job_and_end() {
    let (mut worker, end) = channel::<Job>(1);
    let writer = thread::spawn(move || {
        SIDE.with(|side| side.set(Side::Thread));
        end.work(&mut WriterThread(Arc::new(Bell::default())));
    });
    worker.send(|job| job.0.store(1, Ordering::Relaxed));
    worker.end();
    writer.thread().unpark();
    writer.join().expect("the thread ends");
    assert_eq!(worker.take(), Some(result_of(1)), "the thread ended before it carried the job out");
}

/// Every interleaving with at most three preemptions: without a bound there are too many.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// What loom found with one ordering taken away.
fn failure(weakened: Weakened, jobs_max: usize) -> String {
    WEAKENED.set(Some(weakened));
    let outcome = catch_unwind(AssertUnwindSafe(|| check(move || jobs(jobs_max))));
    WEAKENED.set(None);
    let panic = outcome.expect_err("loom found no failure in this model");
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic.downcast::<&str>().expect("a panic's message is a string").to_string(),
    }
}

#[test]
fn jobs_and_results_arrive_whole_and_neither_side_sleeps_over_them() {
    for jobs_max in [1, 2] {
        check(move || jobs(jobs_max));
    }
}

#[test]
fn a_job_that_was_sent_before_the_end_is_carried_out() {
    check(job_and_end);
}

#[test]
fn without_a_fence_on_either_side_the_worker_sleeps_over_a_result() {
    for weakened in [Weakened::FenceOfWorker, Weakened::FenceOfThread] {
        let found = failure(weakened, 1);
        assert!(found.contains(SLEEPS_FOR_EVER), "{weakened:?}: {found}");
    }
}

#[test]
fn without_release_and_acquire_a_job_or_a_result_is_lost() {
    for weakened in [Weakened::StoreOfSent, Weakened::LoadOfSent, Weakened::StoreOfDone, Weakened::LoadOfDone] {
        let found = failure(weakened, 2);
        let is_wrong = found.contains("another job was carried out") || found.contains(SLEEPS_FOR_EVER);
        assert!(is_wrong, "{weakened:?}: {found}");
    }
}
