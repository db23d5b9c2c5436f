//! The driver's side of the epochs of one queue.

use super::{Actions, Announcement, Area, Epoch, Phase};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The device's word was read (with acquire): after each callback of the queue and after each EVENT.
    Announced(u32),
    /// Nothing is outstanding on the ring that is being drained.
    Drained,
    /// The CQ of the ring that has ended is empty, and every request without a completion was put aside.
    Reaped,
    /// ATTACH is complete, well or not: no ring is left.
    AttachCompleted,
    /// The driver itself wants to have its queue and its memory back.
    Detach,
}

/// What is to be done now, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Read the ring's record from the control page, check it, begin a [`DriverRing`](crate::DriverRing) with all indexes
    /// zero on the epoch's area, and submit: first what was put aside, then what is new.
    Start(Epoch),
    /// Submit nothing more, reap until nothing is outstanding, then [`Event::Drained`]. If nothing is: at once.
    Drain,
    /// Submit nothing more. Take what is in the CQ of this area, put every request aside that has no completion or one of
    /// -ECANCELED, then [`Event::Reaped`].
    Reap(Area),
    /// Store the word with release, then ring the queue's doorbell.
    Acknowledge(Announcement),
    /// Set the detach word, then send DETACH on queue 0.
    RequestDetach,
    /// Reap ARM and ATTACH. The control page, the areas and the queue are the driver's again: what was put aside goes
    /// there as ordinary requests.
    Release,
    /// The device did what no device may do. Nothing more is submitted; reset it.
    Reset,
}

/// Where the driver is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing is on any ring; the end of `epoch` was acknowledged ([`Epoch::NONE`]: ATTACH was sent).
    Idle {
        /// The epoch that ended last.
        epoch: Epoch,
    },
    /// Submits and reaps.
    Running {
        /// The epoch whose ring is used.
        epoch: Epoch,
    },
    /// Only reaps.
    Draining {
        /// The epoch whose ring is being drained.
        epoch: Epoch,
    },
    /// Takes the completions of a ring that has ended.
    Reaping {
        /// The epoch that ended.
        epoch: Epoch,
    },
    /// Takes the completions of a ring that has ended. No other follows.
    Leaving,
    /// Not attached any more.
    Detached,
    /// Waits for the reset of a device that broke the protocol.
    Failed,
}

/// The driver's side of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    state: State,
    /// The word last written; 0 before the first.
    acknowledged: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A queue whose ATTACH was just sent, with a control page of zeroes.
    pub fn new() -> Self {
        Self { state: State::Idle { epoch: Epoch::NONE }, acknowledged: 0 }
    }

    /// Where the driver is.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether requests may be pushed.
    pub fn may_submit(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// Takes an event. What cannot come from a device that keeps to the protocol leads to [`Action::Reset`].
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
            // A caller that reports more than it was asked for: it has nothing to say to anybody.
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
            // The ring of the next epoch may have come and gone before the driver looked.
            State::Idle { epoch } if heard.epoch == epoch.next() => match heard.phase {
                Phase::Open => {
                    actions.push(Action::Start(heard.epoch));
                    State::Running { epoch: heard.epoch }
                }
                Phase::Drain | Phase::Ended => self.acknowledge(heard, actions),
            },
            // A drain was acknowledged and the device died: the one after it begins with the end.
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
            // Already reaping: the same completions are asked for.
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
