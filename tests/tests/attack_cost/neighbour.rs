//! A guest of another owner, with a server and a disk of its own, beside a hostile guest.
//!
//! The thread that serves the neighbour may run only on the CPU of the hostile guest's SQ thread. Elsewhere the scheduler
//! moves it away, and the test would not see what the SQ thread does to others.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;
use ringpass_tests::{
    disks::DiskKind,
    front_end::{
        attach::flooder::Reaping,
        blk::BlkDriver,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
    harness,
};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::attack::{Attack, Hostile};

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
/// The p99 beside an attack, in units of the p99 beside a full load of ordinary reads.
const P99_FACTOR: u32 = 2;
/// Differences below this are those between two runs of the same: whether a CPU has slept, for example.
const P99_NOISE: Duration = Duration::from_micros(500);
/// The longest request beside an attack: this, or twice the longest beside the ordinary load on a busy machine.
const WORST: Duration = Duration::from_millis(100);
/// Something else on the machine disturbs a measurement now and then. An attack that works disturbs each of them.
const MEASUREMENTS: usize = 3;

/// What the neighbour's reads took.
#[derive(Clone, Copy, Debug)]
struct Latencies {
    median: Duration,
    p99: Duration,
    worst: Duration,
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, p99, worst } = self;
        write!(f, "median {median:?}, p99 {p99:?}, worst {worst:?}")
    }
}

/// The attack keeps to the rules, so that its ring does not end.
pub(crate) fn keeps_its_latency(attack: Attack) -> Result<()> {
    let mut measured = Vec::new();
    for _ in 0..MEASUREMENTS {
        let ordinary = beside(Attack::ORDINARY_READS)?;
        let attacked = beside(attack)?;
        eprintln!("beside ordinary reads: {ordinary}; beside the attack: {attacked}");
        if attacked.p99 < ordinary.p99 * P99_FACTOR + P99_NOISE && attacked.worst < WORST.max(ordinary.worst * 2) {
            return Ok(());
        }
        measured.push((ordinary, attacked));
    }
    bail!("the neighbour waits for the attack in each of {MEASUREMENTS} measurements: {measured:?}")
}

/// What the neighbour's reads take while another guest keeps its ring full of these requests.
fn beside(attack: Attack) -> Result<Latencies> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let cpu = shared_cpu()?;
    let broker = rig.broker(&["--mode", "virtqueue", "--num-queues", "1", "--poll-us", "0", "--cpus", &cpu])?;
    let mut ram = TestRam::new(1, 1 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, BLOCK_BYTES)?;
    let mut hostile = Hostile::start_with(attack, &["--submission", "sq-thread", "--sq-cpu", &cpu])?;
    let is_over = AtomicBool::new(false);
    let latencies = thread::scope(|scope| {
        let guest = scope.spawn(|| hostile.flooder.flood(Reaping::Honest, || is_over.load(Ordering::Relaxed)));
        let latencies = read_for(&mut driver, harness::time_budget(Duration::from_secs(1), Duration::from_secs(60)));
        is_over.store(true, Ordering::Relaxed);
        guest.join().map_err(|_| anyhow!("the guest panicked"))??;
        latencies
    });
    let latencies = broker.explain(latencies)?;
    ensure!(!hostile.flooder.has_ended()?, "the ring of the other guest has ended");
    ensure!(hostile.flooder.submitted() > 100, "the other guest did nothing");
    let at = |quantile| Duration::from_nanos(latencies.value_at_quantile(quantile));
    Ok(Latencies { median: at(0.5), p99: at(0.99), worst: Duration::from_nanos(latencies.max()) })
}

/// The last CPU on which this process may run.
fn shared_cpu() -> Result<String> {
    let set = sched_getaffinity(None)?;
    let cpu = (0..CpuSet::MAX_CPU).rev().find(|&cpu| set.is_set(cpu)).context("no CPU")?;
    Ok(cpu.to_string())
}

fn read_for(driver: &mut BlkDriver, duration: Duration) -> Result<Histogram<u64>> {
    let mut latencies = Histogram::new(3)?;
    let begin = Instant::now();
    let mut sector = 0;
    while begin.elapsed() < duration {
        let start = Instant::now();
        driver.read(sector, BLOCK_BYTES)?;
        latencies.record(start.elapsed().as_nanos() as u64)?;
        sector = (sector + u64::from(BLOCK_BYTES) / 512) % (DISK_BYTES / 512);
    }
    Ok(latencies)
}
