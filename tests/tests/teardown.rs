//! The end of queues, devices and brokers with I/O in flight. `close` returns at once, everything that the I/O can
//! still touch stays until its end, and then everything is free again.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::{Disk, DiskConfig},
    ring::{RingEnd, StillRunning},
};
use ringpass_guest_abi::RingLayout;
use ringpass_tests::{
    harness::{self, test},
    raw_guest::{BUFFERS_GPA, CompletionQueue, Driver, RAM_BYTES, Ram, SUBMISSIONS, attach, device, within},
    stuck_disk::{self, StuckDisk, StuckKind},
};

const DISK_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u32 = 4096;
/// More writes than there are io-wq workers.
const WRITES: u64 = 24;
const READS: u64 = 8;
/// A call that returns within this time returns at once, even on a busy machine. The I/O that it must not wait for
/// takes longer.
const AT_ONCE: Duration = Duration::from_secs(5);
/// How long a test watches that something does not happen.
const QUIET: Duration = Duration::from_millis(300);
const LIMIT: Duration = Duration::from_secs(60);

/// Set for a child process: its task.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_TEARDOWN";

fn main() -> ExitCode {
    if let Ok(task) = env::var(CHILD_VARIABLE) {
        child(&task).expect("the child's task");
        return ExitCode::SUCCESS;
    }
    let mut tests = Vec::new();
    for submission in SUBMISSIONS {
        let how = name(submission);
        for kind in [StuckKind::LoopDevice, StuckKind::File] {
            tests.push(test(
                format!("closing_returns_at_once_and_the_end_waits_for_the_io_{kind}_{how}"),
                StuckDisk::needs(),
                move || [false, true].into_iter().try_for_each(|window| stuck_io(kind, submission, window)),
            ));
        }
        tests.push(test(
            format!("a_killed_brokers_disk_is_locked_until_its_io_has_ended_{how}"),
            StuckDisk::needs(),
            move || a_killed_broker(submission),
        ));
    }
    tests.push(test("the_doorbell_thread_lives_until_its_io_has_ended", StuckDisk::needs(), the_doorbell_thread));
    harness::run(tests)
}

fn name(submission: SubmissionConfig) -> &'static str {
    match submission {
        SubmissionConfig::SqThread(_) => "sq_thread",
        SubmissionConfig::Doorbell => "doorbell",
        other => unreachable!("{other:?} has no tests"),
    }
}

fn submission(name: &str) -> Result<SubmissionConfig> {
    SUBMISSIONS.into_iter().find(|submission| self::name(*submission) == name).context("a way of submission")
}

fn child(task: &str) -> Result<()> {
    let argument = |at| env::args().nth(at).with_context(|| format!("argument {at}"));
    match task {
        // Prints why the disk cannot be opened.
        "open" => match Disk::open(&DiskConfig::new(argument(1)?)) {
            Ok(_) => println!("opened"),
            Err(error) => println!("{error}"),
        },
        // A broker and its guest, which submit requests and then wait for the kill.
        "broker" => {
            let ram = Ram::open(&argument(2)?)?;
            let (memory, _) = ram.for_broker()?;
            let device = device(&DiskConfig::new(argument(1)?), &memory, submission(&argument(3)?)?)?;
            let (_queue, mut driver) = attach(&device, &ram, 0, false)?;
            let layout = driver.layout();
            submit(&ram, &mut driver, READS)?;
            wait_until_consumed(&ram, &layout, WRITES + READS)?;
            let completions = CompletionQueue::new(0, &layout);
            println!("submitted {} {}", completions.tail_gpa, completions.cqes_gpa);
            std::io::stdout().flush()?;
            std::io::stdin().read_line(&mut String::new())?;
        }
        _ => bail!("unknown task {task}"),
    }
    Ok(())
}

fn command(task: &str, disk: &StuckDisk) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.arg(disk.path()).env(CHILD_VARIABLE, task).stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(command)
}

/// The block and buffer of request `index`, which is also its user data: writes first, then reads.
fn place(index: u64) -> (u64, u64) {
    (index * u64::from(BLOCK_BYTES), BUFFERS_GPA + index * u64::from(BLOCK_BYTES))
}

/// What write `index` writes.
fn written_byte(index: u64) -> u8 {
    index as u8 + 1
}

/// Submits writes and then `reads` reads.
fn submit(ram: &Ram, driver: &mut Driver, reads: u64) -> Result<()> {
    for index in 0..WRITES + reads {
        let (offset_bytes, gpa) = place(index);
        ram.fill(gpa, BLOCK_BYTES as usize, if index < WRITES { written_byte(index) } else { 0 })?;
        ensure!(driver.push(index < WRITES, gpa, BLOCK_BYTES, offset_bytes, index)?, "no room for request {index}");
    }
    driver.submit()
}

