//! Queues and devices come and go while their guests work. Each ends soon, and nothing of it is left.

use std::{
    env, fmt, fs,
    process::{Command, ExitCode},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    sys::resource::{Resource, setrlimit},
};
use ringpass_broker::{
    direct::{DirectDevice, SubmissionConfig},
    disk::{Disk, DiskConfig},
    ring::RingConfig,
};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, budget, test},
    needs::Need,
    raw_guest::{BUFFERS_GPA, Driver, RAM_BYTES, Ram, SUBMISSIONS, attach, attach_window, device, within},
    seed::Seed,
};
use rustix::thread::CapabilitySet;

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
const DEPTH: u64 = 32;
/// A call that returns within this time returns at once, even on a busy machine. The I/O that it must not wait for
/// takes longer.
const AT_ONCE: Duration = Duration::from_secs(5);
const LIMIT: Duration = Duration::from_secs(60);

/// Set for the child process that pins memory under a limit: the disk.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_PIN";

fn main() -> ExitCode {
    if let Ok(disk) = env::var(CHILD_VARIABLE) {
        pin_again_and_again(&disk).expect("the memory can be pinned again");
        return ExitCode::SUCCESS;
    }
    let mut tests = Vec::new();
    for submission in SUBMISSIONS {
        let how = match submission {
            SubmissionConfig::SqThread(_) => "sq_thread",
            SubmissionConfig::Doorbell => "doorbell",
            other => unreachable!("{other:?} has no tests"),
        };
        tests.push(test(format!("an_idle_queue_ends_soon_{how}"), needs(), move || drained(submission)));
        tests.push(test(format!("queues_that_come_and_go_under_load_leave_nothing_{how}"), needs(), move || {
            come_and_go(submission)
        }));
        tests.push(test(format!("closing_does_not_wait_for_a_long_batch_{how}"), needs(), move || {
            long_batch(submission)
        }));
        tests.push(test(format!("a_device_ends_while_its_doorbells_ring_{how}"), needs(), move || ringing(submission)));
    }
    let mut memlock_needs = needs();
    memlock_needs.push(Need::root());
    tests.push(test("the_end_of_the_last_queue_unpins_the_memory", memlock_needs, memlock));
    harness::run(tests)
}

fn needs() -> Vec<Need> {
    let mut needs = DiskKind::Ext4Direct.needs();
    needs.push(Need::io_uring());
    needs
}

/// The kernel resources of this process.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Holdings {
    file_descriptors: usize,
    threads: usize,
    pinned_kib: u64,
}

impl Holdings {
    fn now() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let pinned = status.lines().find_map(|line| line.strip_prefix("VmPin:")).context("VmPin")?;
        Ok(Self {
            file_descriptors: fs::read_dir("/proc/self/fd")?.count(),
            threads: fs::read_dir("/proc/self/task")?.count(),
            pinned_kib: pinned.trim().trim_end_matches(" kB").parse()?,
        })
    }

    /// The resources once all rings and their kernel threads have ended, and every other thread but this one: the kernel
    /// lists a thread for a moment after it was joined.
    fn settled() -> Result<Self> {
        ensure!(within(LIMIT, || !has_ring_threads()), "kernel threads of ended rings are left");
        let is_alone = || Self::now().is_ok_and(|now| now.threads == 1);
        ensure!(within(LIMIT, is_alone), "threads are left beside the test's own: {}", Self::now()?);
        Self::now()
    }

    /// Waits until the process has these resources again. Kernel threads end a little later than their rings.
    fn ensure_again(self) -> Result<()> {
        let again = within(LIMIT, || !has_ring_threads() && Self::now().is_ok_and(|now| now == self));
        ensure!(again, "before: {self}; after: {}", Self::now()?);
        Ok(())
    }
}

/// Whether this process has an SQ thread or an io-wq worker, or a thread of a device.
fn has_ring_threads() -> bool {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return true };
    let mut names = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.any(|name| name.starts_with("iou-") || name.starts_with("ringpass-"))
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file_descriptors, threads, pinned_kib } = self;
        write!(f, "{file_descriptors} file descriptors, {threads} threads, {pinned_kib} KiB pinned")
    }
}

