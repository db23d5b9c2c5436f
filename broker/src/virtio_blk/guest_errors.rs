//! What guests do wrong: counted, and logged at a bounded rate.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{Refusal, Status, Unanswerable};

/// One line per kind of error in this time, however often it happens.
const LOG_INTERVAL_MS: u64 = 10_000;
const NEVER: u64 = u64::MAX;

/// A kind of error that a guest can cause at will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestError {
    /// A request that was answered with an error, because it was malformed or out of range.
    Refused,
    /// A request of a type, or with a flag, that the device does not have.
    Unsupported,
    /// A request with more pieces of data than there is room for.
    TooManySegments,
    /// A descriptor chain that could not be answered; its queue was stopped.
    MalformedChain,
    /// A ring that made no sense; its queue was stopped.
    BrokenRing,
}

impl GuestError {
    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::Refused, Self::Unsupported, Self::TooManySegments, Self::MalformedChain, Self::BrokenRing];

    fn what(self) -> &'static str {
        match self {
            Self::Refused => "refused requests",
            Self::Unsupported => "unsupported requests",
            Self::TooManySegments => "requests with too many segments",
            Self::MalformedChain => "malformed descriptor chains",
            Self::BrokenRing => "broken rings",
        }
    }
}

impl From<&Refusal> for GuestError {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::TooManySegments => Self::TooManySegments,
            other if other.status() == Status::Unsupported => Self::Unsupported,
            _ => Self::Refused,
        }
    }
}

impl From<&Unanswerable> for GuestError {
    fn from(_: &Unanswerable) -> Self {
        Self::MalformedChain
    }
}

/// The counters of one device, shared by its queues.
///
/// Each kind of error is logged at most once in ten seconds, with its total, so that a guest cannot fill a disk with logs.
#[derive(Debug)]
pub struct GuestErrors {
    kinds: [Kind; GuestError::ALL.len()],
    start: Instant,
}

#[derive(Debug)]
struct Kind {
    count: AtomicU64,
    /// Time of the last line, since `start`; `NEVER` before the first.
    logged_ms: AtomicU64,
}

impl Default for GuestErrors {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestErrors {
    /// All zero.
    pub fn new() -> Self {
        let kinds = GuestError::ALL.map(|_| Kind { count: AtomicU64::new(0), logged_ms: AtomicU64::new(NEVER) });
        Self { kinds, start: Instant::now() }
    }

    /// Counts an error of a queue and logs it, unless one like it was logged a short while ago.
    pub fn record(&self, queue_index: u16, kind: GuestError, what: &dyn Display) {
        let now_ms = self.start.elapsed().as_millis() as u64;
        if let Some(total) = self.count_at(kind, now_ms) {
            tracing::warn!(queue = queue_index, total, "guest error: {what} ({} so far: {total})", kind.what());
        }
    }

    /// How often it happened.
    pub fn count(&self, kind: GuestError) -> u64 {
        self.kinds[kind as usize].count.load(Ordering::Relaxed)
    }

    /// Counts; the total, if it is time for a line.
    fn count_at(&self, kind: GuestError, now_ms: u64) -> Option<u64> {
        let kind = &self.kinds[kind as usize];
        let total = kind.count.fetch_add(1, Ordering::Relaxed) + 1;
        let logged_ms = kind.logged_ms.load(Ordering::Relaxed);
        let due = logged_ms == NEVER || now_ms.saturating_sub(logged_ms) >= LOG_INTERVAL_MS;
        // Of several threads for which it is time, one logs.
        let mine =
            due && kind.logged_ms.compare_exchange(logged_ms, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        mine.then_some(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_of_error_is_logged_once_in_ten_seconds_with_its_total() {
        let errors = GuestErrors::new();
        assert_eq!(errors.count_at(GuestError::Refused, 5), Some(1));
        assert_eq!(errors.count_at(GuestError::Refused, 6), None);
        assert_eq!(errors.count_at(GuestError::Refused, 10_004), None);
        assert_eq!(errors.count_at(GuestError::Refused, 10_005), Some(4));
        assert_eq!(errors.count(GuestError::Refused), 4);
    }

    #[test]
    fn kinds_are_counted_and_limited_each_for_itself() {
        let errors = GuestErrors::new();
        for kind in GuestError::ALL {
            assert_eq!(errors.count_at(kind, 0), Some(1), "{kind:?}");
        }
        assert_eq!(GuestError::ALL.map(|kind| errors.count(kind)), [1; 5]);
    }

    #[test]
    fn refusals_are_counted_by_what_the_driver_is_told() {
        assert_eq!(GuestError::from(&Refusal::TooManySegments), GuestError::TooManySegments);
        assert_eq!(GuestError::from(&Refusal::UnknownType { request_type: 2 }), GuestError::Unsupported);
        assert_eq!(GuestError::from(&Refusal::ReadOnly { request_type: 1 }), GuestError::Refused);
        assert_eq!(GuestError::from(&Unanswerable::NoStatus), GuestError::MalformedChain);
    }
}
