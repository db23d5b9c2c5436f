//! A KVM guest or its whole monitor ends while its I/O hangs. The ring's end, the memory and the disk's lock wait for
//! the real end of that I/O.

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ringpass_bare_metal::Command as Work;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::disk::{DirectIo, Disk, DiskConfig};
use ringpass_broker::ring::RingEnd;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::process_guest::Place;
use ringpass_tests::raw_guest::{CompletionQueue, Ram, within};
use ringpass_tests::seed::Seed;
use ringpass_tests::stuck_disk::{self, StuckDisk, StuckKind};
use ringpass_vmm::VmmError;
use ringpass_workload::{Job, Verify};

const BLOCKS: u64 = 256;
const BLOCK_BYTES: u32 = 4096;
const DISK_BYTES: u64 = BLOCKS * BLOCK_BYTES as u64;
const DEPTH: u32 = 16;
/// How long a test watches that something does not happen.
const QUIET: Duration = Duration::from_millis(300);
const LIMIT: Duration = Duration::from_secs(60);
/// When the test kills the monitor, in microseconds after the monitor says that it starts its guest.
const MOMENT_US: Range<u64> = 1_000..12_000;

/// Set for a child process, which is a monitor with a guest. The value says how the guest submits.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_KVM_CHILD";

fn main() -> ExitCode {
    if let Ok(how) = env::var(CHILD_VARIABLE) {
        monitor(&how).expect("the child's task");
        return ExitCode::SUCCESS;
    }
    let needs = || [Need::kvm(), Need::cpus(2)].into_iter().chain(StuckDisk::needs());
    let mut tests = Vec::new();
    for end in [End::Stopped, End::Dropped, End::Died] {
        let name = format!("{end:?}").to_lowercase();
        tests.push(test(
            format!("the_ring_holds_memory_and_disk_until_its_hanging_io_ends_guest_{name}"),
            needs(),
            move || {
                stuck(end, Place::GuestRam, sq_thread(1))?;
                stuck(end, Place::Window, SubmissionConfig::Doorbell)
            },
        ));
    }
    for how in ["sq_thread", "doorbell"] {
        let name = format!("the_disk_of_a_killed_monitor_is_locked_until_its_hanging_io_has_ended_{how}");
        tests.push(test(name, needs(), move || killed_with_hanging_io(how)));
    }
    let needs = needs().chain(DiskKind::Ext4Direct.needs());
    tests.push(test("a_monitor_killed_during_io_changes_neither_memory_nor_disk_afterwards", needs, killed));
    harness::run(tests)
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Its vCPU is stopped, then its queue is detached.
    Stopped,
    /// The guest is dropped, and the test does not wait for the rings.
    Dropped,
    /// The guest jumps to a bad address, and KVM cannot run it any further.
    Died,
}

fn guest(disk: DiskConfig, place: Place, submission: SubmissionConfig) -> Result<KvmGuest> {
    KvmGuest::start(KvmGuestConfig { place, submission, ..KvmGuestConfig::new(disk) })
}

/// The guest's RAM, as the test reads it.
fn ram_of(process: u32, fd: i32) -> Result<Ram> {
    Ram::open(&format!("/proc/{process}/fd/{fd}"))
}

