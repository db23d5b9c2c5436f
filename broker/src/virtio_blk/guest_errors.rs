//! Errors of guests: counted, and logged at a bounded rate.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Refusal, Status, Unanswerable};
use crate::log_limit::{LogCause, LogLimits};

/// A kind of error that a guest can cause at will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestError {
    /// The device answered a request with an error, because it was malformed or out of range.
    Refused,
    /// The request has a type, or a flag, that the device does not have.
    Unsupported,
    /// The request has more pieces of data than there is room for.
    TooManySegments,
    /// The device could not answer a descriptor chain and stopped its queue.
    MalformedChain,
    /// A ring was invalid; the device stopped its queue.
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
/// Logs each cause of an error at most once in ten seconds, so that a guest cannot fill a disk with logs. Each cause
/// has its own limit, so that a guest cannot hide one error behind a flood of another.
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
    /// Counters at zero.
    pub fn new() -> Self {
        Self { counts: GuestError::ALL.map(|_| AtomicU64::new(0)), causes: LogLimits::new() }
    }

    /// Counts an error of a queue. Logs it too, unless an error of the same cause was logged a short while ago.
    pub(crate) fn record(&self, queue_index: u16, kind: GuestError, cause: LogCause, what: &dyn Display) {
        let total = self.counts[kind as usize].fetch_add(1, Ordering::Relaxed) + 1;
        if self.causes.count(cause).is_some() {
            tracing::warn!(queue = queue_index, kind = kind.what(), total, "guest error: {what}");
        }
    }

    /// How often errors of this kind happened.
    pub fn count(&self, kind: GuestError) -> u64 {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_separately() {
        let errors = GuestErrors::new();
        for (number, kind) in GuestError::ALL.into_iter().enumerate() {
            for _ in 0..number {
                errors.record(0, kind, LogCause::new(number), &"an error");
            }
        }
        assert_eq!(GuestError::ALL.map(|kind| errors.count(kind)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn refusals_are_counted_by_their_status() {
        assert_eq!(GuestError::from(&Refusal::TooManySegments), GuestError::TooManySegments);
        assert_eq!(GuestError::from(&Refusal::UnknownType { request_type: 2 }), GuestError::Unsupported);
        assert_eq!(GuestError::from(&Refusal::ReadOnly { request_type: 1 }), GuestError::Refused);
        assert_eq!(GuestError::from(&Unanswerable::NoStatus), GuestError::MalformedChain);
    }
}
