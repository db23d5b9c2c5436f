//! When a worker without work polls, and when it goes to sleep.
//!
//! Being woken costs some microseconds and the driver a system call, so a worker looks for work for a while before it
//! sleeps. That pays only if work tends to come within that while. A *gap* is the time from when there was nothing to do
//! until there was again; a worker polls if one of the last few gaps was shorter than the poll time, also of those that it
//! slept through. So a guest with little to do costs no CPU time for polling, and one that becomes busy is
//! polled from its second request on.
//!
//! Gaps during which the disk works on requests are judged by themselves: they tell of the disk, the others of the
//! driver.

use std::time::{Duration, Instant};

/// What comes next for a worker that found nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    /// Look again.
    Poll,
    /// Have the kernel wake it.
    Sleep,
}

/// Poll iterations without work between two looks at the clock, a power of two: a look costs about as much as an iteration.
const ITERATIONS_PER_LOOK: u32 = 16;

/// Which of the last gaps count.
const REMEMBERED_GAPS: u8 = 0b1111;

/// The decision for one worker.
#[derive(Debug)]
pub(super) struct PollPolicy {
    poll_time: Duration,
    /// For gaps without and with requests under way: one bit for each gap, the last one lowest; set if it was short.
    short_gaps: [u8; 2],
    /// Poll iterations without work in this gap.
    iterations: u32,
    /// When this gap began, or a few iterations later. `None`: not looked at the clock yet.
    gap_began: Option<Instant>,
    /// Whether requests were under way when this gap began.
    requests_under_way: bool,
    slept: bool,
}

impl PollPolicy {
    /// Polls for at most `poll_time` in each gap; zero: never.
    pub(super) fn new(poll_time: Duration) -> Self {
        Self {
            poll_time,
            // A new queue is worth polling.
            short_gaps: [REMEMBERED_GAPS; 2],
            iterations: 0,
            gap_began: None,
            requests_under_way: false,
            slept: false,
        }
    }

    /// A policy with the same poll time, for another thread.
    pub(super) fn renewed(&self) -> Self {
        Self::new(self.poll_time)
    }

    /// A poll iteration found nothing to do.
    #[inline]
    pub(super) fn idle(&mut self, requests_under_way: bool, now: impl FnOnce() -> Instant) -> Idle {
        if self.iterations == 0 {
            self.requests_under_way = requests_under_way;
        }
        self.iterations = self.iterations.wrapping_add(1).max(1);
        if !self.polls() {
            self.begin_sleep(now);
            return Idle::Sleep;
        }
        if self.iterations & (ITERATIONS_PER_LOOK - 1) != 0 {
            return Idle::Poll;
        }
        let now = now();
        let began = *self.gap_began.get_or_insert(now);
        if now.saturating_duration_since(began) < self.poll_time {
            return Idle::Poll;
        }
        self.slept = true;
        Idle::Sleep
    }

    /// A poll iteration found something to do: a gap, if there was one, has ended.
    #[inline]
    pub(super) fn busy(&mut self, now: impl FnOnce() -> Instant) {
        if self.iterations == 0 {
            return;
        }
        let short = match self.gap_began {
            // Found by polling.
            _ if !self.slept => true,
            Some(began) => now().saturating_duration_since(began) < self.poll_time,
            None => false,
        };
        let gaps = &mut self.short_gaps[usize::from(self.requests_under_way)];
        *gaps = *gaps << 1 | u8::from(short);
        self.iterations = 0;
        self.gap_began = None;
        self.slept = false;
    }

    fn polls(&self) -> bool {
        !self.poll_time.is_zero() && self.short_gaps[usize::from(self.requests_under_way)] & REMEMBERED_GAPS != 0
    }

    fn begin_sleep(&mut self, now: impl FnOnce() -> Instant) {
        self.slept = true;
        // Without polling the length of a gap does not matter.
        if self.gap_began.is_none() && !self.poll_time.is_zero() {
            self.gap_began = Some(now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL_TIME: Duration = Duration::from_micros(32);

    /// A worker's poll iterations, each of which takes one microsecond.
    struct Clock {
        now: Instant,
        policy: PollPolicy,
    }

    impl Clock {
        fn new(poll_time: Duration) -> Self {
            Self { now: Instant::now(), policy: PollPolicy::new(poll_time) }
        }

        /// A gap of this length, then work. Returns for how many iterations the worker polled.
        fn gap(&mut self, length: Duration, requests_under_way: bool) -> u32 {
            let end = self.now + length;
            let mut polled = 0;
            while self.now < end {
                match self.policy.idle(requests_under_way, || self.now) {
                    Idle::Poll => {
                        polled += 1;
                        self.now += Duration::from_micros(1);
                    }
                    Idle::Sleep => self.now = end,
                }
            }
            self.policy.busy(|| self.now);
            polled
        }
    }

    #[test]
    fn a_gap_shorter_than_the_poll_time_is_polled_to_its_end() {
        let mut clock = Clock::new(POLL_TIME);
        for _ in 0..100 {
            assert_eq!(clock.gap(Duration::from_micros(20), false), 20);
        }
    }

    #[test]
    fn polling_ends_after_the_poll_time() {
        let polled = Clock::new(POLL_TIME).gap(Duration::from_millis(100), false);
        assert!((32..=32 + 2 * ITERATIONS_PER_LOOK).contains(&polled), "polled for {polled} us of 32");
    }

    #[test]
    fn a_poll_time_of_zero_never_polls() {
        let mut clock = Clock::new(Duration::ZERO);
        for length_us in [1, 5, 50] {
            assert_eq!(clock.gap(Duration::from_micros(length_us), false), 0);
        }
    }

    #[test]
    fn long_gaps_are_not_polled_once_they_are_the_rule() {
        let mut clock = Clock::new(POLL_TIME);
        for _ in 0..4 {
            assert_ne!(clock.gap(Duration::from_micros(200), false), 0);
        }
        for _ in 0..100 {
            assert_eq!(clock.gap(Duration::from_micros(200), false), 0);
        }
    }

    #[test]
    fn one_short_gap_that_was_slept_through_brings_polling_back() {
        let mut clock = Clock::new(POLL_TIME);
        for _ in 0..10 {
            clock.gap(Duration::from_micros(200), false);
        }
        assert_eq!(clock.gap(Duration::from_micros(10), false), 0);
        assert_eq!(clock.gap(Duration::from_micros(10), false), 10);
    }

    #[test]
    fn a_slow_disk_does_not_stop_the_polling_for_the_driver() {
        let mut clock = Clock::new(POLL_TIME);
        for _ in 0..10 {
            clock.gap(Duration::from_micros(200), true);
            assert_eq!(clock.gap(Duration::from_micros(10), false), 10);
        }
        assert_eq!(clock.gap(Duration::from_micros(200), true), 0, "waiting for the disk is not polled");
    }
}
