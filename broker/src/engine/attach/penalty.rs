//! How long a queue gets no ring after its last ring cost too much.
//!
//! The pauses of all queues of a device grow together: one guest has all of them, and must not gain by taking turns.

use std::time::{Duration, Instant};

/// After the first time.
const FIRST: Duration = Duration::from_secs(10);
/// At most.
const LONGEST: Duration = Duration::from_secs(3600);

/// Grows with each time that a ring ends for its cost, and shrinks with good conduct.
#[derive(Debug, Default)]
pub(super) struct Penalty {
    /// The last pause, and its end.
    last: Option<(Duration, Instant)>,
}

impl Penalty {
    /// A ring has cost too much: the length of the pause that begins now. Twice the last pause, but a pause counts less
    /// the longer it is past: it is halved for each time that its own length has passed since its end.
    pub(super) fn begin(&mut self, now: Instant) -> Duration {
        let pause = match self.last {
            None => FIRST,
            Some((last, end)) => {
                let halvings = (now.saturating_duration_since(end).as_secs() / last.as_secs().max(1)).min(31) as u32;
                (last * 2 / 2_u32.pow(halvings)).clamp(FIRST, LONGEST)
            }
        };
        self.last = Some((pause, now + pause));
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_pause_is_twice_the_last_up_to_an_hour() {
        let mut penalty = Penalty::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let pause = penalty.begin(now);
            now += pause;
            pauses.push(pause.as_secs());
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600, 3600]);
    }

    #[test]
    fn good_conduct_shortens_the_next_pause() {
        let after = |wait: Duration| {
            let mut penalty = Penalty::default();
            let now = Instant::now();
            penalty.begin(now);
            penalty.begin(now);
            assert_eq!(penalty.begin(now), 40 * SECOND);
            penalty.begin(now + 40 * SECOND + wait).as_secs()
        };
        assert_eq!(
            [after(Duration::ZERO), after(39 * SECOND), after(40 * SECOND), after(80 * SECOND)],
            [80, 80, 40, 20]
        );
        assert_eq!(after(1_000_000 * SECOND), 10, "never shorter than the first");
    }
}
