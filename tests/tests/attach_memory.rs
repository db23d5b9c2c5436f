//! Guest RAM comes and goes while rings run: they hardly wait, reach it, and keep nothing of what has left.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::libc::EFAULT;
use ringpass_guest_abi::{
    Sqe,
    request::{EVENT_QUEUES, ErrorCode},
};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        attach::{
            FirstQueue, Interface, PATIENCE, RingDriver,
            bench::{Bench, QUEUE_SIZE},
            ok, wait_until, whole,
        },
        ram::{Ram, RamRegion},
    },
    harness::{self, test},
    needs::Need,
    waits::{Waits, hardly_wait},
};
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
const GIB: u64 = 1 << 30;

/// Memory that comes and goes.
const REGION_BYTES: u64 = 256 << 20;
/// The most that a request may take while it does.
const LATENCY: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    let needs = |more: Vec<Need>| {
        let kind = DiskKind::Ext4PageCache.needs().into_iter();
        kind.chain(broker_process::needs()).chain(more).collect::<Vec<Need>>()
    };
    let much = || vec![Need::cpus(2), Need::available_memory_bytes(REGION_BYTES + GIB / 2)];
    harness::run(vec![
        test("a_ring_hardly_waits_while_memory_comes_to_and_leaves_another_slot", needs(much()), || {
            memory_comes_and_goes(4 * GIB)
        }),
        test("a_ring_hardly_waits_while_memory_comes_to_and_leaves_its_own_slot", needs(much()), || {
            memory_comes_and_goes(GIB / 2)
        }),
        test(
            "a_queue_stops_soon_although_its_guest_is_being_pinned",
            needs(vec![Need::available_memory_bytes(6 * GIB)]),
            stop,
        ),
        test(
            "a_queue_stops_soon_although_a_region_that_came_is_being_pinned",
            needs(vec![Need::available_memory_bytes(9 * GIB)]),
            stop_behind_a_region,
        ),
        test(
            "memory_leaves_soon_although_the_guest_is_being_pinned_for_a_ring",
            needs(vec![Need::available_memory_bytes(6 * GIB)]),
            leave_before_a_ring,
        ),
        test(
            "memory_leaves_soon_although_a_region_that_came_is_being_pinned_and_the_ring_stays",
            needs(vec![Need::available_memory_bytes(9 * GIB)]),
            leave_behind_a_region,
        ),
        test("memory_that_has_left_is_let_go_though_rings_run_on", needs(vec![]), let_go),
        test("pending_requests_are_answered_in_the_memory_that_the_guest_has_by_then", needs(vec![]), answers_move),
    ])
}

fn memory_comes_and_goes(gpa: u64) -> Result<()> {
    // A thread that polls would take a processor from whoever works here.
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

/// A region comes, is used, and leaves, while a ring runs that does not know of it.
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
    ensure!(reads(other, gpa)? == -EFAULT, "memory is reached that is not there");
    let (changing, (reached_after, left_after)) = latencies_while(running, || {
        let begin = Instant::now();
        connection.add_mem_reg(&region.message(), region.file())?;
        // Not often: each attempt takes processor time from those that work.
        while reads(other, last_gpa)? == -EFAULT {
            ensure!(begin.elapsed() < PATIENCE, "the region is not reached");
            thread::sleep(Duration::from_millis(5));
        }
        let reached_after = begin.elapsed();
        for place in [gpa, last_gpa] {
            ensure!(reads(other, place)? == BLOCK_BYTES as i32);
            let mut found = vec![0; BLOCK_BYTES as usize];
            ram.memory().read_slice(&mut found, GuestAddress(place))?;
            ensure!(found == pattern, "another content at {place:#x}");
        }
        let begin = Instant::now();
        connection.rem_mem_reg(&region.message(), Some(region.file()))?;
        let left_after = begin.elapsed();
        for place in [gpa, last_gpa] {
            let res = reads(other, place)?;
            ensure!(res == -EFAULT, "memory that has left is reached at {place:#x}: {res}");
        }
        Ok((reached_after, left_after))
    })?;
    ensure!(other.epoch() == epoch && running.epoch() == epoch, "a ring has ended");
    Ok(Attempt { idle, changing, reached_after, left_after })
}

/// The front-end waits for that with its locks held, and pinning takes half a second for each GiB that nobody has touched.
fn stop() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let region = RamRegion::new(4 * GIB, 12 * GIB)?;
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    let mut driver = bench.started(1)?;
    let before = bench.broker.usage()?.pinned_bytes;
    driver.send_both(&driver.payload().to_bytes())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > before + (16 << 20)))?;
    stop_before_pinned(&bench, 1, &region)?;
    bench.broker.wait_for_unpinned()
}