fn wait_until_consumed(ram: &Ram, layout: &RingLayout, count: u64) -> Result<()> {
    let mut consumed = 0;
    let all = within(LIMIT, || {
        consumed = ram.consumed(0, layout).unwrap_or(0);
        u64::from(consumed) == count
    });
    ensure!(all, "{consumed} of {count} SQEs were consumed");
    Ok(())
}

/// The results by request. Checks that each request has exactly one.
fn results(ram: &Ram, queue: CompletionQueue, count: u64) -> Result<Vec<i32>> {
    let completions = ram.completions(queue)?;
    let by_request: BTreeMap<u64, i32> = completions.iter().map(|cqe| (cqe.user_data, cqe.res)).collect();
    ensure!(completions.len() as u64 == count, "{} of {count} completions: {by_request:?}", completions.len());
    ensure!(by_request.keys().copied().eq(0..count), "completions are doubled or made up: {by_request:?}");
    Ok(by_request.into_values().collect())
}

/// Checks that the guest's memory and the disk agree with the results.
fn check_content(disk: &StuckDisk, ram: &Ram, results: &[i32]) -> Result<()> {
    let file = File::open(disk.path())?;
    for (index, &result) in (0..).zip(results) {
        let (offset_bytes, gpa) = place(index);
        let executed = result == BLOCK_BYTES as i32;
        let mut block = vec![0; BLOCK_BYTES as usize];
        let expected = if index < WRITES {
            file.read_exact_at(&mut block, offset_bytes)?;
            if executed { written_byte(index) } else { StuckDisk::INITIAL_BYTE }
        } else {
            block = ram.bytes(gpa, BLOCK_BYTES as usize)?;
            if executed { StuckDisk::INITIAL_BYTE } else { 0 }
        };
        ensure!(
            block.iter().all(|&byte| byte == expected),
            "request {index} with result {result}: {:#x?}",
            &block[..4]
        );
    }
    Ok(())
}

/// Checks that nothing in the guest's memory changes any more, not even the rings.
fn check_quiet(ram: &Ram) -> Result<()> {
    const FILLED: u8 = 0xee;
    ram.fill(0, RAM_BYTES as usize, FILLED)?;
    thread::sleep(QUIET);
    let changed = ram.bytes(0, RAM_BYTES as usize)?.iter().position(|&byte| byte != FILLED);
    ensure!(changed.is_none(), "guest memory at {changed:x?} changed after the end");
    Ok(())
}

fn stuck_io(kind: StuckKind, submission: SubmissionConfig, window: bool) -> Result<()> {
    // Reads hang behind a write in the loop device; those of a file do not hang.
    let reads = if kind == StuckKind::LoopDevice { READS } else { 0 };
    let disk = StuckDisk::new(kind, DISK_BYTES)?;
    let ram = Ram::new()?;
    let (memory, held) = ram.for_broker()?;
    let device = device(&disk.config(), &memory, submission)?;
    drop(memory);
    let (queue, mut driver) = attach(&device, &ram, 0, window)?;
    let layout = driver.layout();
    disk.freeze()?;
    submit(&ram, &mut driver, reads)?;
    if !window {
        // The kernel has now issued all requests, except those for its workers.
        wait_until_consumed(&ram, &layout, WRITES + reads)?;
    }
    disk.wait_for_hanging_write(|| stuck_disk::has_hanging_thread(std::process::id()))?;
    ensure!(driver.reap().is_none(), "a request completed on a frozen disk");

    let start = Instant::now();
    let end = queue.close();
    let took = start.elapsed();
    ensure!(took < AT_ONCE, "close() took {took:?}");
    // The guest's mapping of a window must go before the end.
    drop(driver);
    drop(device);
    ensure_still_running(&end)?;
    ensure!(held.upgrade().is_some(), "the guest's memory was freed with I/O in flight");
    let me = format!("[{}]", std::process::id());
    let refusal = Disk::open(&disk.config()).err().context("the disk could be opened twice")?.to_string();
    ensure!(refusal.contains(&me), "{refusal}");
    let elsewhere = String::from_utf8(command("open", &disk)?.output()?.stdout)?;
    ensure!(elsewhere.contains(&me), "another process: {elsewhere}");

    disk.thaw()?;
    end.wait(LIMIT)?;
    ensure!(end.has_ended());
    ensure!(held.upgrade().is_none(), "the guest's memory is still held after the end");
    drop(Disk::open(&disk.config()).context("the lock after the end")?);
    if !window {
        let results = results(&ram, CompletionQueue::new(0, &layout), WRITES + reads)?;
        let cancelled = results.iter().filter(|&&result| result == -libc::ECANCELED).count();
        let done = results.iter().filter(|&&result| result == BLOCK_BYTES as i32).count();
        ensure!(done + cancelled == results.len(), "some requests were neither executed nor cancelled: {results:?}");
        match kind {
            StuckKind::LoopDevice => ensure!(cancelled == 0, "issued I/O was cancelled: {results:?}"),
            StuckKind::File => ensure!(
                done > 0 && cancelled > 0,
                "the workers' requests must be executed and the queued ones cancelled: {results:?}"
            ),
        }
        check_content(&disk, &ram, &results)?;
    }
    check_quiet(&ram)
}

