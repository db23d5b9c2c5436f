//! A process that is its own guest does random reads and writes, and verifies every byte: with all pairs of the
//! properties of a queue on each kind of disk, and with all combinations in a soak.

use std::{
    fs::File,
    num::NonZeroU64,
    os::unix::fs::FileExt,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::Disk,
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_guest::RamArea;
use ringpass_guest_abi::{SEGMENT_BOUNDARY_BYTES, rings_area_bytes, sqes_area_bytes};
use ringpass_tests::{
    content::check_content,
    disks::{DiskKind, TestDisk},
    harness::{self, test},
    needs::Need,
    pairs::Space,
    process_guest::{GuestQueue, PageSize, Place, ProcessGuest, RamFile},
    seed::Seed,
};
use ringpass_workload::{Job, ProcessEnv, Report, Verify, Wait, hostile::Extent, prefill, run, verify_all};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE_BYTES: u64 = 4096;

/// Room for two queues of 256 blocks of 1 MiB, and some to choose from.
const DISK_BYTES: u64 = 576 * MIB;
/// Bytes read and compared, per kind of disk.
const VERIFIED_BYTES: u64 = GIB;
/// The reads of a row with small blocks. More reads would take long and find nothing new.
const READS_OF_SMALL_BLOCKS: u64 = 8000;
/// The bytes that a row verifies, if all rows together verify enough.
const ROW_BYTES: u64 = 64 * MIB;
/// The bytes that a test checks on each side of a queue's area, and the gap between the shares of two queues.
const BESIDE_BYTES: u64 = 64 << 10;

const DEPTHS: [u32; 3] = [1, 32, 256];
const SQ_ENTRIES: [u32; 4] = [8, 64, 512, 4096];
const PLACES: [Place; 2] = [Place::GuestRam, Place::Window];
const QUEUES: [u64; 2] = [1, 2];
const WAITS: [Wait; 3] = [Wait::Poll, Wait::Interrupt, Wait::InterruptMuting];
const SUBMISSIONS: [Submission; 2] = [Submission::SqThread, Submission::Kick];

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for kind in DiskKind::ALL {
        // CPUs for the guest and the SQ thread, and memory for the RAM and the disk's pages.
        let needs = || {
            let machine = [Need::io_uring(), Need::cpus(2), Need::available_memory_bytes(2 * GIB)];
            kind.needs().into_iter().chain(machine)
        };
        tests.push(test(format!("a_process_guest_reads_back_what_it_wrote_on_{kind}"), needs(), move || matrix(kind)));
        tests.push(test(format!("a_process_guest_finds_a_byte_that_was_changed_on_{kind}"), needs(), move || {
            changed_byte(kind)
        }));
    }
    harness::run(tests)
}

/// Who consumes the SQs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Submission {
    SqThread,
    Kick,
}

impl Submission {
    fn config(self) -> SubmissionConfig {
        match self {
            // The SQ thread sleeps between the parts of a row.
            Self::SqThread => SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(2))),
            Self::Kick => SubmissionConfig::Doorbell,
        }
    }
}

/// One combination of properties.
#[derive(Clone, Copy, Debug)]
struct Case {
    depth: u32,
    block_bytes: u32,
    sq_entries: u32,
    place: Place,
    queues: u64,
    submission: Submission,
    wait: Wait,
}

impl Case {
    /// The size of a ring whose CQ has room for the whole depth.
    fn ring(&self) -> RingConfig {
        let cq_entries = self.depth.next_power_of_two().max(2 * self.sq_entries);
        RingConfig { sq_entries: self.sq_entries, cq_entries }
    }

    /// From one buffer to the next. The buffers need not start at a page; with a gap as long as a buffer none crosses a
    /// segment boundary.
    fn buffer_stride_bytes(&self) -> u64 {
        2 * u64::from(self.block_bytes)
    }

    fn buffers_bytes(&self) -> u64 {
        (u64::from(self.depth) * self.buffer_stride_bytes()).next_multiple_of(SEGMENT_BOUNDARY_BYTES)
    }

    fn allocate_buffers(&self, guest: &mut ProcessGuest) -> Result<RamArea> {
        Ok(guest.allocator().allocate_aligned(self.buffers_bytes(), SEGMENT_BOUNDARY_BYTES)?)
    }

    /// RAM for all queues in one region.
    fn ram(&self) -> Result<RamFile> {
        let ring = self.ring();
        let ring_bytes = rings_area_bytes(ring.cq_entries) + sqes_area_bytes(ring.sq_entries);
        let queue_bytes = ring_bytes.next_multiple_of(SEGMENT_BOUNDARY_BYTES) + self.buffers_bytes();
        RamFile::new(&[Extent { gpa: 0, len_bytes: self.queues * queue_bytes }], PageSize::Small)
    }

