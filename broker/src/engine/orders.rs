//! What a worker does when it is told to, and what follows once requests have ended.

use std::fmt::Display;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use ringpass_guest_abi::attach_sequence::AttachSequence;
use ringpass_guest_abi::epoch::device::Event;
use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::alignment::Alignment;
use super::attach::{Attachment, Ranges};
use super::command::{Command, WhichEventfd};
use super::eventfd::Signal;
use super::reply::{Reply, done};
use super::vring::{Active, Broken, Start, State, Vring};
use super::worker::{DiskInUse, Worker};
use super::writer::Writer;
use crate::disk::{Disk, DiskKind};
use crate::log_limit::Cause;
use crate::process_end;
use crate::vhost_user::{DeviceMemory, QueueEventfds};
use crate::virtio_blk::{GuestError, RequestTypes};
use crate::virtqueue::{QueueSetup, SplitQueue};

impl Worker<'_> {
    /// Carries out the commands that have come.
    pub(super) fn obey(&mut self) {
        self.commands.silence();
        let (mut has_granted, mut has_others) = (false, false);
        // After it was told to end as well: it may wait for rings, and hears of their end.
        while let Some(command) = self.commands.next() {
            if self.endings.is_shutdown && matches!(command, Command::Shutdown) {
                // What is said again and again when nobody can send any more.
                break;
            }
            match command {
                Command::BeginGranted { .. } => has_granted = true,
                _ => has_others = true,
            }
            self.carry_out(command);
        }
        // A request that goes on changes no queue's state, and settling would look at all queues that the device
        // offers.
        self.is_unsettled |= has_others || !has_granted;
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::SetMemory { memory, reply } => {
                // A copy of the table for this thread alone; the mappings are shared.
                self.set_memory(&Rc::new((*memory).clone()));
                done(&reply);
            }
            Command::LeaveFormerMemory { reply } => self.endings.former_memory.push(reply),
            Command::SetDirtyLog { log, reply } => {
                self.log = log;
                for active in self.vrings.iter_mut().filter_map(Vring::present_mut) {
                    active.log = self.log.clone();
                }
                self.mark_used_rings();
                done(&reply);
            }
            Command::SetUsedLog { queue, used_log_gpa, reply } => {
                self.set_used_log(queue, used_log_gpa);
                done(&reply);
            }
            Command::SetLimits { limits, reply } => {
                self.limits = limits;
                done(&reply);
            }
            Command::SetDisk { disk, reply } => {
                if self.endings.disk.is_some() {
                    self.endings.next_disk = Some(disk);
                } else {
                    self.take_disk(disk);
                }
                done(&reply);
            }
            Command::GiveUpDisk { reply } => self.give_up_disk(reply),
            Command::Start { queue, setup, eventfds } => self.start(queue, setup, eventfds),
            Command::Break { queue, fault, err } => {
                let vring = &self.vrings[queue];
                vring.counters.broken.add(1);
                self.shared.guest_errors.record(vring.index, GuestError::BrokenRing, fault.cause(), &fault);
                if let Some(err) = err {
                    Signal::new(err).send(vring.index);
                }
            }
            Command::Stop { queue, reply } => self.stop(queue, reply),
            Command::SetEnabled { queue, enabled, reply } => {
                self.vrings[queue].enabled = enabled;
                self.enable_ring(queue, enabled, reply);
            }
            Command::SetEventfd { queue, which, eventfd, reply } => {
                self.set_eventfd(queue, which, eventfd);
                done(&reply);
            }
            Command::Abandon => {
                self.give_up_queues();
                // What is under way keeps its own, and the next front-end does not wait for it.
                self.memory = None;
                self.former_memory.clear();
            }
            Command::Reset { reply } => {
                self.give_up_queues();
                self.endings.resets.push(reply);
            }
            Command::Shutdown => {
                self.give_up_queues();
                self.endings.is_shutdown = true;
            }
            Command::Attachment { queue, attachment, event } => self.attachment_event(queue, attachment, event),
            Command::Detach { queue } => {
                if let Some(attach) = &self.attach {
                    attach.rings.detaches.received(self.vrings[queue].index);
                }
                self.epoch_event(queue, Event::Finish(ErrorCode::Detached));
            }
            Command::EndRings { reason } => self.end_rings(reason, Event::End),
            Command::FinishRings { reason, done } => {
                self.end_rings(reason, Event::Finish(reason));
                self.endings.rings.extend(done);
            }
            Command::TellDriver => self.tell_driver(),
            Command::BeginGranted { slot } => self.granted.push(slot),
        }
    }

    fn set_memory(&mut self, memory: &Rc<DeviceMemory>) {
        self.former_memory.retain(|table| table.strong_count() > 0);
        self.former_memory.extend(self.memory.replace(Rc::clone(memory)).as_ref().map(Rc::downgrade));
        for number in 0..self.vrings.len() {
            // What drains belongs to a front-end that is gone, with its memory. What is broken takes nothing more, and
            // while a queue is stopped nothing else is asked.
            let State::Running(active) = &mut self.vrings[number].state else { continue };
            let ranges = active.attachment.as_mut().map(|attachment| attachment.move_to(memory));
            active.memory = Rc::clone(memory);
            // What is pending for as long as the queue is attached is answered where the guest has its memory by then,
            // and holds no region that has left.
            let attach = active.attachment.as_mut().map(|attachment| &mut attachment.attach);
            attach.into_iter().chain(&mut active.event).for_each(|reply| reply.memory = Rc::clone(memory));
            match active.queue.set_memory(memory) {
                Ok(()) => active.is_held = false,
                // A region that is exchanged goes first and then comes back.
                Err(error) => {
                    active.is_held = true;
                    self.report_stop(
                        number,
                        error.cause(),
                        &format_args!("{error}; it waits for memory that has its rings"),
                    );
                }
            }
            match (ranges, &self.attach) {
                (Some(Ranges::Stayed), Some(attach)) => {
                    attach.rings.metrics.ring_moved(self.vrings[number].index, memory)
                }
                (Some(Ranges::Moved), _) => self.end_ring(number, ErrorCode::Memory, Event::End),
                // The driver could not say that it has heard of the end, nor would the device have a place to ask in.
                (Some(Ranges::Left), _) => self.end_ring(number, ErrorCode::Memory, Event::Finish(ErrorCode::Memory)),
                (Some(Ranges::Stayed), None) | (None, _) => {}
            }
        }
        // Queue 0 may have its rings again.
        if std::mem::take(&mut self.has_news) {
            self.tell_driver();
        }
    }

    fn start(&mut self, queue: usize, setup: QueueSetup, eventfds: QueueEventfds) {
        self.disarm(queue);
        let vring = &mut self.vrings[queue];
        vring.enabled = false;
        let start = Start { setup, eventfds: eventfds.into(), stop: None };
        vring.state = match std::mem::replace(&mut vring.state, State::Stopped) {
            // As a rule a front-end that is gone. Whoever it is, no request is executed beside an older one.
            State::Running(active)
            | State::Broken(Broken::Active(active))
            | State::Stopping { active, .. }
            | State::Draining { active, .. } => State::Draining { active, next: Some(start) },
            State::Stopped | State::Waiting(_) | State::Broken(Broken::Idle { .. }) => State::Waiting(start),
        };
        // If it was not told to stop.
        self.epoch_event(queue, Event::Stop);
    }

    fn stop(&mut self, queue: usize, reply: Reply<u16>) {
        self.disarm(queue);
        let vring = &mut self.vrings[queue];
        vring.state = match std::mem::replace(&mut vring.state, State::Stopped) {
            State::Running(active) => {
                // Without memory, what is to be replayed cannot be executed, and must not be waited for.
                let is_replaying = !active.is_held;
                State::Stopping { active, is_replaying, reply }
            }
            State::Broken(Broken::Active(active)) | State::Stopping { active, .. } => {
                State::Stopping { active, is_replaying: false, reply }
            }
            // Its in-flight region is looked at first.
            State::Waiting(start) if start.setup.inflight.is_some() => {
                State::Waiting(Start { stop: Some(reply), ..start })
            }
            State::Draining { active, next: Some(start) } if start.setup.inflight.is_some() => {
                State::Draining { active, next: Some(Start { stop: Some(reply), ..start }) }
            }
            State::Waiting(start) => {
                let _ = reply.send(start.setup.next_avail);
                State::Stopped
            }
            State::Broken(Broken::Idle { next_avail, .. }) => {
                let _ = reply.send(next_avail);
                State::Stopped
            }
            State::Draining { active, next } => {
                let next_avail = next.map_or(active.queue.next_avail(), |start| start.setup.next_avail);
                let _ = reply.send(next_avail);
                State::Draining { active, next: None }
            }
            // The handle knows with what index it was started, if it was.
            State::Stopped => State::Stopped,
        };
        self.answer_event_of_stopping(queue);
        self.epoch_event(queue, Event::Stop);
    }

    /// Nothing more is taken from any queue.
    fn give_up_queues(&mut self) {
        for number in 0..self.vrings.len() {
            self.disarm(number);
            self.vrings[number].abandon();
            self.epoch_event(number, Event::Stop);
        }
    }

    fn set_eventfd(&mut self, queue: usize, which: WhichEventfd, eventfd: Option<EventFd>) {
        if which == WhichEventfd::Kick {
            self.disarm(queue);
        }
        let vring = &mut self.vrings[queue];
        vring.set_eventfd(which, eventfd);
        if which == WhichEventfd::Call {
            self.give_call_to_ring(queue);
        }
        let vring = &mut self.vrings[queue];
        let index = vring.index;
        if which == WhichEventfd::Call
            && let Some(call) = vring.eventfds_mut().and_then(|eventfds| eventfds.call.as_ref())
        {
            // What was said to the old one may not have been heard.
            call.send(index);
        }
        if which == WhichEventfd::Kick && vring.attachment_mut().is_some() {
            self.give_kick_to_ring(queue);
        }
    }

    /// What was said with the old eventfd may not have been heard. Without one nobody would hear of a ring that sleeps.
    fn give_kick_to_ring(&mut self, queue: usize) {
        let vring = &mut self.vrings[queue];
        if vring.eventfds_mut().is_some_and(|eventfds| eventfds.kick.is_some()) {
            self.doorbell_rang(queue);
        } else {
            self.end_ring(queue, ErrorCode::Mode, Event::Finish(ErrorCode::Mode));
        }
    }

    fn set_used_log(&mut self, queue: usize, used_log_gpa: Option<u64>) {
        let vring = &mut self.vrings[queue];
        if let Some(active) = vring.present_mut() {
            active.queue.set_used_log_gpa(used_log_gpa);
        }
        if let State::Waiting(start) | State::Draining { next: Some(start), .. } = &mut vring.state {
            start.setup.used_log_gpa = used_log_gpa;
        }
        self.mark_used_rings();
    }

    /// What was written to used rings before it was logged counts as written now.
    fn mark_used_rings(&mut self) {
        for active in self.vrings.iter_mut().filter_map(Vring::present_mut) {
            if let Some(log) = &active.log {
                active.queue.mark_used_ring(log);
            }
        }
    }

    pub(super) fn take_disk(&mut self, disk: Arc<Disk>) {
        if self.disk.is_some() {
            return;
        }
        if let Err(error) = self.ring.register_disk(disk.as_fd(), disk.page_cache()) {
            end_process(&format_args!("the disk cannot be registered in a worker's io_uring: {error}"));
        }
        let alignment = disk.direct_alignment().map(|direct| Alignment {
            address_mask: direct.memory_bytes as usize - 1,
            read_block_bytes: direct.read_block_bytes,
            write_block_bytes: direct.write_block_bytes,
            is_coarser_than_guest: direct.write_block_bytes > self.limits.logical_block_bytes(),
        });
        // The kernel does the writes to a file one after the other anyway. Those to a block device it does side by
        // side, and one that waits for the device must not hold up the others.
        let is_written = disk.kind() == DiskKind::RegularFile && alignment.is_none() && !disk.is_read_only();
        if is_written && self.writer.is_none() {
            // Now and not with the first write, which would wait for it.
            match Writer::start(self.slots.room(), self.poll.renewed(), self.commands.waker()) {
                Ok(writer) => self.writer = Some(writer),
                Err(error) => tracing::warn!(%error, "no thread for writes into the page cache: they are slower"),
            }
        }
        self.disk = Some(DiskInUse { disk, alignment });
    }

    /// Marks a queue as broken.
    pub(super) fn break_down(&mut self, queue: usize, cause: Cause, why: &dyn Display) {
        self.disarm(queue);
        if self.vrings[queue].break_down() {
            self.report_stop(queue, cause, why);
            self.epoch_event(queue, Event::Stop);
        }
        self.is_unsettled = true;
    }

    /// The same for a cause that has no values.
    pub(super) fn break_down_for(&mut self, queue: usize, why: &'static str) {
        self.break_down(queue, Cause::new(why), &why);
    }

    /// Logs that a queue takes nothing for now, unless it logged the same cause a short while ago.
    fn report_stop(&self, queue: usize, cause: Cause, why: &dyn Display) {
        if let Some(total) = self.shared.stopped_queues.count(cause) {
            tracing::warn!(queue = self.vrings[queue].index, total, "the queue stops: {why} ({total} times so far)");
        }
    }

    /// Lets happen what waited for requests to end, or for the disk. What was given back has been published by then.
    pub(super) fn settle(&mut self) {
        self.is_unsettled = false;
        for number in 0..self.vrings.len() {
            self.settle_vring(number);
        }
        self.settle_disk();
        if !self.endings.former_memory.is_empty() {
            self.former_memory.retain(|table| table.strong_count() > 0);
            if self.former_memory.is_empty() {
                self.endings.former_memory.drain(..).for_each(|reply| done(&reply));
            }
        }
        let vrings = &mut self.vrings;
        self.endings.disabled.retain(|(number, reply)| {
            let vring = &mut vrings[*number];
            let is_enabled = vring.enabled;
            // The ring of a front-end that is gone was not disabled by this one.
            let attachment = vring.present_mut().and_then(|active| active.attachment.as_deref());
            let is_in_force = is_enabled || attachment.is_none_or(Attachment::is_quiet);
            if is_in_force {
                done(reply);
            }
            !is_in_force
        });
        // Rings of a front-end that is gone as well: its guest may have come back, and reads what they write.
        if self.vrings.iter_mut().all(|vring| vring.attachment_mut().is_none()) {
            for reply in self.endings.rings.drain(..) {
                done(&reply);
            }
        }
        if self.vrings.iter().all(|vring| matches!(vring.state, State::Stopped)) {
            for reply in self.endings.resets.drain(..) {
                done(&reply);
            }
        }
        self.count_vrings_in_use();
    }

    fn settle_vring(&mut self, number: usize) {
        let vring = &mut self.vrings[number];
        let state = std::mem::replace(&mut vring.state, State::Stopped);
        vring.state = match state {
            State::Stopping { active, is_replaying, reply }
                if !(active.is_busy() || is_replaying && active.queue.has_replay()) =>
            {
                let _ = reply.send(active.queue.next_avail());
                State::Stopped
            }
            State::Broken(Broken::Active(active)) if !active.is_busy() => {
                let Active { queue, eventfds, .. } = active;
                State::Broken(Broken::Idle { next_avail: queue.next_avail(), eventfds })
            }
            State::Draining { active, next } if !active.is_busy() => next.map_or(State::Stopped, State::Waiting),
            other => other,
        };
        let has_disk = self.disk.is_some() && self.endings.disk.is_none();
        if let State::Waiting(start) = &vring.state
            && (has_disk || start.stop.is_some())
        {
            self.activate(number);
        }
    }

    /// Sets up the queue of a vring that waits.
    fn activate(&mut self, number: usize) {
        let Some(memory) = self.memory.clone() else {
            return self.break_down_for(number, "it was started before the front-end gave the guest's memory");
        };
        let vring = &mut self.vrings[number];
        let sequence = AttachSequence::new(vring.index);
        let State::Waiting(start) = &mut vring.state else { return };
        match SplitQueue::new(start.setup.clone(), &memory) {
            Ok(queue) => {
                if let Some(log) = &self.log {
                    queue.mark_used_ring(log);
                }
                let (eventfds, stop) = (std::mem::take(&mut start.eventfds), start.stop.take());
                let active = Active {
                    queue,
                    request_types: RequestTypes::negotiated(start.setup.driver_features),
                    memory,
                    eventfds,
                    in_flight: 0,
                    is_held: false,
                    log: self.log.clone(),
                    // Somebody else may have given chains back before this and not have said so.
                    has_unpublished: true,
                    sequence,
                    attachment: None,
                    event: None,
                };
                vring.state = match stop {
                    None => State::Running(active),
                    Some(reply) => {
                        self.is_unsettled = true;
                        State::Stopping { active, is_replaying: true, reply }
                    }
                };
            }
            Err(error) => self.break_down(number, error.cause(), &error),
        }
    }
}

/// Ends the process, because nobody would notice otherwise that the guest's requests wait for ever. The front-end
/// notices this, and can connect to a new process.
pub(super) fn end_process(why: &dyn Display) -> ! {
    tracing::error!("{why}; the program ends here, so that the front-end can connect to a new one");
    process_end::end_process(1)
}
