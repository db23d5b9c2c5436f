//! The front-end changes eventfds and memory while a guest drives rings.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use ringpass_guest::vhost_user::{Disk, ExecutedBy, Operation, Queue, Way};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, Test, test},
    held_proxy::HeldProxy,
    needs::Need,
    seed::Seed,
    socket_guest::{Load, LoadedQueue, connect, options},
    waits::{Waits, hardly_wait},
};
use ringpass_workload::Wait;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 32 * MIB;
/// A request that takes longer has lost its interrupt.
const LOST: Duration = Duration::from_secs(30);
/// The worst latency of a queue that runs while memory comes and goes.
const WORST: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    let with = |name: &str, body: fn() -> Result<()>| -> Test {
        let needs = DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs());
        test(name, needs.chain([Need::cpus(2), Need::available_memory_bytes(1 << 30)]), body)
    };
    harness::run(vec![
        with("a_guest_loses_no_interrupt_when_the_call_eventfd_of_its_ring_changes_under_load", moved_interrupts),
        with("the_device_learns_of_memory_that_is_added_while_the_driver_reconnects", added_in_between),
        with("a_ring_does_not_wait_while_memory_is_added_and_removed", latency),
    ])
}

fn moved_interrupts() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "2"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Ring))?;
        let mut queue = disk.queue(1)?;
        let moves = harness::budget(1000, 50_000);
        let (is_over, completed) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let driver = scope.spawn(|| drive(&disk, &mut queue, &is_over, &completed));
            for _ in 0..moves {
                let before = completed.load(Ordering::Relaxed);
                disk.move_interrupt(1)?;
                thread::sleep(Duration::from_micros(500));
                // At least one request completes with each eventfd.
                while completed.load(Ordering::Relaxed) == before && !driver.is_finished() {
                    thread::yield_now();
                }
            }
            is_over.store(true, Ordering::Relaxed);
            driver.join().map_err(|_| anyhow!("the driver panicked"))?
        })?;
        eprintln!("{moves} eventfds, {} requests", completed.into_inner());
        ensure!(matches!(queue.executed_by(), ExecutedBy::Ring { epoch: 1 }), "{:?}", queue.executed_by());
        Ok(())
    })())
}

/// Reads with four requests at a time, and sleeps between interrupts.
fn drive(disk: &Disk, queue: &mut Queue, is_over: &AtomicBool, completed: &AtomicU64) -> Result<()> {
    let mut idle = (0..4).map(|_| disk.allocate(4096)).collect::<Result<Vec<_>, _>>()?;
    while !is_over.load(Ordering::Relaxed) || queue.outstanding() > 0 {
        while let Some(buffer) = idle.pop().filter(|_| !is_over.load(Ordering::Relaxed)) {
            ensure!(
                queue.submit(Operation::Read, buffer, 0, 4096, 0).is_ok(),
                "the queue refuses one of four requests"
            );
        }
        if queue.outstanding() == 0 {
            break;
        }
        queue.send();
        let start = Instant::now();
        let done = queue.wait(LOST).context("an interrupt was lost: nothing came")?;
        ensure!(start.elapsed() < LOST, "an interrupt was lost: the completion was there without it");
        done.result?;
        idle.push(done.buffer);
        completed.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn added_in_between() -> Result<()> {
    const ADDED_GPA: u64 = 256 * MIB;
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    broker.explain((|| {
        let path = rig.socket().with_extension("proxy");
        let proxy = HeldProxy::start(&path, &rig.socket())?;
        let disk = connect(&path, options(1, 4 * MIB, Way::Virtqueue))?;
        let mut queue = disk.queue(1)?;
        disk.reconnect();
        proxy.wait()?;
        thread::scope(|scope| {
            let adding = scope.spawn(|| disk.add_memory(ADDED_GPA, MIB));
            // A driver that did not wait for the device would be done by now.
            let start = Instant::now();
            while !adding.is_finished() && start.elapsed() < Duration::from_millis(200) {
                thread::yield_now();
            }
            proxy.go_on();
            adding.join().map_err(|_| anyhow!("the front-end panicked"))
        })??;
        let buffer = disk.allocate_in(ADDED_GPA, 4096)?;
        ensure!(queue.submit(Operation::Read, buffer, 0, 4096, 0).is_ok(), "the empty queue refuses a request");
        let done = queue.wait(LOST).context("nothing came")?;
        done.result.context("the device does not know the memory")?;
        Ok(())
    })())
}

fn latency() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "2"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Ring))?;
        let load = Load { depth: 1, block_bytes: 4096, blocks: 64, wait: Wait::Poll };
        let mut queue = LoadedQueue::new(&disk, 1, load, Seed::fixed(1))?;
        queue.job.write_percent = 100;
        queue.fill()?;
        queue.job.write_percent = 0;
        hardly_wait(WORST, || {
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(300) {
                queue.run(50_000_000, 0)?;
            }
            let idle_ns = queue.take_latencies_ns()?.max();
            let (changes, all) = thread::scope(|scope| {
                let changing = scope.spawn(|| -> Result<(u32, Duration)> {
                    let start = Instant::now();
                    let mut changes = 0;
                    // Two regions are in the GiB of the running queue's memory, and one in another GiB.
                    for gpa in [256 * MIB, 5 << 30, 768 * MIB] {
                        disk.add_memory(gpa, 256 * MIB)?;
                        thread::sleep(Duration::from_millis(100));
                        disk.remove_memory(gpa)?;
                        changes += 2;
                    }
                    let all = start.elapsed();
                    ensure!(all < Duration::from_secs(20), "the changes took {all:?}");
                    Ok((changes, all))
                });
                while !changing.is_finished() {
                    queue.run(50_000_000, 0)?;
                }
                changing.join().map_err(|_| anyhow!("the front-end panicked"))?
            })?;
            let latencies = queue.take_latencies_ns()?;
            eprintln!(
                "{changes} changes, {} requests, median {} ns",
                latencies.len(),
                latencies.value_at_quantile(0.5),
            );
            ensure!(matches!(queue.queue.executed_by(), ExecutedBy::Ring { epoch: 1 }), "the ring ended meanwhile");
            Ok(Waits {
                worst_without: Duration::from_nanos(idle_ns),
                worst_during: Duration::from_nanos(latencies.max()),
                // Each pair of changes adds and removes one region.
                work: all * 2 / changes,
            })
        })
    })())
}
