//! Moves a queue between ring and virtqueue: ATTACH, the epochs of its rings, and the end of the last ring.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ringpass_guest_abi::epoch::driver::{Action, Event};
use ringpass_guest_abi::request::{ErrorCode, Outcome, Retry, T_ARM, T_ATTACH};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::super::Error;
use super::super::attachment::{Attachment, WantedRings};
use super::super::requests::Body;
use super::pending::Place;
use super::{Driver, Mode, Wanted};

/// How long the driver waits after a first refusal before it asks for a ring again, if no event says when the device can
/// give one. Each further refusal doubles the wait.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// The device gives no ring for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    retry: Retry,
    /// How often the device has refused rings, one after the other.
    count: u32,
    /// The number of events before the driver sent ATTACH. A later event may have come after the device's decision.
    events_before: u64,
    /// The number of answers to PROBE before the driver sent PROBE because of this refusal.
    probes_before: u64,
    since: Instant,
}

impl Refusal {
    /// The refusal, if it is not final.
    fn new(code: Option<ErrorCode>, count: u32, events_before: u64, probes_before: u64) -> Option<Self> {
        let retry = code?.retry();
        let refusal = Self { retry, count, events_before, probes_before, since: Instant::now() };
        (retry != Retry::No).then_some(refusal)
    }

    /// Whether the device may give a ring by now.
    fn may_have_ended(&self, event_count: u64, probe_count: u64, waited: Duration) -> bool {
        match self.retry {
            // An event reports that the device may give rings again.
            Retry::Event => event_count != self.events_before,
            Retry::Probe => probe_count != self.probes_before,
            // The end of ATTACH is an event itself: if events counted here, the driver would ask again at once, without
            // end.
            Retry::Later => {
                let doublings = self.count.saturating_sub(1).min(6);
                waited >= (RETRY_FIRST * (1 << doublings)).min(RETRY_MAX)
            }
            Retry::No => false,
        }
    }
}

impl Driver {
    /// Asks for a ring, as soon as the device has answered PROBE. Does nothing if the device offers none.
    ///
    /// # Errors
    ///
    /// There is no memory for rings.
    pub(in super::super) fn want_ring(&mut self, rings: WantedRings) -> Result<(), Error> {
        if self.attachment.is_none() {
            self.probes_before = self.queue_zero.probe_count();
            let (device, is_probing) = self.queue_zero.device();
            match device {
                Some(device) => self.attachment = Some(rings.attachment(device)?),
                None if is_probing => {}
                None => return Ok(()),
            }
        }
        self.rings = Some(rings);
        self.wanted = Wanted::Ring;
        self.refused = None;
        self.probed_for = None;
        self.progress();
        Ok(())
    }

    /// Asks the device to end the ring, so that the queue is a virtqueue again.
    pub(in super::super) fn detach(&mut self) {
        self.wanted = Wanted::Virtqueue;
        if self.mode != Mode::Virtqueue {
            self.step(Event::Detach);
        }
    }

    /// Whether the application wants a ring and the driver may ask for it now.
    pub(super) fn may_attach(&self) -> bool {
        match self.wanted {
            Wanted::Virtqueue => false,
            Wanted::Ring => self.attachment.is_some() || self.queue_zero.probe_count() != self.probes_before,
            Wanted::RingLater(refusal) => refusal.may_have_ended(
                self.queue_zero.event_count(),
                self.queue_zero.probe_count(),
                refusal.since.elapsed(),
            ),
        }
    }

