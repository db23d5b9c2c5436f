//! The requests by which a driver asks for rings (`docs/abi.md`, sections 2 to 4).

use std::rc::Rc;

use ringpass_guest_abi::attach::{AttachError, AttachPayload, Geometry};
use ringpass_guest_abi::attach_sequence::Verdict;
use ringpass_guest_abi::epoch::device::Event;
use ringpass_guest_abi::request::{
    DetachPayload, EVENT_QUEUES, ErrorCode, EventAnswer, NO_FIELD, Outcome, RequestType, payload,
};

use super::attach::{Attach, Attachment, AttachmentId, Refused, Reply, host_address};
use super::command::Command;
use super::vring::{State, Vring};
use super::worker::Worker;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Answer, Refusal, Status};

impl Worker<'_> {
    /// Takes a request of the interface from a queue.
    pub(super) fn take_interface(&mut self, number: usize, request_type: RequestType, reply: Reply, payload: &[u8]) {
        let Some(attach) = self.attach.clone() else { return self.answer_unknown(number, request_type, &reply) };
        let Some(active) = self.vrings[number].active_mut() else { return };
        if !matches!(request_type, RequestType::Arm | RequestType::Attach) {
            active.queue.record();
        }
        let others = active.queue.in_flight().saturating_sub(1);
        match active.order.take(Some(request_type), others) {
            Verdict::Break => self.break_down_for(number, "the driver made something available behind ATTACH"),
            Verdict::Refuse(code) => self.give_outcome(number, &reply, &Outcome::of(code)),
            Verdict::Execute => match request_type {
                RequestType::Probe => {
                    let alignment = self.disk.as_ref().and_then(|disk| disk.alignment);
                    self.give_reply(number, &reply, &attach.probe_answer(alignment).to_bytes(), Status::Ok);
                }
                RequestType::Arm => self.give_outcome(number, &reply, &Outcome::of(ErrorCode::None)),
                RequestType::Attach => self.attach(number, &attach, reply, payload),
                RequestType::Event => self.take_event(number, reply),
                RequestType::Detach => self.detach(number, &attach, &reply, payload),
            },
        }
    }

    /// The device does not offer rings: nothing but the status is written.
    fn answer_unknown(&mut self, number: usize, request_type: RequestType, reply: &Reply) {
        let Some(active) = self.vrings[number].active_mut() else { return };
        active.queue.record();
        let refusal = Refusal::UnknownType { request_type: request_type.number() };
        let Reply { head, status_gpa, answer_bytes: writable_bytes, .. } = *reply;
        let status = refusal.status();
        let answer = Answer { status, status_gpa, writable_bytes, written_bytes: 0, refusal: Some(refusal) };
        self.answer(number, head, &reply.memory, &answer);
    }

    fn attach(&mut self, number: usize, attach: &Attach, reply: Reply, payload: &[u8]) {
        let vring = &mut self.vrings[number];
        let index = vring.index;
        match admit(vring, attach, &reply.memory, payload) {
            Ok(geometry) => {
                self.attachments += 1;
                let memory = Rc::clone(&reply.memory);
                let attachment = Attachment::new(AttachmentId(self.attachments), geometry, reply, memory);
                let (found, detach) = attachment.found();
                tracing::debug!(queue = index, found, detach, "a driver asks for a ring");
                if let Some(active) = vring.active_mut() {
                    active.attachment = Some(Box::new(attachment));
                }
                self.epoch_event(number, Event::Attach { found, detach });
                // The driver may not have kept to the rule already.
                self.check_behind_attach(number);
            }
            Err(error) => {
                let refused = Refused { code: error.code, why: error.to_string() };
                tracing::debug!(queue = index, %error, "ATTACH is refused");
                attach.gate.note_refusal(index, refused);
                if let Some(active) = vring.active_mut() {
                    active.order.attach_completed();
                }
                self.give_outcome(number, &reply, &error.into());
            }
        }
    }

    /// A queue must have nothing behind its ATTACH: what stands there would be lost at a restart.
    pub(super) fn check_behind_attach(&mut self, number: usize) {
        if self.vrings[number].active_mut().is_some_and(|active| active.attachment.is_some() && active.queue.has_work())
        {
            self.break_down_for(number, "the driver made something available behind ATTACH");
        }
    }

    fn detach(&mut self, number: usize, attach: &Attach, reply: &Reply, bytes: &[u8]) {
        let wanted = payload(bytes).map(|bytes| DetachPayload::from_bytes(&bytes));
        let code = match wanted.and_then(|payload| payload.check(attach.queue_count())) {
            Ok(queue) => {
                if attach.gate.tell_detach(queue) {
                    attach.send(queue, |queue| Command::Detach { queue });
                }
                ErrorCode::None
            }
            Err(code) => code,
        };
        self.give_outcome(number, reply, &Outcome::of(code));
    }

    fn take_event(&mut self, number: usize, reply: Reply) {
        let vring = &mut self.vrings[number];
        let is_stopping = !matches!(vring.state, State::Running(_));
        let Some(active) = vring.active_mut() else { return };
        let earlier = active.event.replace(reply);
        if let Some(earlier) = earlier {
            // One is enough; a driver that sends more gets them back.
            self.give_event(number, &earlier, 0);
        }
        if is_stopping {
            self.answer_event_of_stopping(number);
        } else if std::mem::take(&mut self.has_news) {
            self.tell_driver();
        }
    }

    /// Completes the EVENT that is pending, or remembers that there is something to tell.
    pub(super) fn tell_driver(&mut self) {
        // Queue 0 is the first queue of the first worker.
        let event = match &mut self.vrings[0].state {
            State::Running(active) if !active.is_held => active.event.take(),
            _ => None,
        };
        match event {
            Some(reply) => self.give_event(0, &reply, EVENT_QUEUES),
            None => self.has_news = true,
        }
    }

    /// Completes the EVENT of a queue that stops: nothing of it is in flight then.
    pub(super) fn answer_event_of_stopping(&mut self, number: usize) {
        let vring = &mut self.vrings[number];
        let State::Stopping { active, .. } = &mut vring.state else { return };
        if active.is_held {
            // The used ring is in memory that has left. EVENT is recorded: whoever goes on finds it there.
            return;
        }
        if let Some(reply) = active.event.take() {
            self.give_event(number, &reply, 0);
            // The queue may have stopped before the turn ends.
            self.vrings[number].publish();
        }
    }

    fn give_event(&mut self, number: usize, reply: &Reply, events: u32) {
        let answer = EventAnswer { events: events.into(), reserved: 0.into() };
        self.give_reply(number, reply, &answer.to_bytes(), Status::Ok);
    }

    pub(super) fn give_outcome(&mut self, number: usize, reply: &Reply, outcome: &Outcome) {
        let is_ok = ErrorCode::from_number(outcome.error.get()).is_some_and(ErrorCode::is_ok);
        self.give_reply(number, reply, &outcome.to_bytes(), if is_ok { Status::Ok } else { Status::IoError });
    }

    fn give_reply(&mut self, number: usize, reply: &Reply, bytes: &[u8], status: Status) {
        let log = self.vrings[number].active_mut().and_then(|active| active.log.as_deref());
        let written_bytes = reply.write(bytes, log);
        let Reply { head, status_gpa, answer_bytes: writable_bytes, .. } = *reply;
        let answer = Answer { status, status_gpa, writable_bytes, written_bytes, refusal: None };
        self.give_back(number, head, &reply.memory, &answer);
    }
}

/// Checks an ATTACH completely, and gives the queue its ranges.
fn admit(vring: &mut Vring, attach: &Attach, memory: &DeviceMemory, payload: &[u8]) -> Result<Geometry, AttachError> {
    let index = vring.index;
    let has_doorbell = vring.eventfds_mut().is_some_and(|eventfds| eventfds.kick.is_some());
    if !has_doorbell {
        // Nobody would hear that the driver has acknowledged something, or that an SQ thread is to wake up.
        return Err(AttachError { code: ErrorCode::Mode, field_offset_bytes: NO_FIELD, value: 0 });
    }
    let geometry = AttachPayload::parse(payload)?.check(&attach.limits())?;
    for (field_offset_bytes, range) in geometry.ranges() {
        if host_address(memory, &range).is_none() {
            return Err(AttachError { code: ErrorCode::Memory, field_offset_bytes, value: range.gpa() });
        }
    }
    attach.gate.enter(index, &geometry)?;
    Ok(geometry)
}
