//! Carries out the steps of a queue's epochs (`docs/abi.md`, section 6).
//!
//! The machine decides and touches nothing; here is what it decides about: the control page, the rings, the pending
//! ATTACH.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;

use ringpass_guest_abi::attach_sequence::AttachSequence;
use ringpass_guest_abi::epoch::device::{Action, Event};
use ringpass_guest_abi::epoch::{Announcement, Area, Epoch, Phase};
use ringpass_guest_abi::request::{ErrorCode, Outcome};

use super::attach::{
    AttachEvent, Attachment, AttachmentId, BuildRequest, BuilderCommand, Built, CancellationToken, LiveRing,
    PendingRing,
};
use super::reply::Reply;
use super::worker::Worker;
use crate::log_limit::Cause;

impl Worker<'_> {
    /// Takes an event of a queue's epochs as far as it goes. Queues that are not attached have none.
    pub(super) fn epoch_event(&mut self, number: usize, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let vring = &mut self.vrings[number];
            let index = vring.index;
            let Some(attachment) = vring.attachment_mut() else { return };
            let before = attachment.machine.state();
            if matches!(event, Event::Stop | Event::End | Event::Finish(_)) && attachment.cancel_pending_ring() {
                // It was not begun.
                events.push_back(Event::BuildFailed(ErrorCode::Mode));
            }
            let actions = attachment.machine.step(event);
            let after = attachment.machine.state();
            // Whoever takes that memory away waits for this, and the next ring is ordered in a moment.
            self.is_unsettled |= attachment.forget_former_memory();
            if before != after {
                tracing::debug!(queue = index, ?event, ?after, "epoch");
                if let Some(attach) = &self.attach {
                    attach.rings.metrics.set_state(index, Some(after));
                }
            }
            for action in actions {
                events.extend(self.act(number, action));
            }
        }
    }

    /// Carries out one action. Gives what follows from it at once.
    fn act(&mut self, number: usize, action: Action) -> Option<Event> {
        match action {
            // The worker has the disk, or it would not have taken the ATTACH: no other process has I/O under way. Rings
            // of this one are gone before their attachment is.
            Action::AwaitRelease => return Some(Event::Released),
            Action::Announce(announcement) => return self.announce(number, announcement),
            Action::Build(epoch) => self.order_ring(number, epoch),
            Action::Close(area) => self.close_ring(number, area),
            Action::CompleteAttach(code) => self.complete_attach(number, code),
            Action::Stopped => self.leave_attach(number),
        }
        None
    }

    fn announce(&mut self, number: usize, announcement: Announcement) -> Option<Event> {
        let vring = &mut self.vrings[number];
        let active = vring.active_mut()?;
        let attachment = active.attachment.as_deref_mut()?;
        if announcement.phase != Phase::Ended {
            attachment.end_reason = ErrorCode::None;
        }
        attachment.announce(announcement, active.log.as_deref());
        let acknowledged = attachment.acknowledged();
        let Announcement { epoch, phase } = announcement;
        vring.signal();
        self.report_mode(number, Cause::new(phase), &format_args!("epoch {epoch}: {phase:?}"));
        self.have_driver_told();
        Some(Event::Acknowledged(acknowledged))
    }

    /// Has a ring made, now or when the queue is enabled.
    fn order_ring(&mut self, number: usize, epoch: Epoch) {
        let vring = &mut self.vrings[number];
        let queue = vring.index;
        if !vring.enabled {
            if let Some(attachment) = vring.attachment_mut() {
                attachment.pending = Some(PendingRing::Deferred(epoch));
            }
            return;
        }
        let (Some(attach), Some(active)) = (&self.attach, vring.active_mut()) else { return };
        let Some(ours) = active.attachment.as_deref_mut() else { return };
        let (attachment, geometry, call_generation) = (ours.id, ours.geometry, ours.call_generation);
        let call = active.eventfds.call.as_ref().map(|call| call.eventfd().try_clone()).transpose();
        match call {
            Ok(call) => {
                let token = CancellationToken::default();
                ours.pending = Some(PendingRing::Requested(token.clone()));
                let request = BuildRequest { queue, attachment, geometry, epoch, call, call_generation, token };
                attach.command(BuilderCommand::Build(request));
            }
            Err(error) => {
                if let Some(total) = self.shared.mode_changes.count(Cause::new("duplicating the call eventfd")) {
                    tracing::warn!(queue, total, %error, "no ring for the queue: its call eventfd cannot be duplicated");
                }
                let event = AttachEvent::BuildFailed(ErrorCode::Resources);
                attach.workers().attach_event(queue, attachment, event);
            }
        }
    }

    /// The queue was enabled or disabled. A disabled queue executes nothing, so its ring ends; another one is made when
    /// it is enabled again. `reply` is told when that is in force.
    pub(super) fn enable_ring(&mut self, number: usize, enabled: bool, reply: Reply<()>) {
        let deferred = self.vrings[number].attachment_mut().and_then(Attachment::take_deferred);
        match deferred {
            Some(epoch) => self.order_ring(number, epoch),
            None if !enabled => self.end_ring(number, ErrorCode::None, Event::End),
            None => {}
        }
        self.endings.disabled.push((number, reply));
        self.is_unsettled = true;
    }

    /// Something that was ordered for an attachment has come about.
    pub(super) fn attachment_event(&mut self, number: usize, id: AttachmentId, event: AttachEvent) {
        let attachment = self.vrings[number].attachment_mut().filter(|attachment| attachment.id == id);
        let Some(attachment) = attachment else {
            // An attachment waits for what it has ordered, so this does not happen. A ring that came with it is closed.
            tracing::error!(queue = self.vrings[number].index, ?event, "something of an attachment that is over");
            return;
        };
        if !matches!(event, AttachEvent::Gone(_)) {
            attachment.pending = None;
        }
        let event = match event {
            AttachEvent::Built(built) => {
                self.place_ring(number, *built);
                Event::Built
            }
            AttachEvent::BuildFailed(code) => Event::BuildFailed(code),
            AttachEvent::Gone(area) => Event::Gone(area),
        };
        self.epoch_event(number, event);
        // Somebody may wait for the end of a ring.
        self.is_unsettled = true;
    }

    /// Takes a ring over that was built, and tells the driver where its parts are.
    fn place_ring(&mut self, number: usize, built: Built) {
        let Built { ring, call_generation } = built;
        let vring = &mut self.vrings[number];
        let index = vring.index;
        let Some(active) = vring.active_mut() else { return };
        let Some(attachment) = active.attachment.as_deref_mut() else { return };
        let layout = *ring.queue.layout();
        attachment.describe_ring(&layout, active.log.as_deref());
        if let Some(attach) = &self.attach {
            let rings_gpa = attachment.geometry.rings(ring.epoch.area()).gpa();
            attach.rings.metrics.ring_opened(index, (*active.memory).clone(), rings_gpa, layout);
        }
        let has_call = call_generation == attachment.call_generation;
        let area = ring.epoch.area();
        attachment.rings[area.index()] = Some(ring);
        if !has_call {
            self.give_call_to_ring(number);
        }
    }

    /// Has the completions of a queue's ring signal the queue's call eventfd, which is another one now. The caller
    /// signals it once.
    pub(super) fn give_call_to_ring(&mut self, number: usize) {
        let vring = &mut self.vrings[number];
        let index = vring.index;
        let Some(active) = vring.active_mut() else { return };
        let Some(attachment) = active.attachment.as_deref_mut() else { return };
        attachment.call_generation = attachment.call_generation.wrapping_add(1);
        let Some(ring) = attachment.live() else { return };
        let call = active.eventfds.call.as_ref().map(|call| call.eventfd());
        if let Err(error) = ring.queue.set_completion(call) {
            // The driver would wait for interrupts that do not come: it gets another ring.
            if let Some(total) = self.shared.mode_changes.count(Cause::new("registering the call eventfd")) {
                tracing::warn!(queue = index, total, %error, "the ring ends, because it cannot have the new call eventfd");
            }
            self.end_ring(number, ErrorCode::Resources, Event::End);
        }
    }

    fn close_ring(&mut self, number: usize, area: Area) {
        let vring = &mut self.vrings[number];
        let index = vring.index;
        let (Some(attach), Some(attachment)) = (self.attach.clone(), vring.attachment_mut()) else { return };
        let Some(LiveRing { queue, .. }) = attachment.take_ring(area) else { return };
        let attachment = attachment.id;
        attach.rings.metrics.ring_closed(index);
        let workers = Arc::clone(attach.workers());
        queue.close().on_end(move || workers.attach_event(index, attachment, AttachEvent::Gone(area)));
    }

    fn complete_attach(&mut self, number: usize, code: ErrorCode) {
        let vring = &mut self.vrings[number];
        let sequence = AttachSequence::new(vring.index);
        if let Some(active) = vring.active_mut().filter(|active| active.is_held) {
            // The used ring is in memory that has left. ATTACH is seen again when the queue has its rings again.
            active.sequence = sequence;
            return self.leave_attach(number);
        }
        let Some(attachment) = self.take_attachment(number) else { return };
        let vring = &mut self.vrings[number];
        if let Some(active) = vring.active_mut() {
            active.sequence.attach_completed();
        }
        self.give_outcome(number, &attachment.attach, &Outcome::of(code));
        let vring = &mut self.vrings[number];
        vring.publish();
        // Unconditionally: what the driver wants to be interrupted for is behind, while ARM is not reaped.
        vring.signal();
        self.report_mode(number, Cause::new(code), &format_args!("a virtqueue again ({code:?})"));
        self.have_driver_told();
    }

    /// Logs who executes a queue now, unless it logged a change for the same cause a short while ago: guests can change
    /// it at will.
    fn report_mode(&self, number: usize, cause: Cause, what: &dyn Display) {
        let queue = self.vrings[number].index;
        match self.shared.mode_changes.count(cause) {
            Some(total) => tracing::info!(queue, total, "{what}"),
            None => tracing::debug!(queue, "{what}"),
        }
    }

    /// The queue stops with ATTACH pending: it stays in the available ring, and is found there by whoever goes on.
    fn leave_attach(&mut self, number: usize) {
        let Some(attachment) = self.take_attachment(number) else { return };
        if let Some(active) = self.vrings[number].active_mut() {
            attachment.attach.undo(&mut active.queue);
        }
    }

    fn take_attachment(&mut self, number: usize) -> Option<Box<Attachment>> {
        let vring = &mut self.vrings[number];
        let attachment = vring.active_mut()?.attachment.take()?;
        match &self.attach {
            Some(attach) if attach.rings.leave(vring.index) => attach.command(BuilderCommand::Unpin),
            _ => {}
        }
        self.is_unsettled = true;
        Some(attachment)
    }

    /// The driver's kick on an attached queue: there may be something in the SQ, or an acknowledgement.
    pub(super) fn doorbell_rang(&mut self, number: usize) {
        let Some(attachment) = self.vrings[number].attachment_mut() else { return };
        if let Some(ring) = attachment.live() {
            // Full is as good.
            let _ = ring.doorbell.write(1);
        }
        let acknowledged = attachment.acknowledged();
        self.epoch_event(number, Event::Acknowledged(acknowledged));
        self.check_behind_attach(number);
    }

    /// Ends the rings of all queues of this worker.
    pub(super) fn end_rings(&mut self, reason: ErrorCode, event: Event) {
        for number in 0..self.vrings.len() {
            self.end_ring(number, reason, event);
        }
    }

    pub(super) fn end_ring(&mut self, number: usize, reason: ErrorCode, event: Event) {
        if let Some(attachment) = self.vrings[number].attachment_mut() {
            attachment.end_reason = reason;
        }
        self.epoch_event(number, event);
    }

    /// Has the worker of queue 0 complete EVENT.
    fn have_driver_told(&self) {
        if let Some(attach) = &self.attach {
            attach.workers().tell_driver();
        }
    }
}
