//! A bounded rate of log lines for what others can make happen at any rate.

use std::array;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// At most one line in this time.
const INTERVAL_MS: u64 = 10_000;
const NEVER: u64 = u64::MAX;
/// Causes that have a limit of their own. The causes after that share one limit.
const CAUSES_MAX: usize = 64;
const NO_CAUSE: u64 = 0;

/// Counts something, and says when it is time for a log line about it: at most once in ten seconds.
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

    /// Counts one more; how many they are, if it is time for a line.
    pub(crate) fn count(&self) -> Option<u64> {
        self.count_at(self.start.elapsed().as_millis() as u64)
    }

    fn count_at(&self, now_ms: u64) -> Option<u64> {
        let total = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let logged_ms = self.logged_ms.load(Ordering::Relaxed);
        let due = logged_ms == NEVER || now_ms.saturating_sub(logged_ms) >= INTERVAL_MS;
        // Of several threads for which it is time, one logs.
        let mine =
            due && self.logged_ms.compare_exchange(logged_ms, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        mine.then_some(total)
    }
}

/// What a log line is about, without the values in it.
///
/// A guest or a front-end must not choose what is hashed from more than a few values: it could fill the table of
/// [`LogLimits`], and then a new cause would wait for the others. So a cause is a variant, a name or an errno, and never
/// a sector, an address or a text with such values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Cause(u64);

impl Cause {
    /// The same for the same value, and another for any other.
    pub(crate) fn new(what: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Self(hasher.finish().max(NO_CAUSE + 1))
    }
}

/// A [`LogLimit`] for each cause, so that a flood of one does not hide the first of another.
#[derive(Debug)]
pub(crate) struct LogLimits {
    /// A place belongs to the first cause that needs it.
    causes: [(AtomicU64, LogLimit); CAUSES_MAX],
    others: LogLimit,
}

impl LogLimits {
    /// Nothing has been counted or logged.
    pub(crate) fn new() -> Self {
        let causes = array::from_fn(|_| (AtomicU64::new(NO_CAUSE), LogLimit::new()));
        Self { causes, others: LogLimit::new() }
    }

    /// Counts one more of a cause; how many of it there are, if it is time for a line.
    pub(crate) fn count(&self, cause: Cause) -> Option<u64> {
        self.limit(cause).count()
    }

    fn limit(&self, cause: Cause) -> &LogLimit {
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
        let [flood, rare] = [Cause::new("flood"), Cause::new("rare")];
        assert_eq!(limits.limit(flood).count_at(5), Some(1));
        for _ in 0..1000 {
            assert_eq!(limits.limit(flood).count_at(6), None);
        }
        assert_eq!(limits.limit(rare).count_at(6), Some(1));
        assert_eq!(limits.limit(rare).count_at(7), None);
        assert_eq!(limits.limit(flood).count_at(10_005), Some(1002));
    }

    #[test]
    fn more_causes_than_there_are_places_for_share_one_limit() {
        let limits = LogLimits::new();
        let logged = (0..1000).filter(|number| limits.limit(Cause::new(number)).count_at(5).is_some()).count();
        assert_eq!(logged, CAUSES_MAX + 1);
        assert_eq!(limits.limit(Cause::new(3)).count_at(10_005), Some(2), "a cause keeps its place");
    }

    #[test]
    fn threads_that_bring_the_same_cause_at_once_share_its_place() {
        let limits = LogLimits::new();
        let logged = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for number in 0..CAUSES_MAX {
                        let is_logged = limits.limit(Cause::new(number)).count_at(5).is_some();
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
    fn there_is_one_line_in_ten_seconds_with_the_total() {
        let limit = LogLimit::new();
        assert_eq!(limit.count_at(5), Some(1));
        assert_eq!(limit.count_at(6), None);
        assert_eq!(limit.count_at(10_004), None);
        assert_eq!(limit.count_at(10_005), Some(4));
    }
}
