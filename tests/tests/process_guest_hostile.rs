//! A hostile process guest runs the script of everything that a guest must not be able to do, and everything around it
//! stays as it was: other memory and other files of the broker, another guest, and what of the disk is not its own.
//!
//! Each run is a child process of its own: the limit on the growth of files is for a whole process, and where a policy
//! is wrong on purpose, the guest really does damage.

use std::{
    env,
    fmt::Write as _,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::{DirectIo, Disk, DiskConfig, LogicalBlock},
    kernel::{self, KernelRelease},
    limits::cap_file_growth,
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_guest::RamArea;
use ringpass_guest_abi::Sqe;
use ringpass_restrictions::{Access, Operation, Policy, SqeFlags};
use ringpass_tests::{
    canaries::{Canaries, pattern},
    disks::{DiskKind, TestDisk},
    harness::{self, test},
    needs::Need,
    process_guest::{ADDRESSING, GuestQueue, PageSize, Place, ProcessGuest, RamFile},
};
use ringpass_workload::ProcessEnv;
use ringpass_workload::hostile::{Expect, Extent, HostileReport, Name, Step, Target, Violation, run_hostile, script};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE_BYTES: u32 = 4096;

const DISK_BYTES: u64 = MIB;
const DISK_OFFSET_BYTES: u64 = 64 * KIB;
const BUFFER_BYTES: u32 = 8192;
const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };

/// As a PC's: a hole that is filled, a slot without RAM, RAM across the border of two slots with a long hole behind it,
/// and a last slot with RAM in the middle.
const RAM: [Extent; 5] = [
    extent(0, 640 * KIB),
    extent(MIB, 7 * MIB),
    extent(2 * GIB - 2 * MIB, 4 * MIB),
    extent(2 * GIB + 8 * MIB, MIB),
    extent(5 * GIB + 512 * MIB, MIB),
];
const FILLED_HOLES: [Extent; 2] = [extent(640 * KIB, 384 * KIB), extent(2 * GIB + 2 * MIB, 6 * MIB)];
const EMPTY_HOLES: [Extent; 6] = [
    extent(8 * MIB, GIB - 8 * MIB),
    extent(GIB, GIB - 2 * MIB),
    extent(2 * GIB + 9 * MIB, 4 * KIB),
    extent(3 * GIB, GIB),
    extent(5 * GIB, 512 * MIB),
    extent(5 * GIB + 513 * MIB, GIB),
];

const fn extent(gpa: u64, len_bytes: u64) -> Extent {
    Extent { gpa, len_bytes }
}

/// Set for the child process; its arguments are [`Run::arguments`].
const CHILD_VARIABLE: &str = "RINGPASS_TEST_HOSTILE";

fn main() -> ExitCode {
    if env::var_os(CHILD_VARIABLE).is_some() {
        return match child() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut tests = Vec::new();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        for place in [Place::GuestRam, Place::Window] {
            for sq_thread in [true, false] {
                let how = if sq_thread { "sq_thread" } else { "doorbell" };
                let on_what = if access == Access::ReadOnly { "read_only" } else { "read_write" };
                let run = Run { access, place, sq_thread, ..Run::STRICT };
                tests.push(test(
                    format!("a_hostile_guest_reaches_nothing_but_its_own_{on_what}_{place}_{how}"),
                    needs(),
                    move || [true, false].into_iter().try_for_each(|direct_io| strict(Run { direct_io, ..run })),
                ));
            }
        }
    }
    tests.push(test("without_the_fixed_file_rule_the_script_finds_damaged_files", needs(), without_fixed_file));
    tests.push(test("with_an_operation_too_many_the_script_finds_damaged_memory", needs(), with_plain_read));
    tests.push(test("without_the_limit_the_script_finds_a_growing_image", needs(), without_limit));
    harness::run(tests)
}

fn needs() -> Vec<Need> {
    DiskKind::Ext4PageCache.needs().into_iter().chain([Need::io_uring(), Need::cpus(2)]).collect()
}

/// What the guest may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
    /// The built-in policy.
    BuiltIn,
    /// Descriptors of the process, too.
    AnyFile,
    /// Reads to addresses of the process, too.
    PlainRead,
}

/// One run of the script.
#[derive(Clone, Copy, Debug)]
struct Run {
    rules: Rules,
    access: Access,
    place: Place,
    sq_thread: bool,
    direct_io: bool,
    capped: bool,
}

impl Run {
    const STRICT: Self = Self {
        rules: Rules::BuiltIn,
        access: Access::ReadWrite,
        place: Place::GuestRam,
        sq_thread: false,
        direct_io: false,
        capped: true,
    };

