//! Carries out the steps of a queue's epochs (`docs/abi.md`, section 6).
//!
//! The epoch machine decides and touches nothing; here is what it decides about: the control page, the rings, the pending ATTACH.
//! An action never takes a step itself. What follows from it is another event, which the worker notes; `step_epochs` takes the noted
//! events one after the other.

use std::fmt::Display;
use std::sync::Arc;

use ringpass_guest_abi::attach_sequence::AttachSequence;
use ringpass_guest_abi::epoch::device::{Action, Event, State};
use ringpass_guest_abi::epoch::{Announcement, Area, Epoch, Phase};
use ringpass_guest_abi::request::{ErrorCode, Outcome};

use super::Worker;
use crate::engine::attach::{
    AttachEvent, Attachment, AttachmentId, BuildRequest, BuilderCommand, Built, CancellationToken, LiveRing,
    PendingRing, RingKind, segment_limits,
};
use crate::engine::vring::{ActiveQueue, Executor};
use crate::log_limit::LogCause;
use crate::vhost_user::DeviceMemory;

impl Worker<'_> {
    /// Notes an event of a queue's epochs. Queues that are not attached have none.
    pub(super) fn note_epoch_event(&mut self, number: usize, event: Event) {
        if let Some(rings) = &mut self.rings {
            rings.events.push_back((number, event));
        }
    }

    /// The queue takes no chains any more, so its rings end.
    pub(super) fn note_queue_stop(&mut self, number: usize) {
        self.note_epoch_event(number, Event::Stop);
    }

    /// Takes the noted events, and those that follow from them.
    pub(super) fn step_epochs(&mut self) {
        while let Some((number, event)) = self.rings.as_mut().and_then(|rings| rings.events.pop_front()) {
            self.step_epoch(number, event);
        }
    }

    fn step_epoch(&mut self, number: usize, event: Event) {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let Some(attachment) = vring.attachment_mut() else { return };
        let before = attachment.machine.state();
        let is_end = matches!(event, Event::Stop | Event::End | Event::Finish(_));
        // A ring that the builder has not begun is cancelled at once.
        let is_cancelled = is_end && attachment.cancel_pending_ring();
        let actions = attachment.machine.step(event);
        let after = attachment.machine.state();
        // A front-end that takes that memory away waits for this, and the worker orders the next ring in a moment.
        self.is_unsettled |= attachment.forget_former_memory();
        if is_cancelled {
            self.note_epoch_event(number, Event::BuildFailed(ErrorCode::Mode));
        }
        if before != after {
            tracing::debug!(queue = index, ?event, ?after, "epoch");
            if let Some(attach) = self.attach() {
                attach.rings.metrics.set_state(index, Some(after));
            }
        }
        for action in actions {
            if let Some(event) = self.act(number, action) {
                self.note_epoch_event(number, event);
            }
        }
        // The operator may have chosen virtqueues while the ring was being made.
        let is_open = matches!(after, State::Open { .. });
        if is_open && self.attach().is_some_and(|attach| attach.rings.availability.wants_drained(RingKind::Direct)) {
            self.note_epoch_event(number, Event::Drain);
        }
    }

    /// Carries out one action. Gives what follows from it at once.
    fn act(&mut self, number: usize, action: Action) -> Option<Event> {
        match action {
            // The worker has the disk, or it would not have taken the ATTACH: no other process has I/O under way. Rings of
            // this process are gone before their attachment is.
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
        let vring = self.queues.get_mut(number);
        let active = vring.active_mut()?;
        let log = active.log.clone();
        let attachment = active.attachment_mut()?;
        if announcement.phase != Phase::Ended {
            attachment.end_reason = ErrorCode::None;
        }
        attachment.announce(announcement, log.as_deref());
        let acknowledged = attachment.acknowledged();
        let Announcement { epoch, phase } = announcement;
        vring.signal();
        self.report_mode(number, LogCause::new(phase), &format_args!("epoch {epoch}: {phase:?}"));
        self.have_driver_told();
        Some(Event::Acknowledged(acknowledged))
    }

    /// Has a ring made, now or when the queue is enabled.
    fn order_ring(&mut self, number: usize, epoch: Epoch) {
        let vring = self.queues.get_mut(number);
        let (queue, is_enabled) = (vring.index, vring.is_enabled);
        let (Some(rings), Some(active)) = (&self.rings, vring.active_mut()) else { return };
        let call = active.eventfds.call.as_ref().map(|call| call.eventfd().try_clone()).transpose();
        let Some(ours) = active.attachment_mut() else { return };
        if !is_enabled {
            match rings.attach.rings.availability.closed(RingKind::Direct) {
                None => ours.pending = Some(PendingRing::Deferred(epoch)),
                // The builder would say the same, once the queue is enabled.
                Some(refused) => self.note_epoch_event(number, Event::BuildFailed(refused.code)),
            }
            return;
        }
        let (attachment, geometry, call_generation) = (ours.id, ours.geometry, ours.call_generation);
        match call {
            Ok(call) => {
                let token = CancellationToken::default();
                ours.pending = Some(PendingRing::Requested(token.clone()));
                let request = BuildRequest { queue, attachment, geometry, epoch, call, call_generation, token };
                rings.attach.command(BuilderCommand::Build(request));
            }
            Err(error) => {
                if let Some(total) = self.shared.mode_changes.count(LogCause::new("duplicating the call eventfd")) {
                    tracing::warn!(queue, total, %error, "no ring for the queue: its call eventfd cannot be duplicated");
                }
                self.note_epoch_event(number, Event::BuildFailed(ErrorCode::Resources));
            }
        }
    }

    /// The queue was enabled or disabled. A disabled queue executes nothing, so its ring ends; another one is made when
    /// it is enabled again.
    pub(super) fn enable_ring(&mut self, number: usize, is_enabled: bool) {
        let deferred = self.queues.get_mut(number).attachment_mut().and_then(Attachment::take_deferred);
        match deferred {
            Some(epoch) => self.order_ring(number, epoch),
            None if !is_enabled => self.end_ring(number, ErrorCode::None, Event::End),
            None => {}
        }
        self.is_unsettled = true;
    }

    /// Something that the worker ordered for an attachment has happened.
    pub(super) fn attachment_event(&mut self, number: usize, id: AttachmentId, event: AttachEvent) {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let Some(attachment) = vring.attachment_mut().filter(|attachment| attachment.id == id) else {
            // An attachment waits for what it has ordered, so this does not happen. A ring that came with the event is closed. The
            // guard, however, may find a ring at its end.
            if !matches!(event, AttachEvent::Excess) {
                tracing::error!(queue = index, ?event, "an event of an attachment that is over");
            }
            return;
        };
        if !matches!(event, AttachEvent::Gone(_) | AttachEvent::Excess) {
            attachment.pending = None;
        }
        match event {
            AttachEvent::Built(built) => {
                let follows = self.place_ring(number, *built);
                self.note_epoch_event(number, Event::Built);
                if let Some(event) = follows {
                    self.note_epoch_event(number, event);
                }
            }
            AttachEvent::BuildFailed(code) => self.note_epoch_event(number, Event::BuildFailed(code)),
            AttachEvent::Gone(area) => self.note_epoch_event(number, Event::Gone(area)),
            AttachEvent::Excess => self.end_ring(number, ErrorCode::Cost, Event::Finish(ErrorCode::Cost)),
        }
        // An answer may wait for the end of a ring.
        self.is_unsettled = true;
    }

    /// Takes over a ring that was built, and tells the driver where its parts are. Gives what follows from it.
    fn place_ring(&mut self, number: usize, built: Built) -> Option<Event> {
        let Built { ring, call_generation } = built;
        let segments = segment_limits(self.execution.alignment());
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let active = vring.active_mut()?;
        let (log, memory) = (active.log.clone(), (*active.memory).clone());
        let attachment = active.attachment_mut()?;
        let (id, layout) = (ring.executor.id(), *ring.executor.layout());
        attachment.describe_ring(&ring.executor, &segments, log.as_deref());
        let area = ring.epoch.area();
        let rings_gpa = attachment.geometry.rings(area).gpa();
        let has_call = call_generation == attachment.call_generation;
        attachment.rings[area.index()] = Some(ring);
        if let Some(attach) = self.attach() {
            attach.rings.metrics.ring_opened(index, id, memory, rings_gpa, layout);
        }
        if has_call { None } else { self.register_call(number) }
    }

    /// The queue's call eventfd is another one now: completions of its ring signal that. The caller signals it once.
    pub(super) fn give_call_to_ring(&mut self, number: usize) {
        if let Some(event) = self.register_call(number) {
            self.note_epoch_event(number, event);
        }
    }

    /// Has the completions of a queue's ring signal the queue's present call eventfd. Gives what follows if that fails.
    fn register_call(&mut self, number: usize) -> Option<Event> {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let ActiveQueue { executor, eventfds, .. } = vring.active_mut()?;
        let Executor::Rings(attachment) = executor else { return None };
        attachment.call_generation = attachment.call_generation.wrapping_add(1);
        let ring = attachment.live()?;
        let call = eventfds.call.as_ref().map(|call| call.eventfd());
        let refused = ring.executor.set_completion(call).err()?;
        // The driver would wait for interrupts that do not come: it gets another ring.
        if let Some(total) = self.shared.mode_changes.count(LogCause::new("registering the call eventfd")) {
            tracing::warn!(queue = index, total, "the ring ends: it cannot have the new call eventfd: {}", refused.why);
        }
        self.note_end_reason(number, ErrorCode::Resources);
        Some(Event::End)
    }

    /// The queue's kick eventfd is another one now. The driver may have missed what the old one said. Without one the worker would not
    /// learn of a ring that sleeps.
    pub(super) fn give_kick_to_ring(&mut self, number: usize) {
        let eventfds = self.queues.get_mut(number).eventfds_mut();
        if eventfds.is_some_and(|eventfds| eventfds.kick.is_some()) {
            self.doorbell_rang(number);
        } else {
            self.end_ring(number, ErrorCode::Mode, Event::Finish(ErrorCode::Mode));
        }
    }

    /// A ring that runs goes on in another table with the same memory under it.
    pub(super) fn move_ring(&mut self, number: usize, memory: &DeviceMemory) {
        if let Some(attach) = self.attach() {
            attach.rings.metrics.ring_moved(self.queues.get(number).index, memory);
        }
    }

    fn close_ring(&mut self, number: usize, area: Area) {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let (Some(rings), Some(attachment)) = (&self.rings, vring.attachment_mut()) else { return };
        let Some(LiveRing { executor, .. }) = attachment.take_ring(area) else { return };
        let attachment = attachment.id;
        rings.attach.rings.metrics.ring_closed(index);
        let workers = Arc::clone(rings.attach.workers());
        executor.close(move || workers.attach_event(index, attachment, AttachEvent::Gone(area)));
    }

    fn complete_attach(&mut self, number: usize, code: ErrorCode) {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        if let Some(active) = vring.active_mut().filter(|active| active.is_held) {
            // The used ring is in memory that has left. The worker finds ATTACH again when the queue has its rings again.
            active.sequence = AttachSequence::new(index);
            return self.leave_attach(number);
        }
        let Some(attachment) = self.take_attachment(number) else { return };
        if let Some(active) = self.queues.get_mut(number).active_mut() {
            active.sequence.attach_completed();
        }
        self.give_outcome(number, &attachment.attach, &Outcome::of(code));
        let vring = self.queues.get_mut(number);
        vring.publish();
        // Unconditionally: what the driver wants to be interrupted for is behind, while ARM is not reaped.
        vring.signal();
        self.report_mode(number, LogCause::new(code), &format_args!("a virtqueue again ({code:?})"));
        self.have_driver_told();
    }

    /// Logs what executes a queue now, unless the worker logged a change for the same cause a short while ago: guests can change it
    /// at will.
    fn report_mode(&self, number: usize, cause: LogCause, what: &dyn Display) {
        let queue = self.queues.get(number).index;
        match self.shared.mode_changes.count(cause) {
            Some(total) => tracing::info!(queue, total, "{what}"),
            None => tracing::debug!(queue, "{what}"),
        }
    }

    /// The queue stops with ATTACH pending: ATTACH stays in the available ring, and the next device process finds it there.
    fn leave_attach(&mut self, number: usize) {
        let Some(attachment) = self.take_attachment(number) else { return };
        if let Some(active) = self.queues.get_mut(number).active_mut() {
            attachment.attach.undo(&mut active.queue);
        }
    }

    fn take_attachment(&mut self, number: usize) -> Option<Box<Attachment>> {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let attachment = vring.active_mut()?.take_attachment()?;
        match self.attach() {
            Some(attach) if attach.rings.leave(index) => attach.command(BuilderCommand::Unpin),
            _ => {}
        }
        self.is_unsettled = true;
        Some(attachment)
    }

    /// The driver's kick on an attached queue: there may be something in the SQ, an acknowledgement, or the driver wants its
    /// queue back.
    pub(super) fn doorbell_rang(&mut self, number: usize) {
        let Some(attachment) = self.queues.get_mut(number).attachment_mut() else { return };
        if let Some(ring) = attachment.live() {
            // It does not matter if the counter is full.
            let _ = ring.doorbell.write(1);
        }
        let (acknowledged, is_wanted_back) = (attachment.acknowledged(), attachment.is_wanted_back());
        self.note_epoch_event(number, Event::Acknowledged(acknowledged));
        if is_wanted_back {
            self.note_epoch_event(number, Event::Finish(ErrorCode::Detached));
        }
        self.check_behind_attach(number);
    }

    /// Ends the rings of all queues of this worker.
    pub(super) fn end_rings(&mut self, reason: ErrorCode, event: Event) {
        for number in 0..self.queues.len() {
            self.end_ring(number, reason, event);
        }
    }

    pub(super) fn end_ring(&mut self, number: usize, reason: ErrorCode, event: Event) {
        self.note_end_reason(number, reason);
        self.note_epoch_event(number, event);
    }

    fn note_end_reason(&mut self, number: usize, reason: ErrorCode) {
        if let Some(attachment) = self.queues.get_mut(number).attachment_mut() {
            attachment.end_reason = reason;
        }
    }

    /// Asks the drivers of all rings to leave them.
    pub(super) fn drain_rings(&mut self) {
        for number in 0..self.queues.len() {
            self.note_epoch_event(number, Event::Drain);
            // The ring of a disabled queue would be made when the queue is enabled.
            let deferred = self.queues.get_mut(number).attachment_mut().and_then(Attachment::take_deferred);
            if deferred.is_some() {
                self.note_epoch_event(number, Event::BuildFailed(ErrorCode::Mode));
            }
        }
    }

    /// Has the worker of queue 0 complete EVENT.
    fn have_driver_told(&self) {
        if let Some(attach) = self.attach() {
            attach.workers().tell_driver();
        }
    }
}
