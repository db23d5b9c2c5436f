//! A guest mutes and unmutes its interrupts, and the broker replaces the completion eventfd. The guest notices every
//! completion.

use std::{
    hint,
    io::ErrorKind,
    os::fd::AsRawFd,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::{
    direct::{DirectQueue, SubmissionConfig},
    disk::Disk,
    ring::RingConfig,
};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, budget, test},
    needs::Need,
    process_guest::{GuestQueue, PageSize, Place, ProcessGuest, RamFile},
    raw_guest::SUBMISSIONS,
    seed::Seed,
};
use ringpass_workload::{
    BlockQueue, Completion, Environment, Job, ProcessEnv, PushRefusal, Report, Request, Verify, Wait, Wakeup,
    hostile::Extent, prefill, run,
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u32 = 512;
const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 64 };
/// The guest finds a completion without an interrupt only after this time.
const TIMEOUT_NS: u64 = 5_000_000_000;
/// The longest pause before the guest unmutes its interrupts: several times as long as a request takes.
const HESITATION_NS: u64 = 20_000;
/// Depths, and the share of each in the completions, in percent.
const DEPTHS: [(u32, u64); 3] = [(1, 15), (4, 15), (32, 20)];

fn main() -> ExitCode {
    let needs = || {
        let mut needs = DiskKind::Ext4PageCache.needs();
        needs.extend([Need::io_uring(), Need::cpus(2)]);
        needs
    };
    harness::run(vec![
        test("a_guest_that_mutes_and_unmutes_never_loses_a_completion", needs(), muting),
        test("a_guest_that_does_not_look_again_loses_a_completion", needs(), a_guest_that_does_not_look_again),
        test("a_replaced_completion_eventfd_never_loses_a_completion", needs(), replacing),
    ])
}

fn job(buffers_gpa: u64, depth: u32, wait: Wait, seed: Seed) -> Job {
    Job {
        area_offset_bytes: 0,
        area_bytes: MIB,
        operations: 1000,
        duration_ns: 0,
        timeout_ns: TIMEOUT_NS,
        pause_ns: 0,
        seed: seed.value(),
        buffers_gpa,
        buffer_stride_bytes: BLOCK_BYTES.into(),
        block_bytes: BLOCK_BYTES,
        depth,
        write_percent: 30,
        durable_percent: 0,
        wait,
        verify: Verify::On,
    }
}

/// A guest with one queue.
struct Guest {
    _guest: ProcessGuest,
    queue: GuestQueue,
    env: ProcessEnv,
    buffers_gpa: u64,
    /// The checksums of the blocks.
    expected: Vec<u64>,
}

impl Guest {
    fn new(disk: &Arc<Disk>, submission: SubmissionConfig) -> Result<Self> {
        let ram = RamFile::new(&[Extent { gpa: 0, len_bytes: MIB }], PageSize::Small)?;
        let mut guest = ProcessGuest::new(disk, ram, submission)?;
        let queue = guest.attach(RING, Place::GuestRam)?;
        let buffers = guest.allocator().allocate(64 << 10)?;
        let buffers_gpa = buffers.gpa();
        let env = queue.env(buffers)?;
        let mut guest = Self { _guest: guest, queue, env, buffers_gpa, expected: Vec::new() };
        let job = job(buffers_gpa, 32, Wait::Poll, Seed::fixed(1));
        guest.expected = vec![0; usize::try_from(job.blocks())?];
        let report = prefill(&job, guest.queue.ring(), &mut guest.env, &mut guest.expected)?;
        ensure!(report.is_clean(), "filling: {report}");
        Ok(guest)
    }

    fn close(mut self) -> Result<()> {
        self.env.take_latencies_ns()?;
        self.queue.close()?;
        Ok(())
    }
}

fn disk() -> Result<(TestDisk, Arc<Disk>)> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, MIB)?;
    let disk = Arc::new(Disk::open(&made.config())?);
    Ok((made, disk))
}

