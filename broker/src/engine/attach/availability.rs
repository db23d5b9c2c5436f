//! Whether the device gives out rings, and why not.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ringpass_guest_abi::request::ErrorCode;

use super::refusal::Refused;

/// What consumes the SQ of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RingKind {
    /// The kernel: the ring is an io_uring in memory of the guest.
    Direct,
}

impl RingKind {
    /// Each kind.
    pub const ALL: [Self; 1] = [Self::Direct];

    /// Whether guest memory is pinned for rings of this kind.
    fn pins_memory(self) -> bool {
        match self {
            Self::Direct => true,
        }
    }

    /// Whether the device can log what a ring of this kind writes to guest memory. The kernel logs nothing of what an
    /// io_uring writes.
    fn can_be_logged(self) -> bool {
        match self {
            Self::Direct => false,
        }
    }
}

/// What the operator of a device allows its queues to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OperatorMode {
    /// A queue becomes a ring if its driver asks for one.
    #[default]
    Auto,
    /// Every queue is a virtqueue.
    Virtqueue,
}

impl OperatorMode {
    fn allows(self, kind: RingKind) -> bool {
        match (self, kind) {
            (Self::Auto, RingKind::Direct) => true,
            (Self::Virtqueue, RingKind::Direct) => false,
        }
    }
}

/// Whether the device gives out rings, for each kind of ring.
///
/// ATTACH and the builder both ask: a worker before it accepts an ATTACH, the builder before it pins memory for a ring.
/// The thread that makes a kind unavailable does so first, and then tells the workers to end their rings. A worker that
/// saw the kind available before has its attachment by the time it reads that command, so no ring is missed.
#[derive(Debug)]
pub(in crate::engine) struct RingAvailability {
    causes: Mutex<Causes>,
}

/// What can make rings unavailable.
#[derive(Clone, Copy, Debug, Default)]
struct Causes {
    /// The device logs the pages that it writes.
    is_logging: bool,
    /// Guest memory was discarded while it was pinned, and the driver has not reset the device since.
    is_discarded: bool,
    /// The front-end has started a queue without an in-flight region.
    lacks_records: bool,
    operator_mode: OperatorMode,
}

/// Why rings of one kind are not available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Discarded,
    NoRecords,
    Operator,
    Logging,
}

impl RingAvailability {
    /// Rings of each kind are available.
    pub(in crate::engine) fn new() -> Self {
        Self { causes: Mutex::default() }
    }

    /// Why rings of this kind are not available. `None`: they are.
    pub(in crate::engine) fn closed(&self, kind: RingKind) -> Option<Refused> {
        self.causes().reason(kind).map(Reason::refused)
    }

    /// The device logs the pages that it writes from now on, or no longer. Returns the kinds that are available again.
    pub(in crate::engine) fn set_logging(&self, is_logging: bool) -> Vec<RingKind> {
        self.change(|causes| causes.is_logging = is_logging)
    }

    /// Guest memory was discarded while it was pinned. Rings that pin memory are not available before
    /// [`clear_discard`](Self::clear_discard).
    pub(in crate::engine) fn note_discard(&self) {
        self.change(|causes| causes.is_discarded = true);
    }

    /// The driver has reset the device, or the device has another front-end: no request is left whose data the discard
    /// could have damaged.
    pub(in crate::engine) fn clear_discard(&self) {
        self.change(|causes| causes.is_discarded = false);
    }

    /// The front-end starts a queue without an in-flight region: a device that took over would lose requests of queue 0,
    /// and execute others twice. True: that is news.
    pub(in crate::engine) fn note_lack_of_records(&self) -> bool {
        let mut causes = self.causes();
        !std::mem::replace(&mut causes.lacks_records, true)
    }

    /// All queues have stopped: the next ones may be started with an in-flight region.
    pub(in crate::engine) fn forget_lack_of_records(&self) {
        self.change(|causes| causes.lacks_records = false);
    }

    /// The operator chooses a mode. Returns the kinds that are available again. The caller drains the rings that live
    /// of each kind for which [`wants_drained`](Self::wants_drained) says so.
    pub(in crate::engine) fn set_operator_mode(&self, mode: OperatorMode) -> Vec<RingKind> {
        self.change(|causes| causes.operator_mode = mode)
    }

    /// The mode that the operator chose last.
    pub(in crate::engine) fn operator_mode(&self) -> OperatorMode {
        self.causes().operator_mode
    }

    /// Whether rings of this kind that live should go with the driver's help, because the operator wants another mode.
    /// Rings that cannot live on for another cause end at once instead.
    pub(in crate::engine) fn wants_drained(&self, kind: RingKind) -> bool {
        !self.causes().operator_mode.allows(kind)
    }

    /// Changes the causes, and returns the kinds that this made available.
    fn change(&self, change: impl FnOnce(&mut Causes)) -> Vec<RingKind> {
        let mut causes = self.causes();
        let before = *causes;
        change(&mut causes);
        let is_reopened = |kind: &RingKind| before.reason(*kind).is_some() && causes.reason(*kind).is_none();
        RingKind::ALL.into_iter().filter(is_reopened).collect()
    }

