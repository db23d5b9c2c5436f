//! One vring of a worker: its state, its eventfds, its counters.

use std::rc::Rc;
use std::sync::Arc;

use ringpass_guest_abi::attach_sequence::AttachSequence;
use vmm_sys_util::eventfd::EventFd;

use super::attach::{AttachRequest, Attachment};
use super::command::WhichEventfd;
use super::counters::QueueCounters;
use super::eventfd::{Eventfds, Kick, Signal};
use super::reply::Reply;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::RequestTypes;
use crate::virtqueue::{DirtyLog, QueueSetup, SplitQueue};

/// What a vring does now.
#[derive(Debug)]
pub(super) enum State {
    /// It was not started, or was stopped.
    Stopped,
    /// It was started, and waits for the disk.
    Waiting(Start),
    /// It takes chains, while it is enabled.
    Running(Active),
    /// The driver or the front-end broke the rules: it takes nothing more. What is under way ends.
    Broken(Broken),
    /// It takes nothing new and was asked to stop; the answer goes out when what is under way has ended.
    ///
    /// What an earlier process had taken counts as under way: the answer says that it was taken.
    Stopping { active: Active, is_replaying: bool, reply: Reply<u16> },
    /// Its front-end is gone. What is under way ends into what that front-end gave; then comes the next start.
    Draining { active: Active, next: Option<Start> },
}

/// A start that could not happen yet.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) setup: QueueSetup,
    pub(super) eventfds: Eventfds,
    /// It was asked to stop meanwhile, and an earlier process may have left something to be executed before that.
    pub(super) stop: Option<Reply<u16>>,
}

/// A vring whose queue is set up.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) queue: SplitQueue,
    /// What its driver may ask for.
    pub(super) request_types: RequestTypes,
    /// What new chains are taken from, and where the rings are.
    pub(super) memory: Rc<DeviceMemory>,
    pub(super) eventfds: Eventfds,
    /// Requests under way.
    pub(super) in_flight: u16,
    /// Its rings are not in the guest's memory as it is now: it waits for a table that has them. What is under way ends
    /// into the rings as they were.
    pub(super) is_held: bool,
    /// Where what the queue writes is marked: kept when its front-end goes, since the next one has a log of its own.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// Chains were given back that the driver does not see yet.
    pub(super) has_unpublished: bool,
    /// What was taken from it since it started, as far as rings go.
    pub(super) sequence: AttachSequence,
    /// It is attached: nothing is taken from it.
    pub(super) attachment: Option<Box<Attachment>>,
    /// Queue 0: the EVENT that waits for something to tell. It is recorded in the in-flight region.
    pub(super) event: Option<AttachRequest>,
}

impl Active {
    /// Whether something of it is still under way: requests, or rings.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight > 0 || self.attachment.is_some()
    }

    fn takes(&self) -> bool {
        !self.is_held && self.attachment.is_none()
    }
}

/// Which chains of a queue are to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    Everything,
    /// Those that an earlier process had taken.
    Replay,
}

/// A vring that cannot go on.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a vring has the room anyway, for its other states")]
pub(super) enum Broken {
    /// Something of it is under way.
    Active(Active),
    /// Nothing is under way, so it keeps none of the guest's memory; or its rings were unusable from the beginning.
    Idle { next_avail: u16, eventfds: Eventfds },
}

/// One vring.
#[derive(Debug)]
pub(super) struct Vring {
    /// Index of the queue in the device.
    pub(super) index: u16,
    pub(super) state: State,
    /// VHOST_USER_SET_VRING_ENABLE.
    pub(super) enabled: bool,
    pub(super) kick_poll: KickPoll,
    pub(super) counters: Arc<QueueCounters>,
}

/// The ring's interest in the kick eventfd.
#[derive(Debug, Default)]
pub(super) struct KickPoll {
    /// A completion is to come.
    pub(super) is_armed: bool,
    /// Counts kick eventfds, so that what comes for an earlier one is not taken for this one's.
    pub(super) generation: u32,
}

impl Vring {
    pub(super) fn new(index: u16, counters: Arc<QueueCounters>) -> Self {
        Self { index, state: State::Stopped, enabled: false, kick_poll: KickPoll::default(), counters }
    }

    /// The queue, in whatever state has one.
    #[inline]
    pub(super) fn active_mut(&mut self) -> Option<&mut Active> {
        match &mut self.state {
            State::Running(active)
            | State::Broken(Broken::Active(active))
            | State::Stopping { active, .. }
            | State::Draining { active, .. } => Some(active),
            State::Stopped | State::Waiting(_) | State::Broken(Broken::Idle { .. }) => None,
        }
    }

