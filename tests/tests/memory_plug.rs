//! A VMM plugs guest RAM while queues run. The queues hardly wait and reach the RAM. A refusal changes nothing for
//! them.

use std::{
    fmt,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::Disk,
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, test},
    huge_pages::{self, HUGE_PAGE_BYTES},
    needs::Need,
    process_guest::{GuestQueue, PageSize, Place, ProcessGuest, RamFile},
    ram_piece::{DISK_BYTES, Latencies, PIECE_BYTES, Piece, edges},
    seed::Seed,
    waits::{Waits, hardly_wait},
};
use ringpass_workload::hostile::Extent;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };

/// The most that a request may take while the broker plugs memory.
const PLUG_LATENCY: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    let needs = |ram_bytes: u64| {
        let machine = [Need::io_uring(), Need::cpus(2), Need::available_memory_bytes(ram_bytes + GIB / 2)];
        DiskKind::Ext4PageCache.needs().into_iter().chain(machine).collect::<Vec<_>>()
    };
    let refused_needs = needs(64 * MIB).into_iter().chain([huge_pages::supported()]);
    harness::run(vec![
        test("a_queue_hardly_waits_while_1_gib_is_plugged_in", needs(3 * GIB), plug_latency),
        test("a_queue_reaches_plugged_memory_and_the_ram_beside_it", needs(64 * MIB), plug_into_slot),
        test("queues_keep_working_when_the_broker_refuses_to_plug_memory", refused_needs, refused_plug),
    ])
}

const fn extent(gpa: u64, len_bytes: u64) -> Extent {
    Extent { gpa, len_bytes }
}

fn sq_thread() -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(2)))
}

fn plug_latency() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    hardly_wait(PLUG_LATENCY, || {
        let attempt = plug_1_gib(&disk, seed)?;
        eprintln!("{attempt}");
        // A busy machine delays requests without plugging too.
        let worst_without = attempt.idle.worst.max(attempt.beside.worst);
        Ok(Waits { worst_without, worst_during: attempt.plugging.worst, work: attempt.plugged_after })
    })
}

/// The latencies of a guest: idle, while another guest gets memory, and while it gets memory itself.
struct PlugAttempt {
    idle: Latencies,
    beside: Latencies,
    plugging: Latencies,
    plugged_after: Duration,
}

impl fmt::Display for PlugAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { idle, beside, plugging, plugged_after } = self;
        write!(
            f,
            "idle: {idle}, while 1 GiB is pinned for another guest: {beside}, while it is plugged ({plugged_after:?}): {plugging}"
        )
    }
}

fn plug_1_gib(disk: &Arc<Disk>, seed: Seed) -> Result<PlugAttempt> {
    let ram = RamFile::new(&[extent(0, 16 * MIB)], PageSize::Small)?;
    let mut guest = ProcessGuest::new(disk, ram, SubmissionConfig::Doorbell)?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(PIECE_BYTES)?;
    let mut piece = Piece::new(&queue, area, 0, seed)?;
    piece.use_all(&mut queue)?;

    let idle = piece.latencies_while(&mut queue, || {
        thread::sleep(Duration::from_millis(600));
        Ok(())
    })?;
    // The same work for another guest shows the effect of the machine and its scheduler.
    let beside = piece.latencies_while(&mut queue, || {
        let ram = RamFile::new(&[extent(0, GIB)], PageSize::Small)?;
        in_background(|| ProcessGuest::new(disk, ram, SubmissionConfig::Doorbell).map(drop))
    })?;
    let plugged = RamFile::new(&[extent(4 * GIB, GIB)], PageSize::Small)?;
    let mut plugged_after = Duration::ZERO;
    let plugging = piece.latencies_while(&mut queue, || {
        let begin = Instant::now();
        in_background(|| Ok(plugged.for_broker().into_iter().try_for_each(|region| guest.device().plug(region))?))?;
        plugged_after = begin.elapsed();
        Ok(())
    })?;
    check_plugged(&mut queue, &plugged, &mut piece, seed)?;
    queue.close()?;
    Ok(PlugAttempt { idle, beside, plugging, plugged_after })
}

