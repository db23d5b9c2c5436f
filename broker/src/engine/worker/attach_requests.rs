//! The requests of the attach protocol, by which a driver asks for rings (`docs/abi.md`, sections 2 to 4).

use std::rc::Rc;

use ringpass_guest_abi::attach::{AttachError, AttachPayload, Geometry};
use ringpass_guest_abi::attach_sequence::Verdict;
use ringpass_guest_abi::epoch::device::Event;
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode, EventAnswer, Outcome, RequestType};

use super::Worker;
use crate::engine::attach::{
    Attach, AttachRefusal, Attachment, AttachmentId, PendingAttachRequest, Refused, RingKind, host_address,
};
use crate::engine::queue_life::LiveQueue;
use crate::engine::vring::{Executor, Vring};
use crate::log_limit::LogCause;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Answer, Refusal, Status};

impl Worker<'_> {
    /// Takes a request of the attach protocol from a queue.
    pub(super) fn take_attach_request(
        &mut self,
        number: usize,
        request_type: RequestType,
        mut request: PendingAttachRequest,
        payload: &[u8],
    ) {
        let speaks = self.queues.get_mut(number).active_mut().is_some_and(|active| active.has_version_1);
        let Some(attach) = self.attach().filter(|_| speaks).cloned() else {
            return self.answer_unknown(number, request_type, request);
        };
        let Some(active) = self.queues.get_mut(number).active_mut() else { return };
        if !matches!(request_type, RequestType::Arm | RequestType::Attach) {
            request.record(&mut active.queue);
        }
        let others = active.queue.in_flight().saturating_sub(1);
        match active.sequence.take(Some(request_type), others) {
            Verdict::Break => self.break_for_what_is_behind_attach(number),
            Verdict::Refuse(code) => self.give_outcome(number, &request, &Outcome::of(code)),
            Verdict::Execute => match request_type {
                RequestType::Probe => {
                    let answer = attach.probe_answer(&request.memory, self.execution.alignment());
                    self.give_answer(number, &request, &answer.to_bytes(), Status::Ok);
                }
                RequestType::Arm => self.give_outcome(number, &request, &Outcome::of(ErrorCode::None)),
                RequestType::Attach => self.attach_queue(number, &attach, request, payload),
                RequestType::Event => self.take_event(number, request),
            },
        }
        self.step_epochs();
    }

    /// The device does not offer rings, or the driver is one of a legacy device: the device writes nothing but the status.
    fn answer_unknown(&mut self, number: usize, request_type: RequestType, mut request: PendingAttachRequest) {
        let Some(active) = self.queues.get_mut(number).active_mut() else { return };
        request.record(&mut active.queue);
        let refusal = Refusal::UnknownType { request_type: request_type.number() };
        let PendingAttachRequest { head, status_gpa, answer_bytes: writable_bytes, .. } = request;
        let status = refusal.status();
        let answer = Answer { status, status_gpa, writable_bytes, written_bytes: 0, refusal: Some(refusal) };
        self.answer(number, head, &request.memory, &answer);
    }

    fn attach_queue(&mut self, number: usize, attach: &Attach, request: PendingAttachRequest, payload: &[u8]) {
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        match admit(vring, attach, &request.memory, payload) {
            Ok(geometry) => {
                let id = self.next_attachment();
                let memory = Rc::clone(&request.memory);
                let attachment = Attachment::new(id, geometry, request, memory);
                let (found, detach) = attachment.initial_words();
                tracing::debug!(queue = index, found, detach, "a driver asks for a ring");
                if let Some(active) = self.queues.get_mut(number).active_mut() {
                    active.executor = Executor::Rings(Box::new(attachment));
                }
                self.note_epoch_event(number, Event::Attach { found, detach });
                // The driver may have broken the rule already.
                self.check_behind_attach(number);
            }
            Err(AttachRefusal { error, why }) => {
                tracing::debug!(queue = index, code = ?error.code, "ATTACH is refused: {why}");
                attach.rings.metrics.set_refused(index, Refused { code: error.code, why });
                if let Some(active) = vring.active_mut() {
                    active.sequence.attach_completed();
                }
                self.give_outcome(number, &request, &error.into());
            }
        }
    }

    fn next_attachment(&mut self) -> AttachmentId {
        let Some(rings) = &mut self.rings else { return AttachmentId(0) };
        rings.attachments += 1;
        AttachmentId(rings.attachments)
    }

    /// A queue must have nothing behind its ATTACH: what stands there would be lost at a restart.
    pub(super) fn check_behind_attach(&mut self, number: usize) {
        let active = self.queues.get_mut(number).active_mut();
        if active.is_some_and(|active| !active.is_executed_by_worker() && active.queue.has_work()) {
            self.break_for_what_is_behind_attach(number);
        }
    }

    fn break_for_what_is_behind_attach(&mut self, number: usize) {
        let why = "the driver made something available behind ATTACH";
        self.break_down(number, LogCause::new(why), &why);
    }

    fn take_event(&mut self, number: usize, request: PendingAttachRequest) {
        let vring = self.queues.get_mut(number);
        let is_stopping = !vring.is_running();
        let Some(active) = vring.active_mut() else { return };
        let earlier = active.event.replace(request);
        if let Some(earlier) = earlier {
            // One is enough; a driver that sends more gets the earlier ones back.
            self.give_event(number, &earlier, 0);
        }
        if is_stopping {
            self.answer_event_of_stopping(number);
        } else {
            self.tell_news();
        }
    }

    /// Completes the EVENT that is pending, or remembers that there is something to tell.
    pub(super) fn tell_driver(&mut self) {
        // Queue 0 is the first queue of the first worker.
        let running = self.queues.get_mut(0).running_mut().filter(|active| !active.is_held);
        match running.and_then(|active| active.event.take()) {
            Some(request) => self.give_event(0, &request, EVENT_QUEUES),
            None => {
                self.set_news(true);
            }
        }
    }

    /// Queue 0 has started. What an earlier process, or an earlier run of this one, had to tell may be lost: the driver is
    /// to look at everything once.
    pub(super) fn queue_zero_has_started(&mut self) {
        self.set_news(true);
    }

    /// Tells the driver what there was to tell, if there was something.
    pub(super) fn tell_news(&mut self) {
        if self.set_news(false) {
            self.tell_driver();
        }
    }

    /// Gives what it was before.
    fn set_news(&mut self, has_news: bool) -> bool {
        self.rings.as_mut().is_some_and(|rings| std::mem::replace(&mut rings.has_news, has_news))
    }

    /// Completes the EVENT of a queue that stops: nothing of the queue is in flight then.
    pub(super) fn answer_event_of_stopping(&mut self, number: usize) {
        let Some(active) = self.queues.get_mut(number).stopping_mut() else { return };
        if active.is_held {
            // The used ring is in memory that has left. EVENT is recorded: the next device process finds it there.
            return;
        }
        if let Some(request) = active.event.take() {
            self.give_event(number, &request, 0);
            // The queue may have stopped before the poll iteration ends.
            self.queues.get_mut(number).publish();
        }
    }

    fn give_event(&mut self, number: usize, request: &PendingAttachRequest, events: u32) {
        let answer = EventAnswer { events: events.into(), reserved: 0.into() };
        self.give_answer(number, request, &answer.to_bytes(), Status::Ok);
    }

    pub(super) fn give_outcome(&mut self, number: usize, request: &PendingAttachRequest, outcome: &Outcome) {
        let is_ok = ErrorCode::from_number(outcome.error.get()).is_some_and(ErrorCode::is_ok);
        let status = if is_ok { Status::Ok } else { Status::IoError };
        self.give_answer(number, request, &outcome.to_bytes(), status);
    }

    fn give_answer(&mut self, number: usize, request: &PendingAttachRequest, bytes: &[u8], status: Status) {
        let log = self.queues.get_mut(number).active_mut().and_then(|active| active.log.as_deref());
        let written_bytes = request.write_answer(bytes, log);
        let PendingAttachRequest { head, status_gpa, answer_bytes: writable_bytes, .. } = *request;
        let answer = Answer { status, status_gpa, writable_bytes, written_bytes, refusal: None };
        self.complete(number, head, &request.memory, &answer);
    }
}

/// Checks an ATTACH completely, and gives the queue its ranges.
fn admit(vring: &mut Vring, attach: &Attach, memory: &DeviceMemory, payload: &[u8]) -> Result<Geometry, AttachRefusal> {
    let index = vring.index;
    let has_doorbell = vring.eventfds_mut().is_some_and(|eventfds| eventfds.kick.is_some());
    if !has_doorbell {
        // Without kicks the worker would not notice the driver's acknowledgements, nor could it wake the SQ thread.
        let why =
            "the queue has no kick eventfd, so the driver could not wake the device: use a front-end that gives one";
        return Err(Refused { code: ErrorCode::Mode, why: why.into() }.into());
    }
    let geometry = AttachPayload::parse(payload)?.check(&attach.limits(memory))?;
    for (field_offset_bytes, range) in geometry.ranges() {
        if host_address(memory, &range).is_none() {
            return Err(AttachError { code: ErrorCode::Memory, field_offset_bytes, value: range.gpa() }.into());
        }
    }
    attach.rings.enter(index, RingKind::Direct, &geometry)?;
    Ok(geometry)
}
