//! Keeps requests in flight and checks every completion.

use crate::content::{IN_FLIGHT, Random, UNKNOWN, checksum, fill, spoil};
use crate::slots::{Slot, Slots, State};
use crate::{BlockQueue, Completion, Environment, Job, JobError, PushRefusal, Report, Request, Verify};
use crate::{Wait, Wakeup};

/// Number of completions to take before checking them: verification must not delay the time stamp of the next
/// completion, but the device must not wait long for new requests either.
const REAP_MAX: usize = 16;

/// Number of empty polls between two readings of the clock.
const POLLS_PER_CLOCK: u32 = 64;

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

    fn start_waiting(&mut self) {
        match self.job.wait {
            Wait::Poll => self.queue.mute(),
            // Nothing is in flight, so no signal can be missed.
            Wait::Interrupt | Wait::InterruptMuting => _ = self.queue.unmute(),
        }
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

    /// Fills the queue up to the job's depth.
    fn submit(&mut self) -> Result<(), JobError> {
        if self.give_up_ns.is_some() {
            return Ok(());
        }
        if self.job.pause_ns != 0 && self.in_flight == 0 && self.issued != 0 && self.goes_on() {
            self.env.pause(self.job.pause_ns);
        }
        while let Some(index) = self.prepared.take().or_else(|| self.prepare()) {
            match self.queue.push(&self.request(index)) {
                Ok(()) => self.slots.note_pushed(index),
                Err(PushRefusal::Full) => {
                    self.prepared = Some(index);
                    break;
                }
                Err(PushRefusal::Address(error)) => {
                    self.settle();
                    return Err(JobError::Buffer(error));
                }
            }
        }
        if !self.slots.has_pushed() {
            return Ok(());
        }
        self.now_ns = self.env.now_ns();
        self.in_flight += self.slots.start_pushed(self.now_ns);
        if self.queue.publish() {
            self.report.doorbells += 1;
            self.env.ring_doorbell();
        }
        Ok(())
    }

    /// Chooses the next request and prepares its buffer. `None`: enough requests are in flight, or the run ends.
    fn prepare(&mut self) -> Option<u16> {
        if !self.goes_on() {
            return None;
        }
        let index = self.slots.take()?;
        let (block, mut write) = match self.plan {
            Plan::EveryBlock { write } => (self.issued as u32, write),
            Plan::Random => {
                let write = self.random.chance(self.job.write_percent);
                (self.choose_block(), write)
            }
        };
        let verify = self.job.verify == Verify::On;
        let expected = &mut self.expected[block as usize];
        write |= verify && *expected == UNKNOWN;
        let durable = write && self.job.durable_percent != 0 && self.random.chance(self.job.durable_percent);
        let written = if verify {
            let (seed, operation, previous) = (self.job.seed, self.issued, *expected);
            let make_content = |buffer: &mut [u8]| {
                if write {
                    fill(buffer, seed, u64::from(block), operation, previous);
                    checksum(buffer)
                } else {
                    spoil(buffer);
                    UNKNOWN
                }
            };
            let gpa = self.job.buffer_gpa(u32::from(index));
            // `new` has checked that there is memory for every buffer. If there is none, the block becomes unknown.
            self.env.with_buffer(gpa, self.job.block_bytes, make_content).unwrap_or(UNKNOWN)
        } else {
            UNKNOWN
        };
        *expected |= IN_FLIGHT;
        *self.slots.get_mut(index) = Slot {
            user_data: self.issued << SLOT_BITS | u64::from(index),
            since_ns: self.now_ns,
            written,
            block,
            write,
            durable,
            state: State::Prepared,
        };
        self.issued += 1;
        Some(index)
    }

    /// Chooses a block that no request touches: a random block, or the next free block after it. There always is one,
    /// because a job has at least as many blocks as requests.
    fn choose_block(&mut self) -> u32 {
        let mut block = self.random.below(self.blocks);
        while self.expected[block as usize] & IN_FLIGHT != 0 {
            block = if block + 1 == self.blocks { 0 } else { block + 1 };
        }
        block
    }

    fn request(&self, index: u16) -> Request {
        let slot = self.slots.get(index);
        Request {
            write: slot.write,
            offset_bytes: self.job.area_offset_bytes + u64::from(slot.block) * u64::from(self.job.block_bytes),
            gpa: self.job.buffer_gpa(u32::from(index)),
            len_bytes: self.job.block_bytes,
            durable: slot.durable,
            user_data: slot.user_data,
        }
    }

    /// Takes some completions, then checks each. Returns false if there was none.
    fn reap(&mut self) -> bool {
        let Some(first) = self.queue.reap() else {
            return false;
        };
        let mut batch = [first; REAP_MAX];
        let mut count = 1;
        while count < REAP_MAX {
            let Some(completion) = self.queue.reap() else { break };
            batch[count] = completion;
            count += 1;
        }
        self.now_ns = self.env.now_ns();
        for completion in &batch[..count] {
            self.complete(completion);
        }
        true
    }

    fn complete(&mut self, completion: &Completion) {
        let Some((index, slot)) = self.slots.find(completion.user_data & ((1 << SLOT_BITS) - 1)) else {
            self.report.unexpected += 1;
            return;
        };
        match slot.state {
            State::InFlight if slot.user_data == completion.user_data => self.in_flight -= 1,
            State::Lost if slot.user_data == completion.user_data => {
                self.missing -= 1;
                self.report.late += 1;
            }
            _ => {
                self.report.unexpected += 1;
                return;
            }
        }
        self.slots.release(index);

        let succeeded = i64::from(completion.res) == i64::from(self.job.block_bytes);
        if succeeded && slot.state == State::InFlight {
            self.env.record_latency(self.now_ns.saturating_sub(slot.since_ns));
        }
        let expected = &mut self.expected[slot.block as usize];
        *expected &= !IN_FLIGHT;
        if slot.write {
            *expected = if succeeded { slot.written } else { UNKNOWN };
        }
        match (succeeded, slot.write) {
            (true, true) => self.report.writes += 1,
            (true, false) => {
                self.report.reads += 1;
                if self.job.verify == Verify::On {
                    self.compare(index, slot.block);
                }
            }
            (false, _) => {
                if self.report.errors == 0 {
                    self.report.first_error_result = i64::from(completion.res);
                }
                self.report.errors += 1;
            }
        }
    }

    /// Compares the data of a read with the expected content of the block.
    fn compare(&mut self, index: u16, block: u32) {
        let gpa = self.job.buffer_gpa(u32::from(index));
        let got = self.env.with_buffer(gpa, self.job.block_bytes, |buffer| checksum(buffer)).unwrap_or(UNKNOWN);
        let expected = self.expected[block as usize];
        self.report.verified_bytes += u64::from(self.job.block_bytes);
        if got != expected {
            if self.report.mismatches == 0 {
                self.report.first_mismatch_block = u64::from(block);
                self.report.first_mismatch_got = got;
                self.report.first_mismatch_expected = expected;
            }
            self.report.mismatches += 1;
        }
    }

    /// Handles a poll without completions.
    fn wait(&mut self) {
        // Nothing is in flight: no interrupt will come, only room in the queue.
        if self.job.wait == Wait::Poll || (self.in_flight == 0 && self.missing == 0) {
            self.empty_polls = self.empty_polls.saturating_add(1);
            self.env.relax(self.empty_polls);
            if self.empty_polls % POLLS_PER_CLOCK == 0 {
                self.now_ns = self.env.now_ns();
            }
            return;
        }
        if self.muted && self.unmute() {
            return;
        }
        self.report.sleeps += 1;
        match self.env.wait_for_interrupt(self.job.timeout_ns) {
            Wakeup::Interrupt => self.report.interrupts += 1,
            Wakeup::TimedOut => {
                if let Some(completion) = self.queue.reap() {
                    self.report.missed_interrupts += 1;
                    self.now_ns = self.env.now_ns();
                    self.complete(&completion);
                }
            }
        }
        self.now_ns = self.env.now_ns();
    }

    /// Mutes or unmutes interrupts at random. The reap that always follows finds completions without interrupts.
    fn mute_at_random(&mut self) {
        let choice = self.mute_random.below(4);
        if choice == 0 && !self.muted {
            self.queue.mute();
            self.muted = true;
        } else if choice == 1 && self.muted {
            self.unmute();
        }
    }

    /// Returns true if a completion is already there.
    fn unmute(&mut self) -> bool {
        self.muted = false;
        self.report.unmutes += 1;
        self.queue.unmute()
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
