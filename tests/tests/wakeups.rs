//! The SQ thread falls asleep. The guest rings the doorbell when the ring says so, and loses no submission.

use std::{
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::Disk,
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, budget, test},
    needs::Need,
    process_guest::{GuestQueue, PageSize, Place, ProcessGuest, RamFile},
    seed::Seed,
};
use ringpass_workload::{
    BlockQueue, Completion, Environment, Job, ProcessEnv, PushRefusal, Report, Request, Verify, Wait, Wakeup,
    hostile::Extent, prefill, run,
};

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u32 = 4096;
/// The part of the disk that each guest uses.
const AREA_BYTES: u64 = MIB;
/// The number of guests at a time, each with an SQ thread of its own. A thread takes some timer ticks to fall asleep.
const GUESTS: u64 = 6;
const RING: RingConfig = RingConfig { sq_entries: 8, cq_entries: 16 };
/// The SQ thread's idle time: the shortest possible.
const IDLE: Duration = Duration::from_millis(1);
/// Pauses take from half of this to twice this time: mostly longer than the SQ thread takes to fall asleep (4 to 8 ms
/// with a tick of 4 ms), and sometimes about as long.
const PAUSE_NS: u64 = 12_000_000;
const TIMEOUT_NS: u64 = 10_000_000_000;

fn main() -> ExitCode {
    let needs = || {
        let mut needs = DiskKind::Ext4PageCache.needs();
        needs.extend([Need::io_uring(), Need::cpus(2)]);
        needs
    };
    harness::run(vec![
        test("a_guest_never_loses_a_submission_to_a_sleeping_sq_thread", needs(), || {
            never_lost(1, budget(5_000, 100_000))
        }),
        test("queues_that_share_an_sq_thread_wake_it_for_each_other", needs(), || never_lost(2, budget(400, 10_000))),
        test("a_guest_that_does_not_ring_loses_a_submission", needs(), a_guest_that_does_not_ring),
    ])
}

/// An environment whose pauses have a random length.
struct Restless<'a> {
    env: &'a mut ProcessEnv,
    random: fastrand::Rng,
}

impl Environment for Restless<'_> {
    fn now_ns(&self) -> u64 {
        self.env.now_ns()
    }

    fn ring_doorbell(&mut self) {
        self.env.ring_doorbell();
    }

    fn relax(&mut self, empty_polls: u32) {
        self.env.relax(empty_polls);
    }

    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup {
        self.env.wait_for_interrupt(timeout_ns)
    }

    fn pause(&mut self, duration_ns: u64) {
        self.env.pause(self.random.u64(duration_ns / 2..2 * duration_ns));
    }

    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        self.env.with_buffer(gpa, len_bytes, access)
    }

    fn record_latency(&mut self, latency_ns: u64) {
        self.env.record_latency(latency_ns);
    }
}

/// A job with one request at a time, and a pause before each.
fn job(area: u64, buffers_gpa: u64, seed: Seed) -> Job {
    Job {
        area_offset_bytes: area * AREA_BYTES,
        area_bytes: AREA_BYTES,
        operations: 50,
        duration_ns: 0,
        timeout_ns: TIMEOUT_NS,
        pause_ns: PAUSE_NS,
        seed: seed.value(),
        buffers_gpa,
        buffer_stride_bytes: BLOCK_BYTES.into(),
        block_bytes: BLOCK_BYTES,
        depth: 1,
        write_percent: 50,
        durable_percent: 0,
        // The guest wakes up at once, and leaves the CPU to the SQ threads meanwhile.
        wait: Wait::Interrupt,
        verify: Verify::On,
    }
}

/// A queue, its environment, and the guest-physical address of its buffer.
type Attached = (GuestQueue, ProcessEnv, u64);

fn guest(disk: &Arc<Disk>, queues: u64) -> Result<(ProcessGuest, Vec<Attached>)> {
    let ram = RamFile::new(&[Extent { gpa: 0, len_bytes: MIB }], PageSize::Small)?;
    let submission = SubmissionConfig::SqThread(SqThreadConfig::new(IDLE));
    let mut guest = ProcessGuest::new(disk, ram, submission)?;
    let mut attached = Vec::new();
    for _ in 0..queues {
        let queue = guest.attach(RING, Place::GuestRam)?;
        let buffers = guest.allocator().allocate(BLOCK_BYTES.into())?;
        let gpa = buffers.gpa();
        let env = queue.env(buffers)?;
        attached.push((queue, env, gpa));
    }
    Ok((guest, attached))
}

