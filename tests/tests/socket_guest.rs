//! A process is its own guest on the socket of a broker. It asks for rings with ATTACH requests, and verifies every
//! byte.

use std::{
    num::NonZeroU64,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest::vhost_user::{ExecutedBy, Operation, Way};
use ringpass_guest_abi::request::ErrorCode;
use ringpass_tests::{
    broker_process,
    content::check_content,
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, Test, test},
    needs::Need,
    pairs::Space,
    seed::Seed,
    socket_guest::{Load, LoadedQueue, await_ring, connect, options},
};
use ringpass_workload::{Report, Wait};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 128 * MIB;
const VERIFIED_BYTES: u64 = 512 * MIB;
const ROW_BYTES: u64 = 24 * MIB;
const READS_OF_SMALL_BLOCKS: u64 = 4000;

fn main() -> ExitCode {
    let rings = |name: &str, body: fn() -> Result<()>| -> Test {
        let needs = DiskKind::Ext4PageCache.needs().into_iter().chain(broker_process::needs());
        test(name, needs.chain([Need::cpus(2)]), body)
    };
    let mut tests: Vec<Test> = [DiskKind::Ext4PageCache, DiskKind::Ext4Direct, DiskKind::Zram]
        .into_iter()
        .map(|kind| {
            let needs = kind.needs().into_iter().chain(broker_process::needs()).chain([Need::cpus(2)]);
            test(format!("a_socket_guest_reads_back_what_it_wrote_on_{kind}"), needs, move || matrix(kind))
        })
        .collect();
    tests.extend([
        rings("a_guest_uses_a_device_without_rings_as_an_ordinary_disk", no_rings),
        rings("a_guest_attaches_and_detaches_queues_at_any_time", attach_and_detach),
        rings("a_paused_and_resumed_guest_gets_its_rings_back", pause_and_resume),
        rings("a_guest_without_an_in_flight_region_gets_no_rings_and_the_server_says_why", no_inflight_region),
        rings("a_guest_adds_and_removes_memory_while_rings_run", memory),
        rings("a_guest_flushes_discards_and_writes_zeroes_beside_rings", other_operations),
        rings("a_server_of_a_read_only_disk_offers_no_rings_and_says_why", read_only),
    ]);
    harness::run(tests)
}

#[derive(Clone, Copy, Debug)]
struct Case {
    depth: u32,
    block_bytes: u32,
    queues: u16,
    wait: Wait,
    submission: &'static str,
    inflight: bool,
    way: Way,
}

fn cases(kind: DiskKind) -> Result<Vec<(Case, String, u64)>> {
    let smallest = if kind == DiskKind::Zram { 4096 } else { 512 };
    let mut block_sizes = vec![smallest, 4 << 10, 64 << 10, 512 << 10];
    block_sizes.dedup();
    let mut space = Space::new();
    let depth = space.factor("depth", &[1, 16, 128]);
    let block_bytes = space.factor("block bytes", &block_sizes);
    let queues = space.factor("queues", &[1, 2, 3, 4]);
    let wait = space.factor("wait", &[Wait::Poll, Wait::Interrupt, Wait::InterruptMuting]);
    let submission = space.factor("submission", &["sq-thread", "doorbell"]);
    let inflight = space.factor("in-flight region", &[false, true]);
    let way = space.factor("way", &[Way::Ring, Way::Virtqueue]);
    let rows = if harness::is_soak() { space.full_product()? } else { space.all_pairs(Seed::fixed(6))? };
    let mut cases = Vec::new();
    for row in &rows {
        let case = Case {
            depth: *depth.of(row),
            block_bytes: *block_bytes.of(row),
            queues: *queues.of(row),
            wait: *wait.of(row),
            submission: submission.of(row),
            inflight: *inflight.of(row),
            way: *way.of(row),
        };
        cases.push((case, row.to_string(), ROW_BYTES.min(u64::from(case.block_bytes) * READS_OF_SMALL_BLOCKS)));
    }
    let missing_bytes = VERIFIED_BYTES.saturating_sub(cases.iter().map(|(_, _, bytes)| bytes).sum());
    let mut largest: Vec<_> = cases.iter_mut().filter(|(case, ..)| case.block_bytes == 512 << 10).collect();
    let count = NonZeroU64::new(largest.len() as u64).context("every value is in a row")?;
    largest.iter_mut().for_each(|(_, _, bytes)| *bytes += missing_bytes.div_ceil(count.get()));
    Ok(cases)
}

