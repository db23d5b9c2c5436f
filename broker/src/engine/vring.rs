//! One vring of a worker: its life, its eventfds, its counters.

use std::rc::Rc;
use std::sync::Arc;

use ringpass_guest_abi::attach_sequence::AttachSequence;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::EventFd;

use super::attach::{Attachment, PendingAttachRequest};
use super::command::WhichEventfd;
use super::counters::QueueCounters;
use super::eventfd::{Eventfds, Kick, Signal};
use super::queue_life::{Broken, Effects, Idle, Life, LifeEvent, LiveQueue, PendingStart, QueuedStart, Takes};
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::RequestTypes;
use crate::virtqueue::{DirtyLog, QueueError, QueueSetup, SplitQueue};

/// A start that could not happen yet.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) setup: QueueSetup,
    pub(super) eventfds: Eventfds,
}

/// What executes a queue.
#[derive(Debug)]
pub(super) enum Executor {
    /// The worker: it takes chains from the virtqueue.
    Worker,
    /// Rings in guest memory. ATTACH is pending on the virtqueue, and the worker takes nothing more from it.
    Rings(Box<Attachment>),
}

/// A vring whose queue is set up.
#[derive(Debug)]
pub(super) struct ActiveQueue {
    pub(super) queue: SplitQueue,
    /// What its driver may ask for.
    pub(super) request_types: RequestTypes,
    /// VIRTIO_F_VERSION_1 is negotiated. Drivers of legacy devices get no rings.
    pub(super) has_version_1: bool,
    /// What new chains are taken from, and where the rings are.
    pub(super) memory: Rc<DeviceMemory>,
    pub(super) eventfds: Eventfds,
    /// Requests under way.
    pub(super) in_flight: u16,
    /// Its rings are not in guest memory as it is now: the queue waits for a table that has them. What is under way ends into the
    /// rings as they were.
    pub(super) is_held: bool,
    /// Where the worker marks what the queue writes: kept when the front-end goes, since the next one has a log of its own.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// The worker has put chains into the used ring that the driver does not see yet.
    pub(super) has_unpublished: bool,
    /// What the driver sent since the queue started, as far as rings go.
    pub(super) sequence: AttachSequence,
    pub(super) executor: Executor,
    /// Queue 0: the EVENT that waits for something to tell. The in-flight region records it.
    pub(super) event: Option<PendingAttachRequest>,
}

impl ActiveQueue {
    /// Sets a queue up.
    ///
    /// # Errors
    ///
    /// As [`SplitQueue::new`].
    pub(super) fn new(
        index: u16,
        start: &mut Start,
        memory: Rc<DeviceMemory>,
        log: Option<Arc<DirtyLog>>,
    ) -> Result<Self, QueueError> {
        let queue = SplitQueue::new(start.setup.clone(), &memory)?;
        if let Some(log) = &log {
            queue.mark_used_ring(log);
        }
        Ok(Self {
            queue,
            request_types: RequestTypes::negotiated(start.setup.driver_features),
            has_version_1: start.setup.driver_features & 1 << VIRTIO_F_VERSION_1 != 0,
            memory,
            eventfds: std::mem::take(&mut start.eventfds),
            in_flight: 0,
            is_held: false,
            log,
            // An earlier process may have completed chains and not have signalled.
            has_unpublished: true,
            sequence: AttachSequence::new(index),
            executor: Executor::Worker,
            event: None,
        })
    }

    pub(super) fn attachment(&self) -> Option<&Attachment> {
        match &self.executor {
            Executor::Worker => None,
            Executor::Rings(attachment) => Some(attachment),
        }
    }

    pub(super) fn attachment_mut(&mut self) -> Option<&mut Attachment> {
        match &mut self.executor {
            Executor::Worker => None,
            Executor::Rings(attachment) => Some(attachment),
        }
    }

    /// Ends the attachment: the worker executes the queue again.
    pub(super) fn take_attachment(&mut self) -> Option<Box<Attachment>> {
        match std::mem::replace(&mut self.executor, Executor::Worker) {
            Executor::Worker => None,
            Executor::Rings(attachment) => Some(attachment),
        }
    }
}

