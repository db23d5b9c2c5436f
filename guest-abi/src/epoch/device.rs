//! The device's side of the epochs of one queue, as a state machine.

use super::{Actions, Announcement, Area, Epoch, Phase};
use crate::request::ErrorCode;

/// An event that the device reports to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The device took ATTACH from the queue, and its geometry is good. The device has read the two words once from the
    /// control page, before it wrote anything there.
    Attach {
        /// The announcement word, as another device process may have left it.
        found: u32,
        /// Whether the detach word is set.
        detach: bool,
    },
    /// Everything older than this attachment is gone: every ring that ever used the areas, including those of other
    /// processes (their lock on the disk is free, and this process has it). The device reports only the result of the
    /// wait that [`Action::AwaitRelease`] began for this attachment, not of a wait for an earlier attachment.
    Released,
    /// The new ring runs.
    Built,
    /// The device could not build the ring.
    BuildFailed(ErrorCode),
    /// The closed ring of this area is gone: its I/O has ended, and it does not write to memory any more.
    Gone(Area),
    /// The device has read the driver's word, which can have any value.
    Acknowledged(u32),
    /// The driver shall drain the ring, so that another can replace it: an operator wants another mode.
    Drain,
    /// The ring must end at once, and another may follow.
    End,
    /// The ring must end at once, and no other follows: the device has found the detach word set, or it offers no rings
    /// any more.
    Finish(ErrorCode),
    /// The queue stops (GET_VRING_BASE, reset, the front-end is gone). ATTACH stays pending, and the device takes it
    /// again if the queue starts again.
    Stop,
}

/// An action that the device must do now, in the order of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Begin to wait for [`Event::Released`], on a thread that may wait.
    AwaitRelease,
    /// Store the word with release, signal the queue's call eventfd unconditionally, complete EVENT, and then read the
    /// driver's word ([`Event::Acknowledged`]): the driver may have answered already, to the previous device process.
    Announce(Announcement),
    /// Zero the head of the epoch's area, create a ring there, and write the ring's record into the control page.
    Build(Epoch),
    /// Close the ring of this area, and begin to wait for [`Event::Gone`].
    Close(Area),
    /// Write the answer and the status of ATTACH, put it into the used ring, signal unconditionally, and complete
    /// EVENT. From here on the control page and the areas belong to the driver alone.
    CompleteAttach(ErrorCode),
    /// The queue has stopped: this attachment does not access guest memory any more.
    Stopped,
}

/// The state of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No ATTACH is pending.
    Detached,
    /// ATTACH is pending. An older ring may still write to the areas or to the disk.
    Waiting {
        /// The announcement in the control page at ATTACH.
        found: Option<Announcement>,
    },
    /// No ring is in use. The device builds the ring of `epoch`, or waits until the last ring in its area is gone.
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
    /// All rings are closed, and not all are gone.
    Ending {
        /// The epoch whose end the device will announce.
        epoch: Epoch,
    },
    /// (epoch, Ended) is announced.
    Ended {
        /// The epoch whose end the device has announced.
        epoch: Epoch,
    },
    /// All rings are closed. When all are gone, ATTACH completes.
    Finishing {
        /// The code in the answer of ATTACH.
        code: ErrorCode,
    },
    /// All rings are closed. When all are gone, the queue has stopped.
    Stopping,
}

/// The use of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AreaUse {
    /// No ring uses the area.
    Free,
    /// The device builds a ring in the area.
    Building,
    /// A ring runs in the area.
    Live,
    /// A ring in the area is closed and may still write to it.
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

    /// The current state.
    pub fn state(&self) -> State {
        self.state
    }

    /// The current use of an area.
    pub fn area(&self, area: Area) -> AreaUse {
        self.areas[area.index()]
    }

    /// Processes an event. An event without a meaning in the current state came late and changes nothing.
    ///
    /// The machine does not trust the driver: the driver's words can make an epoch start early, which harms only the
    /// driver's own data.
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
        // At most one ring is under construction.
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

    /// Makes the transitions that need no event, as far as the areas allow.
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