/// Runs `work` on a thread with the lowest priority: the CPUs are few for a guest, its doorbell thread and this one.
fn in_background(work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let work = || {
        rustix::process::nice(19)?;
        work()
    };
    match thread::scope(|scope| scope.spawn(work).join()) {
        Ok(result) => result,
        Err(_) => bail!("the thread in the background panicked"),
    }
}

/// Does verified I/O at the ends of the plugged memory, and in the RAM from before.
fn check_plugged(queue: &mut GuestQueue, plugged: &RamFile, before: &mut Piece, seed: Seed) -> Result<()> {
    let mut allocator = plugged.map()?.allocator()?;
    for (index, edge) in (1..).zip(edges(plugged.regions())) {
        let mut piece = Piece::new(queue, allocator.reserve(edge.gpa, edge.len_bytes)?, index, seed)?;
        piece.use_all(queue)?;
        piece.fill(queue)?;
        piece.check_file(plugged)?;
    }
    before.use_all(queue)
}

fn plug_into_slot() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    let mut guest =
        ProcessGuest::new(&disk, RamFile::new(&[extent(16 * MIB, 16 * MIB)], PageSize::Small)?, sq_thread())?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(PIECE_BYTES)?;
    let mut piece = Piece::new(&queue, area, 0, seed)?;
    piece.use_all(&mut queue)?;
    // The memory is behind a hole, before the RAM, across the border to the next slot, and far away.
    for region in [extent(40 * MIB, MIB), extent(0, 8 * MIB), extent(GIB - MIB, 2 * MIB), extent(63 * GIB, MIB)] {
        let plugged = RamFile::new(&[region], PageSize::Small)?;
        piece.latencies_while(&mut queue, || {
            Ok(plugged.for_broker().into_iter().try_for_each(|region| guest.device().plug(region))?)
        })?;
        check_plugged(&mut queue, &plugged, &mut piece, seed)?;
        // A later queue reaches the memory too.
        let mut later = guest.attach(RING, Place::Window)?;
        let area = guest.allocator().allocate(PIECE_BYTES)?;
        let mut piece_of_later = Piece::new(&later, area, 8, seed)?;
        check_plugged(&mut later, &plugged, &mut piece_of_later, seed)?;
        later.close()?;
    }
    // The table of fixed buffers ends at 64 GiB, because the guest had no memory above when its slots were chosen.
    let above = RamFile::new(&[extent(64 * GIB - MIB, 2 * MIB)], PageSize::Small)?.for_broker().remove(0);
    let refused = guest.device().plug(above).err().context("memory above all slots was plugged")?.to_string();
    ensure!(refused.contains("ends above 64 GiB"), "{refused}");
    piece.use_all(&mut queue)?;
    queue.close()?;
    Ok(())
}

fn refused_plug() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    let mut guest = ProcessGuest::new(&disk, RamFile::new(&[extent(0, 16 * MIB)], PageSize::Small)?, sq_thread())?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(PIECE_BYTES)?;
    let mut piece = Piece::new(&queue, area, 0, seed)?;
    piece.use_all(&mut queue)?;
    let before = format!("{:?}", guest.device().memory().layout());
    let huge = RamFile::new(&[extent(32 * MIB, (huge_pages::free()? + 8) * HUGE_PAGE_BYTES)], PageSize::Huge)?;
    let overlapping = RamFile::new(&[extent(15 * MIB, 2 * MIB)], PageSize::Small)?;
    let too_high = RamFile::new(&[extent(16 * TIB - MIB, 2 * MIB)], PageSize::Small)?;
    for (ram, message) in [(huge, "HugePages_Free"), (overlapping, " overlaps "), (too_high, "ends above 16 TiB")] {
        piece.latencies_while(&mut queue, || {
            for region in ram.for_broker() {
                let refused = guest.device().plug(region).err().context("no refusal")?.to_string();
                ensure!(refused.contains(message), "{refused}");
            }
            Ok(())
        })?;
        ensure!(format!("{:?}", guest.device().memory().layout()) == before, "the refusal has changed the memory");
    }
    queue.close()?;
    Ok(())
}
