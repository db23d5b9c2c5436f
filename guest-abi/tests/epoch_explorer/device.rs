//! The device process: the machine of the crate, and the code that executes its actions, one access to shared memory at
//! a time.

use ringpass_guest_abi::attach_sequence::{AttachSequence, Verdict};
use ringpass_guest_abi::epoch::device::{Action, AreaUse, Event, Machine, State};
use ringpass_guest_abi::epoch::{Announcement, Area, Epoch, Phase};
use ringpass_guest_abi::request::{ErrorCode, RequestType};

use crate::explore::Label;
use crate::kernel::{AreaMemory, Life, Ring};
use crate::list::List;
use crate::model::{Broken, Cheat, Notice, System};

#[derive(Clone, Copy, Hash)]
pub(crate) struct Device {
    pub(crate) machine: Machine,
    sequence: AttachSequence,
    next_avail: u8,
    work: List<Work, 8>,
    awaits_release: bool,
    /// The device has an event to report, but there is no EVENT to complete.
    owes_event: bool,
}

/// One access to what is shared.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    Store(Announcement),
    Notify,
    LookAtAcknowledgement,
    LookAtDetach,
    Build(Epoch),
    Close(Area),
    CompleteAttach,
    Stopped,
}

impl Device {
    /// A process to which a front-end gives the queue, with the used index as its base.
    pub(crate) fn start(base: u8, cheat: Option<Cheat>) -> Self {
        let mut work = List::new();
        if cheat != Some(Cheat::SilentStart) {
            work.push(Work::Notify);
        }
        Self {
            machine: Machine::new(),
            sequence: AttachSequence::new(1),
            next_avail: base,
            work,
            awaits_release: false,
            owes_event: false,
        }
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        self.work.is_empty()
    }

    fn feed(&mut self, event: Event) {
        for action in self.machine.step(event) {
            match action {
                Action::AwaitRelease => self.awaits_release = true,
                Action::Announce(announcement) => {
                    self.work.push(Work::Store(announcement));
                    self.work.push(Work::Notify);
                    self.work.push(Work::LookAtAcknowledgement);
                }
                Action::Build(epoch) => self.work.push(Work::Build(epoch)),
                Action::Close(area) => self.work.push(Work::Close(area)),
                Action::CompleteAttach(_) => {
                    self.work.push(Work::CompleteAttach);
                    self.work.push(Work::Notify);
                }
                Action::Stopped => self.work.push(Work::Stopped),
            }
        }
    }
}

