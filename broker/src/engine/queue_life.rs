//! The life of a queue: when the worker takes chains from it, when it has stopped, and who gets an answer.
//!
//! [`Life`] is a pure state machine. [`Life::step`] consumes a state and an event and gives the next state and the
//! [`Effects`], which the caller carries out. What a queue and a start consist of does not matter to the machine, so the tests run
//! it with small stand-ins: they compare this table with the code, and search random sequences of events.
//!
//! "busy" means that requests of the queue are under way, or that the queue has an attachment, whose rings may run. "replay" means
//! that chains are left which an earlier process had taken. A queue is "held" while its rings are not in guest memory. Events
//! that are not listed change nothing.
//!
//! <!-- table -->
//! | state | event | effects | next state |
//! | --- | --- | --- | --- |
//! | Stopped | start | - | Waiting |
//! | Waiting | start | - | Waiting |
//! | Waiting | stop, no in-flight record | answer | Stopped |
//! | Waiting | stop, in-flight record | - | Waiting to replay and stop |
//! | Waiting | abandon | - | Stopped |
//! | Waiting | break | broken | Broken |
//! | Waiting | set up | - | Running |
//! | Waiting to replay and stop | start | - | Waiting |
//! | Waiting to replay and stop | stop, in-flight record | - | Waiting to replay and stop |
//! | Waiting to replay and stop | abandon | - | Stopped |
//! | Waiting to replay and stop | break | broken, answer | Stopped |
//! | Waiting to replay and stop | set up | - | Stopping, replaying |
//! | Running | start | - | Draining, then Waiting |
//! | Running | stop | - | Stopping, replaying |
//! | Running | stop, held | - | Stopping |
//! | Running | abandon | - | Draining |
//! | Running | break | broken | Broken, with its queue |
//! | Broken, with its queue | start | - | Draining, then Waiting |
//! | Broken, with its queue | stop | - | Stopping |
//! | Broken, with its queue | abandon | - | Draining |
//! | Broken, with its queue | settle, not busy | - | Broken |
//! | Broken | start | - | Waiting |
//! | Broken | stop | answer | Stopped |
//! | Broken | abandon | - | Stopped |
//! | Stopping, replaying | start | - | Draining, then Waiting |
//! | Stopping, replaying | stop | - | Stopping |
//! | Stopping, replaying | abandon | - | Draining |
//! | Stopping, replaying | break | broken | Stopping |
//! | Stopping, replaying | settle, no replay, not busy | answer | Stopped |
//! | Stopping | start | - | Draining, then Waiting |
//! | Stopping | stop | - | Stopping |
//! | Stopping | abandon | - | Draining |
//! | Stopping | settle, not busy | answer | Stopped |
//! | Draining | start | - | Draining, then Waiting |
//! | Draining | stop | answer | Draining |
//! | Draining | abandon | - | Draining |
//! | Draining | settle, not busy | - | Stopped |
//! | Draining, then Waiting | start | - | Draining, then Waiting |
//! | Draining, then Waiting | stop, no in-flight record | answer | Draining |
//! | Draining, then Waiting | stop, in-flight record | - | Draining, then Waiting to replay and stop |
//! | Draining, then Waiting | abandon | - | Draining |
//! | Draining, then Waiting | settle, not busy | - | Waiting |
//! | Draining, then Waiting to replay and stop | start | - | Draining, then Waiting |
//! | Draining, then Waiting to replay and stop | stop, in-flight record | - | Draining, then Waiting to replay and stop |
//! | Draining, then Waiting to replay and stop | abandon | - | Draining |
//! | Draining, then Waiting to replay and stop | settle, not busy | - | Waiting to replay and stop |
//! <!-- end of table -->

use super::eventfd::Eventfds;
use super::reply::Reply;

/// What the machine asks of a queue that is set up.
pub(super) trait LiveQueue {
    /// Whether requests of the queue are under way, or rings of it may run.
    fn is_busy(&self) -> bool;

    /// Whether chains are left that an earlier process had taken and not completed.
    fn has_replay(&self) -> bool;

    /// Whether its rings are not in guest memory.
    fn is_held(&self) -> bool;

    /// Whether the worker executes the queue; if not, rings of its driver do.
    fn is_executed_by_worker(&self) -> bool;

    /// Index of the next available entry to take.
    fn next_avail(&self) -> u16;

    /// What is left when the queue can no longer work and nothing is under way: it keeps none of the guest's memory.
    fn into_idle(self) -> Idle;
}

/// What the machine asks of a start that has not happened yet.
pub(super) trait PendingStart {
    /// Whether there is an in-flight record: an earlier process may have taken chains, which are executed before the queue stops.
    fn has_inflight_record(&self) -> bool;

    /// Index of the next available entry to take.
    fn next_avail(&self) -> u16;

