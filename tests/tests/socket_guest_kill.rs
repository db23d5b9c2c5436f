//! A test kills the broker while a guest drives its rings. A new broker starts, and the guest loses nothing, repeats
//! nothing and reads nothing stale.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};

use ringpass_guest::vhost_user::{Operation, Options, Way};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    content::check_content,
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, Test, test},
    needs::Need,
    seed::Seed,
    socket_guest::{Load, LoadedQueue, await_ring, connect, options},
    stuck_disk::{StuckDisk, StuckKind},
};
use ringpass_workload::Wait;
use rustix::process::Signal;
use tempfile::TempDir;

const DISK_BYTES: u64 = 64 << 20;
const QUEUES: u16 = 2;
/// The longest time between two kills.
const PAUSE_MAX_MS: u64 = 120;

/// Longer than a guest needs to continue on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let kill = |kind: DiskKind, submission: &'static str| -> Test {
        let needs = kind.needs().into_iter().chain(broker_process::needs()).chain([Need::cpus(2)]);
        let name = format!("a_broker_killed_at_random_moments_loses_nothing_of_its_rings_on_{kind}_by_{submission}");
        test(name, needs, move || killed(kind, submission))
    };
    let slow_needs = || StuckDisk::needs().into_iter().chain(broker_process::needs());
    harness::run(vec![
        kill(DiskKind::Ext4PageCache, "sq-thread"),
        kill(DiskKind::Ext4Direct, "sq-thread"),
        kill(DiskKind::Ext4PageCache, "doorbell"),
        kill(DiskKind::Loop, "doorbell"),
        test("no_epoch_ends_before_the_io_of_a_killed_broker_has_ended_in_a_device", slow_needs(), || {
            slow_io(StuckKind::LoopDevice)
        }),
        test("no_epoch_ends_before_the_io_of_a_killed_broker_has_ended_in_a_worker", slow_needs(), || {
            slow_io(StuckKind::File)
        }),
    ])
}

fn arguments(submission: &'static str) -> [&'static str; 8] {
    ["--mode", "direct", "--num-queues", "3", "--submission", submission, "--sq-idle-ms", "2"]
}

/// Kills the broker 25 times in a test run of each kind, so 100 times in all.
fn killed(kind: DiskKind, submission: &'static str) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let rig = Rig::new(kind, DISK_BYTES)?;
    let mut broker = rig.broker(&arguments(submission))?;
    let disk = connect(&rig.socket(), options(QUEUES, 8 << 20, Way::Ring))?;
    let waits = [Wait::Poll, Wait::Interrupt];
    let mut queues = (1..=QUEUES)
        .zip(waits)
        .map(|(index, wait)| {
            let load = Load { depth: 16, block_bytes: 4096, blocks: 512, wait };
            LoadedQueue::new(&disk, index, load, seed)
        })
        .collect::<Result<Vec<_>>>()?;
    let (is_over, verified_bytes) = (AtomicBool::new(false), AtomicU64::new(0));
    let kills = harness::budget(25, 250);
    let outcome = thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .map(|queue| {
                let (is_over, verified_bytes) = (&is_over, &verified_bytes);
                scope.spawn(move || -> Result<()> {
                    queue.fill()?;
                    while !is_over.load(Ordering::Relaxed) {
                        verified_bytes.fetch_add(queue.run(100_000_000, 0)?.verified_bytes, Ordering::Relaxed);
                    }
                    queue.verify()?;
                    Ok(())
                })
            })
            .collect();
        let mut killing = || -> Result<()> {
            let mut rng = seed.derive("moments").rng();
            let await_guests = |holds: &dyn Fn() -> bool| {
                let end = Instant::now() + LIMIT;
                while !holds() && !threads.iter().any(|thread| thread.is_finished()) {
                    ensure!(Instant::now() < end, "the guests do not continue");
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            };
            let mut reconnects = 0;
            for kill in 0..kills {
                // Every second broker is killed at any moment, also before a guest has connected.
                if kill % 2 == 1 {
                    await_guests(&|| disk.reconnects() > reconnects)?;
                }
                reconnects = disk.reconnects();
                thread::sleep(Duration::from_millis(rng.u64(..PAUSE_MAX_MS)));
                if threads.iter().any(|thread| thread.is_finished()) {
                    break;
                }
                broker.kill()?;
                broker = rig.broker(&arguments(submission)).with_context(|| format!("after kill {kill}"))?;
            }
            // The last broker must do some work too.
            let before = verified_bytes.load(Ordering::Relaxed);
            await_guests(&|| verified_bytes.load(Ordering::Relaxed) > before)
        };
        let killed = killing();
        is_over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a guest's thread panicked"))??;
        }
        killed
    });
    broker.explain(outcome.with_context(|| format!("{seed}")))?;
    let verified_bytes = verified_bytes.into_inner();
    let mut resubmitted = 0;
    for queue in &queues {
        let counters = queue.queue.counters();
        resubmitted += counters.resubmitted;
        ensure!(counters.epochs >= 2, "{counters:?}");
        check_content(&rig.disk_file()?, &queue.job, queue.expected())?;
    }
    eprintln!(
        "{kills} kills, {} reconnects, {resubmitted} requests sent again, {} MiB verified",
        disk.reconnects(),
        verified_bytes >> 20
    );
    ensure!(disk.reconnects() >= u64::try_from(kills)? / 2, "the guest found only {} brokers", disk.reconnects());
    ensure!(verified_bytes > 0, "the guests verified nothing");
    Ok(())
}

