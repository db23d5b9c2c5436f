//! The guard: the thread that ends the rings of a guest with more requests outstanding than it may have.
//!
//! Each outstanding request costs kernel memory, and the end of a ring has to wait for it or to cancel it. An honest
//! driver never has more outstanding than its CQ has entries (`docs/abi.md`, section 6), but the kernel sets no limit:
//! it queues for the guest what does not fit. What one request costs is bounded by the size of the slots, and what one
//! batch costs by the number of SQ entries ([`AttachConfig::limits`](super::AttachConfig::limits)). So the guard
//! watches this one number.
//!
//! A ring that exceeds it ends. Its queue gets no ring for a while then ([`penalty`]), and the guest goes on with the
//! virtqueue, whose size bounds what it can have outstanding. [`schedule`] says when the guard looks.

mod kernel_memory;
mod penalty;
mod schedule;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;

use self::penalty::Penalty;
use self::schedule::{Schedule, Signs};
use super::pauses::Excess;
use super::shared::SharedRings;
use super::workers::Workers;
use crate::engine::EngineError;
use crate::log_limit::{LogCause, LogLimits};
use crate::ring::{GaugeReading, RingGauge};
use crate::threads::{AbortOnPanic, leave_signals_to_others};

/// The time between two looks at what costs nothing to see.
const GLANCE: Duration = Duration::from_millis(50);
/// How long the guard asks again and again about a ring that is in the middle of a batch. Between two batches the kernel
/// tells for some microseconds only. A ring whose batches take longer than this takes few requests.
const INSISTENCE: Duration = Duration::from_millis(20);
/// How long it asks without giving up the CPU in between.
const SPIN: Duration = Duration::from_micros(200);

/// A ring that the guard is to watch until it is closed.
#[derive(Debug)]
pub(super) struct WatchedRing {
    pub(super) queue: u16,
    /// The most requests that its driver may have outstanding.
    pub(super) cq_entries: u32,
    pub(super) gauge: RingGauge,
    /// The [`kernel_bytes`] before the ring existed.
    pub(super) kernel_bytes: Option<u64>,
}

/// The kernel's memory that cannot be reclaimed, in bytes, if the host tells.
pub(super) fn kernel_bytes() -> Option<u64> {
    kernel_memory::unreclaimable_bytes()
}

/// The way to the guard. The guard ends when this is dropped.
#[derive(Debug)]
pub(super) struct GuardSender(Sender<WatchedRing>);

impl GuardSender {
    /// Watches a ring from now on.
    pub(super) fn watch(&self, ring: WatchedRing) {
        // The guard ends only after its sender.
        let _ = self.0.send(ring);
    }
}

/// Starts the guard.
pub(super) fn start(rings: Arc<SharedRings>, workers: Arc<dyn Workers>) -> Result<GuardSender, EngineError> {
    let (sender, receiver) = channel();
    thread::Builder::new()
        .name("ring-guard".into())
        .spawn(move || {
            leave_signals_to_others();
            // Without the guard nothing bounds what a guest costs.
            let _abort = AbortOnPanic;
            Guard { receiver, rings, workers, watched: Vec::new(), penalty: Penalty::default(), log: LogLimits::new() }
                .run();
        })
        .map_err(EngineError::Thread)?;
    Ok(GuardSender(sender))
}

struct Guard {
    receiver: Receiver<WatchedRing>,
    rings: Arc<SharedRings>,
    workers: Arc<dyn Workers>,
    watched: Vec<(WatchedRing, Schedule)>,
    penalty: Penalty,
    log: LogLimits,
}