/// A guest that reads at random until the test stops it, even after its queue has ended.
fn work(mut driver: Driver, closed: &AtomicBool, stop: &AtomicBool, seed: Seed) -> Result<u64> {
    let mut random = seed.rng();
    let (mut in_flight, mut done) = (0, 0);
    while !stop.load(Ordering::Acquire) {
        let room = in_flight < DEPTH;
        if room {
            let offset_bytes = random.u64(..DISK_BYTES / u64::from(BLOCK_BYTES)) * u64::from(BLOCK_BYTES);
            let gpa = BUFFERS_GPA + random.u64(..256) * u64::from(BLOCK_BYTES);
            in_flight += u64::from(driver.push(false, gpa, BLOCK_BYTES, offset_bytes, 0)?);
            driver.submit()?;
        }
        // This must come before the look at the CQ: a request that completes later may have been cancelled.
        let was_closed = closed.load(Ordering::Acquire);
        let reaped = driver.reap();
        if let Some(cqe) = reaped {
            let cancelled = cqe.res == -libc::ECANCELED;
            ensure!(cqe.res == BLOCK_BYTES as i32 || (cancelled && was_closed), "a read has the result {}", cqe.res);
            in_flight -= 1;
            done += 1;
        } else if !room {
            thread::yield_now();
        }
    }
    Ok(done)
}

fn drained(submission: SubmissionConfig) -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let ram = Ram::new()?;
    let (memory, _) = ram.for_broker()?;
    for _ in 0..budget(5, 50) {
        let device = device(&disk.config(), &memory, submission)?;
        let (queue, mut driver) = attach(&device, &ram, 0, false)?;
        for block in 0..10 {
            let result = driver.run(block % 2 == 0, BUFFERS_GPA, BLOCK_BYTES, block * u64::from(BLOCK_BYTES))?;
            ensure!(result == BLOCK_BYTES as i32, "{result}");
        }
        // The SQ thread sleeps by now.
        thread::sleep(Duration::from_millis(20));
        let end = queue.close();
        drop(device);
        end.wait(LIMIT)?;
        // Nothing else has the disk, so the test does not wait for the lock.
        let config = disk.config().lock_wait(None);
        drop(Disk::open(&config).context("the lock after the end")?);
    }
    Ok(())
}

fn come_and_go(submission: SubmissionConfig) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let ram = Ram::new()?;
    let mut total = 0;
    // The first round allocates what a process has only once.
    total += round(&disk, &ram, submission, seed.derive("first"))?;
    let before = Holdings::settled()?;
    for index in 0..budget(10u32, 100) {
        total += round(&disk, &ram, submission, seed.derive(index))?;
    }
    before.ensure_again()?;
    eprintln!("{total} reads");
    ensure!(total > 0, "there was no load");
    Ok(())
}

/// Runs ten queues, up to two at a time, and closes each at any moment of its guest's work.
fn round(disk: &TestDisk, ram: &Ram, submission: SubmissionConfig, seed: Seed) -> Result<u64> {
    let (memory, held) = ram.for_broker()?;
    let device = device(&disk.config(), &memory, submission)?;
    drop(memory);
    let workers = [0, 1].map(|lane: u64| (lane, seed.derive(lane)));
    let total = thread::scope(|scope| -> Result<u64> {
        let lanes = workers.map(|(lane, seed)| {
            let device = &device;
            scope.spawn(move || {
                (0..5).map(|at| one_queue(device, ram, lane * 5 + at, seed.derive(at))).sum::<Result<u64>>()
            })
        });
        let mut total = 0;
        for lane in lanes {
            total += lane.join().expect("no panic")?;
        }
        Ok(total)
    })?;
    drop(device);
    ensure!(held.upgrade().is_none(), "the guest's memory is still held after the end of all queues");
    Ok(total)
}

