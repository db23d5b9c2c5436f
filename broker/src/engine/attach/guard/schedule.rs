//! When the guard asks the kernel about a ring.
//!
//! Each look holds up the ring, by 0.05 ms for a small guest and 10 ms for a large one. So the guard looks seldom, and
//! looks sooner where something is suspicious. What is suspicious costs nothing to see: the words in the ring's memory,
//! which an honest guest leaves true, and the size of the kernel's memory, which other processes change, too.

use std::time::{Duration, Instant};

/// The time between two looks without suspicion, at least.
const INTERVAL: Duration = Duration::from_secs(1);
/// The time between two looks in units of what a look costs, without suspicion: a thousandth of the ring's time.
const INTERVAL_COSTS: u32 = 1000;
/// The same with suspicion.
const SUSPICIOUS_COSTS: u32 = 100;
/// The first wait after an attempt to which the kernel gave no answer. Each further one is twice as long.
const BUSY_WAIT: Duration = Duration::from_millis(50);
/// Kernel memory that cannot be reclaimed has grown by this much since the last look: suspicious.
const GROWTH_BYTES: u64 = 16 << 20;

/// When one ring was looked at, and what for.
#[derive(Debug)]
pub(super) struct Schedule {
    last: Instant,
    cost: Duration,
    /// Unreclaimable kernel memory at the last look.
    kernel_bytes: Option<u64>,
    /// When the guard asked last and got no answer, and how often in a row.
    busy: Option<(Instant, u32)>,
    /// How often in a row a suspicion came to nothing: other processes make the kernel's memory grow, too.
    false_alarms: u32,
}

/// What the guard sees without asking the kernel about the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signs {
    /// The ring's words say that more is outstanding than the CQ has entries.
    pub(super) words_exceed_cq: bool,
    /// Kernel memory of the whole host that cannot be reclaimed, in bytes (`SUnreclaim`).
    pub(super) kernel_bytes: Option<u64>,
}

impl Schedule {
    pub(super) fn new(now: Instant, kernel_bytes: Option<u64>) -> Self {
        Self { last: now, cost: Duration::ZERO, kernel_bytes, busy: None, false_alarms: 0 }
    }

    /// Whether to look now.
    pub(super) fn is_due(&self, now: Instant, signs: Signs) -> bool {
        if let Some((last, times)) = self.busy {
            return now.saturating_duration_since(last) >= INTERVAL.min(BUSY_WAIT * 2_u32.pow(times.min(16)));
        }
        let since = now.saturating_duration_since(self.last);
        let regular = INTERVAL.max(self.cost * INTERVAL_COSTS);
        if since >= regular {
            return true;
        }
        if signs.words_exceed_cq {
            return since >= self.cost * SUSPICIOUS_COSTS;
        }
        // Each false alarm doubles the wait, up to the regular interval.
        self.has_grown(signs) && since >= self.cost * SUSPICIOUS_COSTS.saturating_mul(1 << self.false_alarms.min(16))
    }

    /// The kernel did not tell, because the ring was in the middle of a batch. The guard tries again soon, and less and
    /// less often: the attempts take a fiftieth of a CPU at most. A ring takes the fewer requests the longer its
    /// batches are, so it gains nothing by that.
    pub(super) fn found_busy(&mut self, now: Instant) {
        let times = self.busy.map_or(0, |(_, times)| times.saturating_add(1));
        self.busy = Some((now, times));
    }

    /// A look that took `cost` found nothing wrong.
    pub(super) fn looked(&mut self, now: Instant, cost: Duration, signs: Signs) {
        self.false_alarms = if self.has_grown(signs) { self.false_alarms.saturating_add(1) } else { 0 };
        *self = Self { last: now, cost, kernel_bytes: signs.kernel_bytes, busy: None, ..*self };
    }

