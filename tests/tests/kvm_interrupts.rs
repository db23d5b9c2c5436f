//! Completions become interrupts of the guest inside the kernel, and none is lost.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::seed::Seed;
use ringpass_vmm::VmmError;
use ringpass_workload::{Job, Verify, Wait};

const BLOCKS: u64 = 1024;
const COMPLETIONS: u64 = 100_000;
const REPLACEMENTS: u32 = 1000;

fn main() -> ExitCode {
    let needs = || [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4PageCache.needs());
    harness::run(vec![
        test("no_completion_is_lost_while_interrupts_are_muted_and_unmuted", needs(), muting),
        test("no_completion_is_lost_while_the_completion_eventfd_is_replaced", needs(), replacing),
    ])
}

fn muting() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    let ways =
        [(SubmissionConfig::Doorbell, 1), (SubmissionConfig::Doorbell, 4), (sq_thread(10), 2), (sq_thread(1), 32)];
    for (submission, depth) in ways {
        let mut guest = KvmGuest::start(KvmGuestConfig { submission, ..KvmGuestConfig::new(disk.config()) })?;
        let job = Job {
            operations: COMPLETIONS / ways.len() as u64,
            wait: Wait::InterruptMuting,
            verify: Verify::Off,
            seed: seed.derive(depth).value(),
            ..guest.job(0, 4096, depth, BLOCKS)
        };
        let started = std::time::Instant::now();
        let report = guest.run_all(&[job], Command::Run)?[0].report;
        eprintln!("{submission:?} depth {depth}: {report:?} {:?}", started.elapsed());
        // `run_all` has seen that the report is clean: no interrupt was missed.
        ensure!(report.operations() == job.operations, "{report}");
        ensure!(report.interrupts > 50 && report.unmutes > 50, "too few interrupts or unmutes: {report:?}");
    }
    Ok(())
}

fn replacing() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    for submission in [SubmissionConfig::Doorbell, sq_thread(10)] {
        let mut guest = KvmGuest::start(KvmGuestConfig { submission, ..KvmGuestConfig::new(disk.config()) })?;
        let job = Job {
            duration_ns: 1_000_000_000,
            timeout_ns: 5_000_000_000,
            wait: Wait::Interrupt,
            verify: Verify::Off,
            // One request at a time: a second one's interrupt would make good for one that is lost.
            ..guest.job(0, 4096, 1, BLOCKS)
        };
        let gsi = guest.machine().queue_gsi(0);
        let table = guest.table(0, &job)?;
        let (mut replaced, mut operations, mut interrupts) = (0, 0, 0);
        while replaced < REPLACEMENTS / 2 {
            guest.cpus_mut()[0].begin(&Command::Run(job, table))?;
            let report = loop {
                guest.queues()[0].replace_interrupt(Some(gsi))?;
                replaced += 1;
                match guest.cpus_mut()[0].finish(Some(Duration::from_micros(100))) {
                    Ok(outcome) => break outcome.report,
                    Err(VmmError::NotYet { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            };
            ensure!(report.is_clean(), "{report}");
            operations += report.operations();
            interrupts += report.interrupts;
        }
        eprintln!("{submission:?}: {replaced} replacements, {operations} completions, {interrupts} interrupts");
        ensure!(operations > u64::from(replaced), "no load: {operations} completions");
    }
    Ok(())
}
