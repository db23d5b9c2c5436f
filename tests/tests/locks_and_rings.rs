//! The disk's lock and the rings on it: a second writer gets the disk only after the last ring has ended.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::{Disk, DiskConfig},
    memory::{PinnedMemory, Sharing},
    ring::{IoWorkers, KernelRing, Placement, RingCloser, SqThread, SqThreadConfig, Submission},
};
use ringpass_restrictions::{Access, Policy};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, test},
    needs::Need,
    raw_guest::{BUFFERS_GPA, RING, Ram, SUBMISSIONS, attach, device, within},
    stuck_disk::{StuckDisk, StuckKind},
};

const DISK_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u32 = 4096;
const LIMIT: Duration = Duration::from_secs(60);
/// The refusal if the kernel names no process that has the disk.
const NOBODY: &str = "by I/O still in flight from a process that has ended";

/// Set for the child process that has a queue: `read-write` or `read-only`. Its arguments are the disk and the index of
/// the submission.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_QUEUE";

fn main() -> ExitCode {
    if let Ok(how) = env::var(CHILD_VARIABLE) {
        child(how == "read-only").expect("the child's queue");
        return ExitCode::SUCCESS;
    }
    let mut tests = Vec::new();
    for kind in [DiskKind::Ext4Direct, DiskKind::Loop] {
        let needs = || {
            let mut needs = kind.needs();
            needs.push(Need::io_uring());
            needs
        };
        tests.push(test(format!("a_ring_keeps_the_lock_of_a_dropped_disk_{kind}"), needs(), move || {
            [false, true].into_iter().try_for_each(|sq_thread| dropped_disk(kind, sq_thread))
        }));
        tests.push(test(format!("the_lock_is_free_after_the_end_of_the_last_queue_{kind}"), needs(), move || {
            SUBMISSIONS.into_iter().try_for_each(|submission| two_queues(kind, submission))
        }));
        tests.push(test(format!("a_killed_broker_with_an_idle_queue_leaves_no_lock_{kind}"), needs(), move || {
            SUBMISSIONS.into_iter().try_for_each(|submission| killed(kind, submission))
        }));
        tests.push(test(format!("brokers_share_a_read_only_disk_and_keep_writers_out_{kind}"), needs(), move || {
            SUBMISSIONS.into_iter().try_for_each(|submission| read_only(kind, submission))
        }));
    }
    tests.push(test("a_broker_that_waits_for_the_lock_gets_it_after_the_last_io", StuckDisk::needs(), || {
        SUBMISSIONS.into_iter().try_for_each(waiting)
    }));
    harness::run(tests)
}

