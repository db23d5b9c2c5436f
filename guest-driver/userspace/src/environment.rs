//! What a workload needs, as a process has it.

use std::hint::spin_loop;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ringpass_workload::{Environment, Wakeup};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::{RamArea, raw};

/// Empty polls after which the processor is offered to others: about 50 µs, much longer than a fast request takes.
/// With fewer processors than busy threads, the SQ thread could otherwise wait a whole time slice for its turn.
const POLLS_BEFORE_YIELD: u32 = 1024;

/// Longest latency that is told apart from longer ones.
const LATENCY_MAX_NS: u64 = 100_000_000_000;
/// Significant decimal digits of the latencies kept.
const LATENCY_DIGITS: u8 = 3;

/// One queue of a process that is its own guest: its buffers, its doorbell and its interrupts.
#[derive(Debug)]
pub struct ProcessEnv {
    buffers: RamArea,
    doorbell: EventFd,
    interrupts: EventFd,
    start: Instant,
    latencies_ns: Histogram<u64>,
    fault: Option<EnvError>,
}

/// What broke while a workload ran. The workload itself sees it as an interrupt or a completion that does not come.
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
    /// The surroundings of a queue whose buffers are all in `buffers`, whose doorbell is rung by writing to `doorbell`,
    /// and whose completions are signalled through `interrupts`.
    pub fn new(buffers: RamArea, doorbell: EventFd, interrupts: EventFd) -> Self {
        let latencies_ns = Histogram::new_with_bounds(1, LATENCY_MAX_NS, LATENCY_DIGITS).expect("the bounds are valid");
        Self { buffers, doorbell, interrupts, start: Instant::now(), latencies_ns, fault: None }
    }

    /// The area of the buffers.
    pub fn buffers(&mut self) -> &mut RamArea {
        &mut self.buffers
    }

    /// Hands out the latencies noted since the last call, in nanoseconds, with 3 significant digits; longer ones than
    /// 100 s count as 100 s. An error if something broke in this time.
    pub fn take_latencies_ns(&mut self) -> Result<Histogram<u64>, EnvError> {
        let taken = self.latencies_ns.clone();
        self.latencies_ns.reset();
        self.fault.take().map_or(Ok(taken), Err)
    }

    /// Waits until the eventfd is signalled, and takes the signals. False: not in this time.
    fn take_interrupts(&self, timeout: Duration) -> io::Result<bool> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            // What does not fit is longer than anybody waits.
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            let mut fds = [PollFd::from_borrowed_fd(raw::borrow(&self.interrupts), PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            match self.interrupts.read() {
                Ok(_) => return Ok(true),
                // Somebody else took the signals (or, for EINTR, nobody did): wait on.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
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
        match self.take_interrupts(Duration::from_nanos(timeout_ns)) {
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