fn slow_io(kind: StuckKind) -> Result<()> {
    let disk = StuckDisk::new(kind, 4 << 20)?;
    let directory = TempDir::new()?;
    let socket = directory.path().join("vhost.sock");
    let arguments = ["--direct-io", "on", "--mode", "direct", "--num-queues", "2", "--sq-idle-ms", "2"];
    let mut old = BrokerProcess::start(&socket, disk.path(), &arguments)?;
    let guest = connect(&socket, Options::default().queues(1).memory_bytes(4 << 20).way(Way::Ring))?;
    let mut queue = guest.queue(1)?;
    ensure!(await_ring(&mut queue)? == 1);
    let mut buffer = guest.allocate(4096)?;
    ensure!(buffer.write(0, &[0xa7; 4096]));

    disk.freeze()?;
    ensure!(queue.submit(Operation::Write, buffer, 4096, 4096, 1).is_ok(), "the empty queue refuses a request");
    queue.send();
    disk.wait_for_hanging_write(|| old.has_hanging_thread())?;
    let hung = queue.poll();
    old.signal(Signal::KILL)?;
    let new = BrokerProcess::start(&socket, disk.path(), &arguments);
    let silent = (|| -> Result<()> {
        ensure!(hung.is_none(), "the write did not hang: {hung:?}");
        // The new broker answers all messages at once. It does not answer requests yet.
        guest.reconnect();
        let end = Instant::now() + Duration::from_secs(30);
        while guest.reconnects() == 0 {
            ensure!(Instant::now() < end, "the new broker does not answer");
            thread::sleep(Duration::from_millis(5));
        }
        let until = Instant::now() + Duration::from_millis(400);
        while Instant::now() < until {
            ensure!(queue.poll().is_none(), "a request ended whose I/O had not");
            let epoch = queue.executed_by();
            ensure!(
                matches!(epoch, ringpass_guest::vhost_user::ExecutedBy::Ring { epoch: 1 }),
                "the end of the epoch was announced before the old I/O had ended: {epoch:?}"
            );
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })();
    disk.thaw()?;
    let new = new?;
    new.explain(silent)?;
    old.wait()?;
    let done = new.explain(queue.wait(Duration::from_secs(30)).context("the write does not end"))?;
    ensure!(done.result.as_ref().is_ok_and(|&bytes| bytes == 4096), "{:?}", done.result);
    let end = Instant::now() + Duration::from_secs(30);
    while await_ring(&mut queue)? < 2 {
        ensure!(Instant::now() < end, "the new broker makes no ring");
        ensure!(queue.poll().is_none(), "a request has ended twice");
        thread::sleep(Duration::from_millis(1));
    }
    ensure!(queue.submit(Operation::Read, done.buffer, 4096, 4096, 2).is_ok(), "the empty queue refuses a request");
    let done = queue.wait(Duration::from_secs(30)).context("the read does not end")?;
    let mut bytes = [0; 4096];
    ensure!(
        done.result.is_ok() && done.buffer.read(0, &mut bytes) && bytes == [0xa7; 4096],
        "the write did not reach the disk"
    );
    Ok(())
}
