//! Guest RAM of every shape: sizes, holes, slots, huge pages, and memory that comes while queues run; and what is said
//! where RAM cannot be had.

use std::{
    env, fmt,
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, setrlimit};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::{DirectIo, Disk, DiskConfig},
    memory::IOVA_BASE,
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_guest::{ProcessEnv, RamArea};
use ringpass_guest_abi::SLOT_BYTES;
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, budget, test},
    needs::Need,
    process_guest::{GuestQueue, PageSize, Place, ProcessGuest, RamFile},
    seed::Seed,
};
use ringpass_workload::{Job, Verify, Wait, checksum, hostile::Extent, prefill, run, verify_all};
use rustix::mm::{MapFlags, ProtFlags};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const DISK_BYTES: u64 = 16 * MIB;
const BLOCK_BYTES: u32 = 4096;
/// What is used at each end of each piece of RAM.
const EDGE_BYTES: u64 = 64 * KIB;
const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };
const HUGE_PAGE_BYTES: u64 = 2 * MIB;

/// The most that a request may take while memory comes.
const PLUG_LATENCY: Duration = Duration::from_millis(10);
/// A user that no process of this machine has, so that nothing is pinned before.
const USER: u32 = 0x5249_4e48;

/// Set for a child process: what it is to do.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_MEMORY";

fn main() -> ExitCode {
    if let Ok(task) = env::var(CHILD_VARIABLE) {
        return match child(&task) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let needs = |ram_bytes: u64| {
        let machine = [Need::io_uring(), Need::cpus(2), Need::available_memory_bytes(ram_bytes + GIB / 2)];
        DiskKind::Ext4PageCache.needs().into_iter().chain(machine).collect::<Vec<_>>()
    };
    let small = PageSize::Small;
    let pc = budget(
        vec![extent(0, 640 * KIB), extent(MIB, GIB + 63 * MIB), extent(4 * GIB, 64 * MIB)],
        vec![extent(0, 640 * KIB), extent(MIB, 3 * GIB - MIB), extent(4 * GIB, 9 * GIB)],
    );
    let top = vec![extent(0, 16 * MIB), extent(16 * TIB - 4 * MIB, 4 * MIB)];
    let huge = vec![extent(0, 32 * MIB), extent(GIB - 16 * MIB, 32 * MIB)];
    let huge_needs = || needs(128 * MIB).into_iter().chain(huge_pages());
    harness::run(vec![
        test("every_end_of_16_mib_is_reached", needs(16 * MIB), move || ends(&[extent(0, 16 * MIB)], small)),
        test("every_end_of_2_gib_is_reached", needs(2 * GIB), move || ends(&[extent(0, 2 * GIB)], small)),
        test("every_end_of_the_ram_of_a_pc_is_reached", needs(budget(2, 12) * GIB), move || ends(&pc, small)),
        test("the_last_page_below_16_tib_is_reached", needs(20 * MIB), move || ends(&top, small)),
        test("every_end_of_huge_pages_is_reached", huge_needs(), move || {
            let _pages = HugePages::add(64)?;
            ends(&huge, PageSize::Huge)
        }),
        test("a_queue_hardly_waits_while_1_gib_is_plugged_in", needs(3 * GIB), plug_latency),
        test("memory_plugged_beside_ram_in_use_is_reached_and_so_is_that_ram", needs(64 * MIB), plug_into_slot),
        test("memory_that_cannot_be_plugged_leaves_the_queues_alone", needs(64 * MIB), refused_plug),
        test("an_ordinary_user_is_told_which_memlock_limit_a_guest_needs", user_needs(), || {
            in_child(&["memlock"], Some(USER))
        }),
        test("a_lack_of_huge_pages_is_named", needs(64 * MIB), lack_of_huge_pages),
        test("an_occupied_address_is_named", needs(64 * MIB), || in_child(&["occupied"], None)),
    ])
}

const fn extent(gpa: u64, len_bytes: u64) -> Extent {
    Extent { gpa, len_bytes }
}

fn user_needs() -> [Need; 2] {
    [Need::root(), Need::io_uring()]
}

fn sq_thread() -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig { idle: Duration::from_millis(2), cpu: None })
}

fn new_disk(made: &TestDisk) -> Result<Arc<Disk>> {
    Ok(Arc::new(Disk::open(&made.config())?))
}

/// A piece of RAM that is all buffers, and the part of the disk that goes with it.
struct Edge {
    env: ProcessEnv,
    area: Extent,
    job: Job,
    expected: Vec<u64>,
}

