//! Pieces of guest RAM in which a queue does verified I/O, to show that the queue reaches the RAM there.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use ringpass_guest::RamArea;
use ringpass_guest_abi::SEGMENT_BOUNDARY_BYTES;
use ringpass_workload::{Job, ProcessEnv, Verify, Wait, checksum, hostile::Extent, prefill, run, verify_all};

use crate::{
    process_guest::{GuestQueue, RamFile},
    seed::Seed,
};

/// Length of a piece.
pub const PIECE_BYTES: u64 = 64 << 10;
/// The unit in which the broker pins memory.
const SPAN_BYTES: u64 = 1 << 30;
/// A disk with room for all pieces of a test.
pub const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;

/// A piece of RAM that consists of buffers, and the part of the disk that belongs to it.
#[derive(Debug)]
pub struct Piece {
    /// The place of the piece.
    pub area: Extent,
    env: ProcessEnv,
    job: Job,
    expected: Vec<u64>,
}

impl Piece {
    /// The piece as buffers of `queue`, with part `index` of the disk, [`DISK_BYTES`] in all.
    ///
    /// # Errors
    ///
    /// The disk has no such part.
    pub fn new(queue: &GuestQueue, area: RamArea, index: u64, seed: Seed) -> Result<Self> {
        let extent = Extent { gpa: area.gpa(), len_bytes: area.len_bytes() };
        let blocks = extent.len_bytes / u64::from(BLOCK_BYTES);
        let job = Job {
            area_offset_bytes: index * PIECE_BYTES,
            area_bytes: extent.len_bytes,
            operations: 10 * blocks,
            duration_ns: 0,
            timeout_ns: 30_000_000_000,
            pause_ns: 0,
            seed: seed.derive(index).value(),
            buffers_gpa: extent.gpa,
            buffer_stride_bytes: u64::from(BLOCK_BYTES),
            block_bytes: BLOCK_BYTES,
            depth: u32::try_from(blocks)?,
            write_percent: 40,
            durable_percent: 0,
            wait: Wait::Interrupt,
            verify: Verify::On,
        };
        ensure!(job.area_offset_bytes + job.area_bytes <= DISK_BYTES, "the disk is too small for so many pieces");
        Ok(Self { env: queue.env(area)?, area: extent, job, expected: vec![0; usize::try_from(blocks)?] })
    }

    /// Writes all blocks, reads and writes at random, and reads all blocks again. Compares every byte that it reads.
    ///
    /// # Errors
    ///
    /// A request fails, or a byte is wrong.
    pub fn use_all(&mut self, queue: &mut GuestQueue) -> Result<()> {
        let Self { env, job, expected, .. } = self;
        let reports = [
            prefill(job, queue.ring(), env, expected)?,
            run(job, queue.ring(), env, expected)?,
            verify_all(job, queue.ring(), env, expected)?,
        ];
        for report in reports {
            ensure!(report.is_clean(), "at guest-physical {:#x}: {report}", self.area.gpa);
        }
        Ok(())
    }

    /// Reads as many blocks as there are buffers: afterwards each block is in one of them.
    ///
    /// # Errors
    ///
    /// As for [`use_all`](Self::use_all).
    pub fn fill(&mut self, queue: &mut GuestQueue) -> Result<()> {
        let report = verify_all(&self.job, queue.ring(), &mut self.env, &mut self.expected)?;
        ensure!(report.is_clean(), "at guest-physical {:#x}: {report}", self.area.gpa);
        Ok(())
    }

    /// Checks that the file behind the RAM has the blocks that [`fill`](Self::fill) has read, at the place of this
    /// piece.
    ///
    /// # Errors
    ///
    /// The file has other content there.
    pub fn check_file(&self, ram: &RamFile) -> Result<()> {
        let bytes = ram.read(self.area.gpa, self.area.len_bytes)?;
        let mut found: Vec<u64> = bytes.chunks(BLOCK_BYTES as usize).map(checksum).collect();
        let mut expected = self.expected.clone();
        found.sort_unstable();
        expected.sort_unstable();
        ensure!(found == expected, "the file of the RAM has other data for guest-physical {:#x}", self.area.gpa);
        Ok(())
    }

    /// Reads one block at a time while `meanwhile` runs, and some time before and after it. Returns the latencies.
    ///
    /// # Errors
    ///
    /// As for [`use_all`](Self::use_all), or `meanwhile` fails.
    pub fn latencies_while(
        &mut self,
        queue: &mut GuestQueue,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<Latencies> {
        // The page cache answers these reads. A write could wait for the disk.
        let job = Job { operations: 1000, depth: 1, write_percent: 0, ..self.job };
        let Self { env, expected, .. } = self;
        env.take_latencies_ns()?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let guest = scope.spawn(|| -> Result<()> {
                let mut job = job;
                while !stop.load(Ordering::Relaxed) {
                    let report = run(&job, queue.ring(), env, expected)?;
                    ensure!(report.is_clean(), "{report}");
                    job.seed = job.seed.wrapping_add(1);
                }
                Ok(())
            });
            thread::sleep(Duration::from_millis(200));
            let done = meanwhile();
            thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
            match guest.join() {
                Ok(result) => result.and(done),
                Err(_) => bail!("the guest's thread panicked"),
            }
        })?;
        let latencies_ns = env.take_latencies_ns()?;
        Ok(Latencies {
            median: Duration::from_nanos(latencies_ns.value_at_quantile(0.5)),
            worst: Duration::from_nanos(latencies_ns.max()),
            count: latencies_ns.len(),
        })
    }
}

/// The first and the last bytes of each region's part in each gibibyte, and in the slots of 4 MiB at its ends: a guest's RAM
/// has too many slots for an area on the disk for each.
pub fn edges(regions: &[Extent]) -> Vec<Extent> {
    let mut edges = Vec::new();
    for region in regions {
        let (mut gpa, end) = (region.gpa, region.gpa + region.len_bytes);
        let first_slot_end = gpa - gpa % SEGMENT_BOUNDARY_BYTES + SEGMENT_BOUNDARY_BYTES;
        let last_slot = (end - 1) - (end - 1) % SEGMENT_BOUNDARY_BYTES;
        while gpa < end {
            let span_end = (gpa / SPAN_BYTES + 1) * SPAN_BYTES;
            let ends = [first_slot_end, last_slot, span_end, end];
            let piece_end = ends.into_iter().filter(|&end| end > gpa).min().expect("the region ends above");
            edges.extend([gpa, piece_end - PIECE_BYTES].map(|gpa| Extent { gpa, len_bytes: PIECE_BYTES }));
            gpa = piece_end;
        }
    }
    edges
}

/// The latencies of a running queue's requests.
#[derive(Clone, Copy, Debug)]
pub struct Latencies {
    /// The median.
    pub median: Duration,
    /// The longest.
    pub worst: Duration,
    /// The number of requests.
    pub count: u64,
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (median), {:?} (worst of {})", self.median, self.worst, self.count)
    }
}
