//! The interface between the workload and the guest that it runs in.

/// The result of a wait for an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// At least one interrupt has come since the last wait (signals coalesce).
    Interrupt,
    /// No interrupt came within the time-out.
    TimedOut,
}

/// The environment of a queue: a process, a bare-metal virtual machine, or the host.
pub trait Environment {
    /// A monotonic clock, in nanoseconds since any fixed moment.
    fn now_ns(&self) -> u64;

    /// Notifies the device of waiting requests.
    fn ring_doorbell(&mut self);

    /// The hook after each empty poll of the queue. `empty_polls` is the number of empty polls since the last
    /// completion. It is a spin hint; an environment that shares its processor yields when the number is large.
    fn relax(&mut self, empty_polls: u32);

    /// Sleeps until an interrupt comes, at most `timeout_ns`. An interrupt that came after the last returned interrupt
    /// and before this call ends the wait at once: no interrupt may be lost between two calls.
    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup;

    /// Waits for `duration_ns`.
    fn pause(&mut self, duration_ns: u64) {
        let start_ns = self.now_ns();
        let mut polls = 0u32;
        while self.now_ns().wrapping_sub(start_ns) < duration_ns {
            polls = polls.saturating_add(1);
            self.relax(polls);
        }
    }

    /// Runs `access` on the `len_bytes` bytes of guest RAM at `gpa`. Returns `None` without running `access` if the
    /// guest has no such memory for buffers.
    ///
    /// Use it only for memory that no request in flight uses.
    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R>;

    /// Records the latency of one request.
    fn record_latency(&mut self, latency_ns: u64);
}