fn matrix(kind: DiskKind) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let rig = Rig::new(kind, DISK_BYTES)?;
    let cases = cases(kind)?;
    let (start, count) = (Instant::now(), cases.len());
    let mut total = Report::default();
    for (index, (case, text, bytes)) in cases.into_iter().enumerate() {
        let row_start = Instant::now();
        let report = row(&rig, &case, seed.derive(index), bytes).with_context(|| format!("{text} ({seed})"))?;
        eprintln!("{:6.2} s  {text}: {report}", row_start.elapsed().as_secs_f64());
        total.merge(&report);
    }
    eprintln!("{:6.2} s  {count} rows: {total}", start.elapsed().as_secs_f64());
    ensure!(total.verified_bytes >= VERIFIED_BYTES, "only {} bytes were verified", total.verified_bytes);
    Ok(())
}

fn row(rig: &Rig, case: &Case, seed: Seed, bytes: u64) -> Result<Report> {
    let queue_count = (case.queues + 1).to_string();
    let arguments =
        ["--mode", "direct", "--num-queues", &queue_count, "--submission", case.submission, "--sq-idle-ms", "2"];
    let broker = rig.broker(&arguments)?;
    broker.explain(row_on(rig, case, seed, bytes))
}

fn row_on(rig: &Rig, case: &Case, seed: Seed, bytes: u64) -> Result<Report> {
    let buffers_bytes = u64::from(case.queues) * u64::from(case.depth) * u64::from(case.block_bytes);
    let mut options = options(case.queues, buffers_bytes + 8 * MIB, case.way);
    // Without an in-flight region there are no rings.
    options.inflight = case.inflight || case.way == Way::Ring;
    let disk = connect(&rig.socket(), options)?;
    let share_bytes = DISK_BYTES / u64::from(case.queues);
    let blocks = (2 * u64::from(case.depth)).max(32).min(share_bytes / u64::from(case.block_bytes));
    let depth = u64::from(case.depth).min(blocks) as u32;
    let load = Load { depth, block_bytes: case.block_bytes, blocks, wait: case.wait };
    let mut queues =
        (1..=case.queues).map(|index| LoadedQueue::new(&disk, index, load, seed)).collect::<Result<Vec<_>>>()?;
    let operations = (bytes / u64::from(case.queues) / u64::from(case.block_bytes)).max(depth.into());
    let reports = thread::scope(|scope| {
        let running: Vec<_> = queues
            .iter_mut()
            .map(|queue| {
                scope.spawn(move || -> Result<Report> {
                    queue.fill()?;
                    let mut total = queue.run(0, operations)?;
                    total.merge(&queue.verify()?);
                    Ok(total)
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    let mut total = Report::default();
    let beside = rig.disk_file()?;
    for (report, queue) in reports.into_iter().zip(&queues) {
        let Ok(report) = report else { bail!("a guest's thread panicked") };
        total.merge(&report?);
        let is_ring = matches!(queue.queue.executed_by(), ExecutedBy::Ring { .. });
        ensure!(is_ring == (case.way == Way::Ring), "{:?}", queue.queue.executed_by());
        check_content(&beside, &queue.job, queue.expected())?;
    }
    Ok(total)
}

const SMALL: Load = Load { depth: 8, block_bytes: 4096, blocks: 256, wait: Wait::Interrupt };

fn no_rings() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "virtqueue", "--num-queues", "2"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Auto))?;
        ensure!(disk.offers_rings().is_none());
        let mut queue = LoadedQueue::new(&disk, 1, SMALL, Seed::fixed(1))?;
        queue.fill()?;
        queue.run(0, 2000)?;
        queue.verify()?;
        ensure!(queue.queue.executed_by() == ExecutedBy::Virtqueue { refused: None });
        drop((queue, disk));
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Ring))?;
        let error = disk.queue(1).err().context("a queue that insists on a ring was opened")?.to_string();
        ensure!(error.contains("does not offer rings"), "{error}");
        Ok(())
    })())
}