    fn has_grown(&self, signs: Signs) -> bool {
        let growth = signs.kernel_bytes.zip(self.kernel_bytes).map(|(now, then)| now.saturating_sub(then));
        growth.is_some_and(|bytes| bytes >= GROWTH_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Duration = Duration::from_millis(2);
    const QUIET: Signs = Signs { words_exceed_cq: false, kernel_bytes: Some(1 << 30) };
    const GROWN: Signs = Signs { kernel_bytes: Some((1 << 30) + GROWTH_BYTES), ..QUIET };
    const EXCEEDING: Signs = Signs { words_exceed_cq: true, ..QUIET };

    /// The time after a look of [`COST`] at which the next look is due.
    fn due_after(schedule: &Schedule, signs: Signs) -> Duration {
        let mut wait = Duration::ZERO;
        while !schedule.is_due(schedule.last + wait, signs) {
            wait += Duration::from_millis(10);
        }
        wait
    }

    fn looked_at() -> Schedule {
        let mut schedule = Schedule::new(Instant::now(), QUIET.kernel_bytes);
        schedule.looked(schedule.last, COST, QUIET);
        schedule
    }

    #[test]
    fn a_look_is_due_after_a_thousand_times_its_cost_and_a_second_at_least() {
        assert_eq!(due_after(&looked_at(), QUIET), COST * 1000);
        let mut cheap = looked_at();
        cheap.looked(cheap.last, Duration::from_micros(50), QUIET);
        assert_eq!(due_after(&cheap, QUIET), INTERVAL);
    }

    #[test]
    fn a_new_ring_is_looked_at_as_soon_as_something_is_suspicious() {
        let new = Schedule::new(Instant::now(), QUIET.kernel_bytes);
        assert_eq!(
            [QUIET, GROWN, EXCEEDING].map(|signs| due_after(&new, signs)),
            [INTERVAL, Duration::ZERO, Duration::ZERO]
        );
    }

    #[test]
    fn suspicion_brings_the_next_look_forward_to_a_hundred_times_its_cost() {
        assert_eq!(due_after(&looked_at(), GROWN), COST * 100);
        assert_eq!(due_after(&looked_at(), EXCEEDING), COST * 100);
        let little = Signs { kernel_bytes: Some((1 << 30) + GROWTH_BYTES - 1), ..QUIET };
        assert_eq!(due_after(&looked_at(), little), COST * 1000);
    }

    #[test]
    fn kernel_memory_that_grows_for_other_reasons_is_believed_less_and_less() {
        let mut schedule = looked_at();
        let mut waits = Vec::new();
        let mut signs = QUIET;
        for _ in 0..6 {
            signs.kernel_bytes = signs.kernel_bytes.map(|bytes| bytes + GROWTH_BYTES);
            waits.push(due_after(&schedule, signs).as_millis());
            schedule.looked(schedule.last, COST, signs);
        }
        assert_eq!(waits, [200, 400, 800, 1600, 2000, 2000]);
        schedule.looked(schedule.last, COST, signs);
        signs.kernel_bytes = signs.kernel_bytes.map(|bytes| bytes + GROWTH_BYTES);
        assert_eq!(due_after(&schedule, signs), COST * 100, "it was quiet for once");
    }

    #[test]
    fn attempts_without_an_answer_are_repeated_soon_and_then_once_a_second() {
        let mut schedule = looked_at();
        let mut now = schedule.last + COST * 1000;
        let mut waits = Vec::new();
        for _ in 0..7 {
            assert!(schedule.is_due(now, QUIET));
            schedule.found_busy(now);
            let mut wait = Duration::ZERO;
            while !schedule.is_due(now + wait, EXCEEDING) {
                wait += Duration::from_millis(10);
            }
            waits.push(wait.as_millis());
            now += wait;
        }
        assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000]);
        schedule.looked(now, COST, QUIET);
        assert_eq!(due_after(&schedule, QUIET), COST * 1000, "the kernel told again");
    }

    #[test]
    fn a_host_that_does_not_tell_its_memory_gets_regular_looks() {
        let mut schedule = Schedule::new(Instant::now(), None);
        let unknown = Signs { kernel_bytes: None, ..QUIET };
        schedule.looked(schedule.last, COST, unknown);
        assert_eq!(due_after(&schedule, unknown), COST * 1000);
        assert_eq!(due_after(&schedule, GROWN), COST * 1000, "there is nothing to compare with");
    }
}
