//! The driver in the guest: an honest driver with the machine of the crate, and a lying driver.

use ringpass_guest_abi::epoch::driver::{Action, Event, Machine, State};
use ringpass_guest_abi::epoch::{Announcement, Area, Epoch, Phase};

use crate::explore::Label;
use crate::list::List;
use crate::model::{Broken, Cheat, Notice, REQUESTS, System};

#[derive(Clone, Copy, Hash)]
pub(crate) struct Driver {
    pub(crate) machine: Machine,
    pub(crate) requests: [Request; REQUESTS],
    work: List<Work, 8>,
    /// The ring that the driver reads, and the number of CQEs read.
    ring: Option<(Area, u8)>,
    has_queue_back: bool,
    /// The driver has reset the device while no process served it: something older may still use the areas and buffers.
    is_quarantined: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Request {
    Waiting,
    OnRing,
    /// The ring has not executed it: it goes over queue 0.
    Again,
    Done,
}

/// One access to what is shared.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    PostEvent,
    LookAtAnnouncement,
    LookAtUsedRing,
    Acknowledge(Announcement),
    Kick,
    SetDetach,
}

impl Driver {
    pub(crate) fn new() -> Self {
        Self {
            machine: Machine::new(),
            requests: [Request::Waiting; REQUESTS],
            work: List::new(),
            ring: None,
            has_queue_back: false,
            is_quarantined: false,
        }
    }

    pub(crate) fn uses(&self, area: Area) -> bool {
        self.ring.is_some_and(|(used, _)| used == area)
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        self.work.is_empty() && !self.is_quarantined
    }

    pub(crate) fn has_queue_back(&self) -> bool {
        self.has_queue_back
    }

    fn feed(&mut self, event: Event) -> Broken {
        for action in self.machine.step(event) {
            match action {
                Action::Start(epoch) => self.ring = Some((epoch.area(), 0)),
                Action::Drain | Action::Reap(_) => {}
                Action::Acknowledge(announcement) => {
                    self.ring = None;
                    self.work.push(Work::Acknowledge(announcement));
                    self.work.push(Work::Kick);
                }
                Action::RequestDetach => {
                    self.work.push(Work::SetDetach);
                    self.work.push(Work::Kick);
                }
                Action::Release => {
                    self.ring = None;
                    self.has_queue_back = true;
                }
                Action::Reset => return Err(format!("an honest device seemed faulty: {event:?}")),
            }
        }
        Ok(())
    }
}

