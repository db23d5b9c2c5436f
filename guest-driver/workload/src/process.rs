//! The environment of a workload that runs in a process which is its own guest.

use std::hint::spin_loop;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ringpass_guest::{RamArea, wait_for_interrupt};
use vmm_sys_util::eventfd::EventFd;

use crate::{Environment, Wakeup};

/// Empty polls after which the processor is offered to others: about 50 µs, much longer than a fast request takes.
/// With fewer processors than busy threads, the SQ thread could otherwise wait a whole time slice for its turn.
const POLLS_BEFORE_YIELD: u32 = 1024;

/// Longest latency that is told apart from longer ones.
const LATENCY_MAX_NS: u64 = 100_000_000_000;
/// Significant decimal digits of the latencies kept.
const LATENCY_DIGITS: u8 = 3;

/// The environment of one queue of a process that is its own guest: buffers, doorbell, interrupts, clock, latencies.
#[derive(Debug)]
pub struct ProcessEnv {
    buffers: RamArea,
    doorbell: EventFd,
    interrupts: EventFd,
    start: Instant,
    latencies_ns: Histogram<u64>,
    fault: Option<EnvError>,
}

/// What broke while a workload ran. The workload itself sees an interrupt or a completion that does not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvError {
    /// The doorbell could not be rung.
    #[error("cannot ring the doorbell (write to the queue's eventfd): {0}")]
    Doorbell(#[source] io::Error),
    /// Interrupts could not be waited for.
    #[error("cannot wait for interrupts (poll and read of the queue's eventfd): {0}")]
    Interrupts(#[source] io::Error),
}

impl ProcessEnv {
    /// The environment of a queue whose buffers are all in `buffers`. A write to `doorbell` rings its doorbell; the device
    /// signals completions through `interrupts`, which must not block.
    pub fn new(buffers: RamArea, doorbell: EventFd, interrupts: EventFd) -> Self {
        let latencies_ns = Histogram::new_with_bounds(1, LATENCY_MAX_NS, LATENCY_DIGITS).expect("the bounds are valid");
        Self { buffers, doorbell, interrupts, start: Instant::now(), latencies_ns, fault: None }
    }

    /// The area of the buffers.
    pub fn buffers(&mut self) -> &mut RamArea {
        &mut self.buffers
    }

    /// Returns the latencies recorded since the last call, in nanoseconds with 3 significant digits; a latency above 100 s
    /// counts as 100 s.
    ///
    /// # Errors
    ///
    /// An eventfd of the queue broke since the last call.
    pub fn take_latencies_ns(&mut self) -> Result<Histogram<u64>, EnvError> {
        let taken = self.latencies_ns.clone();
        self.latencies_ns.reset();
        self.fault.take().map_or(Ok(taken), Err)
    }
}

impl Environment for ProcessEnv {
    #[inline]
    fn now_ns(&self) -> u64 {
        // 64 bits of nanoseconds last for 584 years.
        self.start.elapsed().as_nanos() as u64
    }

    fn ring_doorbell(&mut self) {
        match self.doorbell.write(1) {
            // A full counter rings as well.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                self.fault.get_or_insert(EnvError::Doorbell(error));
            }
            _ => {}
        }
    }

    #[inline]
    fn relax(&mut self, empty_polls: u32) {
        if empty_polls < POLLS_BEFORE_YIELD {
            spin_loop();
        } else {
            thread::yield_now();
        }
    }

    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup {
        match wait_for_interrupt(&self.interrupts, Duration::from_nanos(timeout_ns)) {
            Ok(true) => Wakeup::Interrupt,
            Ok(false) => Wakeup::TimedOut,
            Err(error) => {
                self.fault.get_or_insert(EnvError::Interrupts(error));
                Wakeup::TimedOut
            }
        }
    }

    fn pause(&mut self, duration_ns: u64) {
        thread::sleep(Duration::from_nanos(duration_ns));
    }

    #[inline]
    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let offset_bytes = gpa.checked_sub(self.buffers.gpa())?;
        self.buffers.bytes_mut(offset_bytes, u64::from(len_bytes)).map(access)
    }

    #[inline]
    fn record_latency(&mut self, latency_ns: u64) {
        self.latencies_ns.saturating_record(latency_ns);
    }
}
