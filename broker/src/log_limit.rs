//! A bounded rate of log lines for what others can make happen at any rate.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// At most one line in this time.
const INTERVAL_MS: u64 = 10_000;
const NEVER: u64 = u64::MAX;

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

    /// How many were counted.
    pub(crate) fn total(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_line_in_ten_seconds_with_the_total() {
        let limit = LogLimit::new();
        assert_eq!(limit.count_at(5), Some(1));
        assert_eq!(limit.count_at(6), None);
        assert_eq!(limit.count_at(10_004), None);
        assert_eq!(limit.count_at(10_005), Some(4));
        assert_eq!(limit.total(), 4);
    }
}