    /// The queue, if it belongs to the present front-end.
    pub(super) fn present_mut(&mut self) -> Option<&mut Active> {
        if let State::Draining { .. } = self.state { None } else { self.active_mut() }
    }

    /// The queue, if it is to take chains.
    #[inline]
    pub(super) fn taking_mut(&mut self) -> Option<&mut Active> {
        match &mut self.state {
            State::Running(active) if self.enabled && active.takes() => Some(active),
            _ => None,
        }
    }

    /// The queue, if chains are to be taken from it, and which.
    #[inline]
    pub(super) fn taking_or_replaying_mut(&mut self) -> Option<(&mut Active, Takes)> {
        match &mut self.state {
            State::Running(active) if self.enabled && active.takes() => Some((active, Takes::Everything)),
            State::Stopping { active, is_replaying: true, .. } => Some((active, Takes::Replay)),
            _ => None,
        }
    }

    /// The attachment, in whatever state has one.
    pub(super) fn attachment_mut(&mut self) -> Option<&mut Attachment> {
        self.active_mut().and_then(|active| active.attachment.as_deref_mut())
    }

    /// Whether the queue's kicks are to be heard although it takes no chains: they are doorbells.
    pub(super) fn has_doorbell(&self) -> bool {
        matches!(&self.state, State::Running(active) if active.attachment.is_some())
    }

    /// The eventfds that the present front-end gave.
    pub(super) fn eventfds_mut(&mut self) -> Option<&mut Eventfds> {
        match &mut self.state {
            State::Running(active) | State::Broken(Broken::Active(active)) | State::Stopping { active, .. } => {
                Some(&mut active.eventfds)
            }
            State::Waiting(start) | State::Draining { next: Some(start), .. } => Some(&mut start.eventfds),
            State::Broken(Broken::Idle { eventfds, .. }) => Some(eventfds),
            State::Stopped | State::Draining { next: None, .. } => None,
        }
    }

    /// Lets the driver see the chains that were given back since the last time, and interrupts it if it wants that.
    #[inline]
    pub(super) fn publish(&mut self) {
        let index = self.index;
        let Some(active) = self.active_mut() else { return };
        if !std::mem::take(&mut active.has_unpublished) {
            return;
        }
        active.queue.publish(active.log.as_deref());
        if !active.queue.needs_signal() {
            return;
        }
        if let Some(call) = &active.eventfds.call {
            call.send(index);
            self.counters.signals.add(1);
        }
    }

    /// Interrupts the driver, whether it wants that or not.
    pub(super) fn signal(&mut self) {
        let index = self.index;
        let Some(active) = self.active_mut() else { return };
        if let Some(call) = &active.eventfds.call {
            call.send(index);
            self.counters.signals.add(1);
        }
    }

    /// Replaces one of those eventfds.
    pub(super) fn set_eventfd(&mut self, which: WhichEventfd, eventfd: Option<EventFd>) {
        let Some(eventfds) = self.eventfds_mut() else { return };
        match which {
            WhichEventfd::Kick => eventfds.kick = eventfd.map(Kick::new),
            WhichEventfd::Call => eventfds.call = eventfd.map(Signal::new),
            WhichEventfd::Err => eventfds.err = eventfd.map(Signal::new),
        }
    }

    /// The front-end is gone.
    pub(super) fn abandon(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Stopped) {
            State::Running(active)
            | State::Broken(Broken::Active(active))
            | State::Stopping { active, .. }
            | State::Draining { active, .. } => State::Draining { active, next: None },
            State::Stopped | State::Waiting(_) | State::Broken(Broken::Idle { .. }) => State::Stopped,
        };
    }

    /// Nothing more is taken, and the error eventfd says so. False: nothing would have been taken anyway.
    pub(super) fn break_down(&mut self) -> bool {
        self.state = match std::mem::replace(&mut self.state, State::Stopped) {
            State::Running(active) => State::Broken(Broken::Active(active)),
            State::Waiting(Start { setup, stop: Some(reply), .. }) => {
                let _ = reply.send(setup.next_avail);
                State::Stopped
            }
            State::Waiting(Start { setup, eventfds, stop: None }) => {
                State::Broken(Broken::Idle { next_avail: setup.next_avail, eventfds })
            }
            State::Stopping { active, is_replaying: true, reply } => {
                State::Stopping { active, is_replaying: false, reply }
            }
            other => {
                self.state = other;
                return false;
            }
        };
        self.counters.broken.add(1);
        let index = self.index;
        if let Some(err) = self.eventfds_mut().and_then(|eventfds| eventfds.err.as_ref()) {
            err.send(index);
        }
        true
    }
}
