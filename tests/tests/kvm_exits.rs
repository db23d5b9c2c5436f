//! What takes a KVM guest's vCPU out of the guest.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::kvm::Exits;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{BellKind, KvmGuest, KvmGuestConfig, Place, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_workload::{Job, Report, Verify, Wait};

const BLOCKS: u64 = 1024;
const OPERATIONS: u64 = 20_000;
/// Exits that the host causes by itself, per second: timer ticks of a 1000 Hz kernel, and other tasks' wake-ups.
const HOST_EXITS_PER_SECOND: u64 = 4000;

fn main() -> ExitCode {
    let needs = || [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4PageCache.needs());
    harness::run(vec![
        test("a_polling_guest_does_its_io_without_exits", needs(), polling),
        test("a_doorbell_for_every_request_is_an_exit_for_every_request", needs(), kicking),
    ])
}

fn measure(config: KvmGuestConfig, depth: u32) -> Result<(Report, Exits)> {
    let mut guest = KvmGuest::start(config)?;
    let job = Job {
        operations: OPERATIONS,
        write_percent: 0,
        verify: Verify::Off,
        wait: Wait::Poll,
        ..guest.job(0, 4096, depth, BLOCKS)
    };
    let before = guest.counters()[0].read()?;
    let report = guest.run_all(&[job], Command::Run)?[0].report;
    let exits = guest.counters()[0].read()? - before;
    eprintln!("depth {depth}: {exits:?} for {OPERATIONS} requests in {} ms", report.elapsed_ns / 1_000_000);
    Ok((report, exits))
}

fn polling() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    for (place, depth) in [(Place::GuestRam, 1), (Place::Window, 32)] {
        let config = KvmGuestConfig { place, submission: sq_thread(1000), ..KvmGuestConfig::new(disk.config()) };
        let (report, exits) = measure(config, depth)?;
        // The SQ thread never sleeps here but before the first request; the last exit is the guest's call at the end.
        ensure!(report.doorbells <= 1, "{} doorbells", report.doorbells);
        ensure!(exits.requested() <= report.doorbells + 1, "{exits:?}");
        let by_host = HOST_EXITS_PER_SECOND * report.elapsed_ns / 1_000_000_000;
        let allowed = OPERATIONS / 100 + by_host;
        ensure!(exits.all <= allowed, "{} exits for {OPERATIONS} requests, allowed {allowed}", exits.all);
    }
    Ok(())
}

/// Shows that the counters of the other test count.
fn kicking() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    for bell in [BellKind::Port, BellKind::Mmio] {
        let config =
            KvmGuestConfig { bell, submission: SubmissionConfig::Doorbell, ..KvmGuestConfig::new(disk.config()) };
        let (report, exits) = measure(config, 1)?;
        ensure!(report.doorbells == OPERATIONS, "{} doorbells", report.doorbells);
        ensure!(exits.all >= OPERATIONS, "{exits:?}");
    }
    Ok(())
}
