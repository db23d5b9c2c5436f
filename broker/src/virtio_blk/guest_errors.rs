//! What guests do wrong: counted, and logged at a bounded rate.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Refusal, Status, Unanswerable};
use crate::log_limit::{Cause, LogLimits};

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
/// Each cause of an error is logged at most once in ten seconds, so that a guest cannot fill a disk with logs, and with a
/// limit of its own, so that a guest cannot hide one error behind a flood of another.
#[derive(Debug)]
pub struct GuestErrors {
    counts: [AtomicU64; GuestError::ALL.len()],
    causes: LogLimits,
}

impl Default for GuestErrors {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestErrors {
    /// All zero.
    pub fn new() -> Self {
        Self { counts: GuestError::ALL.map(|_| AtomicU64::new(0)), causes: LogLimits::new() }
    }

    /// Counts an error of a queue and logs it, unless an error of the same cause was logged a short while ago.
    pub(crate) fn record(&self, queue_index: u16, kind: GuestError, cause: Cause, what: &dyn Display) {
        let total = self.counts[kind as usize].fetch_add(1, Ordering::Relaxed) + 1;
        if self.causes.count(cause).is_some() {
            tracing::warn!(queue = queue_index, total, "guest error: {what} ({} so far: {total})", kind.what());
        }
    }

    /// How often it happened.
    pub fn count(&self, kind: GuestError) -> u64 {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_each_for_itself() {
        let errors = GuestErrors::new();
        for (number, kind) in GuestError::ALL.into_iter().enumerate() {
            for _ in 0..number {
                errors.record(0, kind, Cause::new(number), &"what it is");
            }
        }
        assert_eq!(GuestError::ALL.map(|kind| errors.count(kind)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn refusals_are_counted_by_what_the_driver_is_told() {
        assert_eq!(GuestError::from(&Refusal::TooManySegments), GuestError::TooManySegments);
        assert_eq!(GuestError::from(&Refusal::UnknownType { request_type: 2 }), GuestError::Unsupported);
        assert_eq!(GuestError::from(&Refusal::ReadOnly { request_type: 1 }), GuestError::Refused);
        assert_eq!(GuestError::from(&Unanswerable::NoStatus), GuestError::MalformedChain);
    }
}
