//! What a worker does when others tell it to.

use std::rc::Rc;
use std::sync::Arc;

use ringpass_guest_abi::epoch::device::Event;
use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::Worker;
use crate::disk::Disk;
use crate::engine::attach::Ranges;
use crate::engine::command::{Command, WhichEventfd};
use crate::engine::deferred::Drain;
use crate::engine::eventfd::Signal;
use crate::engine::queues::MemoryChange;
use crate::engine::reply::{Reply, done};
use crate::engine::vring::Start;
use crate::vhost_user::{DeviceMemory, QueueEventfds, RingFault};
use crate::virtio_blk::GuestError;
use crate::virtqueue::QueueSetup;

impl Worker<'_> {
    /// Carries out the commands that have come.
    pub(in crate::engine) fn obey(&mut self) {
        self.commands.clear();
        let (mut has_granted, mut has_others) = (false, false);
        // Also after it was told to end: the worker may wait for rings, and learns of their end here.
        while let Some(command) = self.commands.next() {
            if self.deferred.is_shutdown && matches!(command, Command::Shutdown) {
                // The receiver repeats this when all senders are gone.
                break;
            }
            match command {
                Command::BeginGranted { .. } => has_granted = true,
                _ => has_others = true,
            }
            self.carry_out(command);
        }
        // A request that goes on changes no queue's state, and settling would look at all queues that the device offers.
        self.is_unsettled |= has_others || !has_granted;
    }

    fn carry_out(&mut self, command: Command) {
        let reply = self.begin_command(command);
        // A command is in force when its epochs have taken their steps.
        self.step_epochs();
        if let Some(reply) = reply {
            done(&reply);
        }
    }

    /// Begins a command. Gives the reply of a command that is in force at once.
    fn begin_command(&mut self, command: Command) -> Option<Reply<()>> {
        match command {
            Command::SetMemory { memory, reply } => {
                // A copy of the table for this thread alone; the mappings are shared.
                self.set_memory(&Rc::new((*memory).clone()));
                return Some(reply);
            }
            Command::LeaveFormerMemory { reply } => self.deferred.former_memory.push(reply),
            Command::SetDirtyLog { log, reply } => {
                self.queues.set_log(log);
                return Some(reply);
            }
            Command::SetUsedLog { queue, used_log_gpa, reply } => {
                self.queues.set_used_log(queue, used_log_gpa);
                return Some(reply);
            }
            Command::SetLimits { limits, reply } => {
                self.limits = limits;
                return Some(reply);
            }
            Command::SetDisk { disk, reply } => {
                if self.deferred.disk_release.is_some() {
                    self.deferred.next_disk = Some(disk);
                } else {
                    self.take_disk(disk);
                }
                return Some(reply);
            }
            Command::ReleaseDisk { reply } => self.release_disk(reply),
            Command::Start { queue, setup, eventfds } => self.start(queue, setup, eventfds),
            Command::Break { queue, fault, err } => self.refuse_start(queue, &fault, err),
            Command::Stop { queue, reply } => self.stop(queue, reply),
            Command::SetEnabled { queue, is_enabled, reply } => {
                self.queues.get_mut(queue).is_enabled = is_enabled;
                self.enable_ring(queue, is_enabled);
                self.deferred.enables.push((queue, reply));
            }
            Command::SetEventfd { queue, which, eventfd, reply } => {
                self.set_eventfd(queue, which, eventfd);
                return Some(reply);
            }
            Command::Abandon => {
                self.abandon_queues();
                self.queues.forget_memory();
            }
            Command::Reset { reply } => {
                self.abandon_queues();
                self.deferred.resets.push(reply);
            }
            Command::Shutdown => {
                self.abandon_queues();
                self.deferred.is_shutdown = true;
            }
            Command::Attachment { queue, attachment, event } => self.attachment_event(queue, attachment, event),
            Command::EndRings { reason } => self.end_rings(reason, Event::End),
            Command::FinishRings { reason, done } => {
                self.end_rings(reason, Event::Finish(reason));
                self.deferred.rings.extend(done);
            }
            Command::DrainRings { deadline, reply } => {
                self.drain_rings();
                // A drain before this one has no one who waits for it: the engine allows one at a time.
                self.deferred.drain = Some(Drain { reply, deadline });
            }
            Command::TellDriver => self.tell_driver(),
            Command::BeginGranted { slot } => self.execution.grant(slot),
        }
        None
    }

    fn set_memory(&mut self, memory: &Rc<DeviceMemory>) {
        for (number, MemoryChange { held, ranges }) in self.queues.set_memory(memory) {
            if let Some(error) = held {
                let why = format!("{error}; it waits for memory that has its rings");
                self.report_stop(number, error.cause(), &why);
            }
            match ranges {
                Some(Ranges::Stayed) => self.move_ring(number, memory),
                Some(Ranges::Moved) => self.end_ring(number, ErrorCode::Memory, Event::End),
                // The driver could not say that it has seen the end, nor would the device have a place to ask in.
                Some(Ranges::Left) => self.end_ring(number, ErrorCode::Memory, Event::Finish(ErrorCode::Memory)),
                None => {}
            }
        }
        self.step_epochs();
        // Queue 0 may have its rings again.
        self.tell_news();
    }

    fn start(&mut self, queue: usize, setup: QueueSetup, eventfds: QueueEventfds) {
        self.disarm(queue);
        self.queues.get_mut(queue).start(Start { setup, eventfds: eventfds.into() });
        // If the front-end did not stop it.
        self.note_queue_stop(queue);
    }

    fn refuse_start(&mut self, queue: usize, fault: &RingFault, err: Option<EventFd>) {
        let vring = self.queues.get(queue);
        vring.counters.broken.add(1);
        self.shared.guest_errors.record(vring.index, GuestError::BrokenRing, fault.cause(), fault);
        if let Some(err) = err {
            Signal::new(err).send(vring.index);
        }
    }

    fn stop(&mut self, queue: usize, reply: Reply<u16>) {
        self.disarm(queue);
        self.queues.get_mut(queue).stop(reply);
        self.answer_event_of_stopping(queue);
        self.note_queue_stop(queue);
    }

    /// The worker takes nothing more from any queue.
    fn abandon_queues(&mut self) {
        for number in 0..self.queues.len() {
            self.disarm(number);
            self.queues.get_mut(number).abandon();
            self.note_queue_stop(number);
        }
    }

    fn set_eventfd(&mut self, queue: usize, which: WhichEventfd, eventfd: Option<EventFd>) {
        if which == WhichEventfd::Kick {
            self.disarm(queue);
        }
        let vring = self.queues.get_mut(queue);
        vring.set_eventfd(which, eventfd);
        let is_attached = vring.attachment_mut().is_some();
        match which {
            WhichEventfd::Kick if is_attached => self.give_kick_to_ring(queue),
            WhichEventfd::Kick | WhichEventfd::Err => {}
            WhichEventfd::Call => {
                self.give_call_to_ring(queue);
                let vring = self.queues.get_mut(queue);
                let index = vring.index;
                if let Some(call) = vring.eventfds_mut().and_then(|eventfds| eventfds.call.as_ref()) {
                    // The driver may have missed what the old eventfd said.
                    call.send(index);
                }
            }
        }
    }

    /// Executes requests on `disk` from now on, unless there is a disk already.
    pub(super) fn take_disk(&mut self, disk: Arc<Disk>) {
        let (waker, poll) = (self.commands.waker(), self.poll.renewed());
        self.execution.take_disk(disk, self.limits.logical_block_bytes(), waker, poll);
    }
}
