//! Moves a queue between ring and virtqueue: ATTACH, the epochs of its rings, and the end of the last one.

use std::collections::VecDeque;

use ringpass_guest_abi::epoch::driver::{Action, Event};
use ringpass_guest_abi::request::{ErrorCode, Outcome, T_ARM, T_ATTACH};

use super::super::Error;
use super::super::attachment::Attachment;
use super::super::requests::Body;
use super::errands::Errand;
use super::pending::Place;
use super::{Driver, Mode};

impl Driver {
    /// Has the queue become a ring.
    pub(in super::super) fn want_ring(&mut self, attachment: Attachment) {
        self.attachment = Some(attachment);
        self.wants_ring = true;
        self.refused = None;
        self.progress();
    }

    /// Has the queue become a virtqueue.
    pub(in super::super) fn give_ring_up(&mut self) {
        self.wants_ring = false;
        if self.mode != Mode::Virtqueue {
            self.step(Event::Detach);
        }
    }

    /// Whether a ring may be asked for, and not only if something has changed.
    pub(super) fn may_ask(&self) -> bool {
        self.refused_at.is_none_or(|news| self.shared.news() != news)
    }

    pub(super) fn attach(&mut self) {
        let Some(attachment) = self.attachment.as_mut() else { return };
        let payload = attachment.begin();
        let arm = self.requests.send(&mut self.queue, T_ARM, 0, &Body::Payload(&[]));
        let attach = self.requests.send(&mut self.queue, T_ATTACH, 0, &Body::Payload(&payload));
        let (Some(_), Some(attach)) = (arm, attach) else {
            self.fault = Some(Error::BrokenDevice("an empty queue has no room for ARM and ATTACH".into()));
            return;
        };
        self.refused_at = None;
        self.heard = 0;
        self.mode = Mode::Attached { attach };
        attachment.set_muted(self.is_muted);
        self.queue.want_interrupts(true);
        self.queue.kick();
    }

    /// Looks at what the device says of rings.
    pub(super) fn look(&mut self) {
        // ARM is there and stays; what comes behind it is ATTACH.
        if self.queue.ready() >= 2 {
            return self.step(Event::AttachCompleted);
        }
        if self.is_draining && !self.slots.iter().flatten().any(|pending| pending.place == Place::Ring) {
            self.is_draining = false;
            return self.step(Event::Drained);
        }
        if let Some(word) = self.attachment.as_ref().map(Attachment::announced)
            && word != self.heard
        {
            self.heard = word;
            self.step(Event::Announced(word));
        }
    }

    fn step(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(attachment) = self.attachment.as_mut() else { return };
            for action in attachment.step(event) {
                match self.act(action) {
                    Ok(next) => events.extend(next),
                    Err(error) => return self.fault = Some(error),
                }
            }
        }
    }

    fn act(&mut self, action: Action) -> Result<Option<Event>, Error> {
        let attachment = self.attachment.as_mut().expect("steps are those of an attachment");
        match action {
            Action::Start(epoch) => attachment.start(epoch)?,
            Action::Drain => self.is_draining = true,
            Action::Reap(_) => {
                self.is_draining = false;
                self.reap_ring();
                self.put_ring_aside();
                return Ok(Some(Event::Reaped));
            }
            Action::Acknowledge(announcement) => {
                attachment.take_ring_back();
                attachment.acknowledge(announcement);
                self.queue.kick();
            }
            Action::RequestDetach => {
                attachment.set_detach();
                self.run_errand(Errand::Detach);
            }
            Action::Release => self.release()?,
            Action::Reset => return Err(Error::BrokenDevice("it announced an epoch out of turn".into())),
        }
        Ok(None)
    }

    /// What was on a ring that has ended is to be sent again, before everything else and in its order.
    fn put_ring_aside(&mut self) {
        for id in 0..self.slots.len() {
            if self.slots[id].as_ref().is_some_and(|pending| pending.place == Place::Ring) {
                self.put_aside(id);
            }
        }
        let slots = &self.slots;
        self.waiting.make_contiguous().sort_by_key(|&id| slots[id].as_ref().map(|pending| pending.sequence));
        if let Some(attachment) = &mut self.attachment {
            attachment.take_ring_back();
        }
    }

    /// No ring is left: ARM and ATTACH come back.
    fn release(&mut self) -> Result<(), Error> {
        let Mode::Attached { attach } = self.mode else { return Ok(()) };
        while self.queue.reap()?.is_some() {}
        let answer = self.requests.answer(attach);
        let outcome = Outcome::from_bytes(answer[..Outcome::BYTES].try_into().expect("16 bytes"));
        let code = ErrorCode::from_number(outcome.error.get());
        tracing::debug!(queue = self.index, ?code, "the queue is a virtqueue again");
        self.refused = code;
        // Those that pass; an EVENT tells when.
        if matches!(code, Some(ErrorCode::Mode | ErrorCode::Busy | ErrorCode::Resources)) {
            self.refused_at = Some(self.shared.news());
        } else {
            self.wants_ring = false;
        }
        self.mode = Mode::Virtqueue;
        self.queue.want_interrupts(!self.is_muted);
        Ok(())
    }
}
