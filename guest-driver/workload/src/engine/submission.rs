//! Chooses requests, prepares their buffers and fills the queue.

use super::{Engine, Plan, SLOT_BITS};
use crate::content::{IN_FLIGHT, UNKNOWN, checksum, fill, spoil};
use crate::slots::{Slot, State};
use crate::{BlockQueue, Environment, JobError, PushRefusal, Request, Verify};

impl<Q: BlockQueue, E: Environment> Engine<'_, Q, E> {
    /// Fills the queue up to the job's depth.
    pub(super) fn submit(&mut self) -> Result<(), JobError> {
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
}
