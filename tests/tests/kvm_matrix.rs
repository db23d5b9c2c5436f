//! A KVM guest reads and writes, and every byte is verified: every value and every pair of values of the matrix.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::disk::Disk;
use ringpass_broker::ring::RingConfig;
use ringpass_tests::content::check_content;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{BellKind, KvmGuest, KvmGuestConfig, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::pairs::{Factor, Row, Space};
use ringpass_tests::process_guest::Place;
use ringpass_tests::seed::Seed;
use ringpass_workload::{Job, Wait};

/// The rows are the same in every run. The guests make random choices in them.
const ROWS: Seed = Seed::fixed(3);
/// The least number of verified bytes, over all kinds of disk that run.
const VERIFIED_BYTES: u64 = 256 << 20;
/// The most requests of a queue in a row's random part. Without a limit, rows with small blocks would take most of the
/// time.
const OPERATIONS_MAX: u64 = 2000;

/// A request's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Logical,
    Bytes(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consumer {
    SqThread,
    Doorbell,
}

const DEPTHS: [u32; 3] = [1, 32, 256];
const BLOCKS: [Block; 4] = [Block::Logical, Block::Bytes(4096), Block::Bytes(64 << 10), Block::Bytes(1 << 20)];
const SQ_ENTRIES: [u32; 4] = [8, 64, 512, 4096];
const QUEUES: [u32; 2] = [1, 2];
const PLACES: [Place; 2] = [Place::GuestRam, Place::Window];
const CONSUMERS: [Consumer; 2] = [Consumer::SqThread, Consumer::Doorbell];
const WAITS: [Wait; 3] = [Wait::Poll, Wait::Interrupt, Wait::InterruptMuting];
const BELLS: [BellKind; 2] = [BellKind::Port, BellKind::Mmio];

struct Matrix<'v> {
    space: Space<'v>,
    disk: Factor<'v, DiskKind>,
    depth: Factor<'v, u32>,
    block: Factor<'v, Block>,
    sq_entries: Factor<'v, u32>,
    queues: Factor<'v, u32>,
    place: Factor<'v, Place>,
    consumer: Factor<'v, Consumer>,
    wait: Factor<'v, Wait>,
    bell: Factor<'v, BellKind>,
}

impl Matrix<'_> {
    fn new() -> Self {
        let mut space = Space::new();
        let disk = space.factor("disk", &DiskKind::ALL);
        let depth = space.factor("depth", &DEPTHS);
        let block = space.factor("block", &BLOCKS);
        let sq_entries = space.factor("SQ entries", &SQ_ENTRIES);
        let queues = space.factor("queues", &QUEUES);
        let place = space.factor("placement", &PLACES);
        let consumer = space.factor("consumer", &CONSUMERS);
        let wait = space.factor("wait", &WAITS);
        let bell = space.factor("doorbell", &BELLS);
        Self { space, disk, depth, block, sq_entries, queues, place, consumer, wait, bell }
    }

    /// Runs a row, in which all queues together verify at least `bytes`, and returns how many bytes were verified.
    fn run(&self, row: &Row, seed: Seed, bytes: u64) -> Result<u64> {
        let (depth, queues, sq_entries) = (*self.depth.of(row), *self.queues.of(row), *self.sq_entries.of(row));
        let blocks = self.blocks(row);
        let area_bytes = blocks * u64::from(self.block_bytes_max(row));
        let disk = TestDisk::new(*self.disk.of(row), u64::from(queues) * area_bytes)?;
        let block_bytes = match self.block.of(row) {
            Block::Logical => Disk::open(&disk.config())?.logical_block_bytes(),
            Block::Bytes(bytes) => *bytes,
        };
        let mut guest = KvmGuest::start(KvmGuestConfig {
            // The CQ has room for the whole depth.
            ring: RingConfig { sq_entries, cq_entries: depth.next_power_of_two().max(2 * sq_entries) },
            place: *self.place.of(row),
            queues,
            submission: match self.consumer.of(row) {
                Consumer::SqThread => sq_thread(2),
                Consumer::Doorbell => SubmissionConfig::Doorbell,
            },
            bell: *self.bell.of(row),
            buffer_bytes: u64::from(depth) * u64::from(block_bytes),
            ..KvmGuestConfig::new(disk.config())
        })?;
        let mut jobs: Vec<Job> = (0..queues)
            .map(|cpu| Job {
                operations: (blocks * 2).min(OPERATIONS_MAX),
                seed: seed.derive(cpu).value(),
                durable_percent: 2,
                wait: *self.wait.of(row),
                ..guest.job(cpu, block_bytes, depth, blocks)
            })
            .collect();
        let mut verified_bytes = 0;
        let mut work = |jobs: &[Job], kind| -> Result<u64> {
            let outcomes = guest.run_all(jobs, kind)?;
            verified_bytes += outcomes.iter().map(|outcome| outcome.report.verified_bytes).sum::<u64>();
            Ok(verified_bytes)
        };
        work(&jobs, Command::Prefill)?;
        work(&jobs, Command::Run)?;
        while work(&jobs, Command::VerifyAll)? < bytes {
            jobs.iter_mut().for_each(|job| job.seed = job.seed.wrapping_add(1));
            work(&jobs, Command::Run)?;
        }
        let beside = File::open(disk.path())?;
        for (cpu, job) in (0..).zip(&jobs) {
            check_content(&beside, job, &guest.machine().read_table(cpu, job.blocks())?)?;
        }
        for end in guest.stop() {
            end.wait(Duration::from_secs(30))?;
        }
        Ok(verified_bytes)
    }

    /// The blocks of one queue: at least one for each request in flight.
    fn blocks(&self, row: &Row) -> u64 {
        (8 << 20 >> self.block_bytes_max(row).ilog2()).min(2048).max(u64::from(*self.depth.of(row)))
    }

    fn block_bytes_max(&self, row: &Row) -> u32 {
        match self.block.of(row) {
            Block::Logical => 4096,
            Block::Bytes(bytes) => *bytes,
        }
    }
}

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for kind in DiskKind::ALL {
        let needs = || needs(kind);
        tests.push(test(format!("a_kvm_guest_reads_back_what_it_wrote_on_{kind}"), needs(), move || on(kind)));
        tests.push(test(format!("a_kvm_guest_finds_a_byte_that_was_changed_on_{kind}"), needs(), move || {
            changed_byte(kind)
        }));
    }
    harness::run(tests)
}

