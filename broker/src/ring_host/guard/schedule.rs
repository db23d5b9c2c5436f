//! When the guard asks the kernel about a ring.
//!
//! Each look holds up the ring, by 0.05 ms for a small guest and 10 ms for a large one. So the guard looks seldom, and
//! sooner where something is suspicious. What is suspicious costs nothing to see: the words in the ring's memory, which
//! an honest guest leaves true, and the size of the kernel's memory, which other processes change, too.

use std::time::{Duration, Instant};

/// The time between two looks without suspicion: a thousand times what a look costs, but at least and at most this.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(2);
const INTERVAL_COSTS: u32 = 1000;
/// The time between two looks when the kernel's memory has grown, in units of what a look costs.
const GROWTH_COSTS: u32 = 20;
/// Kernel memory that cannot be reclaimed has grown by this much since the last look: suspicious.
const GROWTH_BYTES: u64 = 16 << 20;
/// A look takes no longer than this. A longer measurement includes the time in which the guard did not run.
const COST_MAX: Duration = Duration::from_millis(15);
/// The first wait after an attempt to which the kernel gave no answer. Each further one is twice as long, without
/// suspicion.
const BUSY_WAIT: Duration = Duration::from_millis(50);
/// A suspicious ring that gives no answer for this long is as good as found.
const BUSY_MAX: Duration = Duration::from_secs(1);
/// While a ring gives no answer, so much growth within [`BUSY_MAX`] is a strong suspicion.
const BUSY_GROWTH_BYTES: u64 = 32 << 20;

/// When one ring was looked at, and what for.
#[derive(Debug)]
pub(super) struct Schedule {
    last: Instant,
    cost: Duration,
    /// Unreclaimable kernel memory at the last look.
    kernel_bytes: Option<u64>,
    /// The kernel gives no answer now.
    busy: Option<Busy>,
    /// How often in a row a suspicion came to nothing: other processes make the kernel's memory grow, too.
    false_alarms: u32,
}

/// The attempts since the last answer.
#[derive(Clone, Copy, Debug)]
struct Busy {
    last: Instant,
    times: u32,
    /// The last [`BUSY_MAX`] began then, with this much kernel memory.
    window: (Instant, Option<u64>),
}

/// What the guard sees without asking the kernel about the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signs {
    /// The ring's words say that more is outstanding than the CQ has entries.
    pub(super) words_exceed_cq: bool,
    /// Kernel memory of the whole host that cannot be reclaimed, in bytes (`SUnreclaim`).
    pub(super) kernel_bytes: Option<u64>,
}

impl Signs {
    fn has_grown(self, since: Option<u64>, by_bytes: u64) -> bool {
        self.kernel_bytes.zip(since).is_some_and(|(now, then)| now.saturating_sub(then) >= by_bytes)
    }
}

impl Schedule {
    /// `kernel_bytes` is what the kernel's memory was before the ring existed.
    pub(super) fn new(now: Instant, kernel_bytes: Option<u64>) -> Self {
        Self { last: now, cost: Duration::ZERO, kernel_bytes, busy: None, false_alarms: 0 }
    }

    /// Whether to look now.
    pub(super) fn is_due(&self, now: Instant, signs: Signs) -> bool {
        // No honest ring pays for this.
        if signs.words_exceed_cq {
            return true;
        }
        let is_suspicious = signs.has_grown(self.kernel_bytes, GROWTH_BYTES);
        if let Some(Busy { last, times, .. }) = self.busy {
            let wait = if is_suspicious { BUSY_WAIT } else { INTERVAL_MIN.min(BUSY_WAIT * 2_u32.pow(times.min(16))) };
            return now.saturating_duration_since(last) >= wait;
        }
        let since = now.saturating_duration_since(self.last);
        if since >= (self.cost * INTERVAL_COSTS).clamp(INTERVAL_MIN, INTERVAL_MAX) {
            return true;
        }
        // Each false alarm doubles the wait, up to the regular interval.
        let wait = (self.cost * GROWTH_COSTS).max(BUSY_WAIT) * 2_u32.pow(self.false_alarms.min(5));
        is_suspicious && since >= wait.min(INTERVAL_MIN)
    }

    /// The kernel did not tell, because the ring was in the middle of a batch. The guard tries again soon, and without
    /// suspicion less and less often: the attempts take a fiftieth of a CPU at most.
    ///
    /// True: the ring has been suspicious for so long without an answer that it has to end.
    pub(super) fn found_busy(&mut self, now: Instant, signs: Signs) -> bool {
        let fresh = (now, signs.kernel_bytes);
        let Busy { times, window, .. } = self.busy.unwrap_or(Busy { last: now, times: 0, window: fresh });
        let is_over = now.saturating_duration_since(window.0) >= BUSY_MAX;
        let is_strong = signs.words_exceed_cq || signs.has_grown(window.1, BUSY_GROWTH_BYTES);
        let window = if is_over { fresh } else { window };
        self.busy = Some(Busy { last: now, times: times.saturating_add(1), window });
        is_over && is_strong
    }

