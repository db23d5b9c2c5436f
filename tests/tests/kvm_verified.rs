//! Verified I/O of a KVM guest.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{BellKind, KvmGuest, KvmGuestConfig, Place};
use ringpass_tests::needs::Need;
use ringpass_workload::{Job, Wait};

fn main() -> ExitCode {
    harness::run(vec![test("smoke", [Need::kvm()], smoke)])
}

fn smoke() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, 16 << 20)?;
    for (submission, wait, bell, place) in [
        (SubmissionConfig::Doorbell, Wait::Poll, BellKind::Port, Place::GuestRam),
        (SubmissionConfig::Doorbell, Wait::Interrupt, BellKind::Mmio, Place::Window),
        (SubmissionConfig::Doorbell, Wait::InterruptMuting, BellKind::Port, Place::Window),
        (ringpass_tests::kvm_guest::sq_thread(1), Wait::Interrupt, BellKind::Mmio, Place::GuestRam),
    ] {
    let mut guest = KvmGuest::start(KvmGuestConfig{ submission, bell, place, ..KvmGuestConfig::new(disk.config())})?;
    let n = 5_000;
    let job = Job { operations: n, wait, write_percent: 0, timeout_ns: 1_000_000_000, ..guest.job(0, 4096, 1, 1024) };
    eprintln!("{submission:?} {wait:?} {bell:?} {place:?}");
    let outcome = guest.run_all(&[job], Command::Prefill)?;
    eprintln!("{}", outcome[0].report);
    for job in [job, Job { depth: 32, ..job }] {
    let before = guest.counters()[0].read()?;
    let at = Instant::now();
    let outcome = guest.run_all(&[job], Command::Run)?;
    let exits = guest.counters()[0].read()? - before;
    eprintln!("{:?} {exits:?} {:?} {:?}", outcome[0].report, outcome[0].report.elapsed_ns / n, at.elapsed());
    }
    for end in guest.stop() {
        eprintln!("{:?}", end.wait(std::time::Duration::from_secs(5))?);
    }
    }
    Ok(())
}
