//! Pauses between polls for an answer that usually comes soon.

use std::thread;
use std::time::{Duration, Instant};

/// How long to spin before the first sleep, and the length of that sleep.
const SPIN: Duration = Duration::from_micros(50);
/// The longest sleep between two polls.
const SLEEP_MAX: Duration = Duration::from_millis(1);

/// The pauses of one wait, which become longer, up to a time limit.
#[derive(Debug)]
pub(super) struct Backoff {
    begin: Instant,
    limit: Duration,
    next_sleep: Duration,
}

impl Backoff {
    pub(super) fn new(limit: Duration) -> Self {
        Self { begin: Instant::now(), limit, next_sleep: SPIN }
    }

    /// Pauses. Returns false if the time limit is over.
    pub(super) fn pause(&mut self) -> bool {
        let waited = self.begin.elapsed();
        if waited >= self.limit {
            return false;
        }
        if waited < SPIN {
            std::hint::spin_loop();
        } else {
            thread::sleep(self.next_sleep);
            self.next_sleep = (self.next_sleep * 2).min(SLEEP_MAX);
        }
        true
    }
}
