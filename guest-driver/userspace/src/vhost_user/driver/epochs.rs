//! Moves a queue between ring and virtqueue: ATTACH, the epochs of its rings, and the end of the last one.

use std::collections::VecDeque;

use ringpass_guest_abi::epoch::driver::{Action, Event};
use ringpass_guest_abi::request::{ErrorCode, Outcome, T_ARM, T_ATTACH};

use super::super::Error;
use super::super::attachment::Attachment;
use super::super::requests::Body;
use super::errands::Errand;
use super::pending::Place;
use super::{Driver, Mode, Wish};

/// A device that gives no ring for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The news that had come by then.
    news: u64,
}

impl Driver {
    /// Has the queue become a ring.
    pub(in super::super) fn want_ring(&mut self, attachment: Attachment) {
        self.attachment = Some(attachment);
        self.wish = Wish::Ring;
        self.refused = None;
        self.progress();
    }

    /// Has the queue become a virtqueue.
    pub(in super::super) fn give_ring_up(&mut self) {
        self.wish = Wish::Virtqueue;
        if self.mode != Mode::Virtqueue {
            self.step(Event::Detach);
        }
    }

    /// Whether a ring is wanted and may be asked for now.
    pub(super) fn may_ask(&self) -> bool {
        match self.wish {
            Wish::Virtqueue => false,
            Wish::Ring => true,
            Wish::RingLater(refusal) => self.shared.news() != refusal.news,
        }
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
        self.wish = Wish::Ring;
        self.mode = Mode::Attached { attach, heard: 0, is_draining: false };
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
        let Mode::Attached { heard, is_draining, .. } = &mut self.mode else { return };
        if *is_draining && !self.slots.iter().flatten().any(|pending| pending.place == Place::Ring) {
            *is_draining = false;
            return self.step(Event::Drained);
        }
        if let Some(word) = self.attachment.as_ref().map(Attachment::announced)
            && word != *heard
        {
            *heard = word;
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
            Action::Drain => self.set_draining(true),
            Action::Reap(_) => {
                self.set_draining(false);
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

    fn set_draining(&mut self, now: bool) {
        if let Mode::Attached { is_draining, .. } = &mut self.mode {
            *is_draining = now;
        }
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
        let Mode::Attached { attach, .. } = self.mode else { return Ok(()) };
        while self.queue.reap()?.is_some() {}
        let answer = self.requests.answer(attach);
        let outcome = Outcome::from_bytes(answer[..Outcome::BYTES].try_into().expect("16 bytes"));
        let code = ErrorCode::from_number(outcome.error.get());
        tracing::debug!(queue = self.index, ?code, "the queue is a virtqueue again");
        self.refused = code;
        // Those that pass; an EVENT tells when.
        let passes = matches!(code, Some(ErrorCode::Mode | ErrorCode::Busy | ErrorCode::Resources));
        self.wish = match self.wish {
            Wish::Ring if passes => Wish::RingLater(Refusal { news: self.shared.news() }),
            _ => Wish::Virtqueue,
        };
        self.mode = Mode::Virtqueue;
        self.queue.want_interrupts(!self.is_muted);
        Ok(())
    }
}
