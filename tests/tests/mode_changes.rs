//! `ringpass dev set NAME mode`: an operator moves queues from rings to virtqueues and back while the guest works.

use std::{
    process::{ExitCode, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use hdrhistogram::Histogram;
use ringpass_guest::vhost_user::Way;
use ringpass_guest_abi::{
    epoch::{Announcement, Phase},
    request::{EVENT_QUEUES, ErrorCode},
};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        attach::{QueueZero, RingDriver, bench::Bench, wait_until, whole},
        rig::Rig,
    },
    harness::{self, Test, test},
    needs::Need,
    seed::Seed,
    socket_guest::{Load, LoadedQueue, connect, options},
};
use ringpass_workload::Wait;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;
const BLOCK_BYTES: u32 = 4096;
/// How long requests run before the driver checks whether the test is over.
const SLICE_NS: u64 = 5_000_000;
/// How long a queue may take to get a ring again.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let with = |name: &str, body: fn() -> Result<()>| -> Test {
        let needs = DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs());
        test(name, needs.chain([Need::cpus(2), Need::available_memory_bytes(1 << 30)]), body)
    };
    harness::run(vec![
        with("queues_move_from_rings_to_virtqueues_and_back_under_load_and_lose_no_request", under_load),
        with("a_driver_that_does_not_answer_keeps_its_ring_and_the_command_says_so", silent_driver),
        with("a_driver_gets_no_ring_in_mode_virtqueue_and_an_event_when_it_can_have_one", refused_until_auto),
        with("a_queue_that_stops_during_the_change_does_not_delay_it", stopped_meanwhile),
        with("a_device_without_rings_refuses_the_change", no_rings),
    ])
}

fn set_mode(rig: &Rig, mode: &str, more: &[&str]) -> Result<Output> {
    let arguments = [&["set", "vhost", "mode", mode], more].concat();
    rig.dev(&arguments)?.output().context("cannot run ringpass dev set")
}

fn set_mode_well(rig: &Rig, mode: &str) -> Result<Duration> {
    let start = Instant::now();
    let output = set_mode(rig, mode, &[])?;
    ensure!(output.status.success(), "mode {mode}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(start.elapsed())
}

/// What executes each queue, from queue 1 on: a ring or the virtqueue.
fn executed_by(rig: &Rig) -> Result<Vec<String>> {
    let output = rig.dev(&["show", "vhost", "--json"])?.output().context("cannot run ringpass dev show")?;
    ensure!(output.status.success(), "dev show: {}", String::from_utf8_lossy(&output.stderr));
    let status: Value = serde_json::from_slice(&output.stdout)?;
    let queues = status["queues"].as_array().context("dev show lists no queues")?;
    Ok(queues[1..].iter().map(|queue| queue["executed_by"].as_str().unwrap_or_default().to_owned()).collect())
}

fn under_load() -> Result<()> {
    const QUEUES: u16 = 2;
    let seed = Seed::from_env_or_random();
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "3", "--submission", "doorbell"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(QUEUES, 8 * MIB, Way::Ring))?;
        let load = Load { depth: 8, block_bytes: BLOCK_BYTES, blocks: 512, wait: Wait::Interrupt };
        let queues = (1..=QUEUES).map(|index| LoadedQueue::new(&disk, index, load, seed));
        let mut queues = queues.collect::<Result<Vec<_>>>()?;
        let is_over = AtomicBool::new(false);
        let changes = thread::scope(|scope| {
            let drivers: Vec<_> = queues.iter_mut().map(|queue| scope.spawn(|| work(queue, &is_over))).collect();
            let are_working = || !drivers.iter().any(|driver| driver.is_finished());
            let changes = change_again_and_again(&rig, are_working);
            is_over.store(true, Ordering::Relaxed);
            for driver in drivers {
                driver.join().map_err(|_| anyhow!("a driver panicked"))??;
            }
            changes
        })?;
        let mut latencies = Histogram::<u64>::new(3)?;
        for queue in &mut queues {
            queue.verify().context("at the end")?;
            latencies.add(queue.take_latencies_ns()?)?;
        }
        eprintln!("{changes}");
        eprintln!(
            "{} requests: median {} us, p99.9 {} us, worst {} us",
            latencies.len(),
            latencies.value_at_quantile(0.5) / 1000,
            latencies.value_at_quantile(0.999) / 1000,
            latencies.max() / 1000
        );
        Ok(())
    })())
}

/// Writes all blocks, and then reads and writes them until the test is over.
fn work(queue: &mut LoadedQueue, is_over: &AtomicBool) -> Result<()> {
    queue.fill()?;
    while !is_over.load(Ordering::Relaxed) {
        queue.run(SLICE_NS, 0)?;
    }
    Ok(())
}

/// Moves all queues to virtqueues and back several times, and returns how long that took, as text.
fn change_again_and_again(rig: &Rig, are_working: impl Fn() -> bool) -> Result<String> {
    let times = harness::budget(100, 2000);
    let (mut to_virtqueue_us, mut to_ring_us) = (Histogram::<u64>::new(3)?, Histogram::<u64>::new(3)?);
    await_all(rig, "ring", &are_working)?;
    for _ in 0..times {
        let taken = set_mode_well(rig, "virtqueue")?;
        to_virtqueue_us.record(taken.as_micros() as u64)?;
        let now = executed_by(rig)?;
        ensure!(now.iter().all(|by| by == "virtqueue"), "after the change the queues are executed by {now:?}");
        let start = Instant::now();
        set_mode_well(rig, "auto")?;
        await_all(rig, "ring", &are_working)?;
        to_ring_us.record(start.elapsed().as_micros() as u64)?;
    }
    let line = |what: &str, histogram: &Histogram<u64>| {
        let at = |quantile| histogram.value_at_quantile(quantile);
        format!("{what}: median {} us, p99.9 {} us, worst {} us", at(0.5), at(0.999), histogram.max())
    };
    Ok(format!(
        "{times} changes each way, with the program that asks for them; {}; {}",
        line("to virtqueues", &to_virtqueue_us),
        line("to rings", &to_ring_us)
    ))
}

