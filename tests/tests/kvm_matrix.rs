//! A KVM guest reads and writes, and every byte is verified: every value and every pair of values of the matrix.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::disk::Disk;
use ringpass_broker::ring::RingConfig;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{BellKind, KvmGuest, KvmGuestConfig, Place, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::pairs::{Factor, Row, Space};
use ringpass_tests::seed::Seed;
use ringpass_workload::{Job, Wait};
use std::time::Duration;

/// The rows are the same in every run; what the guests do in them is random.
const ROWS: Seed = Seed::fixed(3);
/// Verified bytes over all disks in CI.
const VERIFIED_BYTES: u64 = 256 << 20;
/// Most requests of a queue in a row's random part: small blocks would take all the time.
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
const ENTRIES: [u32; 4] = [8, 64, 1024, 4096];
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
    entries: Factor<'v, u32>,
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
        let entries = space.factor("ring entries", &ENTRIES);
        let queues = space.factor("queues", &QUEUES);
        let place = space.factor("placement", &PLACES);
        let consumer = space.factor("consumer", &CONSUMERS);
        let wait = space.factor("wait", &WAITS);
        let bell = space.factor("doorbell", &BELLS);
        // A CQ has twice the entries.
        space.forbid2(depth, entries, |depth, entries| *depth > 2 * entries);
        // 512 MiB of buffers, and a disk that holds as much.
        space.forbid3(depth, block, queues, |depth, block, queues| {
            *depth == 256 && *block == Block::Bytes(1 << 20) && *queues == 2
        });
        Self { space, disk, depth, block, entries, queues, place, consumer, wait, bell }
    }

    /// Runs a row and returns how many bytes were verified.
    fn run(&self, row: &Row, seed: Seed) -> Result<u64> {
        let (depth, queues) = (*self.depth.of(row), *self.queues.of(row));
        let entries = *self.entries.of(row);
        let block_max = match self.block.of(row) {
            Block::Logical => 4096,
            Block::Bytes(bytes) => *bytes,
        };
        let blocks = u64::from(depth).max(8 << 20 >> block_max.ilog2()).min(2048).max(u64::from(depth));
        let disk = TestDisk::new(*self.disk.of(row), u64::from(queues) * blocks * u64::from(block_max))?;
        let block_bytes = match self.block.of(row) {
            Block::Logical => Disk::open(&disk.config())?.logical_block_bytes(),
            Block::Bytes(bytes) => *bytes,
        };
        let mut guest = KvmGuest::start(KvmGuestConfig {
            ring: RingConfig { sq_entries: entries, cq_entries: 2 * entries },
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
        let jobs: Vec<Job> = (0..queues)
            .map(|cpu| Job {
                operations: (blocks * 2).min(OPERATIONS_MAX),
                seed: seed.derive(cpu).value(),
                durable_percent: 2,
                wait: *self.wait.of(row),
                ..guest.job(cpu, block_bytes, depth, blocks)
            })
            .collect();
        let mut verified_bytes = 0;
        for work in [Command::Prefill, Command::Run, Command::VerifyAll] {
            let outcomes = guest.run_all(&jobs, work)?;
            verified_bytes += outcomes.iter().map(|outcome| outcome.report.verified_bytes).sum::<u64>();
        }
        ensure!(verified_bytes >= blocks * u64::from(block_bytes), "only {verified_bytes} bytes were verified");
        for end in guest.stop() {
            end.wait(Duration::from_secs(30))?;
        }
        Ok(verified_bytes)
    }
}

fn main() -> ExitCode {
    let kinds = DiskKind::ALL.into_iter();
    harness::run(
        kinds
            .map(|kind| {
                let needs = [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(kind.needs());
                test(format!("a_kvm_guest_reads_back_what_it_wrote_on_{kind}"), needs, move || on(kind))
            })
            .collect(),
    )
}

/// The rows of one kind of disk.
fn on(kind: DiskKind) -> Result<()> {
    let matrix = Matrix::new();
    let seed = Seed::from_env_or_random();
    let rows = if harness::is_soak() { matrix.space.full_product()? } else { matrix.space.all_pairs(ROWS)? };
    let mut verified_bytes = 0;
    for row in rows.iter().filter(|row| *matrix.disk.of(row) == kind) {
        let started = std::time::Instant::now();
        verified_bytes += matrix.run(row, seed.derive(row)).with_context(|| row.to_string())?;
        eprintln!("{row}: {} ms", started.elapsed().as_millis());
    }
    eprintln!("{} MiB verified", verified_bytes >> 20);
    ensure!(verified_bytes >= VERIFIED_BYTES / DiskKind::ALL.len() as u64, "only {verified_bytes} bytes were verified");
    Ok(())
}
