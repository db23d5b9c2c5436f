//! Cancelling a build between the worker that asked for it and the builder.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Neither side has decided.
const PENDING: u8 = 0;
/// The worker does not want the ring any more.
const CANCELLED: u8 = 1;
/// The builder makes the ring.
const CLAIMED: u8 = 2;

/// Lets a worker cancel a build. Both sides have a clone, and the first decision stands.
///
/// The builder touches the ring's areas only after it has claimed the build. Until then the worker can cancel the build
/// without an answer, and need not wait while the builder pins guest memory. After the claim the builder tells the
/// worker the outcome.
#[derive(Clone, Debug, Default)]
pub(in crate::engine) struct CancellationToken(Arc<AtomicU8>);

impl CancellationToken {
    /// The worker cancels the build. False: the builder has claimed the build, and will tell its outcome.
    pub(in crate::engine) fn cancel(&self) -> bool {
        self.decide(CANCELLED)
    }

    /// The builder claims the build. False: the worker has cancelled the build, and expects no answer.
    pub(in crate::engine) fn claim(&self) -> bool {
        self.decide(CLAIMED)
    }

    /// Whether the worker has cancelled the build: there is nothing to prepare for any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == CANCELLED
    }

    /// The channels between the two sides hand over what each of them touches afterwards, so this orders nothing.
    fn decide(&self, decision: u8) -> bool {
        self.0.compare_exchange(PENDING, decision, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decision_stands() {
        let token = CancellationToken::default();
        assert!(!token.is_cancelled());
        assert!(token.cancel());
        assert!(!token.clone().claim() && token.is_cancelled());
        assert!(!token.cancel(), "it is cancelled once");

        let token = CancellationToken::default();
        assert!(token.clone().claim());
        assert!(!token.cancel() && !token.is_cancelled());
    }
}