fn muting() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let completions: u64 = budget(1_000_000, 20_000_000);
    let (_made, disk) = disk()?;
    let mut total = Report::default();
    for submission in SUBMISSIONS {
        let mut guest = Guest::new(&disk, submission)?;
        for (depth, percent) in DEPTHS {
            let start = Instant::now();
            let seed = seed.derive((format!("{submission:?}"), depth));
            let operations = completions / 100 * percent;
            let job = Job { operations, ..job(guest.buffers_gpa, depth, Wait::InterruptMuting, seed) };
            let mut random = seed.derive("hesitating").rng();
            let hesitate = || {
                let (start, pause) = (Instant::now(), Duration::from_nanos(random.u64(..HESITATION_NS)));
                while start.elapsed() < pause {
                    hint::spin_loop();
                }
            };
            let mut queue = Hesitant { queue: guest.queue.ring(), hesitate, looks_again: true };
            let report = run(&job, &mut queue, &mut guest.env, &mut guest.expected)?;
            let seconds = start.elapsed().as_secs_f64();
            let Report { unmutes, sleeps, .. } = report;
            eprintln!("{seconds:5.2} s  depth {depth}, {submission:?}: {unmutes} unmutes, {sleeps} sleeps, {report}");
            ensure!(report.is_clean(), "depth {depth}, {submission:?}: {report}");
            // Without these the test would show nothing.
            ensure!(unmutes > operations / 1000 && sleeps > operations / 1000, "{unmutes} unmutes, {sleeps} sleeps");
            total.merge(&report);
        }
        guest.close()?;
    }
    ensure!(total.operations() >= completions, "{total}");
    Ok(())
}

/// A driver that pauses before it unmutes, so that completions come at any moment around that. Then it looks at the CQ
/// again, or not.
struct Hesitant<'a, Q, H> {
    queue: &'a mut Q,
    hesitate: H,
    looks_again: bool,
}

impl<Q: BlockQueue, H: FnMut()> BlockQueue for Hesitant<'_, Q, H> {
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal> {
        self.queue.push(request)
    }

    fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    fn reap(&mut self) -> Option<Completion> {
        self.queue.reap()
    }

    fn mute(&mut self) {
        self.queue.mute();
    }

    fn unmute(&mut self) -> bool {
        (self.hesitate)();
        let there = self.queue.unmute();
        there && self.looks_again
    }
}

/// Shows that the other test can fail: the only difference is the look that [`BlockQueue::unmute`] demands.
fn a_guest_that_does_not_look_again() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let (_made, disk) = disk()?;
    for submission in SUBMISSIONS {
        let report = hesitate(&disk, submission, seed, true, Duration::from_millis(10))?;
        ensure!(report.is_clean(), "{submission:?}: {report}");
        // The pauses are longer than a read from the page cache takes. On a busy machine that can be long, so they
        // grow.
        let pauses = [10, 40, 160, 640].map(Duration::from_millis);
        let loses = pauses.into_iter().try_fold(false, |loses, pause| -> Result<bool> {
            Ok(loses || hesitate(&disk, submission, seed, false, pause)?.missed_interrupts > 0)
        })?;
        ensure!(loses, "{submission:?}: no completion was lost");
    }
    Ok(())
}

/// Runs a job on a guest that pauses before it sleeps.
fn hesitate(
    disk: &Arc<Disk>,
    submission: SubmissionConfig,
    seed: Seed,
    looks_again: bool,
    pause: Duration,
) -> Result<Report> {
    let mut guest = Guest::new(disk, submission)?;
    // A guest that looks again never waits for a lost interrupt.
    let timeout = if looks_again { Duration::from_secs(30) } else { Duration::from_millis(200) };
    let job = Job {
        operations: 30,
        timeout_ns: timeout.as_nanos() as u64,
        ..job(guest.buffers_gpa, 1, Wait::InterruptMuting, seed)
    };
    let mut queue = Hesitant { queue: guest.queue.ring(), hesitate: || thread::sleep(pause), looks_again };
    let report = run(&job, &mut queue, &mut guest.env, &mut guest.expected)?;
    guest.close()?;
    Ok(report)
}