fn no_inflight_region() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "2"])?;
    broker.explain((|| {
        let without = |way| {
            let mut options = options(1, 4 * MIB, way);
            options.inflight = false;
            connect(&rig.socket(), options)
        };
        let disk = without(Way::Ring)?;
        let offered = disk.offers_rings().context("the device does not answer PROBE")?;
        ensure!(offered.refusal == Some(Some(ErrorCode::Inflight)), "{offered:?}");
        let error = disk.queue(1).err().context("a ring without an in-flight region")?.to_string();
        ensure!(error.contains("Inflight"), "{error}");
        broker.wait_for_log("keeps no in-flight region")?;
        let shown = String::from_utf8(rig.dev(&["show", "vhost"])?.output()?.stdout)?;
        ensure!(shown.contains("no rings at present: the front-end keeps no in-flight region"), "{shown}");
        drop(disk);
        let disk = without(Way::Auto)?;
        let mut queue = LoadedQueue::new(&disk, 1, SMALL, Seed::fixed(1))?;
        queue.fill()?;
        queue.verify()?;
        ensure!(queue.queue.executed_by() == ExecutedBy::Virtqueue { refused: Some(ErrorCode::Inflight) });
        drop((queue, disk));
        // The next front-end keeps one.
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Ring))?;
        ensure!(disk.queue(1).is_ok());
        Ok(())
    })())
}

fn attach_and_detach() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "3"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(2, 8 * MIB, Way::Ring))?;
        let seed = Seed::from_env_or_random();
        let mut queues = [1, 2].map(|index| LoadedQueue::new(&disk, index, SMALL, seed));
        for queue in &mut queues {
            let queue = queue.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            queue.fill()?;
            queue.run(0, 2000)?;
            queue.queue.detach()?;
            let detached = ExecutedBy::Virtqueue { refused: Some(ErrorCode::Detached) };
            ensure!(queue.queue.executed_by() == detached, "{:?}", queue.queue.executed_by());
            queue.run(0, 2000)?;
            queue.verify()?;
        }
        Ok(())
    })())
}

fn pause_and_resume() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "3"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(2, 8 * MIB, Way::Ring))?;
        let seed = Seed::from_env_or_random();
        let mut queues =
            (1..=2).map(|index| LoadedQueue::new(&disk, index, SMALL, seed)).collect::<Result<Vec<_>>>()?;
        let (disk, running) = (&disk, Duration::from_secs(2));
        thread::scope(|scope| {
            let threads: Vec<_> = queues
                .iter_mut()
                .map(|queue| {
                    scope.spawn(move || {
                        queue.fill()?;
                        // On a busy machine a ring takes longer to come back.
                        let end = Instant::now() + Duration::from_secs(60);
                        loop {
                            queue.run(running.as_nanos() as u64, 0)?;
                            if queue.queue.counters().epochs >= 5 || Instant::now() > end {
                                return queue.verify();
                            }
                        }
                    })
                })
                .collect();
            let mut pauses = 0;
            while threads.iter().any(|thread| !thread.is_finished()) {
                thread::sleep(Duration::from_millis(40));
                disk.pause_and_resume()?;
                pauses += 1;
            }
            for thread in threads {
                thread.join().map_err(|_| anyhow::anyhow!("a guest's thread panicked"))??;
            }
            ensure!(pauses >= 5, "only {pauses} pauses");
            Ok(())
        })?;
        for queue in &queues {
            let counters = queue.queue.counters();
            ensure!(counters.epochs >= 5, "{counters:?}");
        }
        Ok(())
    })())
}

