//! Orders about rings that run, and what happens to rings: the engine's side.

use std::collections::HashMap;
use std::fmt::Display;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, Packet};
use super::message::{Answer, Control, DecodeError, Encoded, HostEvent, RingId};
use super::refused::Refused;
use crate::process_end;
use crate::ring::{RingEnd, borrow_eventfd};

/// Orders about rings that run, for any thread. None of them takes long: at most as long as one batch of the guest.
#[derive(Debug)]
pub(crate) struct RingControl {
    /// Held from an order to its answer.
    channel: Mutex<Channel>,
    rings: Mutex<HashMap<RingId, KnownRing>>,
    next_id: AtomicU64,
    /// The engine ends, and with it the host.
    is_closing: AtomicBool,
}

/// What happens to rings, for one thread.
#[derive(Debug)]
pub(crate) struct RingEvents {
    channel: Channel,
    control: Arc<RingControl>,
}

/// For what the engine had a ring made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingOwner {
    /// The queue.
    pub(crate) queue: u16,
    /// The number of its attachment.
    pub(crate) attachment: u64,
    /// The most requests that the driver may have outstanding.
    pub(crate) cq_entries: u32,
}

#[derive(Debug)]
struct KnownRing {
    owner: RingOwner,
    end: RingEnd,
}

/// What came of a wait for an event.
#[derive(Debug)]
pub(crate) enum NextEvent {
    /// The host closes the ring: it had more requests outstanding than it may have. `None`: the kernel did not tell how
    /// many for too long.
    Excess { owner: RingOwner, outstanding: Option<u32> },
    /// Nothing that concerns the caller.
    Nothing,
    /// The host has ended, because the engine ends.
    Closed,
}

impl RingControl {
    pub(super) fn new(channel: Channel) -> Self {
        Self {
            channel: Mutex::new(channel),
            rings: Mutex::default(),
            next_id: AtomicU64::new(0),
            is_closing: AtomicBool::new(false),
        }
    }

    /// A number for a ring that is to be made. Call this before the host knows of the ring, because it may end at once.
    pub(super) fn expect_ring(&self, owner: RingOwner, end: &RingEnd) -> RingId {
        let id = RingId(self.next_id.fetch_add(1, Ordering::Relaxed));
        self.rings().insert(id, KnownRing { owner, end: end.clone() });
        id
    }

    /// The ring was not made.
    pub(super) fn forget_ring(&self, id: RingId) {
        self.rings().remove(&id);
    }

    /// The engine ends, and with it the host: what cannot be sent from now on is of no importance.
    pub(super) fn begin_end(&self) {
        self.is_closing.store(true, Ordering::Release);
    }

    /// Completions of the ring signal `call` from now on, or nothing.
    pub(super) fn set_call(&self, id: RingId, call: Option<&EventFd>) -> Result<(), Refused> {
        match self.order(&Control::SetCall { id, call: call.map(borrow_eventfd) }) {
            Some(Answer::Refused(refused)) => Err(refused),
            _ => Ok(()),
        }
    }

    /// The disk has another size. When this returns, rings can write up to the new end.
    pub(crate) fn set_disk_size(&self, size_bytes: u64) {
        self.order(&Control::SetDiskSize { size_bytes });
    }

    /// Sends an order and waits for the answer. `None`: the engine ends.
    fn order(&self, order: &Control<BorrowedFd<'_>>) -> Option<Answer> {
        let channel = self.channel();
        self.send_on(&channel, order);
        if self.is_closing() { None } else { Some(self.decoded(channel.receive(), Answer::decode)) }
    }

    /// Whether there are rings that have not ended.
    pub(crate) fn has_rings(&self) -> bool {
        !self.rings().is_empty()
    }

    /// The words of this ring say that it has more outstanding than it may have.
    pub(crate) fn suspect(&self, id: RingId) {
        self.send(&Control::Suspect { id });
    }

    pub(super) fn send(&self, order: &Control<BorrowedFd<'_>>) {
        self.send_on(&self.channel(), order);
    }

    fn send_on(&self, channel: &Channel, order: &Control<BorrowedFd<'_>>) {
        let Encoded { words, text, fds } = order.encode();
        match channel.send(&words, &text, &fds) {
            Err(error) if !self.is_closing() => self.lost(&error),
            _ => {}
        }
    }

    fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Acquire)
    }

    pub(super) fn decoded<T>(
        &self,
        packet: io::Result<Option<Packet>>,
        decode: impl FnOnce(Packet) -> Result<T, DecodeError>,
    ) -> T {
        match packet {
            Ok(Some(packet)) => decode(packet).unwrap_or_else(|error| self.lost(&error)),
            Ok(None) => self.lost(&"it closed its sockets"),
            Err(error) => self.lost(&error),
        }
    }

    /// Ends this process, because nothing watches guests' rings any more and no new ones can be made. The front-end notices
    /// the end, and can connect to a new process.
    pub(super) fn lost(&self, why: &dyn Display) -> ! {
        tracing::error!(
            "the process that makes the guests' rings has ended: {why} (its log or the kernel's tells more); this program \
             ends too, so that the front-end can connect to a new one"
        );
        process_end::end_process(1)
    }

    fn channel(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rings(&self) -> MutexGuard<'_, HashMap<RingId, KnownRing>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RingEvents {
    pub(super) fn new(channel: Channel, control: Arc<RingControl>) -> Self {
        Self { channel, control }
    }

    pub(crate) fn control(&self) -> &Arc<RingControl> {
        &self.control
    }

    /// Waits for the next event, at most this long.
    pub(crate) fn next(&self, timeout: Option<Duration>) -> NextEvent {
        match self.channel.wait(timeout) {
            Ok(true) => {}
            Ok(false) => return NextEvent::Nothing,
            Err(error) => self.control.lost(&error),
        }
        let packet = self.channel.receive();
        if matches!(packet, Ok(None)) && self.control.is_closing() {
            return NextEvent::Closed;
        }
        match self.control.decoded(packet, HostEvent::decode) {
            // The caller looks at the words of rings from now on.
            HostEvent::Runs { .. } => NextEvent::Nothing,
            HostEvent::Gone { id } => {
                let ring = self.control.rings().remove(&id);
                // Not under the lock: this calls what waits for the end.
                ring.iter().for_each(|ring| ring.end.note_ended());
                NextEvent::Nothing
            }
            HostEvent::Excess { id, outstanding } => match self.control.rings().get(&id) {
                Some(&KnownRing { owner, .. }) => NextEvent::Excess { owner, outstanding },
                None => NextEvent::Nothing,
            },
        }
    }
}