    /// Whether the queue has memory for rings as the device wants them according to its last answer to PROBE. If the
    /// driver has none, it allocates it; without success it asks for no ring, or later.
    pub(super) fn is_prepared_for_ring(&mut self) -> bool {
        let probe_count = self.queue_zero.probe_count();
        if self.attachment.is_some() && probe_count == self.probes_before {
            return true;
        }
        self.probes_before = probe_count;
        let (Some(device), _) = self.queue_zero.device() else {
            self.wanted = Wanted::Virtqueue;
            return false;
        };
        let Some(rings) = &self.rings else { return false };
        let former = self.attachment.take();
        let epochs = former.as_ref().map_or(0, |attachment| attachment.epochs);
        // The device has completed ATTACH, and so uses this memory no more.
        former.into_iter().for_each(Attachment::free);
        match rings.attachment(device) {
            Ok(mut attachment) => {
                attachment.epochs = epochs;
                self.attachment = Some(attachment);
                true
            }
            Err(error) => {
                tracing::warn!(queue = self.index, %error, "no memory for a ring: the driver tries again later");
                self.refusals += 1;
                let (count, code) = (self.refusals, Some(ErrorCode::Resources));
                let refusal = Refusal::new(code, count, self.queue_zero.event_count(), probe_count);
                self.wanted = refusal.map_or(Wanted::Virtqueue, Wanted::RingLater);
                false
            }
        }
    }

    /// Sends ARM and ATTACH.
    pub(super) fn attach(&mut self) {
        let Some(attachment) = self.attachment.as_mut() else { return };
        let payload = attachment.reset();
        let events_before = self.queue_zero.event_count();
        let arm = self.requests.send(&mut self.queue, T_ARM, &Body::Payload(&[]));
        let attach = self.requests.send(&mut self.queue, T_ATTACH, &Body::Payload(&payload));
        let (Some(_), Some(attach)) = (arm, attach) else {
            self.set_fault(Error::BrokenDevice("an empty queue has no room for ARM and ATTACH".into()));
            return;
        };
        self.wanted = Wanted::Ring;
        self.mode = Mode::Attached { attach, events_before, last_announced: 0, is_draining: false };
        attachment.set_muted(self.is_muted);
        self.queue.enable_interrupts(true);
        self.queue.kick();
    }

    /// Handles events of the ring until there are no more: one interrupt may announce several events, and one event may
    /// cause another.
    pub(super) fn handle_ring_events(&mut self) {
        while self.fault.is_none() {
            let Some(event) = self.next_ring_event() else { break };
            self.step(event);
        }
    }

    fn next_ring_event(&mut self) -> Option<Event> {
        let Mode::Attached { last_announced, is_draining, .. } = &mut self.mode else { return None };
        // The device completes ARM first, and the driver leaves ARM in the used ring. The next chain is ATTACH.
        if self.queue.ready() >= 2 {
            return Some(Event::AttachCompleted);
        }
        if *is_draining && !self.slots.iter().flatten().any(|pending| pending.place == Place::Ring) {
            *is_draining = false;
            return Some(Event::Drained);
        }
        let word = self.attachment.as_ref().map(Attachment::announced).filter(|word| word != last_announced)?;
        *last_announced = word;
        Some(Event::Announced(word))
    }

