//! The state of one vring that the front-end's messages build.

use vmm_sys_util::eventfd::EventFd;

/// User addresses of the parts of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

/// One vring. Messages to a stopped vring take effect when it starts.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// As the driver chose it and the front-end passed it on: any number.
    pub(super) size: Option<u32>,
    /// As the driver chose them: any addresses.
    pub(super) addresses: Option<RingAddresses>,
    pub(super) used_log_gpa: Option<u64>,
    /// The index at which the ring starts or stopped. Out of date while the ring is started.
    pub(super) next_avail: u16,
    /// Kept when the ring stops: not all front-ends send them again.
    pub(super) call: Option<EventFd>,
    pub(super) err: Option<EventFd>,
    /// The value of the last SET_VRING_ENABLE.
    pub(super) enabled: Option<bool>,
    pub(super) is_started: bool,
    /// The front-end started the ring, but the driver's set-up made that impossible. The front-end takes the ring for
    /// started.
    pub(super) is_broken: bool,
    /// The in-flight region has records of this session for the ring.
    pub(super) is_tracked: bool,
    /// What the session told the device. False whenever the ring is not started.
    pub(super) is_enabled_in_device: bool,
}

impl Vring {
    /// Returns to the state before the first message, but keeps the eventfds.
    pub(super) fn reset(&mut self) {
        *self = Self { call: self.call.take(), err: self.err.take(), ..Self::default() };
    }

    /// Notes that the device has stopped the ring.
    pub(super) fn note_stopped(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.is_started = false;
        self.is_enabled_in_device = false;
    }
}
