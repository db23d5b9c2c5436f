//! Queues that get no ring for a while, because their last one cost too much.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;

use super::refusal::Refused;

/// A guest had more requests outstanding on a ring than it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Excess {
    /// SQEs that the kernel had consumed and that had no CQE in the CQ.
    pub(in crate::engine) outstanding: u32,
    /// The most that an honest driver has outstanding.
    pub(in crate::engine) cq_entries: u32,
    /// How long the queue gets no ring.
    pub(in crate::engine) pause: Duration,
}

/// The pause of each queue. The [guard](super::guard) begins and ends it.
#[derive(Debug)]
pub(in crate::engine) struct Pauses {
    queues: Mutex<Vec<Option<Excess>>>,
}

impl Pauses {
    /// No queue pauses.
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        Self { queues: Mutex::new(vec![None; usize::from(queue_count)]) }
    }

    /// The queue gets no ring from now on.
    pub(in crate::engine) fn begin(&self, queue: u16, excess: Excess) {
        self.queues()[usize::from(queue)] = Some(excess);
    }

    /// Why the queue gets no ring. `None`: it does not pause.
    pub(in crate::engine) fn refused(&self, queue: u16) -> Option<Refused> {
        self.queues()[usize::from(queue)].map(Excess::refused)
    }

    /// The pause of a queue is over. False: it was over before.
    pub(in crate::engine) fn end(&self, queue: u16) -> bool {
        self.queues()[usize::from(queue)].take().is_some()
    }

    /// The operator ends all pauses. False: there was none.
    pub(in crate::engine) fn end_all(&self) -> bool {
        self.queues().iter_mut().filter_map(Option::take).count() > 0
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Option<Excess>>> {
        // A change is one assignment, so a panic cannot leave half of one.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Excess {
    pub(in crate::engine) fn refused(self) -> Refused {
        let Self { outstanding, cq_entries, pause } = self;
        let why = format!(
            "the last ring had {outstanding} requests outstanding, its CQ has {cq_entries} entries: no ring for {} s",
            pause.as_secs()
        );
        Refused { code: ErrorCode::Cost, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXCESS: Excess = Excess { outstanding: 5000, cq_entries: 1024, pause: Duration::from_secs(20) };

    #[test]
    fn a_queue_that_pauses_is_refused_with_the_reason_and_others_are_not() {
        let pauses = Pauses::new(2);
        pauses.begin(1, EXCESS);
        let refused = pauses.refused(1).unwrap();
        assert_eq!(refused.code, ErrorCode::Cost);
        assert_eq!(
            refused.why,
            "the last ring had 5000 requests outstanding, its CQ has 1024 entries: no ring for 20 s"
        );
        assert_eq!(pauses.refused(0), None);
        assert!(pauses.end(1) && !pauses.end(1));
        assert_eq!(pauses.refused(1), None);
    }

    #[test]
    fn the_operator_ends_all_pauses() {
        let pauses = Pauses::new(3);
        assert!(!pauses.end_all());
        pauses.begin(0, EXCESS);
        pauses.begin(2, EXCESS);
        assert!(pauses.end_all() && !pauses.end_all());
        assert_eq!([0, 1, 2].map(|queue| pauses.refused(queue)), [None, None, None]);
    }
}
