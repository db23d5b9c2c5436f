//! What the workload needs from the guest it runs in.

/// How a wait for an interrupt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// At least one interrupt came since the last wait (signals coalesce).
    Interrupt,
    /// None came in the time given.
    TimedOut,
}

/// One queue's surroundings: a process, a bare-metal virtual machine, or the host.
pub trait Environment {
    /// A clock that never goes backwards, in nanoseconds since any fixed moment.
    fn now_ns(&self) -> u64;

    /// Tells the device that requests wait.
    fn ring_doorbell(&mut self);

    /// Called after each look at the queue that found nothing; `empty_polls` counts them since the last completion.
    /// A spin hint; an environment that shares its processor yields when the number is large.
    fn relax(&mut self, empty_polls: u32);

    /// Sleeps until an interrupt comes, at most `timeout_ns`. An interrupt that came before the call and after the
    /// last one that was returned ends the wait at once: none may be lost between.
    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup;

    /// Does nothing for `duration_ns`.
    fn pause(&mut self, duration_ns: u64) {
        let start_ns = self.now_ns();
        let mut polls = 0u32;
        while self.now_ns().wrapping_sub(start_ns) < duration_ns {
            polls = polls.saturating_add(1);
            self.relax(polls);
        }
    }

    /// Runs `access` on the `len_bytes` bytes of guest RAM at `gpa`. None, and `access` not run, where the guest has
    /// no such memory for buffers.
    ///
    /// Only for memory that no request in flight names.
    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R>;

    /// Notes how long one request took.
    fn record_latency(&mut self, latency_ns: u64);
}
