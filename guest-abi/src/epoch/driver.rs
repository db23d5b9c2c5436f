//! The driver's side of the epochs of one queue, as a state machine.

use super::{Actions, Announcement, Area, Epoch, Phase};

/// An event that the driver reports to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The driver has read the device's word (with acquire): after each callback of the queue, and after each EVENT.
    Announced(u32),
    /// No request is outstanding on the draining ring.
    Drained,
    /// The CQ of the ended ring is empty, and the driver has set aside every request without a completion.
    Reaped,
    /// ATTACH is complete, successfully or not. No ring is left.
    AttachCompleted,
    /// The driver itself wants its queue and its memory back.
    Detach,
}

/// An action that the driver must do now, in the order of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Read the ring's record from the control page, check it, begin a [`DriverRing`](crate::DriverRing) with all indexes
    /// zero on the epoch's area, and submit: first the requests that were set aside, then new ones.
    Start(Epoch),
    /// Submit no more requests, reap until none is outstanding, and then report [`Event::Drained`]; at once if none is.
    Drain,
    /// Submit no more requests. Reap the CQ of this area, set aside every request without a completion or with a
    /// completion of -ECANCELED, and then report [`Event::Reaped`].
    Reap(Area),
    /// Store the word with release, then ring the queue's doorbell.
    Acknowledge(Announcement),
    /// Set the detach word with release, then ring the queue's doorbell.
    RequestDetach,
    /// Reap ARM and ATTACH. The control page, the areas and the queue belong to the driver again. Submit the requests
    /// that were set aside to the queue as ordinary requests.
    Release,
    /// The device violated the protocol. Submit no more requests, and reset the device.
    Reset,
}

/// The state of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No request is on any ring. The driver has acknowledged the end of `epoch` ([`Epoch::NONE`]: it has sent ATTACH).
    Idle {
        /// The epoch that ended last.
        epoch: Epoch,
    },
    /// The driver submits and reaps.
    Running {
        /// The epoch whose ring is in use.
        epoch: Epoch,
    },
    /// The driver only reaps.
    Draining {
        /// The epoch whose ring the driver drains.
        epoch: Epoch,
    },
    /// The driver takes the completions of a ring that has ended.
    Reaping {
        /// The epoch that ended.
        epoch: Epoch,
    },
    /// The driver takes the completions of a ring that has ended. No other ring follows.
    Leaving,
    /// The queue is not attached any more.
    Detached,
    /// The device violated the protocol. The driver must reset it.
    Failed,
}

/// The driver's side of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    state: State,
    /// The last word that the driver wrote; 0 before the first.
    acknowledged: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A queue whose ATTACH the driver has just sent, with a control page of zeroes.
    pub fn new() -> Self {
        Self { state: State::Idle { epoch: Epoch::NONE }, acknowledged: 0 }
    }

    /// The current state.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether the driver may push requests.
    pub fn may_submit(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// Processes an event. A word that no correct device writes leads to [`Action::Reset`].
    pub fn step(&mut self, event: Event) -> Actions<Action> {
        let mut actions = Actions::none();
        self.state = match (self.state, event) {
            (State::Detached, _) => self.state,
            (_, Event::AttachCompleted) => self.leave(&mut actions),
            (State::Failed, _) => self.state,
            (state, Event::Announced(word)) => self.hear(state, word, &mut actions),
            (State::Draining { epoch }, Event::Drained) => {
                self.acknowledge(Announcement { epoch, phase: Phase::Drain }, &mut actions)
            }
            (State::Reaping { epoch }, Event::Reaped) => {
                self.acknowledge(Announcement { epoch, phase: Phase::Ended }, &mut actions)
            }
            (State::Leaving, Event::Reaped) => {
                actions.push(Action::Release);
                State::Detached
            }
            (State::Leaving, _) => self.state,
            (state, Event::Detach) => {
                actions.push(Action::RequestDetach);
                state
            }
            // The caller reports something that no action asked for: ignored.
            (state, Event::Drained | Event::Reaped) => state,
        };
        actions
    }

    fn hear(&mut self, state: State, word: u32, actions: &mut Actions<Action>) -> State {
        if matches!(state, State::Leaving) || word == self.acknowledged {
            return state;
        }
        let Some(heard) = Announcement::from_word(word) else {
            return fail(actions);
        };
        let current = |phase, epoch| Announcement { epoch, phase };
        match state {
            // The ring of the next epoch may have started and ended before the driver read the word.
            State::Idle { epoch } if heard.epoch == epoch.next() => match heard.phase {
                Phase::Open => {
                    actions.push(Action::Start(heard.epoch));
                    State::Running { epoch: heard.epoch }
                }
                Phase::Drain | Phase::Ended => self.acknowledge(heard, actions),
            },
            // The driver acknowledged a drain, then the device died: the next device process begins with the end.
            State::Idle { epoch } if heard == current(Phase::Ended, epoch) => self.acknowledge(heard, actions),
            State::Running { epoch } if heard == current(Phase::Open, epoch) => state,
            State::Running { epoch } if heard == current(Phase::Drain, epoch) => {
                actions.push(Action::Drain);
                State::Draining { epoch }
            }
            State::Draining { epoch } if heard == current(Phase::Drain, epoch) => state,
            State::Running { epoch } | State::Draining { epoch } if heard == current(Phase::Ended, epoch) => {
                actions.push(Action::Reap(epoch.area()));
                State::Reaping { epoch }
            }
            State::Reaping { epoch } if heard == current(Phase::Ended, epoch) => state,
            _ => fail(actions),
        }
    }

    fn acknowledge(&mut self, heard: Announcement, actions: &mut Actions<Action>) -> State {
        self.acknowledged = heard.to_word();
        actions.push(Action::Acknowledge(heard));
        State::Idle { epoch: heard.epoch }
    }

    fn leave(&self, actions: &mut Actions<Action>) -> State {
        match self.state {
            State::Running { epoch } | State::Draining { epoch } => {
                actions.push(Action::Reap(epoch.area()));
                State::Leaving
            }
            // The driver reaps already; the same completions are needed.
            State::Reaping { .. } | State::Leaving => State::Leaving,
            State::Idle { .. } | State::Failed | State::Detached => {
                actions.push(Action::Release);
                State::Detached
            }
        }
    }
}

fn fail(actions: &mut Actions<Action>) -> State {
    actions.push(Action::Reset);
    State::Failed
}