fn stuck(end: End, place: Place, submission: SubmissionConfig) -> Result<()> {
    let disk = StuckDisk::new(StuckKind::LoopDevice, DISK_BYTES)?;
    let mut guest = guest(disk.config(), place, submission)?;
    let ram = ram_of(std::process::id(), guest.ram_file().as_raw_fd())?;
    let ram_bytes = guest.memory().len_bytes();
    let held = Arc::downgrade(guest.ram_file());
    let layout = *guest.queues()[0].layout();
    disk.freeze()?;
    let timeout = if end == End::Died { QUIET } else { Duration::from_secs(60) };
    let job = Job { timeout_ns: timeout.as_nanos() as u64, ..guest.job(0, BLOCK_BYTES, DEPTH, BLOCKS) };
    let table = guest.table(0, &job)?;
    let vcpu = &mut guest.cpus_mut()[0];
    vcpu.begin(&Work::Prefill(job, table))?;
    match place {
        Place::GuestRam => {
            let all = within(LIMIT, || ram.consumed(0, &layout).is_ok_and(|count| count == DEPTH));
            ensure!(all, "the kernel does not consume the requests");
        }
        // The indexes of this ring are not in RAM.
        Place::Window => disk.wait_for_hanging_write(|| stuck_disk::has_hanging_thread(std::process::id()))?,
    }

    let start = Instant::now();
    let ends = match end {
        End::Stopped => guest.stop(),
        End::Dropped => {
            drop(guest);
            Vec::new()
        }
        End::Died => {
            let report = vcpu.finish(Some(LIMIT))?.report;
            ensure!(report.lost == u64::from(DEPTH) && report.operations() == 0, "{report}");
            guest.lead_astray(0)?;
            let vcpu = &mut guest.cpus_mut()[0];
            let death = vcpu.run(&Work::Prefill(job, table)).err().context("the guest still runs")?;
            ensure!(matches!(death, VmmError::Exit { cpu: 0, .. }), "{death}");
            guest.stop()
        }
    };
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(20), "the end took {took:?}");
    let is_held = || -> Result<()> {
        ensure!(ends.iter().all(|end| !end.has_ended()), "the end was reported with I/O in flight");
        ensure!(held.strong_count() > 0, "the guest's memory was freed with I/O in flight");
        let refusal = Disk::open(&disk.config()).err().context("the disk is free with I/O in flight")?.to_string();
        ensure!(refusal.contains(&format!("[{}]", std::process::id())), "{refusal}");
        Ok(())
    };
    is_held()?;
    ensure!(ends.iter().all(|end| end.wait(QUIET).is_err()), "the end was reported with I/O in flight");
    thread::sleep(QUIET);
    is_held()?;

    disk.thaw()?;
    ends.iter().try_for_each(|end: &RingEnd| end.wait(LIMIT).map(|_| ()))?;
    ensure!(within(LIMIT, || held.strong_count() == 0), "the guest's memory is not freed");
    drop(Disk::open(&disk.config_waiting()).context("the lock after the end")?);
    check_quiet(&ram, ram_bytes, disk.path())
}

/// Checks that memory and disk do not change any more.
fn check_quiet(ram: &Ram, ram_bytes: u64, disk: &Path) -> Result<()> {
    const FILLED: u8 = 0xee;
    let on_disk = || -> Result<Vec<u8>> {
        let mut content = vec![0; DISK_BYTES as usize];
        File::open(disk)?.read_exact_at(&mut content, 0)?;
        Ok(content)
    };
    let before = on_disk()?;
    ram.fill(0, ram_bytes as usize, FILLED)?;
    thread::sleep(Duration::from_millis(20));
    let changed = ram.bytes(0, ram_bytes as usize)?.iter().position(|&byte| byte != FILLED);
    ensure!(changed.is_none(), "guest memory at {changed:x?} changed after the end");
    ensure!(on_disk()? == before, "the disk changed after the end");
    Ok(())
}