fn ensure_still_running(end: &RingEnd) -> Result<()> {
    let start = Instant::now();
    let error = end.wait(QUIET).err().context("the end was reported with I/O in flight")?;
    ensure!(start.elapsed() >= QUIET && start.elapsed() < QUIET + AT_ONCE, "wait() took {:?}", start.elapsed());
    ensure!(matches!(error, StillRunning::Closed { since_close } if since_close >= QUIET), "{error}");
    let message = error.to_string();
    ensure!(message.starts_with("I/O of the ring is still under way "), "{message}");
    ensure!(message.ends_with(" the guest's memory stays in use until it ends"), "{message}");
    ensure!(!end.has_ended() && end.ended_after().is_none());
    Ok(())
}

/// A child process. The drop kills it.
struct Broker(Child);

impl Drop for Broker {
    fn drop(&mut self) {
        // The process may have ended already. The drop does not wait for its end, which hanging I/O can delay for ever.
        let _ = self.0.kill();
    }
}

fn a_killed_broker(submission: SubmissionConfig) -> Result<()> {
    let disk = StuckDisk::new(StuckKind::LoopDevice, DISK_BYTES)?;
    let ram = Ram::new()?;
    disk.freeze()?;
    let mut command = command("broker", &disk)?;
    let mut broker = Broker(command.arg(ram.path()).arg(name(submission)).spawn()?);
    let mut line = String::new();
    BufReader::new(broker.0.stdout.as_mut().context("a pipe")?).read_line(&mut line)?;
    let numbers: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    let &[tail_gpa, cqes_gpa] = &*numbers else { bail!("the child says {line:?}") };
    broker.0.kill()?;
    // The kernel ends an SQ thread, and with it the process, only after its requests. Without an SQ thread the process
    // is gone, and only the lock shows the I/O.
    if submission == SubmissionConfig::Doorbell {
        let reaped = within(LIMIT, || broker.0.try_wait().is_ok_and(|status| status.is_some()));
        ensure!(reaped, "the killed process does not end");
    }
    let refusal = || Disk::open(&disk.config()).err().map(|error| error.to_string());
    let expected = "by I/O still in flight from a process that has ended";
    // While the kernel ends a process, its files may still be open.
    ensure!(within(LIMIT, || refusal().is_some_and(|text| text.contains(expected))), "{:?}", refusal());
    thread::sleep(QUIET);
    let text = refusal().context("the disk is free with I/O in flight")?;
    ensure!(text.contains(expected), "{text}");
    disk.thaw()?;
    // A process that gets the lock knows that all I/O has ended.
    let opened = Disk::open(&disk.config_waiting())?;
    let results = results(&ram, CompletionQueue { tail_gpa, cqes_gpa }, WRITES + READS)?;
    drop(opened);
    ensure!(results.iter().all(|&result| result == BLOCK_BYTES as i32), "{results:?}");
    ensure!(within(LIMIT, || broker.0.try_wait().is_ok_and(|status| status.is_some())), "the process does not end");
    check_content(&disk, &ram, &results)?;
    check_quiet(&ram)
}

/// In doorbell mode requests belong to the thread that entered the ring. It must live until they end, even when the
/// device is gone.
fn the_doorbell_thread() -> Result<()> {
    let bell_threads = || -> Result<usize> {
        let names = fs::read_dir("/proc/self/task")?.map(|task| fs::read_to_string(task?.path().join("comm")));
        Ok(names.filter(|name| name.as_ref().is_ok_and(|name| name.trim_end() == "ring-doorbell")).count())
    };
    let disk = StuckDisk::new(StuckKind::LoopDevice, DISK_BYTES)?;
    let ram = Ram::new()?;
    let (memory, _) = ram.for_broker()?;
    let device = device(&disk.config(), &memory, SubmissionConfig::Doorbell)?;
    let (queue, mut driver) = attach(&device, &ram, 0, false)?;
    let layout = driver.layout();
    disk.freeze()?;
    submit(&ram, &mut driver, READS)?;
    wait_until_consumed(&ram, &layout, WRITES + READS)?;
    ensure!(bell_threads()? == 1);
    // This is the order in which an ending process drops them. The test does not wait for the end of the ring.
    drop(device);
    drop(queue);
    drop(memory);
    thread::sleep(QUIET);
    ensure!(bell_threads()? == 1, "the doorbell thread has ended with I/O in flight");
    disk.thaw()?;
    ensure!(within(LIMIT, || bell_threads().is_ok_and(|count| count == 0)), "the doorbell thread does not end");
    let results = results(&ram, CompletionQueue::new(0, &layout), WRITES + READS)?;
    ensure!(results.iter().all(|&result| result == BLOCK_BYTES as i32), "{results:?}");
    check_content(&disk, &ram, &results)
}
