//! Verified I/O of a KVM guest.

use std::process::ExitCode;

use anyhow::Result;
use ringpass_bare_metal::Command;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig};
use ringpass_tests::needs::Need;
use ringpass_workload::Job;

fn main() -> ExitCode {
    harness::run(vec![test("smoke", [Need::kvm()], smoke)])
}

fn smoke() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, 16 << 20)?;
    let mut guest = KvmGuest::start(KvmGuestConfig::new(disk.config()))?;
    eprintln!("started");
    let job = Job { operations: 20_000, ..guest.job(0, 4096, 1, 1024) };
    for job in [job, Job { depth: 32, ..job }] {
    let outcome = guest.run_all(&[job], Command::Prefill)?;
    eprintln!("{}", outcome[0].report);
    let before = guest.counters()[0].read()?;
    let outcome = guest.run_all(&[job], Command::Run)?;
    let exits = guest.counters()[0].read()? - before;
    eprintln!("{} {exits:?} {:?}", outcome[0].report, outcome[0].report.elapsed_ns / 20000);
    let job = Job { write_percent: 0, verify: ringpass_workload::Verify::Off, operations: 200_000, ..job};
    let before = guest.counters()[0].read()?;
    let outcome = guest.run_all(&[job], Command::Run)?;
    let exits = guest.counters()[0].read()? - before;
    eprintln!("{} {exits:?} {:?}", outcome[0].report, outcome[0].report.elapsed_ns / 200000);
    let outcome = guest.run_all(&[job], Command::VerifyAll)?;
    eprintln!("{}", outcome[0].report);
    }
    for end in guest.stop() {
        eprintln!("{:?}", end.wait(std::time::Duration::from_secs(5))?);
    }
    Ok(())
}
