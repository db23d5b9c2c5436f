//! The kernel turns completions into interrupts of the guest, and the guest loses none.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::seed::Seed;
use ringpass_workload::{Job, Verify, Wait};

const BLOCKS: u64 = 1024;
const COMPLETIONS: u64 = 100_000;
const REPLACEMENTS: u32 = 1000;
const JOB_OPERATIONS: u64 = 60;

fn main() -> ExitCode {
    let needs = || [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4PageCache.needs());
    harness::run(vec![
        test("a_guest_that_mutes_and_unmutes_loses_no_completion", needs(), muting),
        test("a_guest_loses_no_completion_while_the_completion_eventfd_is_replaced", needs(), replacing),
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
        let started = Instant::now();
        let report = guest.run_all(&[job], Command::Run)?[0].report;
        eprintln!("{submission:?} depth {depth}: {report:?} {:?}", started.elapsed());
        // `run_all` has checked that the report is clean: the guest missed no interrupt.
        ensure!(report.operations() == job.operations, "{report}");
        // On a busy machine the guest finds most completions before it sleeps, and these are no interrupts.
        ensure!(report.interrupts > 50 && report.unmutes > 50, "too few interrupts or unmutes: {report:?}");
    }
    Ok(())
}

/// Runs short jobs, each with one replacement in its middle, so that no later replacement hides a loss.
fn replacing() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut random = seed.rng();
    let disk = TestDisk::new(DiskKind::Ext4PageCache, BLOCKS * 4096)?;
    for submission in [SubmissionConfig::Doorbell, sq_thread(10)] {
        let mut guest = KvmGuest::start(KvmGuestConfig { submission, ..KvmGuestConfig::new(disk.config()) })?;
        let job = Job {
            operations: JOB_OPERATIONS,
            timeout_ns: 300_000_000,
            wait: Wait::Interrupt,
            verify: Verify::Off,
            // One request at a time: the interrupt of a second one would hide a lost interrupt.
            ..guest.job(0, 4096, 1, BLOCKS)
        };
        let gsi = guest.machine().queue_gsi(0);
        let table = guest.table(0, &job)?;
        let mut usual_ns = guest.run_all(&[job], Command::Run)?[0].report.elapsed_ns;
        let (mut in_the_middle, mut jobs, mut interrupts) = (0, 0u32, 0);
        while in_the_middle < REPLACEMENTS / 2 {
            ensure!(
                jobs < 10 * REPLACEMENTS,
                "only {in_the_middle} of {jobs} replacements came in the middle of a job"
            );
            jobs += 1;
            let begun = Instant::now();
            guest.cpus_mut()[0].begin(&Command::Run(Job { seed: random.u64(..), ..job }, table))?;
            thread::sleep(Duration::from_nanos(random.u64(..usual_ns * 7 / 8)));
            guest.queues()[0].replace_interrupt(Some(gsi))?;
            let replaced = begun.elapsed();
            let report = guest.cpus_mut()[0].finish(Some(Duration::from_secs(60)))?.report;
            ensure!(report.is_clean(), "{submission:?}, job {jobs} ({seed}), replaced after {replaced:?}: {report}");
            ensure!(report.operations() == JOB_OPERATIONS, "{report}");
            interrupts += report.interrupts;
            // The guest begins later than this thread measures, so such a replacement came before the job's end.
            in_the_middle += u32::from(replaced.as_nanos() < u128::from(report.elapsed_ns));
            usual_ns = (7 * usual_ns + report.elapsed_ns) / 8;
        }
        eprintln!(
            "{submission:?}: {in_the_middle} replacements in {jobs} jobs of {usual_ns} ns, {interrupts} interrupts"
        );
        // As above, most completions need none on a busy machine.
        ensure!(interrupts >= u64::from(jobs), "no load: {interrupts} interrupts in {jobs} jobs");
    }
    Ok(())
}
