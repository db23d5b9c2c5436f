//! Kicks: when a worker asks its drivers for them, and how it hears of them while it sleeps.

use io_uring::cqueue;

use super::token::Token;
use super::vring::{State, Vring};
use super::worker::Worker;
use super::writer::Writer;

impl Worker<'_> {
    pub(super) fn kicked(&mut self, queue: u16, generation: u32, flags: u32) {
        let vring = &mut self.vrings[usize::from(queue)];
        if vring.kick_poll.generation != generation {
            return;
        }
        // One that tells of each write goes on.
        vring.kick_poll.is_armed = cqueue::more(flags);
        vring.counters.kicks.add(1);
        if let Some(kick) = vring.eventfds_mut().and_then(|eventfds| eventfds.kick.as_mut()) {
            kick.take();
        }
        if vring.has_doorbell() {
            self.doorbell_rang(usize::from(queue));
        }
    }

    /// Ends the interest in a queue's kicks, before its eventfd changes or goes.
    pub(super) fn disarm(&mut self, number: usize) {
        let poll = &mut self.vrings[number].kick_poll;
        let armed = std::mem::take(&mut poll.is_armed);
        let token = Token::Kick { queue: number as u16, generation: poll.generation };
        poll.generation = poll.generation.wrapping_add(1);
        if armed {
            self.ring.push_poll_remove(token.to_user_data(), Token::Nothing.to_user_data());
        }
    }

    pub(super) fn has_queue_without_kick(&mut self) -> bool {
        self.may_take()
            && self
                .vrings_in_use()
                .iter_mut()
                .filter_map(Vring::taking_mut)
                .any(|active| active.eventfds.kick.is_none())
    }

    /// Waits for a kick, a completion or a command, unless there is something to do already.
    pub(super) fn sleep(&mut self) {
        if !self.enable_kicks() && !self.commands.is_rung() && self.writer.as_ref().is_none_or(Writer::announce_sleep) {
            self.arm();
            self.ring.submit_and_wait();
        }
        if let Some(writer) = &self.writer {
            writer.announce_waking();
        }
        self.disable_kicks();
    }

    /// Asks all drivers for kicks. True: there is work already.
    pub(super) fn enable_kicks(&mut self) -> bool {
        if !self.may_take() {
            // The queues are looked at once that changes.
            return false;
        }
        self.vrings_in_use().iter_mut().filter_map(Vring::taking_mut).fold(false, |has_work, active| {
            // All of them, also if one has work already.
            active.queue.enable_kicks(active.log.as_deref()) | has_work
        })
    }

    fn disable_kicks(&mut self) {
        for active in self.vrings_in_use().iter_mut().filter_map(Vring::taking_mut) {
            active.queue.disable_kicks(active.log.as_deref());
        }
    }

    /// Has the ring tell of kicks and commands.
    fn arm(&mut self) {
        if !self.is_bell_armed {
            self.ring.push_poll(self.commands.eventfd(), Token::Commands.to_user_data());
            self.is_bell_armed = true;
        }
        if !self.may_take() {
            return;
        }
        for number in 0..self.vrings_in_use {
            if self.vrings[number].taking_mut().is_some() {
                self.arm_kick(number);
            }
        }
    }

    /// Has the ring tell of the doorbells of attached queues, also while the worker is busy with others.
    pub(super) fn arm_doorbells(&mut self) {
        for number in 0..self.vrings_in_use {
            if self.vrings[number].has_doorbell() {
                self.arm_kick(number);
            }
        }
    }

    /// Has the ring tell of the next kick of a queue that runs.
    fn arm_kick(&mut self, number: usize) {
        let Vring { state: State::Running(active), kick_poll, .. } = &mut self.vrings[number] else { return };
        let Some(kick) = active.eventfds.kick.as_ref().filter(|_| !kick_poll.is_armed) else { return };
        let token = Token::Kick { queue: number as u16, generation: kick_poll.generation };
        if kick.is_endless() {
            self.ring.push_poll_writes(kick.eventfd(), token.to_user_data());
        } else {
            self.ring.push_poll(kick.eventfd(), token.to_user_data());
        }
        kick_poll.is_armed = true;
    }
}
