//! A ring that is to be made, between the worker that orders it and the thread that makes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Nobody has begun.
const ORDERED: u8 = 0;
/// The worker does not want it any more.
const WITHDRAWN: u8 = 1;
/// The ring is being made.
const BEGUN: u8 = 2;

/// Goes with the order for a ring. Until the making of the ring itself begins, nobody touches its areas, and the worker can take
/// the order back without a word: it does not wait until the guest's memory is pinned. From then on the worker hears how it ended.
#[derive(Clone, Debug, Default)]
pub(in crate::engine) struct Ticket(Arc<AtomicU8>);

impl Ticket {
    /// Takes the order back. False: it is too late, the outcome will be told.
    pub(in crate::engine) fn withdraw(&self) -> bool {
        self.decide(WITHDRAWN)
    }

    /// Begins with the ring. False: the order was taken back, and nothing is to be told.
    pub(in crate::engine) fn begin(&self) -> bool {
        self.decide(BEGUN)
    }

    /// Whether it is still worth while to prepare for the ring.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed) != WITHDRAWN
    }

    /// The first decision stands. What either side touches afterwards is handed over by the channels, so nothing is ordered here.
    fn decide(&self, decision: u8) -> bool {
        self.0.compare_exchange(ORDERED, decision, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_first_decides() {
        let ticket = Ticket::default();
        assert!(ticket.is_wanted());
        assert!(ticket.withdraw());
        assert!(!ticket.clone().begin() && !ticket.is_wanted());

        let ticket = Ticket::default();
        assert!(ticket.clone().begin());
        assert!(!ticket.withdraw() && ticket.is_wanted());
    }
}
