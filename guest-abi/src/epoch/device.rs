//! The device's side of the epochs of one queue.

use super::{Actions, Announcement, Area, Epoch, Phase};
use crate::request::ErrorCode;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// ATTACH was taken from the queue, and its geometry is good. The two words were read once from the control page,
    /// where this device wrote nothing yet.
    Attach {
        /// The announcement word, as another device process may have left it.
        found: u32,
        /// Whether the detach word is set.
        detach: bool,
    },
    /// Nothing older than this attachment is left: every ring that ever used the areas is gone, those of other processes
    /// too (their lock on the disk is free and this process has it). Only what the wait of this attachment found: one that
    /// was begun for an earlier attachment is not reported.
    Released,
    /// The ring that was to be built runs.
    Built,
    /// The ring could not be built.
    BuildFailed(ErrorCode),
    /// The ring of this area, which was closed, is really gone: its I/O has ended and it writes to nothing any more.
    Gone(Area),
    /// The driver's word was read. Whatever it is.
    Acknowledged(u32),
    /// The ring should be replaced, with the driver's help: an operator wants another mode.
    Drain,
    /// The ring must end at once, and another may follow.
    End,
    /// The ring must end at once and none follows: DETACH, or the device gives out no ring any more.
    Finish(ErrorCode),
    /// The queue stops (GET_VRING_BASE, reset, the front-end is gone). ATTACH stays what it is, and is seen again if
    /// the queue starts again.
    Stop,
}

/// What is to be done now, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Begin to wait for [`Event::Released`], on a thread that may wait.
    AwaitRelease,
    /// Store the word with release, signal the queue's call eventfd unconditionally, complete EVENT, and then look at the
    /// driver's word ([`Event::Acknowledged`]): it may have answered already, to the device before this one.
    Announce(Announcement),
    /// Zero the head of the epoch's area, make a ring there, write the ring's record into the control page.
    Build(Epoch),
    /// Close the ring of this area, and begin to wait for [`Event::Gone`].
    Close(Area),
    /// Write the answer and status of ATTACH, put it into the used ring, signal unconditionally, and complete EVENT. The
    /// control page and the areas are the driver's alone from here on.
    CompleteAttach(ErrorCode),
    /// The queue has stopped: nothing of this attachment touches guest memory any more.
    Stopped,
}

/// Where the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No ATTACH is pending.
    Detached,
    /// ATTACH is pending; something older may still write to the areas or to the disk.
    Waiting {
        /// What was found in the control page.
        found: Option<Announcement>,
    },
    /// Nobody uses a ring. The one of `epoch` is being built, or waits until the ring that last used its area is gone.
    Opening {
        /// The epoch that will open.
        epoch: Epoch,
    },
    /// (epoch, Open) is announced.
    Open {
        /// The epoch whose ring runs.
        epoch: Epoch,
    },
    /// (epoch, Drain) is announced.
    Draining {
        /// The epoch whose ring still runs.
        epoch: Epoch,
    },
    /// All rings are closed and not all are gone.
    Ending {
        /// The epoch whose end will be announced.
        epoch: Epoch,
    },
    /// (epoch, Ended) is announced.
    Ended {
        /// The epoch whose end was announced.
        epoch: Epoch,
    },
    /// All rings are closed; when all are gone ATTACH completes.
    Finishing {
        /// What the driver is told.
        code: ErrorCode,
    },
    /// All rings are closed; when all are gone the queue has stopped.
    Stopping,
}

/// What an area is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AreaUse {
    /// Nothing.
    Free,
    /// A ring is being built there.
    Building,
    /// A ring runs there.
    Live,
    /// A ring was closed there and may still write to it.
    Dying,
}

