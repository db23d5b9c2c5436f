//! A bounded rate of log lines for events that others can cause at any rate.

use std::array;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The shortest time between two lines.
const INTERVAL_MS: u64 = 10_000;
const NEVER: u64 = u64::MAX;
/// The number of causes with a limit of their own. Later causes share one limit.
const CAUSES_MAX: usize = 64;
const NO_CAUSE: u64 = 0;

/// Counts events, and decides when one gets a log line: at most one in ten seconds.
#[derive(Debug)]
pub(crate) struct LogLimit {
    start: Instant,
    count: AtomicU64,
    /// Time of the last line, since `start`; `NEVER` before the first.
    logged_ms: AtomicU64,
}

impl LogLimit {
    /// Nothing has been counted or logged.
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), count: AtomicU64::new(0), logged_ms: AtomicU64::new(NEVER) }
    }

    /// Counts one event. Returns the total if it is time for a line.
    pub(crate) fn count(&self) -> Option<u64> {
        self.count_at(self.start.elapsed().as_millis() as u64)
    }

    fn count_at(&self, now_ms: u64) -> Option<u64> {
        let total = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let logged_ms = self.logged_ms.load(Ordering::Relaxed);
        let due = logged_ms == NEVER || now_ms.saturating_sub(logged_ms) >= INTERVAL_MS;
        // If it is time for several threads, one of them logs.
        let mine =
            due && self.logged_ms.compare_exchange(logged_ms, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        mine.then_some(total)
    }
}

/// The subject of a log line, without the values in it.
///
/// A guest or a front-end may choose the hashed value only among a few: otherwise it could fill the table of
/// [`LogLimits`], and a new cause would have to share a limit. So a cause is a variant, a name or an errno, and never
/// a sector, an address or a text with such values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LogCause(u64);

impl LogCause {
    /// Equal for equal values, different for different values.
    pub(crate) fn new(what: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Self(hasher.finish().max(NO_CAUSE + 1))
    }
}

/// A [`LogLimit`] for each cause, so that a flood of one cause does not hide the first event of another.
#[derive(Debug)]
pub(crate) struct LogLimits {
    /// An entry belongs to the first cause that needs it.
    causes: [(AtomicU64, LogLimit); CAUSES_MAX],
    others: LogLimit,
}

impl LogLimits {
    /// Nothing has been counted or logged.
    pub(crate) fn new() -> Self {
        let causes = array::from_fn(|_| (AtomicU64::new(NO_CAUSE), LogLimit::new()));
        Self { causes, others: LogLimit::new() }
    }

    /// Counts one event of a cause. Returns the total of that cause if it is time for a line.
    pub(crate) fn count(&self, cause: LogCause) -> Option<u64> {
        self.limit(cause).count()
    }

    fn limit(&self, cause: LogCause) -> &LogLimit {
        let is_its = |owner: &AtomicU64| match owner.load(Ordering::Relaxed) {
            NO_CAUSE => match owner.compare_exchange(NO_CAUSE, cause.0, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => true,
                Err(first) => first == cause.0,
            },
            owner => owner == cause.0,
        };
        self.causes.iter().find(|(owner, _)| is_its(owner)).map_or(&self.others, |(_, limit)| limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_cause_does_not_hide_the_first_of_another() {
        let limits = LogLimits::new();
        let [flood, rare] = [LogCause::new("flood"), LogCause::new("rare")];
        assert_eq!(limits.limit(flood).count_at(5), Some(1));
        for _ in 0..1000 {
            assert_eq!(limits.limit(flood).count_at(6), None);
        }
        assert_eq!(limits.limit(rare).count_at(6), Some(1));
        assert_eq!(limits.limit(rare).count_at(7), None);
        assert_eq!(limits.limit(flood).count_at(10_005), Some(1002));
    }

    #[test]
    fn more_causes_than_entries_share_one_limit() {
        let limits = LogLimits::new();
        let logged = (0..1000).filter(|number| limits.limit(LogCause::new(number)).count_at(5).is_some()).count();
        assert_eq!(logged, CAUSES_MAX + 1);
        assert_eq!(limits.limit(LogCause::new(3)).count_at(10_005), Some(2), "a cause keeps its entry");
    }

    #[test]
    fn threads_that_report_the_same_cause_at_once_share_its_entry() {
        let limits = LogLimits::new();
        let logged = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for number in 0..CAUSES_MAX {
                        let is_logged = limits.limit(LogCause::new(number)).count_at(5).is_some();
                        logged.fetch_add(is_logged.into(), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(logged.into_inner(), CAUSES_MAX as u64);
        let totals = limits.causes.iter().map(|(_, limit)| limit.count.load(Ordering::Relaxed));
        assert!(totals.into_iter().all(|total| total == 4));
    }

    #[test]
    fn one_line_in_ten_seconds_has_the_total() {
        let limit = LogLimit::new();
        assert_eq!(limit.count_at(5), Some(1));
        assert_eq!(limit.count_at(6), None);
        assert_eq!(limit.count_at(10_004), None);
        assert_eq!(limit.count_at(10_005), Some(4));
    }
}