    /// A look that took `cost` found nothing wrong.
    pub(super) fn looked(&mut self, now: Instant, cost: Duration, signs: Signs) {
        let has_grown = signs.has_grown(self.kernel_bytes, GROWTH_BYTES);
        let false_alarms = if has_grown { self.false_alarms.saturating_add(1) } else { 0 };
        *self =
            Self { last: now, cost: cost.min(COST_MAX), kernel_bytes: signs.kernel_bytes, busy: None, false_alarms };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Duration = Duration::from_millis(8);
    const QUIET: Signs = Signs { words_exceed_cq: false, kernel_bytes: Some(1 << 30) };
    const GROWN: Signs = Signs { kernel_bytes: Some((1 << 30) + GROWTH_BYTES), ..QUIET };
    const EXCEEDING: Signs = Signs { words_exceed_cq: true, ..QUIET };

    /// The time after `from` at which the next look is due, in milliseconds.
    fn due_after(schedule: &Schedule, from: Instant, signs: Signs) -> u128 {
        let mut wait = Duration::ZERO;
        while !schedule.is_due(from + wait, signs) {
            wait += Duration::from_millis(10);
        }
        wait.as_millis()
    }

    fn looked_at(cost: Duration) -> Schedule {
        let mut schedule = Schedule::new(Instant::now(), QUIET.kernel_bytes);
        schedule.looked(schedule.last, cost, QUIET);
        schedule
    }

    #[test]
    fn a_look_is_due_every_second_and_every_two_seconds_where_looks_are_expensive() {
        let after = |cost| due_after(&looked_at(cost), looked_at(cost).last, QUIET).div_ceil(100);
        assert_eq!(after(Duration::from_micros(50)), 10);
        assert_eq!(after(Duration::from_micros(1500)), 15);
        assert_eq!(after(COST), 20);
    }

    #[test]
    fn words_that_exceed_the_cq_are_always_looked_at() {
        let mut schedule = looked_at(COST);
        assert!(schedule.is_due(schedule.last, EXCEEDING));
        schedule.found_busy(schedule.last, EXCEEDING);
        assert!(schedule.is_due(schedule.last, EXCEEDING));
    }

    #[test]
    fn growth_of_the_kernel_brings_the_next_look_forward_and_a_new_ring_s_first() {
        let schedule = looked_at(COST);
        assert_eq!(due_after(&schedule, schedule.last, GROWN), 160);
        let little = Signs { kernel_bytes: Some((1 << 30) + GROWTH_BYTES - 1), ..QUIET };
        assert_eq!(due_after(&schedule, schedule.last, little), 2000);
        let new = Schedule::new(Instant::now(), QUIET.kernel_bytes);
        assert_eq!(due_after(&new, new.last, GROWN), 50);
    }

    #[test]
    fn growth_for_other_reasons_is_believed_less_and_less_and_never_delays_a_look_by_more_than_a_second() {
        let mut schedule = looked_at(COST);
        let mut waits = Vec::new();
        let mut signs = QUIET;
        for _ in 0..6 {
            signs.kernel_bytes = signs.kernel_bytes.map(|bytes| bytes + GROWTH_BYTES);
            waits.push(due_after(&schedule, schedule.last, signs));
            schedule.looked(schedule.last, COST, signs);
        }
        assert_eq!(waits, [160, 320, 640, 1000, 1000, 1000]);
        schedule.looked(schedule.last, COST, signs);
        signs.kernel_bytes = signs.kernel_bytes.map(|bytes| bytes + GROWTH_BYTES);
        assert_eq!(due_after(&schedule, schedule.last, signs), 160, "it was quiet for once");
    }

    #[test]
    fn a_guard_that_did_not_run_for_a_while_does_not_take_that_for_the_cost_of_a_look() {
        let schedule = looked_at(Duration::from_secs(5));
        assert_eq!(due_after(&schedule, schedule.last, QUIET), 2000);
        assert_eq!(due_after(&schedule, schedule.last, GROWN), 300);
    }

    #[test]
    fn attempts_without_an_answer_are_repeated_soon_and_then_once_a_second() {
        let mut schedule = looked_at(COST);
        let mut now = schedule.last + INTERVAL_MAX;
        let mut waits = Vec::new();
        for _ in 0..7 {
            assert!(schedule.is_due(now, QUIET));
            assert!(!schedule.found_busy(now, QUIET), "nothing is suspicious");
            let wait = due_after(&schedule, now, QUIET);
            waits.push(wait);
            now += Duration::from_millis(wait as u64);
        }
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000, 1000]);
        assert_eq!(due_after(&schedule, now, GROWN), 0, "suspicion brings the next attempt forward");
        schedule.looked(now, COST, QUIET);
        assert_eq!(due_after(&schedule, now, QUIET), 2000, "the kernel told again");
    }

    #[test]
    fn a_ring_that_stays_suspicious_without_an_answer_for_a_second_has_to_end() {
        let after = |signs: &dyn Fn(u64) -> Signs| {
            let mut schedule = looked_at(COST);
            let at = |step: u64| schedule.last + Duration::from_millis(50 * step);
            let times: Vec<_> = (0..100).map(at).collect();
            times.into_iter().zip(0..).position(|(now, step)| schedule.found_busy(now, signs(step)))
        };
        assert_eq!(after(&|_| EXCEEDING), Some(20));
        assert_eq!(after(&|_| QUIET), None);
        let growing = |bytes_per_step: u64| {
            move |step: u64| Signs { kernel_bytes: Some((1 << 30) + step * bytes_per_step), ..QUIET }
        };
        assert_eq!(after(&growing(2 << 20)), Some(20), "40 MiB a second");
        assert_eq!(after(&growing(1 << 20)), None, "20 MiB a second, which other processes make, too");
    }

    #[test]
    fn a_host_that_does_not_tell_its_memory_gets_regular_looks() {
        let mut schedule = Schedule::new(Instant::now(), None);
        let unknown = Signs { kernel_bytes: None, ..QUIET };
        schedule.looked(schedule.last, COST, unknown);
        assert_eq!(due_after(&schedule, schedule.last, unknown), 2000);
        assert_eq!(due_after(&schedule, schedule.last, GROWN), 2000, "there is nothing to compare with");
    }
}