fn await_all(rig: &Rig, wanted: &str, are_working: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = executed_by(rig)?;
        if now.iter().all(|by| by == wanted) {
            return Ok(());
        }
        ensure!(are_working(), "a driver has ended");
        ensure!(Instant::now() < end, "the queues are executed by {now:?}");
    }
}

fn bench() -> Result<Bench> {
    Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &["--submission", "doorbell"])
}

/// Waits until the device asks the driver to drain its ring.
fn await_drain(driver: &RingDriver) -> Result<()> {
    wait_until("the announcement of the drain", || {
        let announcement = Announcement::from_word(driver.announced());
        Ok(announcement.is_some_and(|announcement| announcement.phase == Phase::Drain))
    })
}

/// Waits until the driver, which answers the device, has left its ring.
fn leave(driver: &mut RingDriver) -> Result<()> {
    wait_until("the end of ATTACH", || {
        driver.look()?;
        driver.has_attach_ended()
    })?;
    let found = driver.wait_attach()?;
    ensure!(found == whole(ErrorCode::Mode), "ATTACH ended with {found:?}");
    Ok(())
}

fn silent_driver() -> Result<()> {
    let mut bench = bench()?;
    let mut silent = bench.attached(1)?;
    let mut other = bench.attached(2)?;
    let mut change = bench.rig.dev(&["set", "vhost", "mode", "virtqueue", "--timeout", "1"])?;
    let change = change.stderr(Stdio::piped()).spawn()?;
    bench.broker.explain(await_drain(&silent))?;
    bench.broker.explain(leave(&mut other))?;
    take_news(&mut bench.queue_zero)?;
    // The ring works for as long as its driver does not answer.
    let data = [0x5a; BLOCK_BYTES as usize];
    write_without_answering(&mut silent, &data)?;
    let output = change.wait_with_output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "the change succeeded although a driver has not answered");
    ensure!(errors.contains("queue 1 did not leave the ring within 1000 ms"), "{errors}");
    ensure!(executed_by(&bench.rig)?[0] == "ring");
    write_without_answering(&mut silent, &data)?;
    // The other queue may have a ring again, and the device tells its driver so.
    ensure!(bench.queue_zero.wait_event()? == EVENT_QUEUES);
    other.attach()?;
    // The silent driver gets another ring once it has answered: a drain cannot be taken back.
    silent.wait_epoch(2)?;
    ensure!(silent.read(0, BLOCK_BYTES)?[..] == data[..], "the write during the drain did not reach the disk");
    ensure!(other.read(0, BLOCK_BYTES)?[..] == data[..]);
    Ok(())
}

/// Takes all news of the device, and leaves an EVENT pending.
fn take_news(queue_zero: &mut QueueZero) -> Result<()> {
    queue_zero.post_event()?;
    while queue_zero.has_event_ended()? {
        queue_zero.wait_event()?;
        queue_zero.post_event()?;
    }
    Ok(())
}

/// Writes the first block without reading the device's announcements.
fn write_without_answering(driver: &mut RingDriver, data: &[u8]) -> Result<()> {
    let (gpa, len_bytes) = (driver.buffers().at(1), data.len() as u32);
    driver.vring().ram().memory().write_slice(data, GuestAddress(gpa))?;
    driver.submit(driver.sqe_at(true, gpa, len_bytes, 0, 9)?)?;
    let mut written = None;
    wait_until("the completion of the write", || {
        driver.reap();
        written = written.or(driver.take_completion(9));
        Ok(written.is_some())
    })?;
    ensure!(written == Some(len_bytes as i32), "the write ended with {written:?}");
    Ok(())
}

fn refused_until_auto() -> Result<()> {
    let mut bench = bench()?;
    let mut driver = bench.started(1)?;
    set_mode_well(&bench.rig, "virtqueue")?;
    driver.send_both(&driver.payload().to_bytes())?;
    let found = driver.wait_attach()?;
    ensure!(found == whole(ErrorCode::Mode), "ATTACH ended with {found:?}");
    let shown = bench.rig.dev(&["show", "vhost"])?.output()?;
    let shown = String::from_utf8(shown.stdout)?;
    ensure!(shown.contains("mode virtqueue") && shown.contains("the operator set mode virtqueue"), "{shown}");
    take_news(&mut bench.queue_zero)?;
    set_mode_well(&bench.rig, "auto")?;
    ensure!(bench.queue_zero.wait_event()? == EVENT_QUEUES);
    driver.attach()?;
    driver.write(0, &[7; BLOCK_BYTES as usize])
}

fn stopped_meanwhile() -> Result<()> {
    let bench = &mut bench()?;
    let silent = bench.attached(1)?;
    let mut change = bench.rig.dev(&["set", "vhost", "mode", "virtqueue", "--timeout", "60"])?;
    let change = change.stderr(Stdio::piped()).spawn()?;
    bench.broker.explain(await_drain(&silent))?;
    bench.front_end.stop_vring(1)?;
    let output = change.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn no_rings() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let _broker = rig.broker(&["--mode", "virtqueue"])?;
    for mode in ["virtqueue", "auto"] {
        let output = set_mode(&rig, mode, &[])?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && errors.contains("the device offers no rings"), "{mode}: {errors}");
    }
    Ok(())
}
