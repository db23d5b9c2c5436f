//! Waits for completions: polls, or sleeps until an interrupt.

use super::Engine;
use crate::{BlockQueue, Environment, Wait, Wakeup};

/// Number of empty polls between two readings of the clock.
const POLLS_PER_CLOCK: u32 = 64;

impl<Q: BlockQueue, E: Environment> Engine<'_, Q, E> {
    pub(super) fn start_waiting(&mut self) {
        match self.job.wait {
            Wait::Poll => self.queue.mute(),
            // Nothing is in flight, so no signal can be missed.
            Wait::Interrupt | Wait::InterruptMuting => _ = self.queue.unmute(),
        }
    }

    /// Handles a poll without completions.
    pub(super) fn wait(&mut self) {
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
    pub(super) fn mute_at_random(&mut self) {
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
}
