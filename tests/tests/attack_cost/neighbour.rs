//! A guest of another owner, with a server and a disk of its own, beside a hostile guest.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
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

use crate::attack::{Attack, Hostile};

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
/// The p99 beside an attack, in units of the p99 beside a full load that keeps to the rules.
const P99_FACTOR: u64 = 2;
/// Differences below this are those between two runs of the same.
const P99_NOISE: Duration = Duration::from_millis(5);
/// The longest request beside an attack: this, or twice the longest beside the honest load on a busy machine.
const WORST: Duration = Duration::from_millis(100);

/// An attack that reaps keeps to the rules: its ring does not end.
pub(crate) fn keeps_its_latency(attack: Attack, reaping: Reaping) -> Result<()> {
    let honest = beside(Attack::ORDINARY_READS, Reaping::Honest)?;
    let hostile = beside(attack, reaping)?;
    let of = |latencies: &Histogram<u64>| {
        let at = |quantile| Duration::from_nanos(latencies.value_at_quantile(quantile));
        (at(0.5), at(0.99), Duration::from_nanos(latencies.max()))
    };
    let ((honest_median, honest_p99, honest_worst), (median, p99, worst)) = (of(&honest), of(&hostile));
    eprintln!("beside an honest full load: median {honest_median:?}, p99 {honest_p99:?}, worst {honest_worst:?}");
    eprintln!("beside the attack:          median {median:?}, p99 {p99:?}, worst {worst:?}");
    ensure!(
        p99 < honest_p99 * P99_FACTOR as u32 + P99_NOISE,
        "the neighbour's p99 is {p99:?}, and {honest_p99:?} beside an honest load"
    );
    ensure!(worst < WORST.max(honest_worst * 2), "a request of the neighbour took {worst:?}");
    Ok(())
}

/// The latencies of the neighbour's reads in nanoseconds, while a guest floods its ring.
fn beside(attack: Attack, reaping: Reaping) -> Result<Histogram<u64>> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "virtqueue", "--num-queues", "1", "--poll-us", "0"])?;
    let mut ram = TestRam::new(1, 1 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, BLOCK_BYTES)?;
    let mut hostile = Hostile::start(attack, "sq-thread")?;
    let is_over = AtomicBool::new(false);
    let latencies = thread::scope(|scope| {
        let guest = scope.spawn(|| hostile.flooder.flood(reaping, || is_over.load(Ordering::Relaxed)));
        let latencies = read_for(&mut driver, harness::time_budget(Duration::from_secs(2), Duration::from_secs(60)));
        is_over.store(true, Ordering::Relaxed);
        guest.join().map_err(|_| anyhow!("the guest panicked"))??;
        latencies
    });
    broker.explain(latencies)
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
