//! What the front-end has said of one vring.

use vmm_sys_util::eventfd::EventFd;

/// User addresses of the parts of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

/// One vring. What is said while it is stopped counts when it starts.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// As the front-end gave it, which is as the driver chose it: any number.
    pub(super) size: Option<u32>,
    /// The same: they may be anywhere.
    pub(super) addresses: Option<RingAddresses>,
    pub(super) used_log_gpa: Option<u64>,
    /// Where the ring starts, or where it stopped. Out of date while it is started.
    pub(super) next_avail: u16,
    /// Kept when the ring stops: front-ends do not all send them again.
    pub(super) call: Option<EventFd>,
    pub(super) err: Option<EventFd>,
    /// What SET_VRING_ENABLE said, if it was sent.
    pub(super) enabled: Option<bool>,
    pub(super) is_started: bool,
    /// It was to start, and its driver's set-up made that impossible. For the front-end it is started.
    pub(super) is_broken: bool,
    /// The in-flight region has records of this session for it.
    pub(super) is_tracked: bool,
    /// What the device was told. False whenever the ring is not started.
    pub(super) is_enabled_in_device: bool,
}

impl Vring {
    /// As it was before the front-end said anything, but for its eventfds.
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