    fn arguments(self) -> [String; 6] {
        [
            format!("{:?}", self.rules),
            format!("{:?}", self.access),
            self.place.to_string(),
            self.sq_thread.to_string(),
            self.direct_io.to_string(),
            self.capped.to_string(),
        ]
    }

    fn parse(arguments: &[String]) -> Result<Self> {
        for rules in [Rules::BuiltIn, Rules::AnyFile, Rules::PlainRead] {
            for access in [Access::ReadWrite, Access::ReadOnly] {
                for place in [Place::GuestRam, Place::Window] {
                    for bits in 0..8 {
                        let bit = |index: u32| bits & 1 << index != 0;
                        let run = Self { rules, access, place, sq_thread: bit(0), direct_io: bit(1), capped: bit(2) };
                        if run.arguments() == arguments {
                            return Ok(run);
                        }
                    }
                }
            }
        }
        bail!("not a run: {arguments:?}")
    }

    fn policy(self) -> Policy {
        let policy = Policy::direct(self.access);
        match self.rules {
            Rules::BuiltIn => policy,
            Rules::AnyFile => policy.with_flags_required(SqeFlags::empty()),
            Rules::PlainRead => policy.allow(Operation::READ),
        }
    }

    /// For each request. What is lost where a policy is wrong is lost for ever.
    fn timeout(self) -> Duration {
        if self.rules == Rules::BuiltIn { Duration::from_secs(10) } else { Duration::from_millis(300) }
    }

    fn submission(self) -> SubmissionConfig {
        if self.sq_thread {
            SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(5)))
        } else {
            SubmissionConfig::Doorbell
        }
    }
}

/// What came of a run: what the script tried, and everything that is not as it must be.
#[derive(Debug)]
struct Outcome {
    steps: u64,
    findings: Vec<String>,
    /// Whether the part of the image that is the disk is the same.
    disk_is_same: bool,
    image_bytes: u64,
}

impl Outcome {
    fn has(&self, beginning: &str) -> bool {
        self.findings.iter().any(|finding| finding.starts_with(beginning))
    }

    /// As lines, the first few.
    fn text(&self) -> String {
        let shown: Vec<&str> = self.findings.iter().map(String::as_str).take(12).collect();
        format!("{} findings: {}", self.findings.len(), shown.join("; "))
    }
}

/// Runs the script in a child process.
fn run(run: Run) -> Result<Outcome> {
    let (disk, other) =
        (TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?, TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?);
    for (seed, disk) in [(1, &disk), (2, &other)] {
        File::options().write(true).open(disk.path())?.write_all_at(&pattern(seed, DISK_BYTES as usize), 0)?;
    }
    let disk_before = read(disk.path())?;

    let directory = tempfile::tempdir()?;
    let (findings, errors) = (directory.path().join("findings"), directory.path().join("errors"));
    let status = Command::new(env::current_exe()?)
        .args([disk.path(), other.path(), &findings])
        .args(run.arguments())
        .env(CHILD_VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A file, which a guest that reaches it may spoil.
        .stderr(File::create(&errors)?)
        .status()?;
    let errors = fs::read(&errors)?;
    ensure!(status.success(), "{run:?}: the child ended with {status}: {}", String::from_utf8_lossy(&errors));
    let text = fs::read_to_string(&findings)?;
    let mut lines = text.lines();
    let steps = lines.next().context("the number of steps")?.parse()?;
    let findings = lines.map(str::to_owned).collect();
    let image_bytes = fs::metadata(disk.path())?.len();
    Ok(Outcome { steps, findings, disk_is_same: read(disk.path())? == disk_before, image_bytes })
}

/// The content of a disk. What an image has grown is left out: it can be a tebibyte.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut content = vec![0; DISK_BYTES as usize];
    File::open(path)?.read_exact_at(&mut content, 0)?;
    Ok(content)
}

fn strict(how: Run) -> Result<()> {
    let outcome = run(how)?;
    ensure!(outcome.findings.is_empty(), "{how:?}: {}", outcome.text());
    ensure!(outcome.steps > 6000, "{how:?}: only {} steps were tried", outcome.steps);
    ensure!(outcome.image_bytes == DISK_BYTES, "{how:?}: the image has {} bytes", outcome.image_bytes);
    if how.access == Access::ReadOnly {
        ensure!(outcome.disk_is_same, "{how:?}: the read-only disk has changed");
    } else {
        // Or the last comparison would show nothing.
        ensure!(!outcome.disk_is_same, "{how:?}: the guest has written nothing to its own disk");
    }
    Ok(())
}

