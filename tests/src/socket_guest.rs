//! A guest in this process on a broker's socket: the user-space driver, with workloads on its queues.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use ringpass_guest::{
    RamArea,
    vhost_user::{ByAddress, Disk, ExecutedBy, Options, Queue, RingSize, Way},
};
use ringpass_workload::{Job, ProcessEnv, Report, Verify, Wait, prefill, run, verify_all};

use crate::seed::Seed;

/// The workload on one queue.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in flight.
    pub depth: u32,
    /// The length of each request in bytes.
    pub block_bytes: u32,
    /// The number of blocks in the queue's own area.
    pub blocks: u64,
    /// How the guest notices completions.
    pub wait: Wait,
}

/// Options for a guest of this many queues and this much RAM.
pub fn options(queues: u16, memory_bytes: u64, way: Way) -> Options {
    let ring = RingSize { sq_entries: 64, cq_entries: 128 };
    Options::default().queues(queues).memory_bytes(memory_bytes).way(way).ring(ring)
}

/// A queue with the buffers of a workload, and the expected content of its area.
#[derive(Debug)]
pub struct LoadedQueue {
    /// The queue.
    pub queue: Queue,
    /// The workload.
    pub job: Job,
    env: ProcessEnv,
    expected: Vec<u64>,
}

impl LoadedQueue {
    /// Opens a queue. Its area of the disk is the `index`th of this length.
    ///
    /// # Errors
    ///
    /// There is no such queue, or no memory.
    pub fn new(disk: &Disk, index: u16, load: Load, seed: Seed) -> Result<Self> {
        // No buffer crosses a segment boundary.
        let align_bytes = u64::from(load.block_bytes).next_power_of_two().max(4096);
        let buffers = disk.allocate_aligned(u64::from(load.depth) * u64::from(load.block_bytes), align_bytes)?;
        Self::with_buffers(disk, index, load, seed, buffers)
    }

    /// The same with these buffers.
    ///
    /// # Errors
    ///
    /// There is no such queue.
    pub fn with_buffers(disk: &Disk, index: u16, load: Load, seed: Seed, buffers: RamArea) -> Result<Self> {
        let queue = disk.queue(index).with_context(|| format!("queue {index}"))?;
        let area_bytes = load.blocks * u64::from(load.block_bytes);
        let job = Job {
            area_offset_bytes: u64::from(index - 1) * area_bytes,
            area_bytes,
            operations: 0,
            duration_ns: 0,
            timeout_ns: 60_000_000_000,
            pause_ns: 0,
            seed: seed.derive(index).value(),
            buffers_gpa: buffers.gpa(),
            buffer_stride_bytes: load.block_bytes.into(),
            block_bytes: load.block_bytes,
            depth: load.depth,
            write_percent: 40,
            durable_percent: 10,
            wait: load.wait,
            verify: Verify::On,
        };
        // The driver rings the doorbell itself, so nothing listens to this one.
        let doorbell = vmm_sys_util::eventfd::EventFd::new(0)?;
        let env = ProcessEnv::new(buffers, doorbell, queue.interrupt().try_clone()?);
        let expected = vec![0; usize::try_from(job.blocks())?];
        Ok(Self { queue, job, env, expected })
    }

    /// Writes all blocks.
    ///
    /// # Errors
    ///
    /// A request failed or was lost.
    pub fn fill(&mut self) -> Result<Report> {
        self.perform("filling", |job, queue, env, expected| prefill(job, queue, env, expected))
    }

    /// Reads and writes at random for this time or this number of requests (0: no such limit).
    ///
    /// # Errors
    ///
    /// A request failed or was lost, or a byte is wrong.
    pub fn run(&mut self, duration_ns: u64, operations: u64) -> Result<Report> {
        self.job.seed = self.job.seed.wrapping_add(1);
        (self.job.duration_ns, self.job.operations) = (duration_ns, operations);
        self.perform("running", |job, queue, env, expected| run(job, queue, env, expected))
    }

    /// Reads all blocks.
    ///
    /// # Errors
    ///
    /// A request failed or was lost, or a byte is wrong.
    pub fn verify(&mut self) -> Result<Report> {
        self.perform("reading all", |job, queue, env, expected| verify_all(job, queue, env, expected))
    }

    /// The checksums that the blocks on the disk must have.
    pub fn expected(&self) -> &[u64] {
        &self.expected
    }

    /// The latencies of the requests since the last call, in nanoseconds.
    ///
    /// # Errors
    ///
    /// The guest could not wait for interrupts.
    pub fn take_latencies_ns(&mut self) -> Result<hdrhistogram::Histogram<u64>> {
        Ok(self.env.take_latencies_ns()?)
    }

    fn perform(
        &mut self,
        what: &str,
        work: impl FnOnce(
            &Job,
            &mut ByAddress<'_>,
            &mut ProcessEnv,
            &mut [u64],
        ) -> Result<Report, ringpass_workload::JobError>,
    ) -> Result<Report> {
        // SAFETY: a workload borrows a buffer only while no request names it, and no other code has these buffers.
        let mut queue = unsafe { self.queue.by_address() };
        let report = work(&self.job, &mut queue, &mut self.env, &mut self.expected)?;
        ensure!(report.is_clean(), "{what}: {report} (the queue is executed by {:?})", self.queue.executed_by());
        Ok(report)
    }
}

/// Waits until a queue is a ring, and returns its epoch.
///
/// # Errors
///
/// The queue does not become a ring.
pub fn await_ring(queue: &mut Queue) -> Result<u32> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        match queue.executed_by() {
            ExecutedBy::Ring { epoch } => return Ok(epoch),
            ExecutedBy::Virtqueue { refused } => anyhow::bail!("the queue is a virtqueue: {refused:?}"),
            ExecutedBy::BetweenRings => ensure!(std::time::Instant::now() < end, "no ring within 30 s"),
            other => anyhow::bail!("the queue is executed in another way: {other:?}"),
        }
        ensure!(queue.poll().is_none(), "a request has ended that was not submitted");
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

/// Connects to a broker.
///
/// # Errors
///
/// The broker does not serve.
pub fn connect(socket: &Path, options: Options) -> Result<Disk> {
    Disk::connect(socket, options).with_context(|| format!("cannot connect to {}", socket.display()))
}