impl Guard {
    fn run(&mut self) {
        loop {
            match self.next_ring() {
                Ok(ring) => {
                    let schedule = Schedule::new(Instant::now(), ring.kernel_bytes);
                    self.watched.push((ring, schedule));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.watched.retain(|(ring, _)| !ring.gauge.is_closed());
            self.look_at_rings();
            self.end_pauses();
        }
    }

    /// Waits for a ring to watch, for the next look or for the end of a pause.
    fn next_ring(&self) -> Result<WatchedRing, RecvTimeoutError> {
        let now = Instant::now();
        let glance = (!self.watched.is_empty()).then_some(GLANCE);
        let pause = self.rings.pauses.next_end().map(|end| end.saturating_duration_since(now));
        match glance.into_iter().chain(pause).min() {
            Some(timeout) => self.receiver.recv_timeout(timeout),
            None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn look_at_rings(&mut self) {
        let kernel_bytes = if self.watched.is_empty() { None } else { kernel_bytes() };
        let mut watched = std::mem::take(&mut self.watched);
        watched.retain_mut(|(ring, schedule)| {
            let claimed = self.rings.metrics.claimed_outstanding(ring.queue);
            let words_exceed_cq = claimed.is_some_and(|claimed| claimed > ring.cq_entries);
            let signs = Signs { words_exceed_cq, kernel_bytes };
            if !schedule.is_due(Instant::now(), signs) {
                return true;
            }
            let (outstanding, cost) = match insist(&ring.gauge) {
                Ok((GaugeReading::Outstanding(outstanding), cost)) => (outstanding, cost),
                Ok((GaugeReading::Closed, _)) => return false,
                Ok((GaugeReading::Busy, _)) if schedule.found_busy(Instant::now(), signs) => {
                    self.end_ring(ring, None);
                    return false;
                }
                Ok((GaugeReading::Busy, _)) => return true,
                Err(error) => {
                    tracing::error!(queue = ring.queue, %error, "the number of outstanding requests of a ring cannot be read");
                    self.end_ring(ring, None);
                    return false;
                }
            };
            schedule.looked(Instant::now(), cost, signs);
            if outstanding > ring.cq_entries {
                self.end_ring(ring, Some(outstanding));
                return false;
            }
            true
        });
        self.watched = watched;
    }

    fn end_ring(&mut self, ring: &WatchedRing, outstanding: Option<u32>) {
        let WatchedRing { queue, cq_entries, .. } = *ring;
        let now = Instant::now();
        let pause = self.penalty.begin(now);
        let excess = Excess { outstanding, cq_entries };
        // First, so that the queue is not attached again in between.
        self.rings.pauses.begin(queue, excess, now + pause);
        self.rings.metrics.end_for_cost(queue, excess.refused(pause));
        if let Some(total) = self.log.count(LogCause::new("excess")) {
            tracing::warn!(
                queue,
                outstanding,
                cq_entries,
                pause_s = pause.as_secs(),
                total,
                "a ring ends: the guest had more requests outstanding than its CQ has entries, which no honest driver has. The \
                 queue goes on as a virtqueue, and gets no ring for a while (`ringpass dev set NAME mode auto` ends the pause; \
                 {total} times so far)"
            );
        }
        self.workers.finish_ring(queue, ErrorCode::Cost);
    }

    fn end_pauses(&self) {
        let resumed = self.rings.pauses.take_over(Instant::now());
        resumed.iter().for_each(|&queue| self.rings.metrics.clear_refused(queue));
        if !resumed.is_empty() {
            self.workers.tell_driver();
        }
    }
}

/// Asks until the ring is between two batches, for a while. Returns also how long the last question took.
fn insist(gauge: &RingGauge) -> io::Result<(GaugeReading, Duration)> {
    let begin = Instant::now();
    loop {
        let start = Instant::now();
        let reading = gauge.read()?;
        let end = Instant::now();
        if reading != GaugeReading::Busy || end - begin >= INSISTENCE {
            return Ok((reading, end - start));
        }
        if end - begin >= SPIN {
            // The SQ thread may need this very CPU.
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use ringpass_guest_abi::request::ErrorCode;

    use super::super::attachment::AttachmentId;
    use super::super::workers::AttachEvent;
    use super::*;

    /// Notes that the driver is told.
    #[derive(Debug)]
    struct Told(Sender<()>);

    impl Workers for Told {
        fn attach_event(&self, _queue: u16, _attachment: AttachmentId, _event: AttachEvent) {}
        fn finish_ring(&self, _queue: u16, _reason: ErrorCode) {}
        fn tell_driver(&self) {
            self.0.send(()).unwrap();
        }
        fn end_rings(&self, _reason: ErrorCode) {}
        fn finish_rings(&self, _reason: ErrorCode) {}
    }

    #[test]
    fn the_driver_is_told_when_a_pause_ends_and_the_queue_may_have_a_ring_again() {
        let rings = Arc::new(SharedRings::new(2));
        let begin = Instant::now();
        let pause = Duration::from_millis(30);
        let excess = Excess { outstanding: Some(2000), cq_entries: 1024 };
        rings.pauses.begin(1, excess, begin + pause);
        rings.metrics.end_for_cost(1, excess.refused(pause));
        let (sender, told) = channel();
        let _guard = start(rings.clone(), Arc::new(Told(sender))).unwrap();
        told.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(begin.elapsed() >= pause, "the pause ended too early");
        assert_eq!(rings.pauses.refused(1), None);
        let status = rings.status();
        assert_eq!((&status.queues[1].refused, status.queues[1].ended_for_cost), (&None, 1));
    }
}