impl LiveQueue for ActiveQueue {
    fn is_busy(&self) -> bool {
        self.in_flight > 0 || !self.is_executed_by_worker()
    }

    fn has_replay(&self) -> bool {
        self.queue.has_replay()
    }

    #[inline]
    fn is_held(&self) -> bool {
        self.is_held
    }

    #[inline]
    fn is_executed_by_worker(&self) -> bool {
        matches!(self.executor, Executor::Worker)
    }

    fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    fn into_idle(self) -> Idle {
        Idle { next_avail: self.queue.next_avail(), eventfds: self.eventfds }
    }
}

impl PendingStart for Start {
    fn has_inflight_record(&self) -> bool {
        self.setup.inflight.is_some()
    }

    fn next_avail(&self) -> u16 {
        self.setup.next_avail
    }

    fn into_idle(self) -> Idle {
        Idle { next_avail: self.setup.next_avail, eventfds: self.eventfds }
    }
}

/// One vring.
#[derive(Debug)]
pub(super) struct Vring {
    /// Index of the queue in the device.
    pub(super) index: u16,
    life: Life<ActiveQueue, Start>,
    /// VHOST_USER_SET_VRING_ENABLE.
    pub(super) is_enabled: bool,
    pub(super) kick_poll: KickPoll,
    pub(super) counters: Arc<QueueCounters>,
}

/// The io_uring's interest in the kick eventfd.
#[derive(Debug, Default)]
pub(super) struct KickPoll {
    /// A completion is to come.
    pub(super) is_armed: bool,
    /// Counts kick eventfds, so that the worker does not take a completion of an earlier one for this one's.
    pub(super) generation: u32,
}

impl Vring {
    pub(super) fn new(index: u16, counters: Arc<QueueCounters>) -> Self {
        Self { index, life: Life::Stopped, is_enabled: false, kick_poll: KickPoll::default(), counters }
    }

    /// Takes an event of the queue's life. True: it broke.
    fn step(&mut self, event: LifeEvent<ActiveQueue, Start>) -> bool {
        let (life, effects) = std::mem::replace(&mut self.life, Life::Stopped).step(event);
        self.life = life;
        let Effects { answer, is_broken } = effects;
        if let Some((reply, next_avail)) = answer {
            // A front-end that is gone does not wait.
            let _ = reply.send(next_avail);
        }
        if is_broken {
            self.counters.broken.add(1);
            self.signal_error();
        }
        is_broken
    }

    /// The front-end starts the queue.
    pub(super) fn start(&mut self, start: Start) {
        self.is_enabled = false;
        self.step(LifeEvent::Start(start));
    }

    /// The front-end stops the queue.
    pub(super) fn stop(&mut self, reply: super::reply::Reply<u16>) {
        self.step(LifeEvent::Stop(reply));
    }

    /// The front-end is gone.
    pub(super) fn abandon(&mut self) {
        self.step(LifeEvent::Abandon);
    }

    /// The worker takes nothing more, and the error eventfd says so. False: it would have taken nothing anyway.
    pub(super) fn break_down(&mut self) -> bool {
        self.step(LifeEvent::Break)
    }

    /// Something of the queue may have ended.
    pub(super) fn settle(&mut self) {
        self.step(LifeEvent::Settle);
    }

    /// Sets up the queue, which waits.
    ///
    /// # Errors
    ///
    /// As [`SplitQueue::new`]; it still waits.
    pub(super) fn set_up(&mut self, memory: Rc<DeviceMemory>, log: Option<Arc<DirtyLog>>) -> Result<(), QueueError> {
        let Life::Waiting(QueuedStart { start, .. }) = &mut self.life else { return Ok(()) };
        let queue = ActiveQueue::new(self.index, start, memory, log)?;
        self.step(LifeEvent::SetUp(queue));
        Ok(())
    }