/// Its ring would be made once the region is pinned; the ring of the other queue is there.
fn stop_behind_a_region() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let mut driver = bench.started(2)?;
    let mut running = bench.attached(1)?;
    let before = bench.broker.usage()?.pinned_bytes;
    let region = RamRegion::new(4 * GIB, 8 * GIB)?;
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > before + (16 << 20)))?;
    driver.send_both(&driver.payload().to_bytes())?;
    // ATTACH, which is taken with it, has no answer yet.
    wait_until("ARM is answered", || Ok(driver.vring().used_idx()? == 1))?;
    running.read(0, 512)?;
    stop_before_pinned(&bench, 2, &region)?;
    stop_before_pinned(&bench, 1, &region)?;
    bench.broker.wait_for_unpinned()
}

/// A guest that begins has its memory changed by its firmware and its VMM while a driver attaches.
fn leave_before_a_ring() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let (small, large) = (RamRegion::new(2 * GIB, 1 << 20)?, RamRegion::new(4 * GIB, 12 * GIB)?);
    for region in [&small, &large] {
        bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    }
    let mut driver = bench.started(1)?;
    driver.send_both(&driver.payload().to_bytes())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > 16 << 20))?;
    leave_before_pinned(&bench, &small, &large)?;
    wait_until("pinning again", || Ok(bench.broker.usage()?.pinned_bytes > 16 << 20))?;
    leave_before_pinned(&bench, &large, &large)?;
    let ring = driver.wait_open().and_then(|()| driver.read(0, 512));
    bench.broker.explain(ring)?;
    Ok(())
}

/// The region that is being pinned is not waited for, and nor is it forgotten.
fn leave_behind_a_region() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let small = RamRegion::new(2 * GIB, 1 << 20)?;
    bench.front_end.connection().add_mem_reg(&small.message(), small.file())?;
    let mut driver = bench.attached(1)?;
    let epoch = driver.epoch();
    let before = bench.broker.usage()?.pinned_bytes;
    let large = RamRegion::new(4 * GIB, 2 * GIB)?;
    bench.front_end.connection().add_mem_reg(&large.message(), large.file())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > before + (16 << 20)))?;
    leave_before_pinned(&bench, &small, &large)?;
    let result = (|| {
        let mut read = |gpa| driver.perform(driver.sqe_at(false, gpa, BLOCK_BYTES, 0, 5)?);
        ensure!(read(2 * GIB)? == -EFAULT, "memory that has left is reached");
        wait_until(
            "the large region is reached",
            || Ok(read(6 * GIB - u64::from(BLOCK_BYTES))? == BLOCK_BYTES as i32),
        )?;
        bench.front_end.connection().rem_mem_reg(&large.message(), Some(large.file()))?;
        ensure!(read(4 * GIB)? == -EFAULT, "memory that has left is reached");
        ensure!(driver.epoch() == epoch, "the ring ended");
        Ok(())
    })();
    bench.broker.explain(result)
}

/// Takes a region away, which does not wait until `pinning` is pinned.
fn leave_before_pinned(bench: &Bench, region: &RamRegion, pinning: &RamRegion) -> Result<()> {
    let begin = Instant::now();
    bench.front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
    eprintln!("{} MiB left after {:?}", region.len_bytes() >> 20, begin.elapsed());
    ensure_not_pinned(pinning)
}

/// Stops a queue with a pending ATTACH, which does not wait until `pinning` is pinned.
fn stop_before_pinned(bench: &Bench, queue: u16, pinning: &RamRegion) -> Result<()> {
    let begin = Instant::now();
    let base = bench.front_end.stop_vring(queue)?;
    eprintln!(
        "queue {queue} stopped after {:?}, {} MiB pinned",
        begin.elapsed(),
        bench.broker.usage()?.pinned_bytes >> 20
    );
    ensure!(base == 1, "ATTACH is not seen again: {base}");
    ensure_not_pinned(pinning)
}

/// A region that was pinned as a whole has all of its pages, also when it is not pinned any more.
fn ensure_not_pinned(region: &RamRegion) -> Result<()> {
    let allocated_bytes = region.file().metadata()?.blocks() * 512;
    let len_bytes = region.len_bytes();
    ensure!(allocated_bytes < len_bytes, "the front-end was answered when all {} MiB were pinned", len_bytes >> 20);
    Ok(())
}