fn needs(kind: DiskKind) -> Vec<Need> {
    // Memory for the RAM and the disk's pages.
    let machine = [Need::kvm(), Need::io_uring(), Need::cpus(2), Need::available_memory_bytes(2 << 30)];
    machine.into_iter().chain(kind.needs()).collect()
}

/// The rows of one kind of disk.
fn on(kind: DiskKind) -> Result<()> {
    let matrix = Matrix::new();
    let seed = Seed::from_env_or_random();
    let all_rows = if harness::is_soak() { matrix.space.full_product()? } else { matrix.space.all_pairs(ROWS)? };
    let rows: Vec<&Row> = all_rows.iter().filter(|row| *matrix.disk.of(row) == kind).collect();
    // The kinds that run here verify the share of those that do not.
    let runs = |kind: &DiskKind| needs(*kind).iter().all(|need| need.check().is_ok());
    let kinds = DiskKind::ALL.into_iter().filter(runs).count().max(1) as u64;
    let wanted_bytes = VERIFIED_BYTES.div_ceil(kinds);
    let mut verified_bytes = 0;
    for (index, &row) in rows.iter().enumerate() {
        let started = Instant::now();
        // The last row verifies all that is missing.
        let is_last = index + 1 == rows.len();
        let bytes = if is_last { wanted_bytes.saturating_sub(verified_bytes) } else { 0 };
        verified_bytes += matrix.run(row, seed.derive(row), bytes).with_context(|| format!("{row} ({seed})"))?;
        eprintln!("{row}: {} ms", started.elapsed().as_millis());
    }
    eprintln!("{} MiB verified in {} rows", verified_bytes >> 20, rows.len());
    ensure!(verified_bytes >= wanted_bytes, "only {verified_bytes} bytes were verified, of {wanted_bytes}");
    Ok(())
}

/// Checks the verification itself: the guest finds one wrong byte, and the comparison of the disk does too.
fn changed_byte(kind: DiskKind) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let disk = TestDisk::new(kind, 4 << 20)?;
    let mut guest = KvmGuest::start(KvmGuestConfig::new(disk.config()))?;
    let job = guest.job(0, 64 << 10, 4, 64);
    let table = guest.table(0, &job)?;
    guest.run_all(&[job], Command::Prefill)?;
    let expected = guest.machine().read_table(0, job.blocks())?;
    let beside = File::options().read(true).write(true).open(disk.path())?;
    check_content(&beside, &job, &expected)?;

    let at = seed.rng().u64(..job.area_bytes);
    let mut byte = [0];
    beside.read_exact_at(&mut byte, at)?;
    beside.write_all_at(&[byte[0] ^ 1], at)?;
    beside.sync_all()?;

    let report = guest.cpus_mut()[0].run(&Command::VerifyAll(job, table))?.report;
    let block = at / u64::from(job.block_bytes);
    ensure!(report.mismatches == 1 && report.first_mismatch_block == block, "byte {at} is wrong: {report}");
    let found = check_content(&beside, &job, &expected).err().context("the disk passes")?.to_string();
    ensure!(found.contains(&format!("in block {block}, ")), "{found}");
    Ok(())
}