    /// Whether the queue waits to be set up. `Some(true)`: the front-end has asked it to stop meanwhile.
    pub(super) fn waits(&self) -> Option<bool> {
        match &self.life {
            Life::Waiting(next) => Some(next.stop.is_some()),
            _ => None,
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        matches!(self.life, Life::Stopped)
    }

    #[inline]
    pub(super) fn is_running(&self) -> bool {
        matches!(self.life, Life::Running(_))
    }

    /// The queue, in whatever state has one.
    #[inline]
    pub(super) fn active_mut(&mut self) -> Option<&mut ActiveQueue> {
        self.life.queue_mut()
    }

    /// The queue, if it belongs to the present front-end.
    pub(super) fn present_mut(&mut self) -> Option<&mut ActiveQueue> {
        self.life.present_mut()
    }

    /// The queue, if it runs.
    pub(super) fn running_mut(&mut self) -> Option<&mut ActiveQueue> {
        match &mut self.life {
            Life::Running(active) => Some(active),
            _ => None,
        }
    }

    /// The queue, if it is stopping.
    pub(super) fn stopping_mut(&mut self) -> Option<&mut ActiveQueue> {
        match &mut self.life {
            Life::Stopping { queue, .. } => Some(queue),
            _ => None,
        }
    }

    /// The queue, if the worker takes new chains from it.
    #[inline]
    pub(super) fn taking_mut(&mut self) -> Option<&mut ActiveQueue> {
        self.life.taking_mut(self.is_enabled)
    }

    /// The queue, if the worker takes chains from it, and which ones.
    #[inline]
    pub(super) fn taking_or_replaying_mut(&mut self) -> Option<(&mut ActiveQueue, Takes)> {
        self.life.taking_or_replaying_mut(self.is_enabled)
    }

    /// The attachment, in whatever state has one.
    pub(super) fn attachment_mut(&mut self) -> Option<&mut Attachment> {
        self.active_mut().and_then(ActiveQueue::attachment_mut)
    }

    /// Whether the worker listens to the queue's kicks although it takes no chains: they are doorbells.
    pub(super) fn has_doorbell(&mut self) -> bool {
        self.running_mut().is_some_and(|active| !active.is_executed_by_worker())
    }

    /// The kick eventfd to which the worker listens while the queue runs, and the io_uring's interest in it.
    pub(super) fn running_kick_mut(&mut self) -> Option<(&Kick, &mut KickPoll)> {
        match &self.life {
            Life::Running(active) => active.eventfds.kick.as_ref().map(|kick| (kick, &mut self.kick_poll)),
            _ => None,
        }
    }

    /// The eventfds that the present front-end gave.
    pub(super) fn eventfds_mut(&mut self) -> Option<&mut Eventfds> {
        match &mut self.life {
            Life::Running(active) | Life::Broken(Broken::WithQueue(active)) | Life::Stopping { queue: active, .. } => {
                Some(&mut active.eventfds)
            }
            Life::Waiting(next) | Life::Draining { next: Some(next), .. } => Some(&mut next.start.eventfds),
            Life::Broken(Broken::Idle(idle)) => Some(&mut idle.eventfds),
            Life::Stopped | Life::Draining { next: None, .. } => None,
        }
    }

    /// Where the used ring is for the dirty log from now on.
    pub(super) fn set_used_log(&mut self, used_log_gpa: Option<u64>) {
        if let Some(active) = self.present_mut() {
            active.queue.set_used_log_gpa(used_log_gpa);
        }
        if let Some(next) = self.life.queued_start_mut() {
            next.start.setup.used_log_gpa = used_log_gpa;
        }
    }

    /// Lets the driver see the chains that the worker has completed since the last time, and interrupts it if it wants that.
    #[inline]
    pub(super) fn publish(&mut self) {
        let index = self.index;
        let Some(active) = self.life.queue_mut() else { return };
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
        let Some(active) = self.life.queue_mut() else { return };
        if let Some(call) = &active.eventfds.call {
            call.send(index);
            self.counters.signals.add(1);
        }
    }

    fn signal_error(&mut self) {
        let index = self.index;
        if let Some(err) = self.eventfds_mut().and_then(|eventfds| eventfds.err.as_ref()) {
            err.send(index);
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
}