    fn step(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(attachment) = self.attachment.as_mut() else { return };
            for action in attachment.step(event) {
                match self.perform(action) {
                    Ok(next) => events.extend(next),
                    Err(error) => return self.set_fault(error),
                }
            }
        }
    }

    fn perform(&mut self, action: Action) -> Result<Option<Event>, Error> {
        let attachment = self.attachment.as_mut().expect("only an attachment has steps");
        match action {
            Action::Start(epoch) => {
                attachment.start(epoch)?;
                self.refusals = 0;
                self.probed_for = None;
            }
            Action::Drain => self.set_draining(true),
            Action::Reap(_) => {
                self.set_draining(false);
                self.reap_ring();
                self.requeue_ring();
                return Ok(Some(Event::Reaped));
            }
            Action::Acknowledge(announcement) => {
                attachment.end_ring();
                attachment.acknowledge(announcement);
                self.queue.kick();
            }
            Action::RequestDetach => {
                attachment.set_detach();
                self.queue.kick();
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

    /// Has the driver send the requests of a ring that has ended again, before all others and in their order.
    fn requeue_ring(&mut self) {
        for id in 0..self.slots.len() {
            if self.slots[id].as_ref().is_some_and(|pending| pending.place == Place::Ring) {
                self.requeue(id);
            }
        }
        let slots = &self.slots;
        self.waiting.make_contiguous().sort_by_key(|&id| slots[id].as_ref().map(|pending| pending.sequence));
        if let Some(attachment) = &mut self.attachment {
            attachment.end_ring();
        }
    }

    /// The device has ended the last ring: takes ARM and ATTACH from the used ring.
    fn release(&mut self) -> Result<(), Error> {
        let Mode::Attached { attach, events_before, .. } = self.mode else { return Ok(()) };
        while self.queue.reap()?.is_some() {}
        let answer = self.requests.answer(attach);
        let outcome = Outcome::from_bytes(answer[..Outcome::BYTES].try_into().expect("16 bytes"));
        let is_known = [VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR].contains(&self.requests.status(attach).into());
        // A process without rings has taken over: the next one may have some, and reports that.
        let code = if is_known { ErrorCode::from_number(outcome.error.get()) } else { Some(ErrorCode::Mode) };
        tracing::debug!(queue = self.index, ?code, "the queue is a virtqueue again");
        self.refused = code;
        self.refusals += 1;
        let refusal = Refusal::new(code, self.refusals, events_before, self.queue_zero.probe_count());
        self.wanted = match refusal {
            Some(refusal) if self.wanted == Wanted::Ring && self.may_ask_again(refusal.retry) => {
                Wanted::RingLater(refusal)
            }
            _ => Wanted::Virtqueue,
        };
        self.mode = Mode::Virtqueue;
        self.queue.enable_interrupts(!self.is_muted);
        Ok(())
    }

    /// Whether the refusal is not final. Sends PROBE if the refusal says that another device has taken over: the
    /// same refusal after another answer is final.
    fn may_ask_again(&mut self, retry: Retry) -> bool {
        if retry != Retry::Probe {
            return true;
        }
        if self.probed_for == self.refused {
            return false;
        }
        self.probed_for = self.refused;
        self.queue_zero.lock().probe_again();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_asks_again_for_a_refused_ring_when_the_refusal_may_have_ended() {
        let refusal = |code, count| Refusal::new(Some(code), count, 3, 1);
        let asks = |code, count, event_count, waited| {
            refusal(code, count).expect("not final").may_have_ended(event_count, 1, waited)
        };
        let (soon, later) = (RETRY_FIRST / 2, RETRY_FIRST);
        for code in [ErrorCode::Mode, ErrorCode::Cost] {
            assert!(!asks(code, 1, 3, later) && asks(code, 1, 4, soon), "{code:?}");
        }
        for code in [ErrorCode::Busy, ErrorCode::Resources] {
            assert!(!asks(code, 1, 4, soon) && asks(code, 1, 3, later), "{code:?}");
            assert!(!asks(code, 3, 4, 3 * later) && asks(code, 3, 3, 4 * later), "{code:?}");
            assert!(!asks(code, 100, 4, RETRY_MAX / 2) && asks(code, 100, 3, RETRY_MAX), "{code:?}");
        }
        for code in [ErrorCode::Version, ErrorCode::Features, ErrorCode::Entries, ErrorCode::Alignment] {
            let refusal = refusal(code, 1).expect("not final");
            assert!(!refusal.may_have_ended(4, 1, RETRY_MAX) && refusal.may_have_ended(3, 2, soon), "{code:?}");
        }
        for code in [ErrorCode::Detached, ErrorCode::Discarded, ErrorCode::Inflight] {
            assert_eq!(refusal(code, 1), None, "{code:?}");
        }
        assert_eq!(Refusal::new(None, 1, 3, 1), None, "a code that this driver does not know is final");
    }
}