impl Edge {
    /// The piece with its own part of the disk.
    fn new(queue: &GuestQueue, area: RamArea, index: u64, seed: Seed) -> Result<Self> {
        let extent = Extent { gpa: area.gpa(), len_bytes: area.len_bytes() };
        let blocks = extent.len_bytes / u64::from(BLOCK_BYTES);
        let job = Job {
            area_offset_bytes: index * EDGE_BYTES,
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

    fn use_all(&mut self, queue: &mut GuestQueue) -> Result<()> {
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
    fn fill(&mut self, queue: &mut GuestQueue) -> Result<()> {
        let report = verify_all(&self.job, queue.ring(), &mut self.env, &mut self.expected)?;
        ensure!(report.is_clean(), "at guest-physical {:#x}: {report}", self.area.gpa);
        Ok(())
    }

    /// Whether the blocks are in the file behind the RAM, where this piece belongs.
    fn check_file(&self, ram: &RamFile) -> Result<()> {
        let bytes = ram.read(self.area.gpa, self.area.len_bytes)?;
        let mut found: Vec<u64> = bytes.chunks(BLOCK_BYTES as usize).map(checksum).collect();
        let mut expected = self.expected.clone();
        found.sort_unstable();
        expected.sort_unstable();
        ensure!(found == expected, "the file of the RAM holds something else for guest-physical {:#x}", self.area.gpa);
        Ok(())
    }
}

/// The first and the last bytes of what each region has in each slot.
fn edges(regions: &[Extent]) -> Vec<Extent> {
    let mut edges = Vec::new();
    for region in regions {
        let (mut gpa, end) = (region.gpa, region.gpa + region.len_bytes);
        while gpa < end {
            let piece_end = end.min((gpa / SLOT_BYTES + 1) * SLOT_BYTES);
            edges.extend([extent(gpa, EDGE_BYTES), extent(piece_end - EDGE_BYTES, EDGE_BYTES)]);
            gpa = piece_end;
        }
    }
    edges
}

/// Verified I/O at both ends of every piece of RAM, with both ways of submission.
fn ends(regions: &[Extent], pages: PageSize) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = new_disk(&made)?;
    for submission in [sq_thread(), SubmissionConfig::Doorbell] {
        let start = Instant::now();
        let mut guest = ProcessGuest::new(&disk, RamFile::new(regions, pages)?, submission)?;
        let pinned_after = start.elapsed();
        let reserve = |edge: &Extent| guest.allocator().reserve(edge.gpa, edge.len_bytes);
        let areas = edges(regions).iter().map(reserve).collect::<Result<Vec<_>, _>>()?;
        let mut queue = guest.attach(RING, Place::GuestRam)?;
        let edge = |(index, area)| Edge::new(&queue, area, index, seed);
        let mut edges = (0..).zip(areas).map(edge).collect::<Result<Vec<_>>>()?;
        edges.iter_mut().try_for_each(|edge| edge.use_all(&mut queue))?;
        // What is read to one piece must not be overwritten by what is read to another.
        edges.iter_mut().try_for_each(|edge| edge.fill(&mut queue))?;
        edges.iter().try_for_each(|edge| edge.check_file(guest.ram()))?;
        eprintln!("{} pieces, made and pinned in {pinned_after:?}", edges.len());
        queue.close()?;
    }
    Ok(())
}

/// What a running queue's requests took.
struct Latencies {
    median: Duration,
    worst: Duration,
    count: u64,
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (median), {:?} (worst of {})", self.median, self.worst, self.count)
    }
}

/// Runs one request at a time until `meanwhile` is done, and some time before and after it.
fn while_running(queue: &mut GuestQueue, edge: &mut Edge, meanwhile: impl FnOnce() -> Result<()>) -> Result<Latencies> {
    // Reads that the page cache answers: a write could wait for the disk.
    let job = Job { operations: 1000, depth: 1, write_percent: 0, ..edge.job };
    let Edge { env, expected, .. } = edge;
    env.take_latencies_ns()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<()> {
            let mut job = job;
            while !stop.load(Ordering::Relaxed) {
                let report = run(&job, queue.ring(), env, expected)?;
                ensure!(report.is_clean(), "{report}");
                job.seed += 1;
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

/// A request that waits for a processor takes long too. But a stall by the plugging itself would be there each time.
const PLUG_ATTEMPTS: usize = 3;

fn plug_latency() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = new_disk(&made)?;
    let mut seen = Vec::new();
    for _ in 0..PLUG_ATTEMPTS {
        let attempt = plug_1_gib(&disk, seed)?;
        eprintln!("{attempt}");
        if attempt.plugging.worst < PLUG_LATENCY {
            return Ok(());
        }
        seen.push(attempt.to_string());
    }
    bail!("requests wait for {PLUG_LATENCY:?} and longer, each time: {}", seen.join("; "))
}

/// The latencies of one guest.
struct PlugAttempt {
    idle: Latencies,
    beside: Latencies,
    plugging: Latencies,
}

impl fmt::Display for PlugAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { idle, beside, plugging } = self;
        write!(f, "idle: {idle}, while 1 GiB is pinned for another guest: {beside}, while it is plugged: {plugging}")
    }
}

fn plug_1_gib(disk: &Arc<Disk>, seed: Seed) -> Result<PlugAttempt> {
    let ram = RamFile::new(&[extent(0, 16 * MIB)], PageSize::Small)?;
    let mut guest = ProcessGuest::new(disk, ram, SubmissionConfig::Doorbell)?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(EDGE_BYTES)?;
    let mut edge = Edge::new(&queue, area, 0, seed)?;
    edge.use_all(&mut queue)?;

    let idle = while_running(&mut queue, &mut edge, || {
        thread::sleep(Duration::from_millis(600));
        Ok(())
    })?;
    // The same work for another guest: what the machine and its scheduler make of it.
    let beside = while_running(&mut queue, &mut edge, || {
        let ram = RamFile::new(&[extent(0, GIB)], PageSize::Small)?;
        in_background(|| ProcessGuest::new(disk, ram, SubmissionConfig::Doorbell).map(drop))
    })?;
    let plugged = RamFile::new(&[extent(4 * GIB, GIB)], PageSize::Small)?;
    let plugging = while_running(&mut queue, &mut edge, || {
        in_background(|| Ok(plugged.for_broker().into_iter().try_for_each(|region| guest.device().plug(region))?))
    })?;
    check_plugged(&mut queue, &plugged, &mut edge, seed)?;
    queue.close()?;
    Ok(PlugAttempt { idle, beside, plugging })
}

/// Runs on a thread that gives way to all others: here are few processors for a guest, its doorbell thread and this.
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

/// Verified I/O at the ends of what was plugged, and in the RAM that was there before.
fn check_plugged(queue: &mut GuestQueue, plugged: &RamFile, before: &mut Edge, seed: Seed) -> Result<()> {
    let mut allocator = plugged.map()?.allocator()?;
    for (index, edge) in (1..).zip(edges(plugged.regions())) {
        let mut edge = Edge::new(queue, allocator.reserve(edge.gpa, edge.len_bytes)?, index, seed)?;
        edge.use_all(queue)?;
        edge.fill(queue)?;
        edge.check_file(plugged)?;
    }
    before.use_all(queue)
}

fn plug_into_slot() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = new_disk(&made)?;
    let mut guest =
        ProcessGuest::new(&disk, RamFile::new(&[extent(16 * MIB, 16 * MIB)], PageSize::Small)?, sq_thread())?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(EDGE_BYTES)?;
    let mut edge = Edge::new(&queue, area, 0, seed)?;
    edge.use_all(&mut queue)?;
    // Behind a hole, in front of the RAM, across the border to the next slot, and far away.
    for region in [extent(40 * MIB, MIB), extent(0, 8 * MIB), extent(GIB - MIB, 2 * MIB), extent(100 * GIB, MIB)] {
        let plugged = RamFile::new(&[region], PageSize::Small)?;
        while_running(&mut queue, &mut edge, || {
            Ok(plugged.for_broker().into_iter().try_for_each(|region| guest.device().plug(region))?)
        })?;
        check_plugged(&mut queue, &plugged, &mut edge, seed)?;
        // A queue that comes later has it too.
        let mut later = guest.attach(RING, Place::Window)?;
        let area = guest.allocator().allocate(EDGE_BYTES)?;
        let mut edge_of_later = Edge::new(&later, area, 8, seed)?;
        check_plugged(&mut later, &plugged, &mut edge_of_later, seed)?;
        later.close()?;
    }
    queue.close()?;
    Ok(())
}

