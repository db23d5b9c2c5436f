//! Keeps requests in flight and checks every completion.

mod completion;
mod submission;
mod waiting;

use crate::content::{IN_FLIGHT, Random, UNKNOWN};
use crate::slots::{Slots, State};
use crate::{BlockQueue, Environment, Job, JobError, Report, Wait};

/// Number of bits of `user_data` for the slot. The other bits count requests, so that a doubled completion is detected.
const SLOT_BITS: u32 = 16;

/// The selection of blocks, and the operation on them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plan {
    Random,
    EveryBlock { write: bool },
}

pub(crate) struct Engine<'a, Q, E> {
    job: &'a Job,
    plan: Plan,
    queue: &'a mut Q,
    env: &'a mut E,
    expected: &'a mut [u64],
    blocks: u32,
    slots: &'a mut Slots,
    random: Random,
    /// The generator for muting, separate so that the requests of a seed do not depend on timing.
    mute_random: Random,
    muted: bool,
    /// Number of requests prepared so far.
    issued: u64,
    issue_max: u64,
    end_ns: u64,
    /// A request that waits for room in the queue. This can happen with nothing in flight: the kernel may post a
    /// completion before it moves the head of the submission queue.
    prepared: Option<u16>,
    /// Number of slots in [`State::InFlight`].
    in_flight: u32,
    /// Number of slots in [`State::Lost`].
    missing: u32,
    /// The end of the wait for lost requests. The first lost request sets it.
    give_up_ns: Option<u64>,
    /// The last reading of the clock.
    now_ns: u64,
    next_lost_check_ns: u64,
    empty_polls: u32,
    report: Report,
}

impl<'a, Q: BlockQueue, E: Environment> Engine<'a, Q, E> {
    pub(crate) fn new(
        job: &'a Job,
        plan: Plan,
        queue: &'a mut Q,
        env: &'a mut E,
        expected: &'a mut [u64],
        slots: &'a mut Slots,
    ) -> Result<Self, JobError> {
        for index in 0..job.depth {
            let gpa = job.buffer_gpa(index);
            let len_bytes = job.block_bytes;
            env.with_buffer(gpa, len_bytes, |_| ()).ok_or(JobError::NoMemory { gpa, len_bytes })?;
        }
        let blocks = expected.len() as u32;
        let now_ns = env.now_ns();
        let (issue_max, end_ns) = match plan {
            Plan::EveryBlock { .. } => (u64::from(blocks), u64::MAX),
            Plan::Random => (
                if job.operations == 0 { u64::MAX } else { job.operations },
                if job.duration_ns == 0 { u64::MAX } else { now_ns.saturating_add(job.duration_ns) },
            ),
        };
        Ok(Self {
            job,
            plan,
            queue,
            env,
            expected,
            blocks,
            slots,
            random: Random::new(job.seed),
            mute_random: Random::new(!job.seed),
            muted: false,
            issued: 0,
            issue_max,
            end_ns,
            prepared: None,
            in_flight: 0,
            missing: 0,
            give_up_ns: None,
            now_ns,
            next_lost_check_ns: now_ns,
            empty_polls: 0,
            report: Report::default(),
        })
    }

    pub(crate) fn drive(mut self) -> Result<Report, JobError> {
        let start_ns = self.now_ns;
        self.start_waiting();
        loop {
            self.submit()?;
            if self.is_done() {
                break;
            }
            if self.job.wait == Wait::InterruptMuting {
                self.mute_at_random();
            }
            if self.reap() {
                self.empty_polls = 0;
            } else {
                self.wait();
            }
            if self.now_ns >= self.next_lost_check_ns {
                self.find_lost();
            }
        }
        self.settle();
        self.report.elapsed_ns = self.now_ns.saturating_sub(start_ns);
        Ok(self.report)
    }

    /// Whether the run may choose new requests.
    fn goes_on(&self) -> bool {
        self.issued < self.issue_max && self.now_ns < self.end_ns
    }

    fn is_done(&self) -> bool {
        self.in_flight == 0
            && match self.give_up_ns {
                None => self.prepared.is_none(),
                Some(at_ns) => self.missing == 0 || self.now_ns >= at_ns,
            }
    }

    /// Finds requests that have been in flight for too long.
    fn find_lost(&mut self) {
        self.next_lost_check_ns = self.now_ns.saturating_add((self.job.timeout_ns / 8).max(1));
        for slot in self.slots.iter_mut() {
            if self.now_ns.saturating_sub(slot.since_ns) < self.job.timeout_ns {
                continue;
            }
            match slot.state {
                State::Free | State::Lost => continue,
                // None of our requests is in flight, and still there is no room in the queue.
                State::Prepared if self.in_flight == 0 && self.give_up_ns.is_none() => {}
                State::Prepared => continue,
                State::InFlight => {
                    slot.state = State::Lost;
                    self.in_flight -= 1;
                    self.missing += 1;
                }
            }
            self.report.lost += 1;
            self.give_up_ns.get_or_insert(self.now_ns.saturating_add(self.job.timeout_ns));
        }
    }

    /// Removes the marks of requests from the expected table.
    fn settle(&mut self) {
        for slot in self.slots.iter() {
            if slot.state == State::Free {
                continue;
            }
            let expected = &mut self.expected[slot.block as usize];
            *expected &= !IN_FLIGHT;
            if slot.write && slot.state != State::Prepared {
                *expected = UNKNOWN;
            }
        }
    }
}