/// The guest's interrupt. Its eventfd changes, as when a VMM masks a vector: only the newest one counts, and a signal
/// to an older one is lost.
struct Vector {
    epoll: Epoll,
    newest: Mutex<EventFd>,
}

impl Vector {
    fn new(first: EventFd) -> Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, first.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        Ok(Self { epoll, newest: Mutex::new(first) })
    }

    fn replace(&self, queue: &DirectQueue) -> Result<()> {
        let new = eventfd()?;
        let theirs = new.try_clone()?;
        self.epoll.ctl(ControlOperation::Add, new.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        self.epoll.ctl(ControlOperation::Delete, newest.as_raw_fd(), EpollEvent::default())?;
        *newest = new;
        drop(newest);
        queue.replace_completion(Some(&theirs))?;
        Ok(())
    }

    /// Returns false if no interrupt came in this time.
    fn wait(&self, timeout: Duration) -> Result<bool> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            let mut events = [EpollEvent::default(); 2];
            match self.epoll.wait(i32::try_from(left.as_millis())?, &mut events) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
            // If the newest eventfd has no signal, the event was from the eventfd before.
            if newest.read().is_ok() {
                return Ok(true);
            }
        }
    }
}

/// The environment of a queue with such an interrupt.
struct Vectored<'a> {
    env: &'a mut ProcessEnv,
    vector: &'a Vector,
}

impl Environment for Vectored<'_> {
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
        match self.vector.wait(Duration::from_nanos(timeout_ns)).expect("an epoll instance can be waited for") {
            true => Wakeup::Interrupt,
            false => Wakeup::TimedOut,
        }
    }

    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        self.env.with_buffer(gpa, len_bytes, access)
    }

    fn record_latency(&mut self, latency_ns: u64) {
        self.env.record_latency(latency_ns);
    }
}

fn replacing() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let (_made, disk) = disk()?;
    for submission in SUBMISSIONS {
        let mut guest = Guest::new(&disk, submission)?;
        let first = eventfd()?;
        let vector = Vector::new(first.try_clone()?)?;
        let done = AtomicBool::new(false);
        let (queue, ring) = guest.queue.split();
        queue.replace_completion(Some(&first))?;
        let (env, expected, buffers_gpa) = (&mut guest.env, &mut guest.expected, guest.buffers_gpa);
        let total = thread::scope(|scope| -> Result<Report> {
            let replacing = scope.spawn(|| -> Result<()> {
                let mut random = seed.derive("replacing").rng();
                let result = (0..budget(1000, 20_000)).try_for_each(|_| {
                    thread::sleep(Duration::from_micros(random.u64(..1000)));
                    vector.replace(queue)
                });
                done.store(true, Ordering::Release);
                result
            });
            let mut total = Report::default();
            for round in 0u64.. {
                // With one or two requests at a time, no later completion hides that the guest missed one.
                let depth = 1 + (round % 2) as u32;
                let job = job(buffers_gpa, depth, Wait::Interrupt, seed.derive(round));
                let report = run(&job, ring, &mut Vectored { env, vector: &vector }, expected)?;
                ensure!(report.is_clean(), "{submission:?}, round {round}: {report}");
                total.merge(&report);
                if done.load(Ordering::Acquire) {
                    break;
                }
            }
            replacing.join().expect("no panic").context("cannot replace the eventfd")?;
            Ok(total)
        })?;
        eprintln!("{submission:?}: {} sleeps, {total}", total.sleeps);
        ensure!(total.sleeps > 1000, "the guest hardly ever waited for an interrupt: {} times", total.sleeps);
        guest.close()?;
    }
    Ok(())
}

fn eventfd() -> Result<EventFd> {
    Ok(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?)
}