fn refused_plug() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let disk = new_disk(&made)?;
    let mut guest = ProcessGuest::new(&disk, RamFile::new(&[extent(0, 16 * MIB)], PageSize::Small)?, sq_thread())?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(EDGE_BYTES)?;
    let mut edge = Edge::new(&queue, area, 0, seed)?;
    edge.use_all(&mut queue)?;
    let before = format!("{:?}", guest.device().memory().layout());
    let huge = RamFile::new(&[extent(32 * MIB, (free_huge_pages()? + 8) * HUGE_PAGE_BYTES)], PageSize::Huge)?;
    let overlapping = RamFile::new(&[extent(15 * MIB, 2 * MIB)], PageSize::Small)?;
    let too_high = RamFile::new(&[extent(16 * TIB - MIB, 2 * MIB)], PageSize::Small)?;
    for (ram, message) in [(huge, "HugePages_Free"), (overlapping, " overlaps "), (too_high, "ends above 16 TiB")] {
        while_running(&mut queue, &mut edge, || {
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

/// The kernel's 2 MiB huge pages (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

fn huge_pages() -> Vec<Need> {
    let supported = Need::new("2 MiB huge pages", || {
        ensure!(Path::new(HUGE_PAGES).exists(), "{HUGE_PAGES} does not exist: this kernel has none");
        Ok(())
    });
    vec![Need::root(), supported]
}

fn free_huge_pages() -> Result<u64> {
    let path = format!("{HUGE_PAGES}/free_hugepages");
    if !Path::new(&path).exists() {
        return Ok(0);
    }
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

/// More huge pages, until the drop.
struct HugePages {
    before: u64,
}

impl HugePages {
    fn add(count: u64) -> Result<Self> {
        let pages = Self { before: Self::total()? };
        Self::set(pages.before + count)?;
        let free = free_huge_pages()?;
        ensure!(free >= count, "of {count} huge pages the kernel finds only {free}: memory is too fragmented");
        Ok(pages)
    }

    fn total() -> Result<u64> {
        Ok(fs::read_to_string(format!("{HUGE_PAGES}/nr_hugepages"))?.trim().parse()?)
    }

    fn set(count: u64) -> Result<()> {
        fs::write(format!("{HUGE_PAGES}/nr_hugepages"), count.to_string()).context("setting the number of huge pages")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = Self::set(self.before) {
            eprintln!("huge pages stay behind: {error:#}");
        }
    }
}

fn lack_of_huge_pages() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let len_bytes = (free_huge_pages()? + 8) * HUGE_PAGE_BYTES;
    let ram = RamFile::new(&[extent(0, len_bytes)], PageSize::Huge)?;
    let error = ProcessGuest::new(&new_disk(&made)?, ram, sq_thread()).err().context("no refusal")?;
    let message = format!("{error:#}");
    let beginning =
        format!("the memory at guest-physical 0x0 ({len_bytes:#x} bytes, /memfd:guest-ram (deleted)) cannot");
    ensure!(message.starts_with(&beginning), "{message}");
    ensure!(message.contains("with huge pages, check HugePages_Free in /proc/meminfo"), "{message}");
    Ok(())
}

fn in_child(tasks: &[&str], user: Option<u32>) -> Result<()> {
    // A copy, since an ordinary user may not reach the build directory.
    let directory = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir()?;
    let program: PathBuf = directory.path().join("memory-test");
    fs::copy(env::current_exe()?, &program)?;
    for task in tasks {
        let mut command = Command::new(&program);
        command.env(CHILD_VARIABLE, task);
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let output = command.output()?;
        ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn child(task: &str) -> Result<()> {
    match task {
        "memlock" => memlock(),
        "occupied" => occupied(),
        _ => bail!("unknown task {task}"),
    }
}

/// A disk that is a file of this process's user.
fn own_disk() -> Result<(tempfile::NamedTempFile, Arc<Disk>)> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(DISK_BYTES)?;
    let disk = Disk::open(&DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(image.path()) })?;
    Ok((image, Arc::new(disk)))
}

fn guest_works(disk: &Arc<Disk>, ram_bytes: u64) -> Result<()> {
    let ram = RamFile::new(&[extent(0, ram_bytes)], PageSize::Small)?;
    let mut guest = ProcessGuest::new(disk, ram, sq_thread())?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(EDGE_BYTES)?;
    Edge::new(&queue, area, 0, Seed::fixed(1))?.use_all(&mut queue)?;
    queue.close()?;
    Ok(())
}

fn memlock() -> Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, 8 * MIB, 8 * MIB)?;
    let (_image, disk) = own_disk()?;
    let message = guest_works(&disk, 16 * MIB).err().context("16 MiB are not refused")?.to_string();
    ensure!(message.starts_with("pinning needs 16 MiB, RLIMIT_MEMLOCK is 8 MiB"), "{message}");
    ensure!(message.contains("The hard limit is 8 MiB, so only root can raise it"), "{message}");
    ensure!(message.contains("LimitMEMLOCK=16M in a systemd unit"), "{message}");
    ensure!(message.contains("--memlock=16777216`"), "{message}");
    guest_works(&disk, 4 * MIB).context("4 MiB")
}

fn occupied() -> Result<()> {
    let (_image, disk) = own_disk()?;
    let address = IOVA_BASE + 8 * MIB;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: the range is free, or the call fails; the mapping is never used.
    let mapped = unsafe { rustix::mm::mmap_anonymous(address as *mut _, 4096, ProtFlags::READ, flags) }?;
    let message = guest_works(&disk, 16 * MIB).err().context("no refusal")?.to_string();
    ensure!(message.contains("is occupied in this process"), "{message}");
    ensure!(message.contains("0x100000000000"), "{message}");
    // SAFETY: mapped above, and never used.
    unsafe { rustix::mm::munmap(mapped, 4096) }?;
    guest_works(&disk, 16 * MIB).context("once the address is free")
}
