//! The timer of a worker: wakes it at a deadline while it sleeps.

use std::time::{Duration, Instant};

use io_uring::{opcode, types};

use super::ring::Ring;
use super::token::Token;

/// A timeout in the worker's io_uring (`IORING_OP_TIMEOUT`, Linux 5.4).
#[derive(Debug, Default)]
pub(super) struct Timer {
    /// When the timeout that is under way ends. `None`: none is under way.
    armed_for: Option<Instant>,
    /// Read by the kernel when it takes the SQE. On the heap, since the worker may move until then.
    duration: Box<types::Timespec>,
}

impl Timer {
    /// Has the io_uring complete an entry at `deadline`, or earlier. The caller submits before it arms again.
    pub(super) fn arm(&mut self, ring: &mut Ring<'_>, deadline: Instant, now: Instant) {
        if self.armed_for.is_some_and(|armed_for| armed_for <= deadline) {
            return;
        }
        if self.armed_for.is_some() {
            // At most one is under way, apart from those that the kernel is taking back.
            ring.push_timeout_remove(Token::Timer.to_user_data(), Token::Nothing.to_user_data());
            // What the kernel reads for the next timeout must not change before it has read it for this one.
            ring.submit();
        }
        self.armed_for = Some(deadline);
        let left = deadline.saturating_duration_since(now).max(Duration::from_nanos(1));
        *self.duration = types::Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
        let entry = opcode::Timeout::new(&*self.duration).build().user_data(Token::Timer.to_user_data());
        // SAFETY: the kernel reads the duration when it takes the entry. Its place is on the heap, and lives as long as the worker; it
        // does not change before the entry is submitted.
        unsafe { ring.push(&entry) };
    }

    /// A timeout has ended, or the kernel has taken it back.
    pub(super) fn has_fired(&mut self, now: Instant) {
        if self.armed_for.is_some_and(|armed_for| armed_for <= now) {
            self.armed_for = None;
        }
    }
}