    /// The job of queue `index`, somewhere in its share of the disk.
    fn job(&self, index: u64, disk: &Disk, buffers_gpa: u64, seed: Seed) -> Job {
        let mut random = seed.rng();
        let block_bytes = u64::from(self.block_bytes);
        // All shares end at a block, the last one at the end of the disk. Between two shares there are bytes that
        // belong to no queue.
        let stride_bytes = DISK_BYTES / self.queues;
        let start_bytes = index * stride_bytes + if index == 0 { 0 } else { BESIDE_BYTES.max(block_bytes) };
        let share_bytes = (index + 1) * stride_bytes - start_bytes;
        // There are more blocks than requests in flight, so that the guest has a choice, as far as the disk has room.
        let blocks = (2 * u64::from(self.depth)).max(32).min(256 * MIB / block_bytes);
        let area_bytes = blocks * block_bytes;
        let places = (share_bytes - area_bytes) / block_bytes + 1;
        // Each end of the disk is as likely as all the rest.
        let place = [0, places - 1, random.u64(..places)][random.usize(..3)];
        let alignment_bytes = u64::from(disk.logical_block_bytes());
        Job {
            area_offset_bytes: start_bytes + place * block_bytes,
            area_bytes,
            operations: 0,
            duration_ns: 0,
            timeout_ns: 30_000_000_000,
            pause_ns: 0,
            seed: seed.value(),
            buffers_gpa: buffers_gpa + random.u64(..PAGE_BYTES / alignment_bytes) * alignment_bytes,
            buffer_stride_bytes: self.buffer_stride_bytes(),
            block_bytes: self.block_bytes,
            depth: self.depth,
            write_percent: 40,
            durable_percent: 0,
            wait: self.wait,
            verify: Verify::On,
        }
    }
}

/// All rows for this disk, and how many bytes each must verify.
fn cases(disk: &Disk) -> Result<Vec<(Case, String, u64)>> {
    let mut block_sizes = vec![disk.logical_block_bytes(), 4 << 10, 64 << 10, 1 << 20];
    block_sizes.dedup();
    let mut space = Space::new();
    let depth = space.factor("depth", &DEPTHS);
    let block_bytes = space.factor("block bytes", &block_sizes);
    let sq_entries = space.factor("SQ entries", &SQ_ENTRIES);
    let place = space.factor("place", &PLACES);
    let queues = space.factor("queues", &QUEUES);
    let submission = space.factor("submission", &SUBMISSIONS);
    let wait = space.factor("wait", &WAITS);
    let rows = if harness::is_soak() { space.full_product()? } else { space.all_pairs(Seed::fixed(2))? };
    let case = |row| Case {
        depth: *depth.of(row),
        block_bytes: *block_bytes.of(row),
        sq_entries: *sq_entries.of(row),
        place: *place.of(row),
        queues: *queues.of(row),
        submission: *submission.of(row),
        wait: *wait.of(row),
    };
    let mut cases: Vec<(Case, String, u64)> = Vec::new();
    for row in &rows {
        let case = case(row);
        let bytes = ROW_BYTES.min(u64::from(case.block_bytes) * READS_OF_SMALL_BLOCKS);
        cases.push((case, row.to_string(), bytes));
    }
    // The rows with the largest blocks verify what the others do not.
    let missing_bytes = VERIFIED_BYTES.saturating_sub(cases.iter().map(|(_, _, bytes)| bytes).sum());
    let mut largest: Vec<_> = cases.iter_mut().filter(|(case, ..)| u64::from(case.block_bytes) == MIB).collect();
    let count = NonZeroU64::new(largest.len() as u64).context("every value is in a row")?;
    largest.iter_mut().for_each(|(_, _, bytes)| *bytes += missing_bytes.div_ceil(count.get()));
    Ok(cases)
}

fn matrix(kind: DiskKind) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(kind, DISK_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    // The test accesses the disk past the rings, as other programs do: through the page cache.
    let beside = File::open(made.path())?;
    let cases = cases(&disk)?;
    let (start, count) = (Instant::now(), cases.len());
    let mut total = Report::default();
    for (index, (case, text, bytes)) in cases.into_iter().enumerate() {
        let row_start = Instant::now();
        let report =
            row(&case, &disk, &beside, seed.derive(index), bytes).with_context(|| format!("{text} ({seed})"))?;
        eprintln!("{:6.2} s  {text}: {report}", row_start.elapsed().as_secs_f64());
        total.merge(&report);
    }
    eprintln!("{:6.2} s  {count} rows: {total}", start.elapsed().as_secs_f64());
    ensure!(total.verified_bytes >= VERIFIED_BYTES, "only {} bytes were verified", total.verified_bytes);
    Ok(())
}

