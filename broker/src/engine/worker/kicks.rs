//! Kicks: when a worker asks its drivers for them, and how it learns of them while it sleeps.

use std::time::Instant;

use io_uring::cqueue;

use super::Worker;
use crate::engine::token::Token;
use crate::engine::vring::Vring;
use crate::engine::writer::Writer;

impl Worker<'_> {
    pub(super) fn kicked(&mut self, queue: u16, generation: u32, flags: u32) {
        let number = usize::from(queue);
        let vring = self.queues.get_mut(number);
        if vring.kick_poll.generation != generation {
            return;
        }
        // A poll that tells of each write goes on.
        vring.kick_poll.is_armed = cqueue::more(flags);
        vring.counters.kicks.add(1);
        if let Some(kick) = vring.eventfds_mut().and_then(|eventfds| eventfds.kick.as_mut()) {
            kick.take();
        }
        if vring.has_doorbell() {
            self.doorbell_rang(number);
            self.step_epochs();
        }
    }

    /// Ends the interest in a queue's kicks, before its eventfd changes or goes.
    pub(super) fn disarm(&mut self, number: usize) {
        let poll = &mut self.queues.get_mut(number).kick_poll;
        let armed = std::mem::take(&mut poll.is_armed);
        let token = Token::Kick { queue: number as u16, generation: poll.generation };
        poll.generation = poll.generation.wrapping_add(1);
        if armed {
            self.execution.ring().push_poll_remove(token.to_user_data(), Token::Nothing.to_user_data());
        }
    }

    pub(super) fn has_queue_without_kick(&mut self) -> bool {
        if !self.may_take() {
            return false;
        }
        let mut taking = self.queues.in_use_mut().iter_mut().filter_map(Vring::taking_mut);
        taking.any(|active| active.eventfds.kick.is_none())
    }

    /// Waits for a kick, a completion, a command or a deadline, unless there is something to do already.
    pub(in crate::engine) fn sleep(&mut self) {
        let has_work = self.enable_kicks() || self.commands.has_commands();
        if !has_work && self.execution.writer().is_none_or(Writer::announce_sleep) {
            self.arm();
            self.execution.ring().submit_and_wait();
        }
        if let Some(writer) = self.execution.writer() {
            writer.announce_waking();
        }
        self.disable_kicks();
    }

    /// Asks all drivers for kicks. True: there is work already.
    pub(in crate::engine) fn enable_kicks(&mut self) -> bool {
        if !self.may_take() {
            // The worker looks at the queues once that changes.
            return false;
        }
        self.queues.in_use_mut().iter_mut().filter_map(Vring::taking_mut).fold(false, |has_work, active| {
            // All of them, also if one has work already.
            active.queue.enable_kicks(active.log.as_deref()) | has_work
        })
    }

    fn disable_kicks(&mut self) {
        for active in self.queues.in_use_mut().iter_mut().filter_map(Vring::taking_mut) {
            active.queue.disable_kicks(active.log.as_deref());
        }
    }

    /// Has the io_uring tell of kicks, commands and the next deadline.
    fn arm(&mut self) {
        if !self.is_command_poll_armed {
            self.execution.ring().push_poll(self.commands.eventfd(), Token::Commands.to_user_data());
            self.is_command_poll_armed = true;
        }
        if let Some(deadline) = self.deferred.next_deadline() {
            self.timer.arm(self.execution.ring(), deadline, Instant::now());
        }
        if !self.may_take() {
            return;
        }
        for number in 0..self.queues.in_use() {
            if self.queues.get_mut(number).taking_mut().is_some() {
                self.arm_kick(number);
            }
        }
    }

    /// Has the io_uring tell of the doorbells of attached queues, also while the worker is busy with others.
    pub(super) fn arm_doorbells(&mut self) {
        for number in 0..self.queues.in_use() {
            if self.queues.get_mut(number).has_doorbell() {
                self.arm_kick(number);
            }
        }
    }

    /// Has the io_uring tell of the next kick of a queue that runs.
    fn arm_kick(&mut self, number: usize) {
        let Some((kick, poll)) = self.queues.get_mut(number).running_kick_mut() else { return };
        if poll.is_armed {
            return;
        }
        let token = Token::Kick { queue: number as u16, generation: poll.generation };
        poll.is_armed = true;
        if kick.is_endless() {
            self.execution.ring().push_poll_writes(kick.eventfd(), token.to_user_data());
        } else {
            self.execution.ring().push_poll(kick.eventfd(), token.to_user_data());
        }
    }
}