    fn causes(&self) -> MutexGuard<'_, Causes> {
        // A change is one assignment, so a panic cannot leave half of one.
        self.causes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Causes {
    /// The most lasting reason comes first.
    fn reason(self, kind: RingKind) -> Option<Reason> {
        if self.is_discarded && kind.pins_memory() {
            return Some(Reason::Discarded);
        }
        if self.lacks_records {
            return Some(Reason::NoRecords);
        }
        if !self.operator_mode.allows(kind) {
            return Some(Reason::Operator);
        }
        (self.is_logging && !kind.can_be_logged()).then_some(Reason::Logging)
    }
}

impl Reason {
    fn refused(self) -> Refused {
        let (code, why) = match self {
            Self::Discarded => (
                ErrorCode::Discarded,
                "guest memory was discarded while it was pinned (balloon, free page reporting, virtio-mem or postcopy); no \
                 rings before the driver resets the device",
            ),
            Self::NoRecords => (
                ErrorCode::Inflight,
                "the front-end keeps no in-flight region (INFLIGHT_SHMFD), so a restarted server could lose and repeat \
                 requests",
            ),
            Self::Operator => (ErrorCode::Mode, "the operator set mode virtqueue"),
            Self::Logging => (ErrorCode::Mode, "the guest is being migrated: what a ring writes cannot be logged"),
        };
        Refused { code, why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECT: RingKind = RingKind::Direct;

    fn code(availability: &RingAvailability) -> Option<ErrorCode> {
        availability.closed(DIRECT).map(|refused| refused.code)
    }

    #[test]
    fn a_new_device_gives_out_rings_and_drains_none() {
        let availability = RingAvailability::new();
        assert_eq!(code(&availability), None);
        assert_eq!(availability.operator_mode(), OperatorMode::Auto);
        assert!(!availability.wants_drained(DIRECT));
    }

    #[test]
    fn a_log_makes_rings_unavailable_and_its_end_makes_them_available_again() {
        let availability = RingAvailability::new();
        assert_eq!(availability.set_logging(false), [], "rings were available");
        assert_eq!(availability.set_logging(true), []);
        let refused = availability.closed(DIRECT).expect("a log is kept");
        assert_eq!(refused.code, ErrorCode::Mode);
        assert_eq!(refused.why, "the guest is being migrated: what a ring writes cannot be logged");
        assert!(!availability.wants_drained(DIRECT), "rings end at once");
        assert_eq!(availability.set_logging(false), [DIRECT]);
        assert_eq!(code(&availability), None);
    }

    #[test]
    fn a_discard_outlasts_the_end_of_a_log() {
        let availability = RingAvailability::new();
        availability.set_logging(true);
        availability.note_discard();
        assert_eq!(availability.set_logging(false), [], "the discard keeps rings unavailable");
        let refused = availability.closed(DIRECT).expect("memory was discarded");
        assert_eq!(refused.code, ErrorCode::Discarded);
        assert!(refused.why.contains("no rings before the driver resets the device"), "{}", refused.why);
        availability.clear_discard();
        assert_eq!(code(&availability), None);
    }

    #[test]
    fn an_operator_takes_rings_away_with_a_drain_and_allows_them_again() {
        let availability = RingAvailability::new();
        assert_eq!(availability.set_operator_mode(OperatorMode::Virtqueue), []);
        let refused = availability.closed(DIRECT).expect("the operator allows no ring");
        assert_eq!((refused.code, &*refused.why), (ErrorCode::Mode, "the operator set mode virtqueue"));
        assert_eq!(availability.operator_mode(), OperatorMode::Virtqueue);
        assert!(availability.wants_drained(DIRECT));
        assert_eq!(availability.set_operator_mode(OperatorMode::Auto), [DIRECT]);
        assert_eq!(code(&availability), None);
        assert!(!availability.wants_drained(DIRECT));
    }

    #[test]
    fn the_choice_of_an_operator_outlasts_logs_and_resets_of_the_device() {
        let availability = RingAvailability::new();
        availability.set_logging(true);
        availability.set_operator_mode(OperatorMode::Virtqueue);
        assert_eq!(availability.set_logging(false), []);
        availability.note_discard();
        assert_eq!(code(&availability), Some(ErrorCode::Discarded));
        availability.clear_discard();
        assert_eq!(code(&availability), Some(ErrorCode::Mode));
        availability.set_logging(true);
        assert_eq!(availability.set_operator_mode(OperatorMode::Auto), [], "a log is kept");
        assert_eq!(availability.set_logging(false), [DIRECT]);
    }

    #[test]
    fn a_front_end_without_an_in_flight_region_gets_no_rings_until_all_its_queues_have_stopped() {
        let availability = RingAvailability::new();
        assert!(availability.note_lack_of_records() && !availability.note_lack_of_records());
        let refused = availability.closed(DIRECT).expect("no region");
        assert_eq!(refused.code, ErrorCode::Inflight);
        assert!(refused.why.contains("keeps no in-flight region"), "{}", refused.why);
        assert!(!availability.wants_drained(DIRECT));
        availability.forget_lack_of_records();
        assert_eq!(code(&availability), None);
    }

    #[test]
    fn a_choice_that_is_repeated_changes_nothing() {
        let availability = RingAvailability::new();
        assert_eq!(availability.set_operator_mode(OperatorMode::Auto), []);
        availability.set_operator_mode(OperatorMode::Virtqueue);
        assert_eq!(availability.set_operator_mode(OperatorMode::Virtqueue), []);
        assert_eq!(code(&availability), Some(ErrorCode::Mode));
    }
}