impl System {
    pub(crate) fn device_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        let Some(device) = self.device else {
            step(("the front-end starts the device", 0), &|system| {
                system.device = Some(Device::start(system.base, system.cheat));
                Ok(())
            });
            return;
        };
        if let Some(work) = device.work.get(0) {
            step(("the device works", work_name(work)), &|system| {
                system.device_mut().work.remove(0);
                system.device_work(work)
            });
            return;
        }
        let is_released = self.rings.is_empty() || self.cheat == Some(Cheat::EndBeforeLock) && self.announced != 0;
        if self.is_knocking {
            if device.next_avail < self.available && is_released {
                step(("the device answers the first request after a reset", 0), &Self::answer_knock);
            }
            return;
        }
        if device.next_avail < self.available && !device.sequence.is_attached() {
            step(("the device takes entry", device.next_avail.into()), &Self::take_entry);
        }
        if device.awaits_release && is_released {
            step(("the device has the lock", 0), &|system| {
                system.device_mut().awaits_release = false;
                system.device_mut().feed(Event::Released);
                Ok(())
            });
        }
        if self.kick {
            step(("the device is kicked", 0), &|system| {
                system.kick = false;
                let work = &mut system.device_mut().work;
                [Work::LookAtAcknowledgement, Work::LookAtDetach].into_iter().for_each(|look| work.push(look));
                Ok(())
            });
        }
        for area in Area::ALL {
            let is_gone = self.rings.iter().all(|ring| ring.area != area) || self.cheat == Some(Cheat::ReuseEarly);
            if device.machine.area(area) == AreaUse::Dying && is_gone {
                step(("the device sees that the ring is gone of area", area.index()), &|system| {
                    system.device_mut().feed(Event::Gone(area));
                    Ok(())
                });
            }
        }
        if self.notice == Notice::Event && device.owes_event && self.event_posted {
            step(("the device completes the EVENT it owes", 0), &|system| {
                system.device_mut().owes_event = false;
                system.notify();
                Ok(())
            });
        }
    }

    pub(crate) fn device_mut(&mut self) -> &mut Device {
        self.device.as_mut().expect("a step of a device that runs")
    }

    pub(crate) fn feed_device(&mut self, event: Event) -> Broken {
        self.device_mut().feed(event);
        Ok(())
    }

    fn take_entry(&mut self) -> Broken {
        let (announced, detach) = (self.announced, self.detach && self.cheat != Some(Cheat::ForgetDetach));
        let found = if self.cheat == Some(Cheat::AlwaysFirst) { 0 } else { announced };
        let device = self.device.as_mut().expect("a step of a device that runs");
        let (entry, is_attach) =
            if device.next_avail == 0 { (RequestType::Arm, false) } else { (RequestType::Attach, true) };
        if device.sequence.take(Some(entry), 0) != Verdict::Execute {
            return Err(format!("{entry:?} was refused"));
        }
        device.next_avail += 1;
        if is_attach {
            device.feed(Event::Attach { found, detach });
        } else {
            self.used = 1;
        }
        Ok(())
    }

    /// An ordinary request, which a device takes only when nothing older is left.
    fn answer_knock(&mut self) -> Broken {
        let device = self.device_mut();
        if device.sequence.take(None, 0) != Verdict::Execute {
            return Err("an ordinary request was refused".into());
        }
        device.next_avail += 1;
        self.used = 1;
        Ok(())
    }

    /// The driver has reset its virtqueue and begins at its first entry again.
    pub(crate) fn begin_queue_again(&mut self) {
        (self.base, self.used, self.available) = (0, 0, 2);
        if let Some(device) = &mut self.device {
            device.next_avail = 0;
        }
    }

    fn device_work(&mut self, work: Work) -> Broken {
        match work {
            Work::Store(announcement) => {
                if announcement.phase == Phase::Ended && !self.rings.is_empty() && self.cheat.is_none() {
                    return Err("the end was announced while a ring was left".into());
                }
                self.announced = announcement.to_word();
                if self.cheat == Some(Cheat::OpenUnasked) {
                    self.acknowledged = self.announced;
                }
            }
            Work::Notify => self.notify(),
            Work::LookAtAcknowledgement => {
                let word = self.acknowledged;
                self.device_mut().feed(Event::Acknowledged(word));
            }
            Work::LookAtDetach if self.detach && self.cheat != Some(Cheat::ForgetDetachOnKick) => {
                self.device_mut().feed(Event::Finish(ErrorCode::Detached));
            }
            Work::LookAtDetach => {}
            Work::Build(epoch) => return self.build(epoch.area()),
            Work::Close(area) => {
                for index in 0..self.rings.len() {
                    let ring = self.rings.get_mut(index);
                    if ring.area == area && ring.life == Life::Live {
                        ring.life = Life::Closing;
                    }
                }
            }
            Work::CompleteAttach => {
                if !self.rings.is_empty() {
                    return Err("ATTACH was completed before every ring was gone".into());
                }
                self.device_mut().sequence.attach_completed();
                self.used = 2;
            }
            Work::Stopped => {
                let next_avail = self.device_mut().next_avail;
                self.base = if self.cheat == Some(Cheat::BaseBehindAttach) { next_avail } else { self.used };
                self.device = None;
            }
        }
        Ok(())
    }

    fn build(&mut self, area: Area) -> Broken {
        if self.rings.iter().any(|ring| ring.area == area) {
            return Err(format!("two rings have the {area:?} area"));
        }
        if self.driver.uses(area) {
            return Err(format!("a ring was built in the {area:?} area while the driver reads it"));
        }
        if self.building_fails {
            self.building_fails = false;
            return self.feed_device(Event::BuildFailed(ErrorCode::Resources));
        }
        self.areas[area.index()] = AreaMemory::new();
        self.rings.push(Ring::new(area));
        self.feed_device(Event::Built)
    }

    fn notify(&mut self) {
        if self.cheat == Some(Cheat::NoSignal) {
            return;
        }
        match self.notice {
            Notice::Call => self.call = true,
            Notice::Event if self.event_posted => {
                self.event_posted = false;
                self.call = true;
            }
            Notice::Event => self.device_mut().owes_event = self.cheat != Some(Cheat::ForgetEvent),
        }
    }

    /// The actions of operators and front-ends, and faults, while there is a budget for them.
    pub(crate) fn fault_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        let Some(device) = self.device else { return };
        if self.budget.crashes > 0 {
            step(("the device is killed", 0), &|system| {
                system.budget.crashes -= 1;
                system.device = None;
                system.base = system.used;
                for index in 0..system.rings.len() {
                    let ring = system.rings.get_mut(index);
                    if ring.life == Life::Live {
                        ring.life = Life::Orphan;
                    }
                }
                Ok(())
            });
        }
        if !device.is_at_rest() || device.machine.state() == State::Detached {
            return;
        }
        if self.budget.drains > 0 && matches!(device.machine.state(), State::Open { .. }) {
            step(("an operator wants another ring", 0), &|system| {
                system.budget.drains -= 1;
                system.feed_device(Event::Drain)
            });
        }
        if self.budget.ends > 0 {
            step(("the ring must end", 0), &|system| {
                system.budget.ends -= 1;
                system.feed_device(Event::End)
            });
        }
        if self.budget.refusals > 0 {
            step(("the device gives out no ring any more", 0), &|system| {
                system.budget.refusals -= 1;
                system.feed_device(Event::Finish(ErrorCode::Mode))
            });
            step(("the next ring cannot be built", 0), &|system| {
                system.budget.refusals -= 1;
                system.building_fails = true;
                Ok(())
            });
        }
        if self.budget.stops > 0 {
            step(("the front-end stops the queue", 0), &|system| {
                system.budget.stops -= 1;
                system.feed_device(Event::Stop)
            });
        }
    }
}

fn work_name(work: Work) -> usize {
    match work {
        Work::Store(announcement) => announcement.to_word() as usize,
        Work::Notify => 100,
        Work::LookAtAcknowledgement => 101,
        Work::LookAtDetach => 102,
        Work::Build(epoch) => 110 + epoch.number() as usize,
        Work::Close(area) => 120 + area.index(),
        Work::CompleteAttach => 130,
        Work::Stopped => 131,
    }
}
