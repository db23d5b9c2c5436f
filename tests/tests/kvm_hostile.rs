//! A hostile KVM guest runs the script of everything that a guest must not be able to do. It changes nothing outside:
//! not the memory and files of its monitor, not another guest, and not the parts of the disk that are not its own.

use std::collections::HashSet;
use std::path::Path;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use ringpass_bare_metal::{ATTACK_EXTENTS_MAX, Attack, Command, HOST_ADDRESSES_MAX, RAM_REGIONS_MAX, RamRegion};
use ringpass_broker::disk::{self, DirectIo, DiskConfig};
use ringpass_broker::kernel::{self, KernelRelease};
use ringpass_broker::limits::cap_file_growth_at;
use ringpass_restrictions::Access;
use ringpass_tests::canaries::{Canaries, pattern};
use ringpass_tests::disks::DiskKind;
use ringpass_tests::harness::{self, test};
use ringpass_tests::hostile_run::{ChildTask, DISK_BYTES, OTHER_DISK, Rules, Run, answers, child_task, read, run};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig};
use ringpass_tests::needs::Need;
use ringpass_tests::process_guest::Place;
use ringpass_workload::hostile::script;
use ringpass_workload::{Job, Verify};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const DISK_OFFSET_BYTES: u64 = 64 << 10;
const BUFFER_BYTES: u32 = 8192;
// Seeds of contents.
const RAM: u64 = 10;
const OTHER_RAM: u64 = 11;

fn main() -> ExitCode {
    match child_task().and_then(|task| task.map(|task| child(&task)).transpose()) {
        Ok(None) => {}
        Ok(Some(())) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    }
    let mut tests = Vec::new();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        for place in [Place::GuestRam, Place::Window] {
            for sq_thread in [true, false] {
                let on_what = if access == Access::ReadOnly { "read_only" } else { "read_write" };
                let how = if sq_thread { "sq_thread" } else { "doorbell" };
                let run = Run { access, place, sq_thread, ..Run::STRICT };
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

fn strict(how: Run) -> Result<()> {
    let outcome = run(how)?;
    ensure!(outcome.findings.is_empty(), "{how:?}: {}", outcome.text());
    ensure!(outcome.steps > 3000, "{how:?}: only {} steps were tried", outcome.steps);
    ensure!(outcome.image_bytes == DISK_BYTES, "{how:?}: the image has {} bytes", outcome.image_bytes);
    if how.access == Access::ReadOnly {
        ensure!(outcome.disk_is_same, "{how:?}: the read-only disk has changed");
    } else {
        // Without this the last comparison would show nothing.
        ensure!(!outcome.disk_is_same, "{how:?}: the guest has written nothing to its own disk");
    }
    Ok(())
}

fn without_fixed_file() -> Result<()> {
    let outcome = run(Run { rules: Rules::AnyFile, ..Run::STRICT })?;
    ensure!(outcome.has("answer: plain descriptor"), "{}", outcome.text());
    ensure!(outcome.has("damage: file"), "{}", outcome.text());
    ensure!(outcome.image_bytes == DISK_BYTES, "the image has {} bytes", outcome.image_bytes);
    Ok(())
}

fn with_plain_read() -> Result<()> {
    let outcome = run(Run { rules: Rules::PlainRead, access: Access::ReadOnly, ..Run::STRICT })?;
    ensure!(outcome.has("answer: operation with flags 0x1 (opcode 22)"), "{}", outcome.text());
    ensure!(outcome.has("damage: memory of the broker"), "{}", outcome.text());
    ensure!(outcome.image_bytes == DISK_BYTES, "the image has {} bytes", outcome.image_bytes);
    Ok(())
}

/// The child process: the monitor with the hostile guest, a second guest, and canaries.
fn child(task: &ChildTask) -> Result<()> {
    let how = task.run;
    let canaries = Canaries::new()?;
    let config = |path: &Path, direct_io| {
        let direct_io = if direct_io { DirectIo::On } else { DirectIo::Off };
        KvmGuestConfig {
            place: how.place,
            submission: how.submission(),
            hole: true,
            ..KvmGuestConfig::new(DiskConfig::new(path).direct_io(direct_io))
        }
    };
    let mut hostile = config(&task.disk, how.direct_io);
    hostile.disk.read_only = how.access == Access::ReadOnly;
    hostile.policy = (!how.is_strict()).then(|| how.policy());
    let (mut hostile, mut other) = (KvmGuest::start(hostile)?, KvmGuest::start(config(&task.other_disk, false))?);
    let ram = pattern(RAM, usize::try_from(hostile.memory().len_bytes())?);
    let other_ram = pattern(OTHER_RAM, usize::try_from(other.memory().len_bytes())?);
    hostile.fill_ram(&ram)?;
    other.fill_ram(&other_ram)?;
    cap_file_growth_at(disk::DiskKind::RegularFile, std::fs::metadata(&task.disk)?.len())?;

    let stack = (&raw const how).addr() as u64;
    let addresses =
        [canaries.address(), stack, task.heap_address(), address_of_ram(&other)?, address_of_ram(&hostile)?];
    let attack = plan(&hostile, how, &addresses)?;
    let report = hostile.cpus_mut()[0].attack(attack)?;

    let mut findings = attack.with_target(|target| answers(&report, target))?;
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
    let (disk, other_disk) = (read(&task.disk)?, read(&task.other_disk)?);
    if other_disk != pattern(OTHER_DISK, DISK_BYTES as usize) {
        findings.push("damage: the other guest's disk".to_owned());
    }
    if let Some(at) = find_any(&disk, &[canaries.content(), &other_ram]) {
        findings.push(format!("damage: something of the broker or of the other guest is on the disk, at {at}"));
    }
    task.report(report.steps, &findings)?;
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
        read_only: how.access == Access::ReadOnly,
        zero_length: !kernel::affected(&KernelRelease::running()?).iter().any(|hole| hole.cve == "CVE-2026-43006"),
        timeout_ns: how.timeout().as_nanos() as u64,
    })
}

fn address_of_ram(guest: &KvmGuest) -> Result<u64> {
    let address = guest.memory().mapped().get_host_address(GuestAddress(0)).context("cannot look up a guest's RAM")?;
    Ok(address.addr() as u64)
}

/// The position in `content` of eight bytes that are also in one of the `secrets`, which are random.
fn find_any(content: &[u8], secrets: &[&[u8]]) -> Option<usize> {
    let words: HashSet<&[u8]> = secrets.iter().flat_map(|secret| secret.chunks_exact(8)).collect();
    content.windows(8).position(|word| words.contains(word))
}