/// The device's side of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    state: State,
    areas: [AreaUse; 2],
    released: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A queue that is not attached.
    pub fn new() -> Self {
        Self { state: State::Detached, areas: [AreaUse::Free; 2], released: false }
    }

    /// Where the device is.
    pub fn state(&self) -> State {
        self.state
    }

    /// What an area is used for.
    pub fn area(&self, area: Area) -> AreaUse {
        self.areas[area.index()]
    }

    /// Takes an event. One that has no meaning in this state changes nothing: it came late.
    ///
    /// Nothing here believes the driver: what it writes can make epochs come early, which harms its own data, and nothing
    /// else.
    pub fn step(&mut self, event: Event) -> Actions<Action> {
        let mut actions = Actions::none();
        self.note_area(event);
        self.transition(event, &mut actions);
        self.settle(&mut actions);
        actions
    }

    fn note_area(&mut self, event: Event) {
        let (from, to) = match event {
            Event::Built => (AreaUse::Building, AreaUse::Live),
            Event::BuildFailed(_) => (AreaUse::Building, AreaUse::Free),
            Event::Gone(area) => {
                let area = &mut self.areas[area.index()];
                if *area == AreaUse::Dying {
                    *area = AreaUse::Free;
                }
                return;
            }
            _ => return,
        };
        // At most one is being built.
        for area in &mut self.areas {
            if *area == from {
                *area = to;
            }
        }
    }

    fn transition(&mut self, event: Event, actions: &mut Actions<Action>) {
        self.state = match (self.state, event) {
            (State::Detached, Event::Attach { found, detach }) => {
                self.released = false;
                actions.push(Action::AwaitRelease);
                if detach {
                    State::Finishing { code: ErrorCode::Detached }
                } else {
                    State::Waiting { found: Announcement::from_word(found) }
                }
            }
            (State::Detached, _) => return,
            (_, Event::Stop) => State::Stopping,
            (State::Stopping, _) => return,
            (state, Event::Released) => {
                self.released = true;
                state
            }
            (State::Finishing { .. }, _) => return,
            (_, Event::Finish(code)) => State::Finishing { code },
            (State::Opening { .. }, Event::BuildFailed(code)) => State::Finishing { code },
            (State::Opening { epoch }, Event::End) => State::Ending { epoch: epoch.previous() },
            (State::Open { epoch } | State::Draining { epoch }, Event::End) => State::Ending { epoch },
            (State::Open { epoch }, Event::Drain) => {
                actions.push(Action::Announce(Announcement { epoch, phase: Phase::Drain }));
                State::Draining { epoch }
            }
            (State::Draining { epoch }, Event::Acknowledged(word))
                if word == (Announcement { epoch, phase: Phase::Drain }).to_word() =>
            {
                self.close(epoch.area(), actions);
                State::Opening { epoch: epoch.next() }
            }
            (State::Ended { epoch }, Event::Acknowledged(word))
                if word == (Announcement { epoch, phase: Phase::Ended }).to_word() =>
            {
                State::Opening { epoch: epoch.next() }
            }
            (state, _) => state,
        };
    }

    /// Goes on by itself as far as the areas allow.
    fn settle(&mut self, actions: &mut Actions<Action>) {
        if matches!(self.state, State::Ending { .. } | State::Finishing { .. } | State::Stopping) {
            Area::ALL.into_iter().for_each(|area| self.close(area, actions));
        }
        let all_free = self.areas == [AreaUse::Free; 2];
        match self.state {
            State::Waiting { found: None } if self.released => {
                self.state = State::Opening { epoch: Epoch::NONE.next() };
            }
            State::Waiting { found: Some(found) } if self.released => self.announce_end(found.epoch, actions),
            State::Ending { epoch } if all_free => self.announce_end(epoch, actions),
            State::Finishing { code } if all_free && self.released => {
                actions.push(Action::CompleteAttach(code));
                self.state = State::Detached;
            }
            State::Stopping if all_free => {
                actions.push(Action::Stopped);
                self.state = State::Detached;
            }
            _ => {}
        }
        if let State::Opening { epoch } = self.state {
            let area = &mut self.areas[epoch.area().index()];
            match *area {
                AreaUse::Free => {
                    *area = AreaUse::Building;
                    actions.push(Action::Build(epoch));
                }
                AreaUse::Live => {
                    actions.push(Action::Announce(Announcement { epoch, phase: Phase::Open }));
                    self.state = State::Open { epoch };
                }
                AreaUse::Building | AreaUse::Dying => {}
            }
        }
    }

    fn announce_end(&mut self, epoch: Epoch, actions: &mut Actions<Action>) {
        actions.push(Action::Announce(Announcement { epoch, phase: Phase::Ended }));
        self.state = State::Ended { epoch };
    }

    fn close(&mut self, area: Area, actions: &mut Actions<Action>) {
        let used = &mut self.areas[area.index()];
        if *used == AreaUse::Live {
            *used = AreaUse::Dying;
            actions.push(Action::Close(area));
        }
    }
}
