//! The rhythm of waiting for a disk.

use std::time::{Duration, Instant};

use super::{Disk, DiskError};

/// How soon the waiting thread first looks for the disk's holder again; the interval then doubles each time, up to
/// [`REPORT_INTERVAL`].
const FIRST_LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often the log repeats that the lease still waits for the disk.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// When to look for the disk's holder, and when to log.
pub(super) struct Looks {
    since: Instant,
    next_look: Instant,
    interval: Duration,
    next_report: Option<Instant>,
}

impl Looks {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, next_look: since, interval: FIRST_LOOK_INTERVAL, next_report: None }
    }

    pub(super) fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let is_due = now >= self.next_look;
        if is_due {
            self.next_look = now + self.interval;
            self.interval = (self.interval * 2).min(REPORT_INTERVAL);
        }
        is_due
    }

    pub(super) fn report(&mut self, obstacle: &DiskError) {
        let now = Instant::now();
        if self.next_report.is_none_or(|next| now >= next) {
            self.next_report = Some(now + REPORT_INTERVAL);
            let waited_s = self.since.elapsed().as_secs();
            tracing::warn!(waited_s, "waiting for the disk, no request is executed yet: {obstacle}");
        }
    }

    pub(super) fn report_success(&self, disk: &Disk) {
        let waited_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(path = ?disk.path(), size_bytes = disk.size_bytes(), waited_ms, "disk acquired");
    }
}
