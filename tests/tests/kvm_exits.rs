//! The exits of a KVM guest's vCPU.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::kvm::Exits;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{BellKind, KvmGuest, KvmGuestConfig, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::process_guest::Place;
use ringpass_workload::{Job, Report, Verify, Wait};

const BLOCKS: u64 = 1024;
const OPERATIONS: u64 = 50_000;
/// The number of measurements and baselines. Only the smallest ones count, because the rest of the host causes exits
/// too.
const ROUNDS: u32 = 5;

const NOT_BY_KIND: &str = "ran without a look at exits by their kind: this KVM does not count port I/O";
const POLLING: &str = "a_polling_guest_does_its_io_without_exits";
const KICKING: &str = "a_doorbell_for_every_request_is_an_exit_for_every_request";

fn main() -> ExitCode {
    let needs = || [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4PageCache.needs());
    harness::run(vec![test(POLLING, needs(), polling), test(KICKING, needs(), kicking)])
}

/// Runs a job of reads, and returns its exits.
fn measure(guest: &mut KvmGuest, depth: u32) -> Result<(Report, Exits)> {
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

/// The exits that the host itself causes: those of a vCPU that does one request and then spins for this time.
fn baseline(guest: &mut KvmGuest, elapsed_ns: u64) -> Result<u64> {
    let job = Job {
        duration_ns: elapsed_ns,
        pause_ns: elapsed_ns,
        write_percent: 0,
        verify: Verify::Off,
        wait: Wait::Poll,
        ..guest.job(0, 4096, 1, BLOCKS)
    };
    let before = guest.counters()[0].read()?;
    let report = guest.run_all(&[job], Command::Run)?[0].report;
    let exits = guest.counters()[0].read()? - before;
    eprintln!("baseline: {exits:?} for {} requests in {} ms", report.operations(), report.elapsed_ns / 1_000_000);
    ensure!(report.operations() <= 3, "the baseline did I/O: {report}");
    ensure!(report.elapsed_ns >= elapsed_ns / 2, "the baseline was too short: {report:?}");
    Ok((u128::from(exits.all) * u128::from(elapsed_ns) / u128::from(report.elapsed_ns)) as u64)
}

fn polling() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    for (place, depth) in [(Place::GuestRam, 1), (Place::Window, 32)] {
        let config = KvmGuestConfig { place, submission: sq_thread(1000), ..KvmGuestConfig::new(disk.config()) };
        let mut guest = KvmGuest::start(config)?;
        let (mut fewest, mut fewest_by_host) = (u64::MAX, u64::MAX);
        for _ in 0..ROUNDS {
            let (report, exits) = measure(&mut guest, depth)?;
            // The SQ thread sleeps only before the first request here. The last exit is the guest's call at its end.
            ensure!(report.doorbells <= 1, "{} doorbells", report.doorbells);
            ensure!(exits.requested() <= report.doorbells + 1, "{exits:?}");
            fewest = fewest.min(exits.all);
            fewest_by_host = fewest_by_host.min(baseline(&mut guest, report.elapsed_ns)?);
        }
        let beyond = fewest.saturating_sub(fewest_by_host);
        eprintln!("depth {depth}: {beyond} exits beyond the {fewest_by_host} of a vCPU that only spins");
        ensure!(beyond < OPERATIONS / 100, "{fewest} exits for {OPERATIONS} requests, {fewest_by_host} by the host");
        if guest.counters()[0].read()?.port_io == 0 {
            harness::note(POLLING, NOT_BY_KIND);
        }
    }
    Ok(())
}

/// Shows that the counters that the other test uses count.
fn kicking() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    for bell in [BellKind::Port, BellKind::Mmio] {
        let config =
            KvmGuestConfig { bell, submission: SubmissionConfig::Doorbell, ..KvmGuestConfig::new(disk.config()) };
        let mut guest = KvmGuest::start(config)?;
        let (report, exits) = measure(&mut guest, 1)?;
        ensure!(report.doorbells == OPERATIONS, "{} doorbells", report.doorbells);
        ensure!(exits.all >= OPERATIONS, "{exits:?}");
        if bell == BellKind::Port {
            // The guest has already called several times, through a port.
            if guest.counters()[0].read()?.port_io == 0 {
                harness::note(KICKING, NOT_BY_KIND);
            } else {
                ensure!(exits.port_io >= OPERATIONS, "{exits:?}");
            }
        }
    }
    Ok(())
}