    /// What is left when the queue cannot be set up.
    fn into_idle(self) -> Idle;
}

/// A broken queue of which nothing is under way.
#[derive(Debug, Default)]
pub(super) struct Idle {
    pub(super) next_avail: u16,
    pub(super) eventfds: Eventfds,
}

/// A start that waits for the disk, or for the end of a former queue.
#[derive(Debug)]
pub(super) struct QueuedStart<S> {
    pub(super) start: S,
    /// The front-end has asked the queue to stop meanwhile. The queue first executes what an earlier process had taken.
    pub(super) stop: Option<Reply<u16>>,
}

impl<S> QueuedStart<S> {
    fn new(start: S) -> Self {
        Self { start, stop: None }
    }
}

/// What a queue does now.
#[derive(Debug)]
pub(super) enum Life<Q, S> {
    /// It was not started, or has stopped.
    Stopped,
    /// It was started and waits for the disk.
    Waiting(QueuedStart<S>),
    /// The worker takes chains from it, while it is enabled, is not held and has no attachment.
    Running(Q),
    /// The driver or the front-end broke the rules. The worker takes nothing more; what is under way ends.
    Broken(Broken<Q>),
    /// The worker takes nothing new. It answers the front-end when what is under way has ended.
    ///
    /// What an earlier process had taken counts as under way: the answer's index says that it was taken.
    Stopping { queue: Q, is_replaying: bool, reply: Reply<u16> },
    /// Its front-end is gone. What is under way ends into what that front-end gave; then comes the next start.
    Draining { queue: Q, next: Option<QueuedStart<S>> },
}

/// A queue that cannot go on.
#[derive(Debug)]
pub(super) enum Broken<Q> {
    /// Something of it may be under way.
    WithQueue(Q),
    /// Nothing is under way, or its rings were unusable from the beginning.
    Idle(Idle),
}

/// What happens to a queue.
#[derive(Debug)]
pub(super) enum LifeEvent<Q, S> {
    /// The front-end starts it.
    Start(S),
    /// The front-end stops it and waits for the index of the next available entry.
    Stop(Reply<u16>),
    /// The front-end is gone.
    Abandon,
    /// The driver or the front-end broke the rules.
    Break,
    /// The queue that waited is set up.
    SetUp(Q),
    /// Something of it may have ended.
    Settle,
}

/// What the caller has to do after a step.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Effects {
    /// Answer the front-end that stopped the queue.
    pub(super) answer: Option<(Reply<u16>, u16)>,
    /// Count the break, and signal the error eventfd.
    pub(super) is_broken: bool,
}

impl<Q: LiveQueue, S: PendingStart> Life<Q, S> {
    /// Takes one event.
    pub(super) fn step(self, event: LifeEvent<Q, S>) -> (Self, Effects) {
        match event {
            LifeEvent::Start(start) => (self.start(start), Effects::default()),
            LifeEvent::Stop(reply) => self.stop(reply),
            LifeEvent::Abandon => (self.abandon(), Effects::default()),
            LifeEvent::Break => self.break_down(),
            LifeEvent::SetUp(queue) => (self.set_up(queue), Effects::default()),
            LifeEvent::Settle => self.settle(),
        }
    }

    fn start(self, start: S) -> Self {
        let next = QueuedStart::new(start);
        match self {
            // No request of the new queue is executed beside an older one, whichever front-end that one belongs to.
            Self::Running(queue)
            | Self::Broken(Broken::WithQueue(queue))
            | Self::Stopping { queue, .. }
            | Self::Draining { queue, .. } => Self::Draining { queue, next: Some(next) },
            Self::Stopped | Self::Waiting(_) | Self::Broken(Broken::Idle(_)) => Self::Waiting(next),
        }
    }

    fn stop(self, reply: Reply<u16>) -> (Self, Effects) {
        let next = match self {
            Self::Running(queue) => {
                // The worker cannot execute what is to be replayed without memory, and must not wait for it.
                let is_replaying = !queue.is_held();
                Self::Stopping { queue, is_replaying, reply }
            }
            Self::Broken(Broken::WithQueue(queue)) | Self::Stopping { queue, .. } => {
                Self::Stopping { queue, is_replaying: false, reply }
            }
            Self::Waiting(QueuedStart { start, .. }) if start.has_inflight_record() => {
                Self::Waiting(QueuedStart { start, stop: Some(reply) })
            }
            Self::Waiting(QueuedStart { start, .. }) => {
                return (Self::Stopped, Effects::answer(reply, start.next_avail()));
            }
            Self::Broken(Broken::Idle(idle)) => return (Self::Stopped, Effects::answer(reply, idle.next_avail)),
            Self::Draining { queue, next: Some(QueuedStart { start, .. }) } if start.has_inflight_record() => {
                Self::Draining { queue, next: Some(QueuedStart { start, stop: Some(reply) }) }
            }
            Self::Draining { queue, next } => {
                let next_avail = next.map_or(queue.next_avail(), |next| next.start.next_avail());
                return (Self::Draining { queue, next: None }, Effects::answer(reply, next_avail));
            }
            // The engine's handle knows the index with which the queue was started, if it was.
            Self::Stopped => Self::Stopped,
        };
        (next, Effects::default())
    }

