//! The guard: the thread that ends the rings of a guest with more requests outstanding than it may have.
//!
//! Each outstanding request costs kernel memory, and the end of a ring has to wait for it or to cancel it. An honest
//! driver never has more outstanding than its CQ has entries (`docs/abi.md`, section 6), but the kernel sets no limit:
//! it queues for the guest what does not fit. What one request costs is bounded by the size of the slots, and what one
//! batch costs by the number of SQ entries ([`AttachConfig::limits`](super::AttachConfig::limits)). So this one number
//! is what is left to watch.
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

/// A ring that the guard is to watch until it is closed.
#[derive(Debug)]
pub(super) struct WatchedRing {
    pub(super) queue: u16,
    /// The most requests that its driver may have outstanding.
    pub(super) cq_entries: u32,
    pub(super) gauge: RingGauge,
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
            Guard {
                receiver,
                rings,
                workers,
                watched: Vec::new(),
                penalty: Penalty::default(),
                pauses: Vec::new(),
                log: LogLimits::new(),
            }
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
    /// The queues that pause, and when their pauses end.
    pauses: Vec<(u16, Instant)>,
    log: LogLimits,
}

impl Guard {
    fn run(&mut self) {
        loop {
            match self.next_ring() {
                Ok(ring) => {
                    let schedule = Schedule::new(Instant::now(), kernel_memory::unreclaimable_bytes());
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
        let pauses = self.pauses.iter().map(|(_, end)| end.saturating_duration_since(now));
        match glance.into_iter().chain(pauses).min() {
            Some(timeout) => self.receiver.recv_timeout(timeout),
            None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn look_at_rings(&mut self) {
        let kernel_bytes = if self.watched.is_empty() { None } else { kernel_memory::unreclaimable_bytes() };
        let mut watched = std::mem::take(&mut self.watched);
        watched.retain_mut(|(ring, schedule)| {
            let claimed = self.rings.metrics.claimed_outstanding(ring.queue);
            let words_exceed_cq = claimed.is_some_and(|claimed| claimed > ring.cq_entries);
            let signs = Signs { words_exceed_cq, kernel_bytes };
            if !schedule.is_due(Instant::now(), signs) {
                return true;
            }
            let start = Instant::now();
            let outstanding = match read(&mut ring.gauge) {
                Ok(GaugeReading::Outstanding(outstanding)) => outstanding,
                Ok(GaugeReading::Busy) => {
                    schedule.found_busy(Instant::now());
                    return true;
                }
                Ok(GaugeReading::Closed) => return false,
                Err(error) => {
                    self.report_blindness(&error);
                    0
                }
            };
            let now = Instant::now();
            schedule.looked(now, now - start, signs);
            if outstanding > ring.cq_entries {
                self.end_ring(ring, outstanding);
                return false;
            }
            true
        });
        self.watched = watched;
    }

    fn end_ring(&mut self, ring: &WatchedRing, outstanding: u32) {
        let WatchedRing { queue, cq_entries, .. } = *ring;
        let now = Instant::now();
        let pause = self.penalty.begin(now);
        self.pauses.retain(|(other, _)| *other != queue);
        self.pauses.push((queue, now + pause));
        let excess = Excess { outstanding, cq_entries, pause };
        // First, so that the queue is not attached again in between.
        self.rings.pauses.begin(queue, excess);
        self.rings.metrics.count_end_for_cost(queue, excess.refused());
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

    fn report_blindness(&self, error: &io::Error) {
        if let Some(total) = self.log.count(LogCause::new("blindness")) {
            tracing::error!(
                %error,
                total,
                "cannot see how many requests a ring has outstanding, so a guest can have any number: the server needs /proc \
                 ({total} times so far)"
            );
        }
    }

    fn end_pauses(&mut self) {
        let now = Instant::now();
        let mut has_ended = false;
        self.pauses.retain(|&(queue, end)| {
            let is_over = end <= now;
            has_ended |= is_over && self.rings.pauses.end(queue);
            !is_over
        });
        if has_ended {
            self.workers.tell_driver();
        }
    }
}

/// Asks until the ring is between two batches, for a while.
fn read(gauge: &mut RingGauge) -> io::Result<GaugeReading> {
    let end = Instant::now() + INSISTENCE;
    loop {
        match gauge.read()? {
            GaugeReading::Busy if Instant::now() < end => {}
            reading => return Ok(reading),
        }
    }
}
