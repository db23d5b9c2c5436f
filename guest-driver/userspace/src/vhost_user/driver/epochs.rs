//! Moves a queue between ring and virtqueue: ATTACH, the epochs of its rings, and the end of the last ring.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ringpass_guest_abi::epoch::driver::{Action, Event};
use ringpass_guest_abi::request::{ErrorCode, Outcome, T_ARM, T_ATTACH};

use super::super::Error;
use super::super::attachment::Attachment;
use super::super::requests::Body;
use super::errands::Errand;
use super::pending::Place;
use super::{Driver, Mode, Wish};

/// How long to wait before the driver asks for a ring again, if no event says that the device can give one.
const PAUSE: Duration = Duration::from_secs(1);

/// The device gives no ring for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    code: ErrorCode,
    /// The number of events before the driver asked. A later event may have come after the device's decision.
    news: u64,
    since: Instant,
}

impl Refusal {
    /// The refusal, if its reason can pass.
    fn new(code: Option<ErrorCode>, news: u64) -> Option<Self> {
        let code = code.filter(|code| matches!(code, ErrorCode::Mode | ErrorCode::Busy | ErrorCode::Resources))?;
        Some(Self { code, news, since: Instant::now() })
    }

    /// Whether the reason may have passed by now.
    fn may_have_passed(&self, news: u64, waited: Duration) -> bool {
        match self.code {
            // An EVENT reports it.
            ErrorCode::Mode => news != self.news,
            ErrorCode::Busy => news != self.news || waited >= PAUSE,
            // No event reports it. The end of the ATTACH is an event itself, and would let the driver ask without end.
            _ => waited >= PAUSE,
        }
    }
}

impl Driver {
    /// Asks for a ring. If the queue has no memory for rings yet, `make` allocates it.
    ///
    /// # Errors
    ///
    /// `make` fails.
    pub(in super::super) fn want_ring(
        &mut self,
        make: impl FnOnce() -> Result<Attachment, Error>,
    ) -> Result<(), Error> {
        if self.attachment.is_none() {
            self.attachment = Some(make()?);
        }
        self.wish = Wish::Ring;
        self.refused = None;
        self.progress();
        Ok(())
    }

    /// Gives the ring up for a virtqueue.
    pub(in super::super) fn give_ring_up(&mut self) {
        self.wish = Wish::Virtqueue;
        if self.mode != Mode::Virtqueue {
            self.step(Event::Detach);
        }
    }

    /// Whether the user wants a ring and the driver may ask for it now.
    pub(super) fn may_ask(&self) -> bool {
        match self.wish {
            Wish::Virtqueue => false,
            Wish::Ring => true,
            Wish::RingLater(refusal) => refusal.may_have_passed(self.shared.news(), refusal.since.elapsed()),
        }
    }

    pub(super) fn attach(&mut self) {
        let Some(attachment) = self.attachment.as_mut() else { return };
        let payload = attachment.begin();
        let news = self.shared.news();
        let arm = self.requests.send(&mut self.queue, T_ARM, 0, &Body::Payload(&[]));
        let attach = self.requests.send(&mut self.queue, T_ATTACH, 0, &Body::Payload(&payload));
        let (Some(_), Some(attach)) = (arm, attach) else {
            self.break_down(Error::BrokenDevice("an empty queue has no room for ARM and ATTACH".into()));
            return;
        };
        self.wish = Wish::Ring;
        self.mode = Mode::Attached { attach, news, heard: 0, is_draining: false };
        attachment.set_muted(self.is_muted);
        self.queue.want_interrupts(true);
        self.queue.kick();
    }

    /// Handles events of the ring until there are no more: one interrupt may stand for several events, and one event may cause
    /// another.
    pub(super) fn look(&mut self) {
        while self.fault.is_none() {
            let Some(event) = self.next_event() else { break };
            self.step(event);
        }
    }

    fn next_event(&mut self) -> Option<Event> {
        let Mode::Attached { heard, is_draining, .. } = &mut self.mode else { return None };
        // The device completes ARM and leaves it in the used ring; the next chain is ATTACH.
        if self.queue.ready() >= 2 {
            return Some(Event::AttachCompleted);
        }
        if *is_draining && !self.slots.iter().flatten().any(|pending| pending.place == Place::Ring) {
            *is_draining = false;
            return Some(Event::Drained);
        }
        let word = self.attachment.as_ref().map(Attachment::announced).filter(|word| word != heard)?;
        *heard = word;
        Some(Event::Announced(word))
    }

    fn step(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(attachment) = self.attachment.as_mut() else { return };
            for action in attachment.step(event) {
                match self.act(action) {
                    Ok(next) => events.extend(next),
                    Err(error) => return self.break_down(error),
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

    /// The driver sends the requests of a ring that has ended again, before all others and in their order.
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

    /// No ring is left: takes ARM and ATTACH back.
    fn release(&mut self) -> Result<(), Error> {
        let Mode::Attached { attach, news, .. } = self.mode else { return Ok(()) };
        while self.queue.reap()?.is_some() {}
        let answer = self.requests.answer(attach);
        let outcome = Outcome::from_bytes(answer[..Outcome::BYTES].try_into().expect("16 bytes"));
        let code = ErrorCode::from_number(outcome.error.get());
        tracing::debug!(queue = self.index, ?code, "the queue is a virtqueue again");
        self.refused = code;
        self.wish = match Refusal::new(code, news) {
            Some(refusal) if self.wish == Wish::Ring => Wish::RingLater(refusal),
            _ => Wish::Virtqueue,
        };
        self.mode = Mode::Virtqueue;
        self.queue.want_interrupts(!self.is_muted);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_ring_is_asked_for_again_when_there_is_a_reason() {
        let refusal = |code| Refusal::new(Some(code), 3);
        let asks = |code, news, waited| refusal(code).unwrap().may_have_passed(news, waited);
        let (soon, later) = (PAUSE / 2, PAUSE);
        assert!(!asks(ErrorCode::Mode, 3, later) && asks(ErrorCode::Mode, 4, soon));
        assert!(!asks(ErrorCode::Busy, 3, soon) && asks(ErrorCode::Busy, 4, soon) && asks(ErrorCode::Busy, 3, later));
        assert!(!asks(ErrorCode::Resources, 4, soon) && asks(ErrorCode::Resources, 3, later));
        assert_eq!((refusal(ErrorCode::Detached), refusal(ErrorCode::Discarded)), (None, None));
        assert_eq!(Refusal::new(None, 3), None, "a code that this driver does not know is final");
    }
}