/// The child process: a monitor whose guest writes until the process is killed.
fn monitor(how: &str) -> Result<()> {
    let submission = if how == "doorbell" { SubmissionConfig::Doorbell } else { sq_thread(1) };
    let path = env::args().nth(1).context("the disk's path")?;
    let disk = DiskConfig::new(path).direct_io(DirectIo::On);
    let mut guest = guest(disk, Place::GuestRam, submission)?;
    let mut job = guest.job(0, BLOCK_BYTES, DEPTH, BLOCKS);
    (job.duration_ns, job.timeout_ns, job.verify) = (600_000_000_000, 600_000_000_000, Verify::Off);
    job.write_percent = 100;
    let table = guest.table(0, &job)?;
    let layout = guest.queues()[0].layout();
    let CompletionQueue { tail_gpa, cqes_gpa } = CompletionQueue::new(0, layout);
    let (fd, ram_bytes) = (guest.ram_file().as_raw_fd(), guest.memory().len_bytes());
    let head_gpa = layout.sq_head_offset;
    guest.cpus_mut()[0].begin(&Work::Run(job, table))?;
    println!("begun {fd} {ram_bytes} {head_gpa} {tail_gpa} {cqes_gpa}");
    std::io::stdout().flush()?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// A monitor in a process of its own. The drop kills it.
struct Monitor {
    process: Child,
    // The child ends when this pipe closes.
    _lifeline: Option<ChildStdin>,
    ram: Ram,
    ram_bytes: u64,
    head_gpa: u64,
    completions: CompletionQueue,
}

impl Monitor {
    fn start(disk: &Path, how: &str) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.arg(disk).env(CHILD_VARIABLE, how).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("a pipe")?).read_line(&mut line)?;
        let numbers: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        let &[fd, ram_bytes, head_gpa, tail_gpa, cqes_gpa] = &*numbers else { bail!("the child says {line:?}") };
        let ram = ram_of(process.id(), i32::try_from(fd)?)?;
        let completions = CompletionQueue { tail_gpa, cqes_gpa };
        let lifeline = process.stdin.take();
        Ok(Self { process, _lifeline: lifeline, ram, ram_bytes, head_gpa, completions })
    }

    fn ends(&mut self) -> bool {
        within(LIMIT, || self.process.try_wait().is_ok_and(|status| status.is_some()))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // The process may have ended already. The drop does not wait for its end, which hanging I/O can delay for ever.
        let _ = self.process.kill();
    }
}

fn killed_with_hanging_io(how: &str) -> Result<()> {
    let disk = StuckDisk::new(StuckKind::LoopDevice, DISK_BYTES)?;
    disk.freeze()?;
    let mut monitor = Monitor::start(disk.path(), how)?;
    let all = within(LIMIT, || monitor.ram.word(monitor.head_gpa).is_ok_and(|count| count == DEPTH));
    ensure!(all, "the kernel does not consume the requests");
    disk.wait_for_hanging_write(|| stuck_disk::has_hanging_thread(monitor.process.id()))?;
    monitor.process.kill()?;
    // The kernel ends an SQ thread, and with it the process, only after its requests.
    if how == "doorbell" {
        ensure!(monitor.ends(), "the killed process does not end");
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
    let completions = monitor.ram.completions(monitor.completions)?;
    ensure!(completions.len() == DEPTH as usize, "{} completions", completions.len());
    ensure!(completions.iter().all(|cqe| cqe.res == BLOCK_BYTES as i32), "{completions:?}");
    check_quiet(&monitor.ram, monitor.ram_bytes, disk.path())?;
    drop(opened);
    ensure!(monitor.ends(), "the process does not end");
    Ok(())
}

fn killed() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut random = seed.rng();
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let (kills, mut with_io) = (harness::budget(20, 200), 0);
    for number in 0..kills {
        let how = if random.bool() { "doorbell" } else { "sq_thread" };
        let once = |moment: Duration| -> Result<bool> {
            let mut monitor = Monitor::start(disk.path(), how)?;
            thread::sleep(moment);
            monitor.process.kill()?;
            let opened = Disk::open(&disk.config().lock_wait(LIMIT))?;
            let consumed = monitor.ram.word(monitor.head_gpa)?;
            check_quiet(&monitor.ram, monitor.ram_bytes, disk.path())?;
            drop(opened);
            ensure!(monitor.ends(), "the process does not end");
            Ok(consumed != 0)
        };
        let moment = Duration::from_micros(random.u64(MOMENT_US));
        with_io += u32::from(once(moment).with_context(|| format!("kill {number} ({seed}): {how}, {moment:?}"))?);
    }
    eprintln!("{with_io} of {kills} kills met a guest with I/O");
    ensure!(with_io * 4 > kills, "hardly any guest had begun: {with_io} of {kills}");
    ensure!(fs::metadata(disk.path())?.len() == DISK_BYTES, "the image has another size");
    Ok(())
}
