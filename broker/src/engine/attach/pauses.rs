//! Queues that get no ring for a while, because their last one cost too much.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;

use super::refusal::Refused;

/// A guest had more requests outstanding on a ring than it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Excess {
    /// SQEs that the kernel had consumed and that had no CQE in the CQ. `None`: the kernel did not tell for so long
    /// that the guard gave up.
    pub(in crate::engine) outstanding: Option<u32>,
    /// The most that an honest driver has outstanding.
    pub(in crate::engine) cq_entries: u32,
}

/// The pause of each queue.
#[derive(Debug)]
pub(in crate::engine) struct Pauses {
    queues: Mutex<Vec<Option<Pause>>>,
}

#[derive(Clone, Copy, Debug)]
struct Pause {
    excess: Excess,
    end: Instant,
}

impl Pauses {
    /// No queue pauses.
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        Self { queues: Mutex::new(vec![None; usize::from(queue_count)]) }
    }

    /// The queue gets no ring before `end`.
    pub(in crate::engine) fn begin(&self, queue: u16, excess: Excess, end: Instant) {
        self.queues()[usize::from(queue)] = Some(Pause { excess, end });
    }

    /// Why the queue gets no ring. `None`: it does not pause.
    pub(in crate::engine) fn refused(&self, queue: u16) -> Option<Refused> {
        let Pause { excess, end } = self.queues()[usize::from(queue)]?;
        Some(excess.refused(end.saturating_duration_since(Instant::now())))
    }

    /// Forgets the pauses that are over, and returns the queues that had them. Their drivers can ask again.
    pub(in crate::engine) fn take_over(&self, now: Instant) -> Vec<u16> {
        self.take(|pause| pause.end <= now)
    }

    /// The operator ends all pauses. Returns the queues that had one.
    pub(in crate::engine) fn take_all(&self) -> Vec<u16> {
        self.take(|_| true)
    }

    /// When the next pause ends.
    pub(in crate::engine) fn next_end(&self) -> Option<Instant> {
        self.queues().iter().flatten().map(|pause| pause.end).min()
    }

    fn take(&self, is_over: impl Fn(&Pause) -> bool) -> Vec<u16> {
        let mut queues = self.queues();
        let over = queues.iter_mut().zip(0..).filter(|(pause, _)| pause.as_ref().is_some_and(&is_over));
        over.map(|(pause, queue)| {
            *pause = None;
            queue
        })
        .collect()
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Option<Pause>>> {
        // A change is one assignment, so a panic cannot leave half of one.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Excess {
    /// For a queue that gets no ring for this time from now on.
    pub(in crate::engine) fn refused(self, left: Duration) -> Refused {
        let Self { outstanding, cq_entries } = self;
        let outstanding = outstanding.map_or("an unknown number of".to_owned(), |outstanding| outstanding.to_string());
        let why = format!(
            "the last ring had {outstanding} requests outstanding, its CQ has {cq_entries} entries: no ring for {} s",
            left.as_secs_f64().ceil()
        );
        Refused { code: ErrorCode::Cost, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXCESS: Excess = Excess { outstanding: Some(5000), cq_entries: 1024 };
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_queue_that_pauses_is_refused_with_the_reason_and_what_is_left_and_others_are_not() {
        let pauses = Pauses::new(2);
        pauses.begin(1, EXCESS, Instant::now() + MINUTE);
        let refused = pauses.refused(1).unwrap();
        assert_eq!(refused.code, ErrorCode::Cost);
        let expected = "the last ring had 5000 requests outstanding, its CQ has 1024 entries: no ring for 60 s";
        assert_eq!(refused.why, expected);
        assert_eq!(pauses.refused(0), None);
        let unknown = Excess { outstanding: None, ..EXCESS }.refused(MINUTE);
        assert!(unknown.why.starts_with("the last ring had an unknown number of requests outstanding"), "{unknown:?}");
    }

    #[test]
    fn a_pause_ends_at_its_time_and_no_earlier() {
        let pauses = Pauses::new(3);
        let now = Instant::now();
        pauses.begin(2, EXCESS, now + MINUTE);
        pauses.begin(0, EXCESS, now + 2 * MINUTE);
        assert_eq!(pauses.next_end(), Some(now + MINUTE));
        assert!(pauses.take_over(now + MINUTE - Duration::from_nanos(1)).is_empty());
        assert_eq!(pauses.take_over(now + MINUTE), [2]);
        assert_eq!((pauses.refused(2), pauses.next_end()), (None, Some(now + 2 * MINUTE)));
    }

    #[test]
    fn the_operator_ends_all_pauses() {
        let pauses = Pauses::new(3);
        assert!(pauses.take_all().is_empty());
        pauses.begin(0, EXCESS, Instant::now() + MINUTE);
        pauses.begin(2, EXCESS, Instant::now() + MINUTE);
        assert_eq!((pauses.take_all(), pauses.take_all()), (vec![0, 2], vec![]));
        assert_eq!((pauses.refused(0), pauses.next_end()), (None, None));
    }
}
