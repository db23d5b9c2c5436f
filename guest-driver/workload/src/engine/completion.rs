//! Takes completions and checks each.

use super::{Engine, SLOT_BITS};
use crate::content::{IN_FLIGHT, UNKNOWN, checksum};
use crate::slots::State;
use crate::{BlockQueue, Completion, Environment, Verify};

/// Number of completions to take before checking them: verification must not delay the time stamp of the next
/// completion, but the device must not wait long for new requests either.
const REAP_MAX: usize = 16;

impl<Q: BlockQueue, E: Environment> Engine<'_, Q, E> {
    /// Takes some completions, then checks each. Returns false if there was none.
    pub(super) fn reap(&mut self) -> bool {
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

    pub(super) fn complete(&mut self, completion: &Completion) {
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
}
