//! A hostile KVM guest reaches its own memory and its own disk, and nothing else.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use ringpass_bare_metal::{ATTACK_EXTENTS_MAX, Attack, HOST_ADDRESSES_MAX, RAM_REGIONS_MAX, RamRegion};
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::disk::DiskConfig;
use ringpass_broker::kernel::{self, KernelRelease};
use ringpass_broker::limits::cap_file_growth;
use ringpass_broker::memory::IOVA_BASE;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig, Place, sq_thread};
use ringpass_tests::needs::Need;

const DISK_BYTES: u64 = 4 << 20;
const CANARY: u8 = 0xc5;

fn main() -> ExitCode {
    let needs = || [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4Direct.needs());
    harness::run(vec![
        test("a_hostile_kvm_guest_is_refused_everything_but_its_own", needs(), || attack(false)),
        test("a_hostile_kvm_guest_changes_nothing_of_a_read_only_disk", needs(), || attack(true)),
    ])
}

fn attack(read_only: bool) -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let content: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 512 * 31 + at) as u8).collect();
    fs::write(disk.path(), &content)?;
    for (place, submission) in [(Place::GuestRam, sq_thread(20)), (Place::Window, SubmissionConfig::Doorbell)] {
        let config = KvmGuestConfig {
            disk: DiskConfig { read_only, ..disk.config() },
            place,
            submission,
            hole: true,
            ..KvmGuestConfig::new(disk.config())
        };
        // Memory of this process, and RAM of another guest in it.
        let canary = vec![CANARY; 1 << 20];
        let neighbour = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
        let other = KvmGuest::start(KvmGuestConfig::new(neighbour.config()))?;
        let mut guest = KvmGuest::start(config)?;
        cap_file_growth(guest.device().disk())?;
        let attack = plan(&guest, read_only, &canary, &other)?;
        let report = guest.cpus_mut()[0].attack(attack)?;
        eprintln!("{report:?}");
        if !report.is_clean() {
            let violations: Vec<String> = attack.with_target(|target| {
                let named = report.named(target).into_iter().flatten();
                named.map(|(step, violation)| format!("{}: {}", step.name, violation.res)).collect()
            });
            anyhow::bail!("{} answers are not allowed: {violations:?} ({report:?})", report.violations);
        }
        ensure!(report.steps > 1000 && report.refused > 900, "hardly anything was tried: {report:?}");
        ensure!(canary.iter().all(|byte| *byte == CANARY), "memory of the host has changed");
        other.stop().iter().try_for_each(|end| end.wait(std::time::Duration::from_secs(10)).map(|_| ()))?;
        guest.stop().iter().try_for_each(|end| end.wait(std::time::Duration::from_secs(10)).map(|_| ()))?;
        ensure!(fs::read(neighbour.path())?.iter().all(|byte| *byte == 0), "another guest's disk has changed");
        ensure!(fs::metadata(disk.path())?.len() == DISK_BYTES, "the image has another size");
        if read_only {
            ensure!(fs::read(disk.path())? == content, "the read-only disk has changed");
        }
    }
    Ok(())
}

fn plan(guest: &KvmGuest, read_only: bool, canary: &[u8], other: &KvmGuest) -> Result<Attack> {
    let [lower, upper] = guest.machine().ram() else { anyhow::bail!("the guest has no hole") };
    let mut ram = [RamRegion::default(); RAM_REGIONS_MAX];
    (ram[0], ram[1]) = (*lower, *upper);
    let mut filled_holes = [RamRegion::default(); ATTACK_EXTENTS_MAX];
    filled_holes[0] = RamRegion { gpa: lower.len_bytes, len_bytes: upper.gpa - lower.len_bytes };
    let mut empty_holes = [RamRegion::default(); ATTACK_EXTENTS_MAX];
    empty_holes[0] = RamRegion { gpa: upper.gpa + upper.len_bytes, len_bytes: 64 << 10 };
    empty_holes[1] = RamRegion { gpa: 5 << 30, len_bytes: 1 << 20 };
    let mut host_addresses = [0; HOST_ADDRESSES_MAX];
    let others_ram =
        vm_memory::GuestMemoryBackend::get_host_address(other.memory().mapped(), vm_memory::GuestAddress(0))
            .context("looking up the other guest's RAM")?;
    let ram_here = vm_memory::GuestMemoryBackend::get_host_address(guest.memory().mapped(), vm_memory::GuestAddress(0))
        .context("looking up the guest's RAM")?;
    let addresses = [canary.as_ptr() as u64, others_ram as u64, ram_here as u64, (&raw const host_addresses) as u64];
    host_addresses[..addresses.len()].copy_from_slice(&addresses);
    Ok(Attack {
        ram,
        filled_holes,
        empty_holes,
        host_addresses,
        iova_base: IOVA_BASE,
        buffer_gpa: guest.buffers_gpa(),
        buffer_bytes: 4096,
        disk_bytes: DISK_BYTES,
        disk_offset_bytes: 0,
        read_only,
        zero_length: !kernel::affected(&KernelRelease::running()?).iter().any(|hole| hole.cve == "CVE-2026-43006"),
        timeout_ns: 10_000_000_000,
    })
}
