//! The whole system: guest memory, the kernel's rings, the device, the driver, the disk.

use ringpass_guest_abi::epoch::device::State;

use crate::device::Device;
use crate::driver::{Driver, Request};
use crate::explore::{Label, Model, Step};
use crate::kernel::{AreaMemory, Ring};
use crate::list::List;

/// Number of the driver's requests. Two are enough to show every error.
pub(crate) const REQUESTS: usize = 2;

/// The rule that a step broke.
pub(crate) type Broken = Result<(), String>;

/// A rule that one side violates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Cheat {
    /// The device regards an area as free as soon as its ring is closed.
    ReuseEarly,
    /// The device announces the end before the older process's I/O has ended.
    EndBeforeLock,
    /// The device opens the next epoch without the driver's acknowledgement.
    OpenUnasked,
    /// The device regards every ATTACH as the first one.
    AlwaysFirst,
    /// The device ignores the detach word when it sees ATTACH.
    ForgetDetach,
    /// The device ignores the detach word when it is kicked.
    ForgetDetachOnKick,
    /// GET_VRING_BASE answers with the entry after ATTACH.
    BaseBehindAttach,
    /// The device never signals.
    NoSignal,
    /// A device that starts does not signal.
    SilentStart,
    /// The device forgets an EVENT that it could not complete, and the driver reads the control pages before it posts
    /// one.
    ForgetEvent,
    /// The driver does not ring the doorbell after its acknowledgement.
    NoKick,
    /// The driver does not wait until a drained ring is empty.
    AcknowledgeUndrained,
    /// The driver does not reap a ring that has ended.
    AcknowledgeUnreaped,
    /// The driver regards -ECANCELED as the end of a request.
    CanceledIsDone,
    /// The driver sends a request of two SQEs again while one of them is on the ring.
    ResendEarly,
    /// The driver ends a request of two SQEs when one of them is done.
    EndEarly,
    /// After a reset without a device process the driver uses its memory again at once.
    NoQuarantine,
}

/// How the driver learns of an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Notice {
    /// The queue's interrupt.
    Call,
    /// EVENT on queue 0.
    Event,
}

/// The budgets: how often each event may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub(crate) crashes: u8,
    pub(crate) stops: u8,
    pub(crate) drains: u8,
    pub(crate) ends: u8,
    pub(crate) refusals: u8,
    pub(crate) detaches: u8,
    pub(crate) resets: u8,
    pub(crate) lies: u8,
}

#[derive(Clone, Copy, Hash)]
pub(crate) struct System {
    // The fixed part.
    pub(crate) cheat: Option<Cheat>,
    pub(crate) notice: Notice,
    pub(crate) driver_lies: bool,
    /// The requests are SQEs of one request.
    pub(crate) are_siblings: bool,
    // The control page.
    pub(crate) announced: u32,
    pub(crate) acknowledged: u32,
    pub(crate) detach: bool,
    // The areas.
    pub(crate) areas: [AreaMemory; 2],
    // The virtqueue: entry 0 is ARM, entry 1 ATTACH.
    pub(crate) available: u8,
    pub(crate) used: u8,
    /// The entry at which a starting device begins.
    pub(crate) base: u8,
    /// The driver has reset the device, and its first request is an ordinary one.
    pub(crate) is_knocking: bool,
    pub(crate) event_posted: bool,
    // The eventfds.
    pub(crate) call: bool,
    pub(crate) kick: bool,
    // The parties.
    pub(crate) rings: List<Ring, 6>,
    pub(crate) executed: [bool; REQUESTS],
    pub(crate) device: Option<Device>,
    pub(crate) building_fails: bool,
    pub(crate) driver: Driver,
    pub(crate) budget: Budget,
}

impl System {
    pub(crate) fn new(budget: Budget) -> Self {
        Self {
            cheat: None,
            notice: Notice::Call,
            driver_lies: budget.lies > 0,
            are_siblings: false,
            announced: 0,
            acknowledged: 0,
            detach: false,
            areas: [AreaMemory::new(); 2],
            available: 2,
            used: 0,
            base: 0,
            is_knocking: false,
            event_posted: true,
            call: false,
            kick: false,
            rings: List::new(),
            executed: [false; REQUESTS],
            device: None,
            building_fails: false,
            driver: Driver::new(),
            budget,
        }
    }

    pub(crate) fn by(self, notice: Notice) -> Self {
        Self { notice, ..self }
    }

    pub(crate) fn of_one_request(self) -> Self {
        Self { are_siblings: true, ..self }
    }

    pub(crate) fn with(self, cheat: Cheat) -> Self {
        Self { cheat: Some(cheat), ..self }
    }
}

impl Model for System {
    fn steps(&self, steps: &mut Vec<Step<Self>>) {
        let mut is_fault = false;
        let mut step = |is_fault: bool, label: Label, change: &dyn Fn(&mut Self) -> Broken| {
            let mut next = *self;
            let result = change(&mut next).map(|()| next);
            steps.push(Step { label, is_fault, result });
        };
        self.kernel_steps(&mut |label, change| step(is_fault, label, change));
        self.device_steps(&mut |label, change| step(is_fault, label, change));
        if !self.driver_lies {
            self.driver_steps(&mut |label, change| step(is_fault, label, change));
        }
        is_fault = true;
        self.fault_steps(&mut |label, change| step(is_fault, label, change));
        self.reset_steps(&mut |label, change| step(is_fault, label, change));
        self.lie_steps(&mut |label, change| step(is_fault, label, change));
    }

    /// With an honest driver: every request is done, both sides agree, and no demand is left. With a lying driver: the
    /// device waits for the driver, or is no longer attached to it.
    fn is_goal(&self) -> bool {
        let Some(device) = self.device else { return false };
        let at_rest = device.is_at_rest();
        if self.driver_lies {
            let settled =
                matches!(device.machine.state(), State::Open { .. } | State::Draining { .. } | State::Ended { .. });
            return at_rest && (settled || device.machine.state() == State::Detached && self.used == 2);
        }
        let is_detached = self.used == 2 && self.driver.has_queue_back();
        let is_open = matches!(device.machine.state(), State::Open { .. }) && self.driver.machine.may_submit();
        at_rest
            && self.driver.is_at_rest()
            && self.driver.requests == [Request::Done; REQUESTS]
            && (is_detached || is_open && !self.detach)
    }
}
