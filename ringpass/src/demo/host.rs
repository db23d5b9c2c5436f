//! The reference: an ordinary process with an ordinary io_uring (through the `io-uring` crate) and submission polling.

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use io_uring::{IoUring, opcode, types};
use memmap2::{MmapMut, MmapRaw};
use ringpass_broker::disk::Disk;
use ringpass_workload::{BlockQueue, Completion, Environment, PushRefusal, Request, Wakeup};
use rustix::fd::{AsFd, AsRawFd};

use super::{BUFFERS_BYTES, DemoWay, Outcome, SQ_THREAD_IDLE, Task};

/// The index of the only fixed file, the disk, and of the only registered buffer.
const DISK: types::Fixed = types::Fixed(0);
const BUFFERS: u16 = 0;

/// The reference.
///
/// The queue is the first field, so that its ring is dropped before the buffers.
pub(crate) struct HostWay {
    queue: HostQueue,
    environment: HostEnvironment,
    expected: Vec<u64>,
    // The ring uses the disk's own open file description.
    _disk: Arc<Disk>,
}

impl HostWay {
    /// Creates a ring of the host's own on `disk`. `expected` are the checksums of the blocks of its area.
    pub(crate) fn new(disk: &Arc<Disk>, expected: Vec<u64>) -> anyhow::Result<Self> {
        let (queue, environment) = host(disk)?;
        Ok(Self { queue, environment, expected, _disk: disk.clone() })
    }
}

impl DemoWay for HostWay {
    fn name(&self) -> &'static str {
        "host"
    }

    fn perform(&mut self, task: Task) -> anyhow::Result<Outcome> {
        let report = super::perform(task, &mut self.queue, &mut self.environment, &mut self.expected)?;
        let latencies = super::pairs(&self.environment.latencies_ns);
        self.environment.latencies_ns.reset();
        Ok(Outcome { report, latencies, exits: None })
    }
}

/// The host's queue. "Guest-physical" addresses are offsets in the buffer memory here.
struct HostQueue {
    ring: IoUring,
    buffers: NonNull<u8>,
    buffers_bytes: u64,
}

/// The workload's environment on the host.
struct HostEnvironment {
    buffers: MmapRaw,
    started: Instant,
    /// Latencies of the current round.
    latencies_ns: Histogram<u64>,
}

/// The environment owns the buffers and must be dropped last.
fn host(disk: &Disk) -> anyhow::Result<(HostQueue, HostEnvironment)> {
    let buffers = MmapMut::map_anon(BUFFERS_BYTES as usize).context("cannot allocate the host's buffers")?;
    let buffers = MmapRaw::from(buffers);
    let ring = IoUring::builder()
        .setup_sqpoll(SQ_THREAD_IDLE.as_millis() as u32)
        .build(64)
        .context("cannot create the host's own io_uring (see `ringpass probe`)")?;
    ring.submitter().register_files(&[disk.as_fd().as_raw_fd()]).context("cannot register the disk")?;
    let iovec = nix::libc::iovec { iov_base: buffers.as_mut_ptr().cast(), iov_len: buffers.len() };
    // SAFETY: the mapping outlives the ring (see above), and no reference to it exists while a request is in flight.
    unsafe { ring.submitter().register_buffers(&[iovec]) }
        .context("cannot register the host's buffers (RLIMIT_MEMLOCK? see `ringpass probe`)")?;
    let start = NonNull::new(buffers.as_mut_ptr()).context("a mapping at address 0")?;
    let queue = HostQueue { ring, buffers: start, buffers_bytes: buffers.len() as u64 };
    Ok((queue, HostEnvironment { buffers, started: Instant::now(), latencies_ns: super::histogram() }))
}

impl BlockQueue for HostQueue {
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal> {
        let end = request.gpa.checked_add(request.len_bytes.into());
        assert!(end.is_some_and(|end| end <= self.buffers_bytes), "a buffer outside the buffer memory");
        // SAFETY: inside the mapping, by the assertion.
        let buffer = unsafe { self.buffers.add(request.gpa as usize) }.as_ptr();
        let flags = if request.durable { nix::libc::RWF_DSYNC } else { 0 };
        let entry = if request.write {
            let write = opcode::WriteFixed::new(DISK, buffer, request.len_bytes, BUFFERS);
            write.offset(request.offset_bytes).rw_flags(flags).build()
        } else {
            let read = opcode::ReadFixed::new(DISK, buffer, request.len_bytes, BUFFERS);
            read.offset(request.offset_bytes).rw_flags(flags).build()
        };
        // SAFETY: the buffer is registered, mapped for as long as the ring, and left alone until the completion.
        unsafe { self.ring.submission().push(&entry.user_data(request.user_data)) }.map_err(|_| PushRefusal::Full)
    }

    fn publish(&mut self) -> bool {
        // This writes the tail, and enters the kernel only if the SQ thread sleeps.
        self.ring.submit().expect("waking the SQ thread of our own ring");
        false
    }

    fn reap(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        Some(Completion { user_data: entry.user_data(), res: entry.result() })
    }

    fn mute(&mut self) {}

    fn unmute(&mut self) -> bool {
        false
    }
}

impl Environment for HostEnvironment {
    fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn ring_doorbell(&mut self) {}

    fn relax(&mut self, _empty_polls: u32) {
        std::hint::spin_loop();
    }

    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup {
        // The reference polls and has no interrupts.
        std::thread::sleep(Duration::from_nanos(timeout_ns));
        Wakeup::TimedOut
    }

    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let end = gpa.checked_add(len_bytes.into())?;
        if end > self.buffers.len() as u64 {
            return None;
        }
        // SAFETY: inside the mapping, by the comparison.
        let start = unsafe { self.buffers.as_mut_ptr().add(gpa as usize) };
        // SAFETY: the workload asks only for buffers that no request in flight names, so neither the kernel nor
        // another slice touches these bytes while the slice lives.
        Some(access(unsafe { std::slice::from_raw_parts_mut(start, len_bytes as usize) }))
    }

    fn record_latency(&mut self, latency_ns: u64) {
        self.latencies_ns.saturating_record(latency_ns);
    }
}