fn without_fixed_file() -> Result<()> {
    let outcome = run(Run { rules: Rules::AnyFile, ..Run::STRICT })?;
    ensure!(outcome.has("answer: plain descriptor"), "{}", outcome.text());
    ensure!(outcome.has("damage: file"), "{}", outcome.text());
    Ok(())
}

fn with_plain_read() -> Result<()> {
    let outcome = run(Run { rules: Rules::PlainRead, access: Access::ReadOnly, ..Run::STRICT })?;
    ensure!(outcome.has("answer: operation with flags 0x1 (opcode 22)"), "{}", outcome.text());
    ensure!(outcome.has("damage: memory of the broker"), "{}", outcome.text());
    Ok(())
}

fn without_limit() -> Result<()> {
    let outcome = run(Run { capped: false, ..Run::STRICT })?;
    ensure!(outcome.has("answer: "), "{}", outcome.text());
    ensure!(!outcome.has("damage: "), "{}", outcome.text());
    ensure!(outcome.image_bytes > DISK_BYTES, "the image has not grown");
    Ok(())
}

/// The broker with the hostile guest, a second guest, and canaries.
fn child() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (paths, how) = arguments.split_at_checked(3).context("three paths")?;
    let how = Run::parse(how)?;
    let canaries = Canaries::new()?;
    let disk_config = DiskConfig::new(&paths[0])
        .read_only(how.access == Access::ReadOnly)
        .direct_io(if how.direct_io { DirectIo::On } else { DirectIo::Off })
        .logical_block(LogicalBlock::DirectIo);
    let disk = Arc::new(Disk::open(&disk_config)?);
    let other_disk = Arc::new(Disk::open(&DiskConfig::new(&paths[1]).direct_io(DirectIo::Off))?);
    let policy = how.policy().compile(&kernel::support()?)?;
    let policy = if how.rules == Rules::BuiltIn { policy } else { policy.accept_unsafe() };
    let hostile_guest = ProcessGuest::with_policy(&disk, filled_ram(10)?, how.submission(), policy)?;
    let mut hostile = Guest::new(hostile_guest, how.place)?;
    let mut other = Guest::new(ProcessGuest::new(&other_disk, filled_ram(11)?, how.submission())?, how.place)?;
    if how.capped {
        cap_file_growth(&disk)?;
    }

    // Something in the other guest's scratch memory.
    let hole = FILLED_HOLES[0].gpa;
    other.request(Direction::Read, hole, 0)?;

    let mappings = [hostile.guest.ram().map()?, other.guest.ram().map()?];
    let of_ram = mappings.iter().filter_map(|ram| Some(ram.pointer(0, 1)?.as_ptr().addr() as u64));
    let stack = (&raw const how).addr() as u64;
    let heap = arguments.as_ptr().addr() as u64;
    let mut host_addresses = vec![canaries.address(), stack, heap];
    host_addresses.extend(of_ram);
    host_addresses.extend(hostile.queue.window_address());
    let holes = kernel::affected(&KernelRelease::running()?);
    let target = Target {
        ram: &RAM,
        filled_holes: &FILLED_HOLES,
        empty_holes: &EMPTY_HOLES,
        addressing: ADDRESSING,
        buffer_gpa: hostile.buffer.gpa,
        buffer_bytes: BUFFER_BYTES,
        disk_bytes: DISK_BYTES,
        disk_offset_bytes: DISK_OFFSET_BYTES,
        read_only: disk.is_read_only(),
        host_addresses: &host_addresses,
        zero_length: !holes.iter().any(|hole| hole.cve == "CVE-2026-43006"),
    };
    let steps = script(&target).map_err(|error| anyhow::anyhow!("{error}"))?;
    let report = hostile.run(steps, how.timeout());

    let mut findings = answers(&report, &target)?;
    findings.extend(canaries.damage()?);
    findings.extend(hostile.damage("RAM of the hostile guest that no request names")?);
    findings.extend(other.damage("RAM of the other guest")?);
    if how.rules == Rules::BuiltIn {
        // Both guests still have their rings, and the hostile one scratch memory: its own.
        hostile.request(Direction::Read, hole, DISK_OFFSET_BYTES)?;
        findings.extend(hostile.damage("RAM of the hostile guest after a read into a hole")?);
        other.request(Direction::Write, hole, u64::from(PAGE_BYTES))?;
        let mut pages = vec![0; 2 * PAGE_BYTES as usize];
        File::open(&paths[1])?.read_exact_at(&mut pages, 0)?;
        let (first, second) = pages.split_at(PAGE_BYTES as usize);
        if first != second || first != &pattern(2, PAGE_BYTES as usize)[..] {
            findings.push("damage: scratch memory of the other guest".to_owned());
        }
        hostile.queue.close()?;
        other.queue.close()?;
    }
    let mut text = format!("{}\n", report.steps);
    findings.iter().try_for_each(|finding| writeln!(text, "{finding}"))?;
    fs::write(PathBuf::from(&paths[2]), text)?;
    Ok(())
}