fn one_queue(device: &DirectDevice, ram: &Ram, index: u64, seed: Seed) -> Result<u64> {
    let mut random = seed.rng();
    let mut pause = |up_to_us| thread::sleep(Duration::from_micros(random.u64(..up_to_us)));
    let (queue, driver) = attach(device, ram, index, false)?;
    let (closed, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let (done, end) = thread::scope(|scope| {
        let guest = scope.spawn(|| work(driver, &closed, &stop, seed));
        pause(15_000);
        closed.store(true, Ordering::Release);
        let start = Instant::now();
        let end = queue.close();
        let took = start.elapsed();
        pause(5_000);
        stop.store(true, Ordering::Release);
        (guest.join().expect("no panic"), (end, took))
    });
    let (end, took) = end;
    ensure!(took < AT_ONCE, "close() took {took:?}");
    end.wait(LIMIT)?;
    done
}

/// The device, its queues, and the threads that ring doorbells end in any order.
fn ringing(submission: SubmissionConfig) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut random = seed.rng();
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let ram = Ram::new()?;
    let mut before = None;
    for _ in 0..budget(20, 500) {
        let (memory, held) = ram.for_broker()?;
        let device = device(&disk.config(), &memory, submission)?;
        drop(memory);
        let attached = [0, 1].map(|index| attach(&device, &ram, index, false));
        let mut queues = Vec::new();
        let mut drivers = Vec::new();
        for attached in attached {
            let (queue, driver) = attached?;
            queues.push(queue);
            drivers.push(driver);
        }
        let stop = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let ringers: Vec<_> = drivers
                .into_iter()
                .map(|driver| {
                    let stop = &stop;
                    scope.spawn(move || -> Result<()> {
                        while !stop.load(Ordering::Acquire) {
                            driver.ring_doorbell()?;
                        }
                        Ok(())
                    })
                })
                .collect();
            let mut device = Some(device);
            let device_goes_at = random.usize(..=queues.len());
            for at in 0..=queues.len() + 1 {
                thread::sleep(Duration::from_micros(random.u64(..2_000)));
                if at == device_goes_at {
                    device = None;
                }
                queues.pop();
            }
            drop(device);
            stop.store(true, Ordering::Release);
            ringers.into_iter().try_for_each(|ringer| ringer.join().expect("no panic"))
        })?;
        ensure!(within(LIMIT, || held.upgrade().is_none()), "the guest's memory is never freed");
        // The rings of the first round have ended. That round allocates what a process has only once.
        match before {
            None => before = Some(Holdings::settled()?),
            Some(before) => before.ensure_again()?,
        }
    }
    Ok(())
}

/// A guest decides how long the kernel works on one batch. That must not delay the thread that closes the queue.
fn long_batch(submission: SubmissionConfig) -> Result<()> {
    // The longest that one SQE can read, and enough of them for more than a second on any machine.
    const READ_BYTES: u32 = 4 << 20;
    let disk = TestDisk::new(DiskKind::Ext4PageCache, READ_BYTES.into())?;
    let ram = Ram::with_len(READ_BYTES.into())?;
    let (memory, _) = ram.for_broker()?;
    let device = device(&disk.config(), &memory, submission)?;
    let (queue, mut driver) = attach_window(&device, RingConfig { sq_entries: 4096, cq_entries: 4096 })?;
    let layout = driver.layout();
    for index in 0..u64::from(layout.sq_entries) {
        ensure!(driver.push(false, 0, READ_BYTES, 0, index)?, "no room");
    }
    driver.submit()?;
    // The kernel may post the completions of a batch only at its end, so the test does not wait for one.
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    let end = queue.close();
    let took = start.elapsed();
    ensure!(took < AT_ONCE, "close() took {took:?}");
    let mut early = 0;
    while driver.reap().is_some() {
        early += 1;
    }
    ensure!(early < layout.sq_entries / 2, "the batch was not long: {early} reads are done");
    drop(driver);
    end.wait(6 * LIMIT)?;
    Ok(())
}

/// Runs in a process of its own, because it gives up a capability.
fn memlock() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let child = Command::new(env::current_exe()?).env(CHILD_VARIABLE, disk.path()).output()?;
    ensure!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    Ok(())
}

/// The limit has room for one guest at a time. The next guest can start as soon as the previous one's end is known.
fn pin_again_and_again(disk: &str) -> Result<()> {
    let mut capabilities = rustix::thread::capabilities(None)?;
    capabilities.effective.remove(CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, capabilities)?;
    let limit_bytes = RAM_BYTES + RAM_BYTES / 2;
    setrlimit(Resource::RLIMIT_MEMLOCK, limit_bytes, limit_bytes)?;
    for submission in SUBMISSIONS.into_iter().cycle().take(20) {
        let ram = Ram::new()?;
        let (memory, _) = ram.for_broker()?;
        let device = device(&DiskConfig::new(disk), &memory, submission)?;
        let (queue, mut driver) = attach(&device, &ram, 0, false)?;
        let result = driver.run(false, BUFFERS_GPA, BLOCK_BYTES, 0)?;
        ensure!(result == BLOCK_BYTES as i32, "{result}");
        drop(device);
        queue.close().wait(LIMIT)?;
    }
    Ok(())
}