    fn abandon(self) -> Self {
        match self {
            Self::Running(queue)
            | Self::Broken(Broken::WithQueue(queue))
            | Self::Stopping { queue, .. }
            | Self::Draining { queue, .. } => Self::Draining { queue, next: None },
            Self::Stopped | Self::Waiting(_) | Self::Broken(Broken::Idle(_)) => Self::Stopped,
        }
    }

    fn break_down(self) -> (Self, Effects) {
        let broken = Effects { answer: None, is_broken: true };
        match self {
            Self::Running(queue) => (Self::Broken(Broken::WithQueue(queue)), broken),
            Self::Waiting(QueuedStart { start, stop: Some(reply) }) => {
                let answer = Effects::answer(reply, start.next_avail());
                (Self::Stopped, Effects { is_broken: true, ..answer })
            }
            Self::Waiting(QueuedStart { start, stop: None }) => (Self::Broken(Broken::Idle(start.into_idle())), broken),
            Self::Stopping { queue, is_replaying: true, reply } => {
                (Self::Stopping { queue, is_replaying: false, reply }, broken)
            }
            // The worker takes nothing from the queue anyway.
            other => (other, Effects::default()),
        }
    }

    fn set_up(self, queue: Q) -> Self {
        match self {
            Self::Waiting(QueuedStart { stop: None, .. }) => Self::Running(queue),
            Self::Waiting(QueuedStart { stop: Some(reply), .. }) => Self::Stopping { queue, is_replaying: true, reply },
            other => other,
        }
    }

    fn settle(self) -> (Self, Effects) {
        match self {
            Self::Stopping { queue, is_replaying, reply }
                if !(queue.is_busy() || is_replaying && queue.has_replay()) =>
            {
                (Self::Stopped, Effects::answer(reply, queue.next_avail()))
            }
            Self::Broken(Broken::WithQueue(queue)) if !queue.is_busy() => {
                (Self::Broken(Broken::Idle(queue.into_idle())), Effects::default())
            }
            Self::Draining { queue, next } if !queue.is_busy() => {
                (next.map_or(Self::Stopped, Self::Waiting), Effects::default())
            }
            other => (other, Effects::default()),
        }
    }
}

impl Effects {
    fn answer(reply: Reply<u16>, next_avail: u16) -> Self {
        Self { answer: Some((reply, next_avail)), is_broken: false }
    }
}

/// Which chains of a queue the worker takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    Everything,
    /// Those that an earlier process had taken.
    Replay,
}

impl<Q: LiveQueue, S> Life<Q, S> {
    /// The queue, in whatever state has one.
    #[inline]
    pub(super) fn queue_mut(&mut self) -> Option<&mut Q> {
        match self {
            Self::Running(queue)
            | Self::Broken(Broken::WithQueue(queue))
            | Self::Stopping { queue, .. }
            | Self::Draining { queue, .. } => Some(queue),
            Self::Stopped | Self::Waiting(_) | Self::Broken(Broken::Idle(_)) => None,
        }
    }

    /// The queue, if it belongs to the present front-end.
    pub(super) fn present_mut(&mut self) -> Option<&mut Q> {
        match self {
            Self::Draining { .. } => None,
            other => other.queue_mut(),
        }
    }

    /// The start that has not happened yet.
    pub(super) fn queued_start_mut(&mut self) -> Option<&mut QueuedStart<S>> {
        match self {
            Self::Waiting(next) | Self::Draining { next: Some(next), .. } => Some(next),
            _ => None,
        }
    }

    /// The queue, if the worker takes new chains from it.
    #[inline]
    pub(super) fn taking_mut(&mut self, is_enabled: bool) -> Option<&mut Q> {
        match self {
            Self::Running(queue) if is_enabled && !queue.is_held() && queue.is_executed_by_worker() => Some(queue),
            _ => None,
        }
    }

    /// The queue, if the worker takes chains from it, and which ones.
    #[inline]
    pub(super) fn taking_or_replaying_mut(&mut self, is_enabled: bool) -> Option<(&mut Q, Takes)> {
        match self {
            Self::Stopping { queue, is_replaying: true, .. } => Some((queue, Takes::Replay)),
            other => other.taking_mut(is_enabled).map(|queue| (queue, Takes::Everything)),
        }
    }
}

#[cfg(test)]
mod tests;