/// The answers that are not allowed.
fn answers(report: &HostileReport, target: &Target<'_>) -> Result<Vec<String>> {
    let named = report.named(target).map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut findings: Vec<String> = named
        .map(|(step, violation)| match violation.res {
            Violation::NO_ANSWER => format!("answer: {}: none", step.name),
            res => format!("answer: {}: {res}, allowed was {:?}", step.name, step.expect),
        })
        .collect();
    if report.violations > findings.len() as u64 {
        findings.push(format!("answers that are not allowed: {}", report.violations));
    }
    if report.unexpected != 0 {
        findings.push(format!("completions of no request: {}", report.unexpected));
    }
    Ok(findings)
}

/// RAM without a page of zeros.
fn filled_ram(seed: u64) -> Result<RamFile> {
    let ram = RamFile::new(&RAM, PageSize::Small)?;
    for (index, region) in (0u64..).zip(&RAM) {
        ram.write(region.gpa, &pattern(seed * 100 + index, usize::try_from(region.len_bytes)?))?;
    }
    Ok(ram)
}

enum Direction {
    Read,
    Write,
}

/// A guest with one queue and one buffer, and what its RAM held before.
struct Guest {
    guest: ProcessGuest,
    queue: GuestQueue,
    env: ProcessEnv,
    buffer: Extent,
    before: Vec<(Extent, Vec<u8>)>,
}

impl Guest {
    fn new(mut guest: ProcessGuest, place: Place) -> Result<Self> {
        let queue = guest.attach(RING, place)?;
        let buffer: RamArea = guest.allocator().allocate(u64::from(BUFFER_BYTES))?;
        let extent = Extent { gpa: buffer.gpa(), len_bytes: buffer.len_bytes() };
        let env = queue.env(buffer)?;
        let mut made = Self { guest, queue, env, buffer: extent, before: Vec::new() };
        made.before = made.now()?;
        Ok(made)
    }

    fn now(&self) -> Result<Vec<(Extent, Vec<u8>)>> {
        RAM.iter().map(|region| Ok((*region, self.guest.ram().read(region.gpa, region.len_bytes)?))).collect()
    }

    /// Pages with other bytes than before, but for the buffer and the ring.
    fn damage(&self, what: &str) -> Result<Vec<String>> {
        let may_change = [&[self.buffer], self.queue.areas()].concat();
        let now = self.now()?;
        let mut damage = Vec::new();
        for ((region, before), (_, now)) in self.before.iter().zip(&now) {
            let pages = before.chunks(PAGE_BYTES as usize).zip(now.chunks(PAGE_BYTES as usize));
            for (gpa, (before, now)) in (region.gpa..).step_by(PAGE_BYTES as usize).zip(pages) {
                let is_free = may_change.iter().any(|area| (area.gpa..area.gpa + area.len_bytes).contains(&gpa));
                if before != now && !is_free {
                    damage.push(format!("damage: {what}: page {gpa:#x}"));
                }
            }
        }
        Ok(damage)
    }

    fn run(&mut self, steps: impl Iterator<Item = Step>, timeout: Duration) -> HostileReport {
        run_hostile(self.queue.ring().ring_mut(), &mut self.env, steps, timeout.as_nanos() as u64)
    }

    /// One page between the disk and guest memory, which must succeed.
    fn request(&mut self, direction: Direction, gpa: u64, offset_bytes: u64) -> Result<()> {
        let address = ADDRESSING.resolve(gpa, PAGE_BYTES).context("the address")?;
        let (what, sqe) = match direction {
            Direction::Read => ("read", Sqe::read_fixed(address, PAGE_BYTES, offset_bytes, 0)),
            Direction::Write => ("write", Sqe::write_fixed(address, PAGE_BYTES, offset_bytes, 0)),
        };
        let name = Name { what, opcode: sqe.opcode, value: gpa };
        let step = Step { name, sqe, expect: Expect::Exactly(PAGE_BYTES) };
        let report = self.run([step].into_iter(), Duration::from_secs(10));
        ensure!(report.is_clean(), "a {what} at guest-physical {gpa:#x}: {report:?}");
        Ok(())
    }
}