/// A ring that was made while a region was there, and an EVENT and an ATTACH that were taken then, do not hold it.
fn let_go() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let region = RamRegion::new(4 * GIB, 24 << 20)?;
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    let mut driver = bench.attached(1)?;
    bench.first.post_event()?;
    ensure!(bench.first.wait_event()? == EVENT_QUEUES);
    bench.first.post_event()?;
    ensure!(!bench.first.has_event_ended()?);
    let usage = bench.broker.usage()?;
    ensure!(mapping_lengths(bench.broker.pid())?.contains(&region.len_bytes()), "the region is not mapped");
    bench.front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
    let result = (|| {
        // At the latest now the workers know of it.
        driver.read(0, 512)?;
        bench.broker.wait_for_fds(usage.fds - 1)?;
        ensure!(!mapping_lengths(bench.broker.pid())?.contains(&region.len_bytes()), "the region is still mapped");
        wait_until("only the region that is left is pinned", || {
            Ok(bench.broker.usage()?.pinned_bytes < usage.pinned_bytes - (8 << 20))
        })?;
        driver.read(0, 512)
    })();
    bench.broker.explain(result)?;
    Ok(())
}

/// How long the mappings of guest RAM in a process are, in bytes.
fn mapping_lengths(pid: u32) -> Result<Vec<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let ranges = maps.lines().filter(|line| line.contains("ringpass-test-ram"));
    let lengths = ranges.map(|line| {
        let (begin, rest) = line.split_once('-').context("a range of addresses")?;
        let end = rest.split(' ').next().unwrap_or_default();
        Ok(u64::from_str_radix(end, 16)? - u64::from_str_radix(begin, 16)?)
    });
    lengths.collect()
}

/// The RAM of a bench and a region more.
fn ram_with(bench: &Bench, region: &RamRegion) -> Result<Ram> {
    Ram::new(bench.ram.ram.regions().iter().chain([region]).cloned())
}

/// Requests stay pending for as long as a queue is attached. Meanwhile the memory of their answers may become another.
fn answers_move() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let gpa = 4 * GIB;
    let before = RamRegion::new(gpa, 1 << 20)?;
    bench.front_end.connection().add_mem_reg(&before.message(), before.file())?;
    let ram = ram_with(&bench, &before)?;
    let mut places = before.arena();
    let mut vring = bench.ram.vring(&bench.front_end, QUEUE_SIZE)?;
    vring.set_ram(&ram);
    bench.front_end.start_vring(1, &vring.layout(), vring.eventfds(), 0)?;
    let requests = Interface::take(&mut places, RingDriver::PLACES)?;
    let mut driver = RingDriver::with_requests(vring, &mut bench.ram.arenas[0], requests, bench.addressing)?;
    bench.front_end.stop_vring(0)?;
    let mut vring = bench.ram.vring(&bench.front_end, QUEUE_SIZE)?;
    vring.set_ram(&ram);
    bench.front_end.start_vring(0, &vring.layout(), vring.eventfds(), 0)?;
    let mut first = FirstQueue::new(vring, &mut places)?;
    let result = (|| {
        driver.attach()?;
        first.post_event()?;
        // What there was to tell, and what is to come.
        wait_until("an EVENT that is pending", || {
            // The ring was announced a moment before this is told.
            thread::sleep(Duration::from_millis(20));
            if !first.has_event_ended()? {
                return Ok(true);
            }
            ensure!(first.wait_event()? == EVENT_QUEUES);
            first.post_event()?;
            Ok(false)
        })?;
        let connection = bench.front_end.connection();
        let after = RamRegion::new(gpa, 1 << 20)?;
        let ram = ram_with(&bench, &after)?;
        connection.rem_mem_reg(&before.message(), Some(before.file()))?;
        connection.add_mem_reg(&after.message(), after.file())?;
        driver.vring().set_ram(&ram);
        first.vring().set_ram(&ram);

        driver.set_detach();
        ensure!(first.detach(1)? == ok());
        let found = driver.wait_attach()?;
        ensure!(found == whole(ErrorCode::Detached), "ATTACH: {found:?}");
        ensure!(first.wait_event()? == EVENT_QUEUES, "EVENT");
        Ok(())
    })();
    bench.broker.explain(result)
}

/// What requests took.
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

/// Reads one block at a time, waiting for interrupts, until `meanwhile` is done and some time before and after.
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
