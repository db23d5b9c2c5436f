//! The client: libblkio's vhost-user driver, which spins on the used ring.

use std::{
    collections::VecDeque,
    fmt,
    os::fd::AsRawFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

const BLOCK_BYTES: usize = 4096;
/// Number of requests before the clock starts, to warm up caches and pollers.
const WARM_UP: Duration = Duration::from_millis(150);
/// The features that a Linux guest negotiates with both servers. Without FLUSH each write would have to be stable at
/// once.
const FEATURES: u64 = VirtioFeatureFlags::VERSION_1
    .union(VirtioFeatureFlags::RING_EVENT_IDX)
    .union(VirtioFeatureFlags::RING_INDIRECT_DESC)
    .bits()
    | VIRTIO_BLK_F_FLUSH;
/// VIRTIO 1.2, 5.2.3.
const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
/// Time-out for a request: after this time the server hangs.
const TIME_OUT: Duration = Duration::from_secs(10);

/// The operation of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Operation {
    #[value(name = "randread")]
    Read,
    #[value(name = "randwrite")]
    Write,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Read => "randread",
            Self::Write => "randwrite",
        })
    }
}

/// The results of a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measurement {
    pub(crate) iops: f64,
    pub(crate) p50_ns: u64,
    pub(crate) p99_ns: u64,
}

/// Keeps `depth` random 4 KiB requests in flight for `duration`.
pub(crate) fn measure(socket: &Path, operation: Operation, depth: u16, duration: Duration) -> Result<Measurement> {
    let path = socket.to_str().context("the path of the socket is not UTF-8")?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, FEATURES).context("cannot connect")?);
    let capacity_bytes = transport.get_config().context("cannot read the configuration")?.capacity.to_native() * 512;
    let blocks = capacity_bytes / BLOCK_BYTES as u64;
    ensure!(blocks > 0, "the disk is empty");

    let memory = memfd_create("bench-buffers", MemfdFlags::CLOEXEC)?;
    let memory_bytes = BLOCK_BYTES * usize::from(depth);
    ftruncate(&memory, memory_bytes as u64)?;
    // SAFETY: only this process and the server use the file, and the server writes only to buffers that are read after
    // their request has completed.
    let mut buffers = unsafe { MmapMut::map_mut(&memory) }?;
    buffers.fill(0x5a);
    transport.map_mem_region(buffers.as_ptr() as usize, memory_bytes, memory.as_raw_fd(), 0)?;

    // The driver itself puts the three descriptors of a request into the table.
    let queue_size = (3 * depth).next_power_of_two().max(64);
    let mut queues =
        VirtioBlkQueue::setup_queues(transport.as_mut(), 1, queue_size).context("cannot set up the queue")?;
    let notifier = transport.get_submission_notifier(0);
    let queue = &mut queues[0];
    queue.set_used_notif_enabled(false);

    let mut load = Load { operation, blocks, random: fastrand::Rng::with_seed(1), buffers };
    let mut histogram = Histogram::<u64>::new_with_bounds(1, TIME_OUT.as_nanos() as u64, 3)?;
    let mut free = (0..depth).collect::<VecDeque<_>>();
    let started = Instant::now();
    let mut counted_from = None;
    let mut last = started;
    let mut done = 0u64;
    loop {
        let mut pushed = false;
        while let Some(slot) = free.pop_front() {
            load.push(queue, slot)?;
            pushed = true;
        }
        if pushed && queue.avail_notif_needed() {
            notifier.notify().context("cannot kick the queue")?;
        }
        let mut any = false;
        let mut failed = 0;
        let now = Instant::now();
        for completion in queue.completions() {
            let (slot, pushed_at): (u16, Instant) = completion.context;
            failed |= completion.ret;
            if counted_from.is_some() {
                histogram.saturating_record((now - pushed_at).as_nanos() as u64);
                done += 1;
            }
            free.push_back(slot);
            any = true;
        }
        ensure!(failed == 0, "a request failed");
        if any {
            last = now;
        }
        ensure!(now - last < TIME_OUT, "no completion for {TIME_OUT:?}");
        match counted_from {
            None if now - started >= WARM_UP => counted_from = Some(now),
            Some(from) if now - from >= duration => {
                let iops = done as f64 / (now - from).as_secs_f64();
                while free.len() < usize::from(depth) {
                    free.extend(queue.completions().map(|completion| completion.context.0));
                    ensure!(last.elapsed() < TIME_OUT + duration, "no completion for {TIME_OUT:?}");
                }
                let [p50_ns, p99_ns] = [0.5, 0.99].map(|quantile| histogram.value_at_quantile(quantile));
                return Ok(Measurement { iops, p50_ns, p99_ns });
            }
            _ => {}
        }
    }
}

/// The requests: their blocks and buffers.
struct Load {
    operation: Operation,
    blocks: u64,
    random: fastrand::Rng,
    buffers: MmapMut,
}

impl Load {
    fn push(&mut self, queue: &mut VirtioBlkQueue<'_, (u16, Instant)>, slot: u16) -> Result<()> {
        let offset = self.random.u64(..self.blocks) * BLOCK_BYTES as u64;
        let start = usize::from(slot) * BLOCK_BYTES;
        let buffer = &mut self.buffers[start..start + BLOCK_BYTES];
        let context = (slot, Instant::now());
        match self.operation {
            Operation::Read => queue.read(offset, buffer, context),
            Operation::Write => queue.write(offset, buffer, context),
        }
        .context("the queue does not take a request")
    }
}
