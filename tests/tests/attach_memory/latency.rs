//! How long the requests of a ring take while the front-end adds and removes memory.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::libc::EFAULT;
use ringpass_guest_abi::Sqe;
use ringpass_tests::{
    disks::DiskKind,
    front_end::{
        attach::{PATIENCE, RingDriver, bench::Bench, wait_until},
        ram::{Ram, RamRegion},
    },
    waits::{Waits, hardly_wait},
};
use vm_memory::{Bytes, GuestAddress};

use crate::{BLOCK_BYTES, DISK_BYTES};

/// The length of the region that the front-end adds and removes.
pub(crate) const REGION_BYTES: u64 = 256 << 20;

/// The most that a request may take meanwhile.
const LATENCY: Duration = Duration::from_millis(10);

pub(crate) fn memory_comes_and_goes(gpa: u64) -> Result<()> {
    // An SQ thread would take a CPU from the threads that work here.
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &["--submission", "doorbell"])?;
    let mut running = bench.attached(1)?;
    let mut other = bench.attached(2)?;
    let pinned_bytes = bench.broker.usage()?.pinned_bytes;
    let pattern = [0xc3; BLOCK_BYTES as usize];
    other.write(0, &pattern)?;
    hardly_wait(LATENCY, || {
        let attempt = one_region(&bench, &mut running, &mut other, gpa, &pattern);
        let attempt = bench.broker.explain(attempt)?;
        eprintln!("{attempt}");
        wait_until("the region is not pinned any more", || Ok(bench.broker.usage()?.pinned_bytes <= pinned_bytes))?;
        let (worst_without, worst_during) = (attempt.idle.worst, attempt.changing.worst);
        Ok(Waits { worst_without, worst_during, work: attempt.reached_after })
    })
}

struct Attempt {
    idle: Latencies,
    changing: Latencies,
    reached_after: Duration,
    left_after: Duration,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { idle, changing, reached_after, left_after } = self;
        write!(
            f,
            "idle: {idle}, while {} MiB come and go: {changing}; reached after {reached_after:?}, gone after {left_after:?}",
            REGION_BYTES >> 20
        )
    }
}

/// Adds a region, lets the ring `other` use it, and removes it, while the ring `running` works in other memory.
fn one_region(
    bench: &Bench,
    running: &mut RingDriver,
    other: &mut RingDriver,
    gpa: u64,
    pattern: &[u8],
) -> Result<Attempt> {
    let region = RamRegion::new(gpa, REGION_BYTES)?;
    let ram = Ram::new([region.clone()])?;
    let connection = bench.front_end.connection();
    let last_gpa = gpa + REGION_BYTES - u64::from(BLOCK_BYTES);
    let reads = |driver: &mut RingDriver, gpa| driver.perform(driver.sqe_at(false, gpa, BLOCK_BYTES, 0, 5)?);
    let epoch = other.epoch();

    let (idle, ()) = latencies_while(running, || {
        thread::sleep(Duration::from_millis(300));
        Ok(())
    })?;
    ensure!(reads(other, gpa)? == -EFAULT, "the ring reaches memory that the front-end has not added");
    let (changing, (reached_after, left_after)) = latencies_while(running, || {
        let begin = Instant::now();
        connection.add_mem_reg(&region.message(), region.file())?;
        // The pause is long, because each attempt takes CPU time from the threads that work.
        while reads(other, last_gpa)? == -EFAULT {
            ensure!(begin.elapsed() < PATIENCE, "the region is not reached");
            thread::sleep(Duration::from_millis(5));
        }
        let reached_after = begin.elapsed();
        for place in [gpa, last_gpa] {
            ensure!(reads(other, place)? == BLOCK_BYTES as i32);
            let mut found = vec![0; BLOCK_BYTES as usize];
            ram.memory().read_slice(&mut found, GuestAddress(place))?;
            ensure!(found == pattern, "other data at {place:#x}");
        }
        let begin = Instant::now();
        connection.rem_mem_reg(&region.message(), Some(region.file()))?;
        let left_after = begin.elapsed();
        for place in [gpa, last_gpa] {
            let res = reads(other, place)?;
            ensure!(res == -EFAULT, "the ring reaches removed memory at {place:#x}: {res}");
        }
        Ok((reached_after, left_after))
    })?;
    ensure!(other.epoch() == epoch && running.epoch() == epoch, "a ring has ended");
    Ok(Attempt { idle, changing, reached_after, left_after })
}

/// The latencies of requests.
struct Latencies {
    median: Duration,
    worst: Duration,
    count: usize,
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (median), {:?} (worst of {})", self.median, self.worst, self.count)
    }
}

/// Reads one block at a time and waits for its interrupt: while `meanwhile` runs, and some time before and after.
fn latencies_while<T>(driver: &mut RingDriver, meanwhile: impl FnOnce() -> Result<T>) -> Result<(Latencies, T)> {
    let is_over = AtomicBool::new(false);
    let around = Duration::from_millis(100);
    let mut taken = Vec::new();
    let done = thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<()> {
            while !is_over.load(Ordering::Relaxed) {
                let offset_bytes = taken.len() as u64 % 4096 * u64::from(BLOCK_BYTES);
                let sqe = driver.sqe(false, 1, BLOCK_BYTES, offset_bytes, 9)?;
                let begin = Instant::now();
                let res = perform_by_interrupt(driver, sqe)?;
                taken.push(begin.elapsed());
                ensure!(res == BLOCK_BYTES as i32, "a read: {res}");
            }
            Ok(())
        });
        thread::sleep(around);
        let done = meanwhile();
        thread::sleep(around);
        is_over.store(true, Ordering::Relaxed);
        load.join().map_err(|_| anyhow!("the load panicked"))?.and(done)
    })?;
    taken.sort_unstable();
    let worst = *taken.last().context("nothing was read")?;
    Ok((Latencies { median: taken[taken.len() / 2], worst, count: taken.len() }, done))
}

fn perform_by_interrupt(driver: &mut RingDriver, sqe: Sqe) -> Result<i32> {
    driver.submit(sqe)?;
    loop {
        driver.reap();
        if let Some(res) = driver.take_completion(sqe.user_data) {
            return Ok(res);
        }
        ensure!(driver.wait_interrupt(PATIENCE)?, "no interrupt");
    }
}
