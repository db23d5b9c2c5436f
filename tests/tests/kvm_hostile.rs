//! A hostile KVM guest runs the script of everything that a guest must not be able to do. It changes nothing outside:
//! not the memory and files of its monitor, not another guest, and not the parts of the disk that are not its own.
//!
//! Each run has a child process of its own. The limit on the growth of files holds for a whole process, and under a
//! policy that is wrong on purpose the guest really does damage.

use std::collections::HashSet;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{self, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use ringpass_bare_metal::{ATTACK_EXTENTS_MAX, Attack, Command, HOST_ADDRESSES_MAX, RAM_REGIONS_MAX, RamRegion};
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::disk::{DirectIo, DiskConfig};
use ringpass_broker::kernel::{self, KernelRelease};
use ringpass_broker::limits::cap_file_growth;
use ringpass_restrictions::{Access, Operation, Policy, SqeFlags};
use ringpass_tests::canaries::{Canaries, pattern};
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig, Place, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_workload::hostile::{HostileReport, Target, Violation, script};
use ringpass_workload::{Job, Verify};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const DISK_BYTES: u64 = 1 << 20;
const DISK_OFFSET_BYTES: u64 = 64 << 10;
const BUFFER_BYTES: u32 = 8192;
// Seeds of contents.
const DISK: u64 = 1;
const OTHER_DISK: u64 = 2;
const RAM: u64 = 10;
const OTHER_RAM: u64 = 11;

/// Set for the child process; its arguments are three paths and [`Run::arguments`].
const CHILD_VARIABLE: &str = "RINGPASS_TEST_KVM_HOSTILE";

fn main() -> ExitCode {
    if env::var_os(CHILD_VARIABLE).is_some() {
        if let Err(error) = child() {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    let mut tests = Vec::new();
    for read_only in [false, true] {
        for in_window in [false, true] {
            for doorbell in [false, true] {
                let on_what = if read_only { "read_only" } else { "read_write" };
                let place = if in_window { "window" } else { "guest_ram" };
                let how = if doorbell { "doorbell" } else { "sq_thread" };
                let run = Run { read_only, in_window, doorbell, ..Run::STRICT };
                tests.push(test(
                    format!("a_hostile_kvm_guest_reaches_nothing_but_its_own_{on_what}_{place}_{how}"),
                    needs(),
                    move || [true, false].into_iter().try_for_each(|direct_io| strict(Run { direct_io, ..run })),
                ));
            }
        }
    }
    tests.push(test("a_kvm_guest_damages_files_without_the_fixed_file_rule", needs(), without_fixed_file));
    tests.push(test("a_kvm_guest_damages_memory_if_the_policy_allows_plain_reads", needs(), with_plain_read));
    harness::run(tests)
}

fn needs() -> Vec<Need> {
    let machine = [Need::kvm(), Need::io_uring(), Need::cpus(2)];
    machine.into_iter().chain(DiskKind::Ext4PageCache.needs()).collect()
}

/// One run of the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The policy also allows descriptors of the process.
    any_file: bool,
    /// The policy also allows reads to addresses of the process.
    plain_read: bool,
    read_only: bool,
    in_window: bool,
    doorbell: bool,
    direct_io: bool,
}

impl Run {
    const STRICT: Self = Self {
        any_file: false,
        plain_read: false,
        read_only: false,
        in_window: false,
        doorbell: true,
        direct_io: false,
    };

    fn argument(self) -> String {
        let Self { any_file, plain_read, read_only, in_window, doorbell, direct_io } = self;
        let bit = |on| if on { '1' } else { '0' };
        [any_file, plain_read, read_only, in_window, doorbell, direct_io].map(bit).into_iter().collect()
    }

    fn parse(argument: &str) -> Result<Self> {
        let bits: Vec<bool> = argument.chars().map(|bit| bit == '1').collect();
        let &[any_file, plain_read, read_only, in_window, doorbell, direct_io] = &*bits else {
            bail!("not a run: {argument:?}")
        };
        Ok(Self { any_file, plain_read, read_only, in_window, doorbell, direct_io })
    }

    fn is_strict(self) -> bool {
        !self.any_file && !self.plain_read
    }

    fn policy(self) -> Policy {
        let policy = Policy::direct(if self.read_only { Access::ReadOnly } else { Access::ReadWrite });
        let policy = if self.any_file { policy.with_flags_required(SqeFlags::empty()) } else { policy };
        if self.plain_read { policy.allow(Operation::READ) } else { policy }
    }
}

/// The result of a run: the number of steps, and all findings.
struct Outcome {
    steps: u64,
    findings: Vec<String>,
    disk_is_same: bool,
}

impl Outcome {
    fn has(&self, beginning: &str) -> bool {
        self.findings.iter().any(|finding| finding.starts_with(beginning))
    }

    /// The first few findings.
    fn text(&self) -> String {
        let shown: Vec<&str> = self.findings.iter().map(String::as_str).take(12).collect();
        format!("{} findings: {}", self.findings.len(), shown.join("; "))
    }
}

/// Runs the script in a child process.
fn run(run: Run) -> Result<Outcome> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let other = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    fs::write(disk.path(), pattern(DISK, DISK_BYTES as usize))?;
    fs::write(other.path(), pattern(OTHER_DISK, DISK_BYTES as usize))?;

    let directory = tempfile::tempdir()?;
    let (findings, errors) = (directory.path().join("findings"), directory.path().join("errors"));
    let status = process::Command::new(env::current_exe()?)
        .args([disk.path(), other.path(), &findings])
        .arg(run.argument())
        .env(CHILD_VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // Standard error is a file, because a guest that reaches it may damage it.
        .stderr(File::create(&errors)?)
        .status()?;
    let errors = fs::read(&errors)?;
    ensure!(status.success(), "{run:?}: the child ended with {status}: {}", String::from_utf8_lossy(&errors));
    let text = fs::read_to_string(&findings)?;
    let mut lines = text.lines();
    let steps = lines.next().context("the number of steps")?.parse()?;
    let findings = lines.map(str::to_owned).collect();
    ensure!(fs::metadata(disk.path())?.len() == DISK_BYTES, "{run:?}: the image has another size");
    let disk_is_same = fs::read(disk.path())? == pattern(DISK, DISK_BYTES as usize);
    Ok(Outcome { steps, findings, disk_is_same })
}

fn strict(how: Run) -> Result<()> {
    let outcome = run(how)?;
    ensure!(outcome.findings.is_empty(), "{how:?}: {}", outcome.text());
    ensure!(outcome.steps > 3000, "{how:?}: only {} steps were tried", outcome.steps);
    if how.read_only {
        ensure!(outcome.disk_is_same, "{how:?}: the read-only disk has changed");
    } else {
        // Without this the last comparison would show nothing.
        ensure!(!outcome.disk_is_same, "{how:?}: the guest has written nothing to its own disk");
    }
    Ok(())
}

fn without_fixed_file() -> Result<()> {
    let outcome = run(Run { any_file: true, ..Run::STRICT })?;
    ensure!(outcome.has("answer: plain descriptor"), "{}", outcome.text());
    ensure!(outcome.has("damage: file"), "{}", outcome.text());
    Ok(())
}

fn with_plain_read() -> Result<()> {
    let outcome = run(Run { plain_read: true, read_only: true, ..Run::STRICT })?;
    ensure!(outcome.has("answer: operation with flags 0x1 (opcode 22)"), "{}", outcome.text());
    ensure!(outcome.has("damage: memory of the broker"), "{}", outcome.text());
    Ok(())
}

/// The child process: the monitor with the hostile guest, a second guest, and canaries.
fn child() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [path, other_path, findings_path, how] = &*arguments else { bail!("three paths and a run") };
    let how = Run::parse(how)?;
    let canaries = Canaries::new()?;
    let config = |path: &str, direct_io| {
        let direct_io = if direct_io { DirectIo::On } else { DirectIo::Off };
        KvmGuestConfig {
            place: if how.in_window { Place::Window } else { Place::GuestRam },
            submission: if how.doorbell { SubmissionConfig::Doorbell } else { sq_thread(5) },
            hole: true,
            ..KvmGuestConfig::new(DiskConfig::new(path).direct_io(direct_io))
        }
    };
    let mut hostile = config(path, how.direct_io);
    (hostile.disk.read_only, hostile.policy) = (how.read_only, (!how.is_strict()).then(|| how.policy()));
    let (mut hostile, mut other) = (KvmGuest::start(hostile)?, KvmGuest::start(config(other_path, false))?);
    let ram = pattern(RAM, usize::try_from(hostile.memory().len_bytes())?);
    let other_ram = pattern(OTHER_RAM, usize::try_from(other.memory().len_bytes())?);
    hostile.fill_ram(&ram)?;
    other.fill_ram(&other_ram)?;
    cap_file_growth(hostile.device().disk())?;

    let (stack, heap) = ((&raw const how).addr() as u64, arguments.as_ptr().addr() as u64);
    let addresses = [canaries.address(), stack, heap, address_of_ram(&other)?, address_of_ram(&hostile)?];
    let attack = plan(&hostile, how, &addresses)?;
    let report = hostile.cpus_mut()[0].attack(attack)?;

    let mut findings = answers(&report, &attack)?;
    // Every guest runs the same script on the same target.
    let steps = attack.with_target(|target| script(target).map(Iterator::count)).map_err(|error| anyhow!("{error}"))?;
    if report.steps != steps as u64 {
        findings.push(format!("{} steps of {steps} were done", report.steps));
    }
    findings.extend(canaries.damage()?);
    let buffer = attack.buffer_gpa..attack.buffer_gpa + u64::from(BUFFER_BYTES);
    for (what, pages) in [
        ("the hostile guest that no request names", hostile.changed_ram(&ram, &[buffer])?),
        ("the other guest", other.changed_ram(&other_ram, &[])?),
    ] {
        findings.extend(pages.iter().map(|page| format!("damage: RAM of {what}: {page:#x}")));
    }
    let (disk, other_disk) = (read(path)?, read(other_path)?);
    if other_disk != pattern(OTHER_DISK, DISK_BYTES as usize) {
        findings.push("damage: the other guest's disk".to_owned());
    }
    if let Some(at) = find_any(&disk, &[canaries.content(), &other_ram]) {
        findings.push(format!("damage: something of the broker or of the other guest is on the disk, at {at}"));
    }
    findings.insert(0, report.steps.to_string());
    fs::write(findings_path, findings.join("\n"))?;
    if !how.is_strict() {
        // Under a wrong policy a request may never complete.
        process::exit(0);
    }
    // Both guests still have their rings.
    for guest in [&mut hostile, &mut other] {
        let job = guest.job(0, 4096, 8, 64);
        let job = Job { operations: 64, write_percent: 0, verify: Verify::Off, ..job };
        guest.run_all(&[job], Command::Run)?;
    }
    for guest in [hostile, other] {
        guest.stop().iter().try_for_each(|end| end.wait(Duration::from_secs(10)).map(|_| ()))?;
    }
    Ok(())
}

fn plan(guest: &KvmGuest, how: Run, addresses: &[u64]) -> Result<Attack> {
    let [lower, upper] = guest.machine().ram() else { bail!("the guest has no hole") };
    let mut ram = [RamRegion::default(); RAM_REGIONS_MAX];
    (ram[0], ram[1]) = (*lower, *upper);
    let mut filled_holes = [RamRegion::default(); ATTACK_EXTENTS_MAX];
    filled_holes[0] = RamRegion { gpa: lower.len_bytes, len_bytes: upper.gpa - lower.len_bytes };
    let mut empty_holes = [RamRegion::default(); ATTACK_EXTENTS_MAX];
    empty_holes[0] = RamRegion { gpa: upper.gpa + upper.len_bytes, len_bytes: 64 << 10 };
    empty_holes[1] = RamRegion { gpa: 5 << 30, len_bytes: 1 << 20 };
    let mut host_addresses = [0; HOST_ADDRESSES_MAX];
    host_addresses[..addresses.len()].copy_from_slice(addresses);
    let timeout = if how.is_strict() { Duration::from_secs(10) } else { Duration::from_millis(300) };
    Ok(Attack {
        ram,
        filled_holes,
        empty_holes,
        host_addresses,
        addressing: guest.memory().addressing(),
        buffer_gpa: guest.buffers_gpa(),
        buffer_bytes: BUFFER_BYTES,
        disk_bytes: DISK_BYTES,
        disk_offset_bytes: DISK_OFFSET_BYTES,
        read_only: how.read_only,
        zero_length: !kernel::affected(&KernelRelease::running()?).iter().any(|hole| hole.cve == "CVE-2026-43006"),
        timeout_ns: timeout.as_nanos() as u64,
    })
}

fn address_of_ram(guest: &KvmGuest) -> Result<u64> {
    let address = guest.memory().mapped().get_host_address(GuestAddress(0)).context("cannot look up a guest's RAM")?;
    Ok(address.addr() as u64)
}

/// The answers that are not allowed.
fn answers(report: &HostileReport, attack: &Attack) -> Result<Vec<String>> {
    let named = |target: &Target<'_>| {
        let named = report.named(target).map_err(|error| anyhow!("{error}"))?;
        let text = named.map(|(step, violation)| match violation.res {
            Violation::NO_ANSWER => format!("answer: {}: none", step.name),
            res => format!("answer: {}: {res}, allowed was {:?}", step.name, step.expect),
        });
        Ok::<_, anyhow::Error>(text.collect::<Vec<String>>())
    };
    let mut findings = attack.with_target(named)?;
    if report.violations > findings.len() as u64 {
        findings.push(format!("answers that are not allowed: {}", report.violations));
    }
    if report.unexpected != 0 {
        findings.push(format!("completions of no request: {}", report.unexpected));
    }
    Ok(findings)
}

/// The content of a disk, without the part by which the image has grown: that can be a tebibyte.
fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let mut content = vec![0; DISK_BYTES as usize];
    File::open(path)?.read_exact_at(&mut content, 0)?;
    Ok(content)
}

/// The position in `content` of eight bytes that are also in one of the `secrets`, which are random.
fn find_any(content: &[u8], secrets: &[&[u8]]) -> Option<usize> {
    let words: HashSet<&[u8]> = secrets.iter().flat_map(|secret| secret.chunks_exact(8)).collect();
    content.windows(8).position(|word| words.contains(word))
}