impl System {
    pub(crate) fn driver_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        let driver = self.driver;
        if driver.is_quarantined {
            if self.used == 1 || self.cheat == Some(Cheat::NoQuarantine) {
                step(("the driver ends the quarantine and attaches again", 0), &Self::attach_again);
            }
            return;
        }
        if let Some(work) = driver.work.get(0) {
            step(("the driver works", work_name(work)), &|system| {
                system.driver.work.remove(0);
                system.driver_work(work)
            });
        } else if self.call {
            step(("the driver is called", 0), &|system| {
                system.call = false;
                let work = &mut system.driver.work;
                let looks = [Work::LookAtAnnouncement, Work::LookAtUsedRing];
                if system.notice == Notice::Event && system.cheat != Some(Cheat::ForgetEvent) {
                    work.push(Work::PostEvent);
                }
                looks.into_iter().for_each(|look| work.push(look));
                if system.notice == Notice::Event && system.cheat == Some(Cheat::ForgetEvent) {
                    work.push(Work::PostEvent);
                }
                Ok(())
            });
        }
        self.request_steps(step);
        self.end_steps(step);
    }

    /// Submitting and reaping: on other CPUs than the rest.
    fn request_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        let driver = self.driver;
        // It does not matter which of them waits: they are all alike.
        let waiting = driver.requests.iter().position(|request| *request == Request::Waiting);
        if let (Some(request), Some((area, _)), true) = (waiting, driver.ring, driver.machine.may_submit()) {
            step(("the driver submits request", request), &|system| {
                system.driver.requests[request] = Request::OnRing;
                system.areas[area.index()].sq.push(request as u8);
                Ok(())
            });
        }
        // A request of several SQEs goes no other way while one of them is on the ring.
        let may_go = !(self.are_siblings && driver.requests.contains(&Request::OnRing));
        let has_no_ring = driver.has_queue_back || !driver.machine.may_submit();
        if let (Some(request), true) = (waiting, has_no_ring && may_go) {
            step(("a virtqueue executes request", request), &|system| system.execute_elsewhere(request));
        }
        let again = driver.requests.iter().position(|request| *request == Request::Again);
        if let (Some(request), true) = (again, may_go || self.cheat == Some(Cheat::ResendEarly)) {
            step(("queue 0 executes request", request), &|system| {
                if system.are_siblings {
                    let left = |request: &usize| system.driver.requests[*request] != Request::Done;
                    let whole: Vec<usize> = (0..REQUESTS).filter(left).collect();
                    return whole.into_iter().try_for_each(|part| system.execute_elsewhere(part));
                }
                system.execute_elsewhere(request)
            });
        }
        let completion = driver.ring.and_then(|(area, reaped)| {
            let (request, executed) = self.areas[area.index()].cq.get(reaped.into())?;
            Some((area, reaped, request, executed))
        });
        if let Some((area, reaped, request, executed)) = completion {
            let request = usize::from(request);
            step(("the driver reaps request", request), &|system| {
                system.driver.ring = Some((area, reaped + 1));
                let is_done = executed || system.cheat == Some(Cheat::CanceledIsDone);
                system.driver.requests[request] = if is_done { Request::Done } else { Request::Again };
                if is_done && !system.executed[request] {
                    return Err(format!("request {request} was lost: done and never executed"));
                }
                system.check_end(is_done)
            });
        }
    }

    /// Has a device execute a request that is on no ring.
    fn execute_elsewhere(&mut self, request: usize) -> Broken {
        if self.is_in_flight(request) {
            return Err(format!("request {request} was issued again before its older I/O ended"));
        }
        self.driver.requests[request] = Request::Done;
        self.execute(request)
    }

    /// If the two are SQEs of one request, the request ends when both are done: the driver gives its buffer back.
    fn check_end(&self, is_done: bool) -> Broken {
        let ends = self.driver.requests == [Request::Done; REQUESTS] || is_done && self.cheat == Some(Cheat::EndEarly);
        if self.are_siblings && ends && (0..REQUESTS).any(|request| self.is_in_flight(request)) {
            return Err("a request ended while I/O on its buffer was under way".into());
        }
        Ok(())
    }

    /// The driver resets the device while no process serves it, so that the front-end waits for nothing. It sends an
    /// ordinary request on the same queue.
    pub(crate) fn reset_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        if self.budget.resets == 0 || self.device.is_some() || self.driver.has_queue_back {
            return;
        }
        step(("the driver resets the device", 0), &|system| {
            system.budget.resets -= 1;
            (system.base, system.used, system.available) = (0, 0, 1);
            (system.call, system.kick, system.event_posted) = (false, false, true);
            system.is_knocking = true;
            system.driver.put_aside();
            system.driver = Driver { is_quarantined: true, requests: system.driver.requests, ..Driver::new() };
            Ok(())
        });
    }

    fn attach_again(&mut self) -> Broken {
        if !self.rings.is_empty() {
            return Err("memory of a ring was used again while the ring was left".into());
        }
        self.is_knocking = false;
        self.driver.is_quarantined = false;
        (self.announced, self.acknowledged, self.detach) = (0, 0, false);
        self.begin_queue_again();
        for request in 0..REQUESTS {
            if self.driver.requests[request] != Request::Done {
                // The driver has not seen whether it was executed. It has not ended, so it may be executed again.
                self.driver.requests[request] = Request::Waiting;
                self.executed[request] = false;
            }
        }
        Ok(())
    }

    fn end_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        let driver = self.driver;
        let on_ring = driver.requests.contains(&Request::OnRing);
        if matches!(driver.machine.state(), State::Draining { .. })
            && (!on_ring || self.cheat == Some(Cheat::AcknowledgeUndrained))
        {
            step(("the driver has drained", 0), &|system| {
                system.driver.put_aside();
                system.driver.feed(Event::Drained)
            });
        }
        let has_cqe =
            driver.ring.is_some_and(|(area, reaped)| self.areas[area.index()].cq.get(reaped.into()).is_some());
        if matches!(driver.machine.state(), State::Reaping { .. } | State::Leaving)
            && (!has_cqe || self.cheat == Some(Cheat::AcknowledgeUnreaped))
        {
            step(("the driver has reaped", 0), &|system| {
                system.driver.put_aside();
                system.driver.feed(Event::Reaped)
            });
        }
        if self.budget.detaches > 0 && driver.work.is_empty() {
            step(("the driver wants its queue back", 0), &|system| {
                system.budget.detaches -= 1;
                system.driver.feed(Event::Detach)
            });
        }
    }

    fn driver_work(&mut self, work: Work) -> Broken {
        match work {
            Work::PostEvent => self.event_posted = true,
            Work::LookAtAnnouncement => return self.driver.feed(Event::Announced(self.announced)),
            Work::LookAtUsedRing if self.used == 2 => return self.driver.feed(Event::AttachCompleted),
            Work::LookAtUsedRing => {}
            Work::Acknowledge(announcement) => self.acknowledged = announcement.to_word(),
            Work::Kick => self.kick = self.cheat != Some(Cheat::NoKick),
            Work::SetDetach => self.detach = true,
        }
        Ok(())
    }

    /// A driver that writes any values into shared memory, while its budget lasts. Only the kind of word that the
    /// device finds matters: the right answer, or another word.
    pub(crate) fn lie_steps(&self, step: &mut impl FnMut(Label, &dyn Fn(&mut Self) -> Broken)) {
        if self.budget.lies == 0 {
            return;
        }
        let words = [Phase::Open, Phase::Drain, Phase::Ended]
            .into_iter()
            .flat_map(|phase| (0..4).map(move |number| Announcement { epoch: Epoch::new(number), phase }.to_word()));
        for word in words.chain([0, u32::MAX]) {
            step(("a lie in the driver's word", word as usize), &|system| {
                system.budget.lies -= 1;
                system.acknowledged = word;
                system.kick = true;
                Ok(())
            });
            step(("a lie in the device's word", word as usize), &|system| {
                system.budget.lies -= 1;
                system.announced = word;
                Ok(())
            });
        }
        step(("a lie in the detach word", 0), &|system| {
            system.budget.lies -= 1;
            system.detach = !system.detach;
            system.kick = true;
            Ok(())
        });
    }
}

impl Driver {
    fn put_aside(&mut self) {
        for request in &mut self.requests {
            if *request == Request::OnRing {
                *request = Request::Waiting;
            }
        }
    }
}

fn work_name(work: Work) -> usize {
    match work {
        Work::Acknowledge(announcement) => announcement.to_word() as usize,
        Work::PostEvent => 100,
        Work::LookAtAnnouncement => 101,
        Work::LookAtUsedRing => 102,
        Work::Kick => 103,
        Work::SetDetach => 104,
    }
}