/// Guests with `queues` queues each submit to sleeping SQ threads, until these have been woken `wakes` times.
fn never_lost(queues: u64, wakes: u64) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, GUESTS * queues * AREA_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    let each = wakes.div_ceil(GUESTS * queues);
    let start = Instant::now();
    let mut total = Report::default();
    let mut guests = Vec::new();
    for _ in 0..GUESTS {
        guests.push(guest(&disk, queues)?);
    }
    let attached: Vec<_> = guests.iter_mut().flat_map(|(_, attached)| attached).zip(0..).collect();
    let reports = thread::scope(|scope| {
        let run = |((queue, env, gpa), area): (&'_ mut Attached, u64)| {
            wake(queue, env, job(area, *gpa, seed.derive(area)), each)
        };
        let threads: Vec<_> = attached.into_iter().map(|one| scope.spawn(move || run(one))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    for report in reports {
        total.merge(&report?);
    }
    for (guest, attached) in guests {
        for (queue, mut env, _) in attached {
            env.take_latencies_ns()?;
            queue.close()?;
        }
        drop(guest);
    }
    let seconds = start.elapsed().as_secs_f64();
    eprintln!(
        "{} of {} submissions woke the SQ thread, in {seconds:.1} s: {total}",
        total.doorbells,
        total.operations()
    );
    ensure!(total.doorbells >= wakes, "the SQ threads were woken only {} times", total.doorbells);
    Ok(())
}

/// Works until the SQ thread was woken `wakes` times.
fn wake(queue: &mut GuestQueue, env: &mut ProcessEnv, job: Job, wakes: u64) -> Result<Report> {
    let mut expected = vec![0; usize::try_from(job.blocks())?];
    // The filling has no pauses.
    let filled = prefill(&Job { pause_ns: 0, ..job }, queue.ring(), env, &mut expected)?;
    ensure!(filled.is_clean(), "filling: {filled}");
    let seed = Seed::fixed(job.seed);
    let mut total = Report::default();
    for round in 0u64.. {
        let job = Job { seed: seed.derive(round).value(), ..job };
        let mut restless = Restless { env, random: seed.derive(("pauses", round)).rng() };
        let report = run(&job, queue.ring(), &mut restless, &mut expected)?;
        ensure!(report.is_clean(), "round {round}: {report}");
        total.merge(&report);
        if total.doorbells >= wakes {
            break;
        }
        let rounds_max = 20 + 10 * wakes / job.operations;
        ensure!(round < rounds_max, "the SQ thread hardly ever sleeps: {} wakes in {round} rounds", total.doorbells);
    }
    Ok(total)
}

/// The same driver, except that it never looks whether the SQ thread sleeps.
struct Deaf<'a, Q>(&'a mut Q);

impl<Q: BlockQueue> BlockQueue for Deaf<'_, Q> {
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal> {
        self.0.push(request)
    }

    fn publish(&mut self) -> bool {
        let _needed = self.0.publish();
        false
    }

    fn reap(&mut self) -> Option<Completion> {
        self.0.reap()
    }

    fn mute(&mut self) {
        self.0.mute();
    }

    fn unmute(&mut self) -> bool {
        self.0.unmute()
    }
}

/// Shows that the other tests can fail.
fn a_guest_that_does_not_ring() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let made = TestDisk::new(DiskKind::Ext4PageCache, AREA_BYTES)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    let (_guest, mut attached) = guest(&disk, 1)?;
    let (mut queue, mut env, gpa) = attached.pop().context("one queue")?;
    let job = Job { timeout_ns: 300_000_000, pause_ns: 50_000_000, write_percent: 100, ..job(0, gpa, seed) };
    let mut expected = vec![0; usize::try_from(job.blocks())?];
    let report = run(&job, &mut Deaf(queue.ring()), &mut env, &mut expected)?;
    ensure!(report.lost == 1 && report.operations() < job.operations, "{report}");
    // The SQ thread sleeps until the doorbell rings. Then it executes the request.
    ensure!(queue.ring().reap().is_none(), "the SQ thread woke up by itself");
    env.ring_doorbell();
    let done = ringpass_tests::raw_guest::within(Duration::from_secs(10), || queue.ring().reap().is_some());
    ensure!(done, "the request never completes");
    queue.close()?;
    Ok(())
}
