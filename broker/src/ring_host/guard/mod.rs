//! The guard: the thread of a ring host that ends the rings of a guest with more requests outstanding than it may have.
//!
//! Each outstanding request costs kernel memory, and the end of a ring has to wait for it or to cancel it. An honest
//! driver never has more outstanding than its CQ has entries (`docs/abi.md`, section 6), but the kernel sets no limit:
//! it queues for the guest what does not fit. What one request costs is bounded by the size of the slots, and what one
//! batch costs by the number of SQ entries ([`AttachConfig::limits`](super::AttachConfig::limits)). So the guard
//! watches this one number.
//!
//! A ring that exceeds it ends. The engine gives its queue no ring for a while then, and the guest goes on with the
//! virtqueue, whose size bounds what it can have outstanding. [`schedule`] says when the guard looks.

mod kernel_memory;
mod schedule;

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use self::schedule::{Schedule, Signs};
use super::message::RingId;
use crate::ring::{GaugeReading, RingGauge};
use crate::threads::{AbortOnPanic, leave_signals_to_others};

/// The time between two looks at what costs nothing to see.
const GLANCE: Duration = Duration::from_millis(50);
/// How long a suspicion of the engine is true. The engine repeats it every 50 ms.
const SUSPICION: Duration = Duration::from_millis(150);
/// How long the guard asks again and again about a ring that is in the middle of a batch. Between two batches the kernel
/// tells for some microseconds only. A ring whose batches take longer than this takes few requests.
const INSISTENCE: Duration = Duration::from_millis(20);
/// How long it asks without giving up the CPU in between.
const SPIN: Duration = Duration::from_micros(200);

/// A ring that the guard is to watch until it is closed.
#[derive(Debug)]
pub(super) struct WatchedRing {
    pub(super) id: RingId,
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
#[derive(Clone, Debug)]
pub(super) struct GuardSender {
    rings: Sender<WatchedRing>,
    suspicions: Arc<Suspicions>,
}

/// When the engine suspected each ring last. One entry for each ring, however often the engine says it.
type Suspicions = Mutex<HashMap<RingId, Instant>>;

impl GuardSender {
    /// Watches a ring from now on.
    pub(super) fn watch(&self, ring: WatchedRing) {
        // The guard ends only after its senders.
        let _ = self.rings.send(ring);
    }

    /// The words in the memory of a ring that runs, which an honest guest leaves true, say that it has more outstanding
    /// than it may have. The guard asks the kernel at its next glance.
    pub(super) fn suspect(&self, id: RingId) {
        self.suspicions.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Instant::now());
    }
}

/// Starts the guard. It has `end_ring` end a ring with so many requests outstanding (`None`: the kernel does not tell for too long).
pub(super) fn start(end_ring: impl Fn(RingId, Option<u32>) + Send + 'static) -> io::Result<GuardSender> {
    let (rings, receiver) = channel();
    let suspicions = Arc::new(Suspicions::default());
    let theirs = Arc::clone(&suspicions);
    thread::Builder::new().name("ring-guard".into()).spawn(move || {
        leave_signals_to_others();
        // Without the guard nothing bounds what a guest costs.
        let _abort = AbortOnPanic;
        Guard { receiver, suspicions: theirs, end_ring, watched: Vec::new() }.run();
    })?;
    Ok(GuardSender { rings, suspicions })
}

struct Guard<F> {
    receiver: Receiver<WatchedRing>,
    suspicions: Arc<Suspicions>,
    end_ring: F,
    watched: Vec<Watched>,
}

struct Watched {
    ring: WatchedRing,
    schedule: Schedule,
    suspected: Option<Instant>,
}

impl<F: Fn(RingId, Option<u32>)> Guard<F> {
    fn run(&mut self) {
        let mut next_glance = Instant::now();
        loop {
            match self.next_ring(next_glance) {
                Ok(ring) => {
                    let schedule = Schedule::new(Instant::now(), ring.kernel_bytes);
                    self.watched.push(Watched { ring, schedule, suspected: None });
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // However many rings and suspicions come, the guard looks no more often.
            if Instant::now() >= next_glance {
                self.take_suspicions();
                self.watched.retain(|watched| !watched.ring.gauge.is_closed());
                self.look_at_rings();
                next_glance = Instant::now() + GLANCE;
            }
        }
    }

    /// Waits for a ring to watch, or for the next glance.
    fn next_ring(&self, next_glance: Instant) -> Result<WatchedRing, RecvTimeoutError> {
        if self.watched.is_empty() {
            return self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected);
        }
        self.receiver.recv_timeout(next_glance.saturating_duration_since(Instant::now()))
    }

    fn take_suspicions(&mut self) {
        let suspicions = std::mem::take(&mut *self.suspicions.lock().unwrap_or_else(PoisonError::into_inner));
        for watched in &mut self.watched {
            watched.suspected = suspicions.get(&watched.ring.id).copied().or(watched.suspected);
        }
    }

    fn look_at_rings(&mut self) {
        let kernel_bytes = if self.watched.is_empty() { None } else { kernel_bytes() };
        self.watched.retain_mut(|watched| match watched.look(kernel_bytes) {
            None => true,
            Some(Verdict::Closed) => false,
            Some(Verdict::Excess(outstanding)) => {
                (self.end_ring)(watched.ring.id, outstanding);
                false
            }
        });
    }
}

/// Why the guard watches a ring no longer.
enum Verdict {
    Closed,
    /// More is outstanding than may be: this number, or the kernel does not tell for too long.
    Excess(Option<u32>),
}

impl Watched {
    fn look(&mut self, kernel_bytes: Option<u64>) -> Option<Verdict> {
        let words_exceed_cq = self.suspected.is_some_and(|since| since.elapsed() < SUSPICION);
        let signs = Signs { words_exceed_cq, kernel_bytes };
        if !self.schedule.is_due(Instant::now(), signs) {
            return None;
        }
        match insist(&self.ring.gauge) {
            Ok((GaugeReading::Outstanding(outstanding), cost)) => {
                self.schedule.looked(Instant::now(), cost, signs);
                (outstanding > self.ring.cq_entries).then_some(Verdict::Excess(Some(outstanding)))
            }
            Ok((GaugeReading::Closed, _)) => Some(Verdict::Closed),
            Ok((GaugeReading::Busy, _)) => {
                self.schedule.found_busy(Instant::now(), signs).then_some(Verdict::Excess(None))
            }
            Err(error) => {
                tracing::error!(%error, "a ring ends: the number of its outstanding requests cannot be read");
                Some(Verdict::Excess(None))
            }
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