fn child(read_only: bool) -> Result<()> {
    let argument = |at| env::args().nth(at).context("an argument");
    let submission = SUBMISSIONS[argument(2)?.parse::<usize>()?];
    let ram = Ram::new()?;
    let (memory, _) = ram.for_broker()?;
    let device = device(&DiskConfig::new(argument(1)?).read_only(read_only), &memory, submission)?;
    let (_queue, mut driver) = attach(&device, &ram, 0, false)?;
    let result = driver.run(false, BUFFERS_GPA, BLOCK_BYTES, 0)?;
    println!("read {result}");
    std::io::stdout().flush()?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// A child process with an idle queue. The drop kills it.
struct Broker(Child);

impl Broker {
    fn start(disk: &Path, submission: SubmissionConfig, how: &str) -> Result<Self> {
        let index = SUBMISSIONS.iter().position(|&one| one == submission).context("a way of submission")?;
        let child = Command::new(env::current_exe()?)
            .arg(disk)
            .arg(index.to_string())
            .env(CHILD_VARIABLE, how)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut broker = Self(child);
        let mut line = String::new();
        BufReader::new(broker.0.stdout.as_mut().context("a pipe")?).read_line(&mut line)?;
        ensure!(line == format!("read {BLOCK_BYTES}\n"), "the child says {line:?}");
        Ok(broker)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn now(config: &DiskConfig) -> DiskConfig {
    config.clone().lock_wait(None)
}

fn refusal(config: &DiskConfig) -> Result<String> {
    Ok(Disk::open(&now(config)).err().context("the disk was not refused")?.to_string())
}

/// Makes a ring without a device, so that only the ring holds the disk.
fn dropped_disk(kind: DiskKind, sq_thread: bool) -> Result<()> {
    let made = TestDisk::new(kind, DISK_BYTES)?;
    let ram = Ram::new()?;
    let (memory, _) = ram.for_broker()?;
    let pinned = PinnedMemory::pin(&memory, Sharing::Clone)?;
    let policy = Policy::direct(Access::ReadWrite).compile(&ringpass_broker::kernel::support()?)?;
    let submission = match sq_thread {
        true => Submission::SqThread(Arc::new(SqThread::new(SqThreadConfig::default())?)),
        false => Submission::Doorbell,
    };
    let closer = RingCloser::start()?;
    let disk = Disk::open(&made.config())?;
    let ring = KernelRing::create(RING, submission, &Placement::Window, disk.as_fd(), &closer)?
        .attach_memory(&pinned)?
        .limit_workers(IoWorkers::default())?
        .restrict(&policy)?
        .enable()?;
    drop(disk);
    let text = refusal(&made.config())?;
    ensure!(text.contains(NOBODY), "{text}");
    ring.close(Box::new(())).wait(LIMIT)?;
    Disk::open(&now(&made.config())).context("the lock after the end")?;
    Ok(())
}

fn two_queues(kind: DiskKind, submission: SubmissionConfig) -> Result<()> {
    let made = TestDisk::new(kind, DISK_BYTES)?;
    let ram = Ram::new()?;
    let (memory, _) = ram.for_broker()?;
    let device = device(&made.config(), &memory, submission)?;
    let (first, mut first_driver) = attach(&device, &ram, 0, false)?;
    let (second, mut second_driver) = attach(&device, &ram, 1, false)?;
    drop(device);
    for driver in [&mut first_driver, &mut second_driver] {
        let result = driver.run(true, BUFFERS_GPA, BLOCK_BYTES, 0)?;
        ensure!(result == BLOCK_BYTES as i32, "{result}");
    }
    first.close().wait(LIMIT)?;
    let text = refusal(&made.config())?;
    ensure!(text.contains(&format!("[{}]", std::process::id())), "{text}");
    let result = second_driver.run(false, BUFFERS_GPA, BLOCK_BYTES, 0)?;
    ensure!(result == BLOCK_BYTES as i32, "the remaining queue: {result}");
    second.close().wait(LIMIT)?;
    Disk::open(&now(&made.config())).context("the lock after the end")?;
    Ok(())
}

fn killed(kind: DiskKind, submission: SubmissionConfig) -> Result<()> {
    let made = TestDisk::new(kind, DISK_BYTES)?;
    let broker = Broker::start(made.path(), submission, "read-write")?;
    let text = refusal(&made.config())?;
    ensure!(text.contains(&format!("[{}]", broker.0.id())), "{text}");
    drop(broker);
    let start = Instant::now();
    Disk::open(&made.config().lock_wait(LIMIT))?;
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(2), "it took {took:?}");
    Ok(())
}

fn read_only(kind: DiskKind, submission: SubmissionConfig) -> Result<()> {
    let made = TestDisk::new(kind, DISK_BYTES)?;
    let config = made.config().read_only(true);
    let rams = [Ram::new()?, Ram::new()?];
    let mut brokers = Vec::new();
    for ram in &rams {
        let (memory, _) = ram.for_broker()?;
        let device = device(&now(&config), &memory, submission)?;
        let (queue, mut driver) = attach(&device, ram, 0, false)?;
        let result = driver.run(false, BUFFERS_GPA, BLOCK_BYTES, 0)?;
        ensure!(result == BLOCK_BYTES as i32, "{result}");
        brokers.push((device, queue, driver));
    }
    let elsewhere = Broker::start(made.path(), submission, "read-only")?;
    let text = refusal(&made.config())?;
    ensure!(text.contains(" is locked: "), "{text}");

    // The brokers end one after the other, and the last one keeps writers out.
    for (device, queue, mut driver) in brokers {
        let result = driver.run(true, BUFFERS_GPA, BLOCK_BYTES, 0)?;
        ensure!(result == -nix::libc::EACCES, "a write to a read-only disk: {result}");
        drop(device);
        queue.close().wait(LIMIT)?;
        let text = refusal(&made.config())?;
        ensure!(text.contains(&format!("[{}]", elsewhere.0.id())), "{text}");
    }
    drop(elsewhere);
    Disk::open(&made.config().lock_wait(LIMIT))?;
    Ok(())
}

fn waiting(submission: SubmissionConfig) -> Result<()> {
    let disk = StuckDisk::new(StuckKind::LoopDevice, DISK_BYTES)?;
    let ram = Ram::new()?;
    let (memory, _) = ram.for_broker()?;
    let device = device(&disk.config(), &memory, submission)?;
    let (queue, mut driver) = attach(&device, &ram, 0, false)?;
    let layout = driver.layout();
    disk.freeze()?;
    ensure!(driver.push(true, BUFFERS_GPA, BLOCK_BYTES, 0, 0)?);
    driver.submit()?;
    ensure!(
        within(LIMIT, || ram.consumed(0, &layout).is_ok_and(|count| count == 1)),
        "the kernel does not consume the write"
    );
    drop(device);
    let end = queue.close();

    let config = disk.config().lock_wait(Duration::from_millis(100));
    let text = Disk::open(&config).err().context("the disk was not refused")?.to_string();
    ensure!(text.contains("(still so after waiting 0.1 s)"), "{text}");
    let config = disk.config_waiting();
    let opening = thread::spawn(move || Disk::open(&config).map(drop));
    thread::sleep(Duration::from_millis(300));
    ensure!(!opening.is_finished() && !end.has_ended(), "the disk was opened with I/O in flight");
    disk.thaw()?;
    opening.join().expect("no panic")?;
    // The lock is free only after the last I/O.
    let result = driver.reap().context("the write has no result")?.res;
    ensure!(result == BLOCK_BYTES as i32, "{result}");
    end.wait(LIMIT)?;
    Ok(())
}