/// Runs one guest, which verifies at least `bytes`, and then checks its disk.
fn row(case: &Case, disk: &Arc<Disk>, beside: &File, seed: Seed, bytes: u64) -> Result<Report> {
    let mut guest = ProcessGuest::new(disk, case.ram()?, case.submission.config())?;
    let mut queues = Vec::new();
    for index in 0..case.queues {
        let queue = guest.attach(case.ring(), case.place)?;
        let buffers = case.allocate_buffers(&mut guest)?;
        let job = case.job(index, disk, buffers.gpa(), seed.derive(index));
        let around = Around::read(beside, &job)?;
        queues.push((queue.env(buffers)?, queue, job, around));
    }

    let queue_bytes = bytes / case.queues;
    let results = thread::scope(|scope| {
        let running: Vec<_> = queues
            .iter_mut()
            .map(|(env, queue, job, _)| scope.spawn(|| verified_bytes(queue, env, job, queue_bytes)))
            .collect();
        running.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });

    let mut total = Report::default();
    for (result, (mut env, queue, job, around)) in results.into_iter().zip(queues) {
        let Ok(result) = result else { bail!("a guest's thread panicked") };
        let (report, expected) = result?;
        env.take_latencies_ns()?;
        queue.close()?;
        check_content(beside, &job, &expected)?;
        around.check(beside)?;
        total.merge(&report);
    }
    Ok(total)
}

/// Fills the job's area, reads and writes there until `bytes` are verified, and reads the whole area again. Also
/// returns the checksums of its blocks.
fn verified_bytes(queue: &mut GuestQueue, env: &mut ProcessEnv, job: &Job, bytes: u64) -> Result<(Report, Vec<u64>)> {
    let mut expected = vec![0; usize::try_from(job.blocks())?];
    let mut total = Report::default();
    let mut add = |what: &str, report: Report| {
        ensure!(report.is_clean(), "{what}: {report}");
        total.merge(&report);
        Ok(total.verified_bytes)
    };
    add("filling", prefill(job, queue.ring(), env, &mut expected)?)?;
    // The reads, of which there are more than writes, verify this much, and the last pass over all blocks the rest.
    let run_bytes = bytes.saturating_sub(job.area_bytes);
    let mut job = *job;
    job.operations = (run_bytes / u64::from(job.block_bytes)).max(u64::from(job.depth));
    let mut verified_bytes = add("running", run(&job, queue.ring(), env, &mut expected)?)?;
    while verified_bytes < run_bytes {
        job.operations = (run_bytes - verified_bytes).div_ceil(u64::from(job.block_bytes)) * 2;
        job.seed = job.seed.wrapping_add(1);
        verified_bytes = add("running", run(&job, queue.ring(), env, &mut expected)?)?;
    }
    add("reading all", verify_all(&job, queue.ring(), env, &mut expected)?)?;
    Ok((total, expected))
}

/// The bytes beside a job's area on the disk, which must not change.
struct Around(Vec<(u64, Vec<u8>)>);

impl Around {
    fn read(beside: &File, job: &Job) -> Result<Self> {
        let before = job.area_offset_bytes.saturating_sub(BESIDE_BYTES)..job.area_offset_bytes;
        let end = job.area_offset_bytes + job.area_bytes;
        let behind = end..(end + BESIDE_BYTES).min(DISK_BYTES);
        let mut found = Vec::new();
        for range in [before, behind] {
            found.push((range.start, read(beside, range.start, range.end - range.start)?));
        }
        Ok(Self(found))
    }

    fn check(&self, beside: &File) -> Result<()> {
        for (offset_bytes, before) in &self.0 {
            let now = read(beside, *offset_bytes, before.len() as u64)?;
            ensure!(now == *before, "the disk has changed at {offset_bytes}, beside the guest's area");
        }
        Ok(())
    }
}

fn read(file: &File, offset_bytes: u64, len_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len_bytes)?];
    file.read_exact_at(&mut bytes, offset_bytes)?;
    Ok(bytes)
}

/// Checks the verification itself: the guest finds one wrong byte, and the comparison of the disk does too.
fn changed_byte(kind: DiskKind) -> Result<()> {
    let case = Case {
        depth: 4,
        block_bytes: 64 << 10,
        sq_entries: 8,
        place: Place::GuestRam,
        queues: 1,
        submission: Submission::Kick,
        wait: Wait::Interrupt,
    };
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(kind, 8 * MIB)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    let beside = File::options().read(true).write(true).open(made.path())?;
    let mut guest = ProcessGuest::new(&disk, case.ram()?, case.submission.config())?;
    let mut queue = guest.attach(case.ring(), case.place)?;
    let buffers = case.allocate_buffers(&mut guest)?;
    let job = Job { area_offset_bytes: 0, ..case.job(0, &disk, buffers.gpa(), seed) };
    let mut env = queue.env(buffers)?;
    let mut expected = vec![0; usize::try_from(job.blocks())?];
    ensure!(prefill(&job, queue.ring(), &mut env, &mut expected)?.is_clean());
    check_content(&beside, &job, &expected)?;

    let at = seed.rng().u64(..job.area_bytes);
    let byte = read(&beside, at, 1)?[0];
    beside.write_all_at(&[byte ^ 1], at)?;
    beside.sync_all()?;

    let report = verify_all(&job, queue.ring(), &mut env, &mut expected)?;
    let block = at / u64::from(job.block_bytes);
    ensure!(report.mismatches == 1 && report.first_mismatch_block == block, "byte {at} is wrong: {report}");
    let found = check_content(&beside, &job, &expected).err().context("the disk passes")?.to_string();
    ensure!(found.contains(&format!("in block {block}, ")), "{found}");
    queue.close()?;
    Ok(())
}