fn memory() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "2"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(1, 8 * MIB, Way::Ring))?;
        let mut queue = LoadedQueue::new(&disk, 1, SMALL, Seed::from_env_or_random())?;
        queue.fill()?;
        // One region is in the same GiB as the other memory, one in another GiB.
        for gpa in [512 * MIB, 4 << 30] {
            disk.add_memory(gpa, 16 * MIB)?;
            queue.run(0, 200)?;
            // The transfer works at once: over queue 0 while the ring does not reach the memory yet, and later through
            // the ring.
            let mut buffer = disk.allocate_in(gpa, 4096)?;
            let end = Instant::now() + Duration::from_secs(20);
            loop {
                let fallbacks = queue.queue.counters().fallbacks;
                buffer = transfer(&mut queue, buffer)?;
                if queue.queue.counters().fallbacks == fallbacks {
                    break;
                }
                ensure!(Instant::now() < end, "rings do not reach the new memory");
            }
            disk.remove_memory(gpa)?;
            let submitted = queue.queue.submit(Operation::Read, buffer, 0, 4096, 9);
            ensure!(submitted.is_ok(), "the empty queue refuses a request");
            let done = queue.queue.wait(Duration::from_secs(20)).context("nothing ends")?;
            ensure!(done.result.is_err(), "a read reached removed memory");
            queue.run(0, 200)?;
        }
        let epoch = await_ring(&mut queue.queue)?;
        ensure!(epoch == 1, "the ring ended meanwhile: it is epoch {epoch}");
        queue.verify().map(drop)
    })())
}

/// Writes a block and reads it.
fn transfer(queue: &mut LoadedQueue, mut buffer: ringpass_guest::RamArea) -> Result<ringpass_guest::RamArea> {
    let offset_bytes = DISK_BYTES - 4096;
    for (operation, byte) in [(Operation::DurableWrite, 0x5a), (Operation::Read, 0)] {
        ensure!(buffer.write(0, &[byte; 4096]));
        let submitted = queue.queue.submit(operation, buffer, offset_bytes, 4096, 8);
        ensure!(submitted.is_ok(), "the empty queue refuses a request");
        let done = queue.queue.wait(Duration::from_secs(20)).context("nothing ends")?;
        ensure!(done.result.as_ref().is_ok_and(|&bytes| bytes == 4096), "{:?}", done.result);
        buffer = done.buffer;
    }
    let mut bytes = [0; 4096];
    ensure!(buffer.read(0, &mut bytes) && bytes == [0x5a; 4096], "the read returned other data");
    Ok(buffer)
}

fn other_operations() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "2", "--serial", "ring-1"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Ring))?;
        ensure!(disk.serial()? == "ring-1");
        ensure!(disk.geometry().size_bytes == DISK_BYTES);
        let mut queue = LoadedQueue::new(&disk, 1, SMALL, Seed::fixed(1))?;
        queue.fill()?;
        disk.flush()?;
        let beside = rig.disk_file()?;
        check_content(&beside, &queue.job, queue.expected())?;
        disk.write_zeroes(0, 64 << 10, false)?;
        disk.discard(64 << 10, 64 << 10)?;
        let mut content = vec![1; 128 << 10];
        std::os::unix::fs::FileExt::read_exact_at(&beside, &mut content, 0)?;
        ensure!(content.iter().all(|&byte| byte == 0), "written zeroes or a hole do not read as zeroes");
        ensure!(matches!(queue.queue.executed_by(), ExecutedBy::Ring { epoch: 1 }));
        Ok(())
    })())
}

fn read_only() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&["--read-only", "--num-queues", "2"])?;
    broker.explain((|| {
        let disk = connect(&rig.socket(), options(1, 4 * MIB, Way::Auto))?;
        ensure!(disk.offers_rings().is_none() && disk.geometry().is_read_only);
        broker.wait_for_log("the disk is read-only")
    })())
}
