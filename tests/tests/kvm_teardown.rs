//! A KVM guest ends during its I/O. Its rings end, its memory stays until then, and nothing is left afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ringpass_bare_metal::Command;
use ringpass_broker::direct::SubmissionConfig;
use ringpass_broker::disk::Disk;
use ringpass_broker::ring::RingEnd;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::kvm_guest::{KvmGuest, KvmGuestConfig, sq_thread};
use ringpass_tests::needs::Need;
use ringpass_tests::process_guest::Place;
use ringpass_tests::seed::Seed;
use ringpass_workload::{Job, Verify, Wait};

const ENDS: usize = 200;
const WARM_UP: usize = 12;
const BLOCKS: u64 = 2048;
/// The latest moment of an end, in microseconds after the first request.
const MOMENT_MAX_US: u64 = 20_000;

fn main() -> ExitCode {
    let needs = [Need::kvm(), Need::io_uring(), Need::cpus(2)].into_iter().chain(DiskKind::Ext4Direct.needs());
    harness::run(vec![test("guests_that_end_during_their_io_leave_nothing_behind", needs, ends)])
}

/// How a guest ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The vCPUs are stopped, then the queues are detached.
    Stopped,
    /// The queues are detached under the running vCPUs.
    Detached,
    /// The guest is dropped, and the test does not wait for the rings.
    Dropped,
}

fn ends() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut random = seed.rng();
    let disk = TestDisk::new(DiskKind::Ext4Direct, 2 * BLOCKS * 4096)?;
    let mut before = None;
    let started = Instant::now();
    for number in 0..WARM_UP + ENDS {
        if number == WARM_UP {
            before = Some(Usage::settled(None)?);
        }
        let end = [End::Stopped, End::Detached, End::Dropped][random.usize(..3)];
        let config = KvmGuestConfig {
            place: if random.bool() { Place::GuestRam } else { Place::Window },
            submission: if random.bool() { sq_thread(5) } else { SubmissionConfig::Doorbell },
            queues: random.u32(1..=2),
            ..KvmGuestConfig::new(disk.config())
        };
        let moment = Duration::from_micros(random.u64(..MOMENT_MAX_US));
        let wait = if random.bool() { Wait::Poll } else { Wait::Interrupt };
        end_once(&config, end, wait, moment).with_context(|| format!("end {number} ({seed}): {end:?}, {config:?}"))?;
    }
    eprintln!("{:?}", started.elapsed());
    let before = before.context("no usage was taken")?;
    let after = Usage::settled(Some(&before))?;
    before.compare(&after)
}

fn end_once(config: &KvmGuestConfig, end: End, wait: Wait, moment: Duration) -> Result<()> {
    let mut guest = KvmGuest::start(config.clone())?;
    for cpu in 0..config.queues {
        let job = Job {
            duration_ns: 60_000_000_000,
            write_percent: 30,
            verify: Verify::Off,
            wait,
            ..guest.job(cpu, 4096, 16, BLOCKS)
        };
        let table = guest.table(cpu, &job)?;
        guest.cpus_mut()[cpu as usize].begin(&Command::Run(job, table))?;
    }
    thread::sleep(moment);

    let ram = guest.ram_file().try_clone()?;
    let ram_bytes = guest.memory().len_bytes();
    let held = Arc::downgrade(guest.ram_file());
    let ends = match end {
        End::Stopped => guest.stop(),
        End::Detached => {
            let ends = guest.detach_under_the_guest();
            drop(guest);
            ends
        }
        End::Dropped => {
            drop(guest);
            Vec::new()
        }
    };
    // The reference to the RAM's file keeps the RAM. When the last reference goes, the disk must be free too: a ring
    // that could still do I/O would hold the disk's lock, usually for 20 ms and more.
    let deadline = Instant::now() + Duration::from_secs(60);
    while held.strong_count() > 0 {
        ensure!(Instant::now() < deadline, "the rings do not end");
        thread::sleep(Duration::from_micros(500));
    }
    Disk::open(&config.disk.clone().lock_wait(Duration::from_millis(10)))
        .context("the guest's memory was freed while a ring still held the disk")?;
    ends.iter().try_for_each(|end: &RingEnd| end.wait(Duration::from_secs(60)).map(|_| ()))?;

    // No I/O reaches the memory any more.
    let mark = vec![0x5a; ram_bytes as usize];
    ram.write_all_at(&mark, 0)?;
    thread::sleep(Duration::from_millis(2));
    let mut found = vec![0; ram_bytes as usize];
    ram.read_exact_at(&mut found, 0)?;
    ensure!(found == mark, "the memory changed after the end of the rings");
    Ok(())
}

/// The resources of this process.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    /// The number of open files of each kind.
    files: BTreeMap<String, usize>,
    threads: usize,
    mappings: usize,
    pinned_kib: u64,
    resident_kib: u64,
}

impl Usage {
    fn now() -> Result<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            // The descriptor of the directory itself is closed by now.
            if let Ok(target) = fs::read_link(entry?.path()) {
                *files.entry(target.to_string_lossy().into_owned()).or_default() += 1;
            }
        }
        files.retain(|name, _| !name.starts_with("/proc/"));
        let status = fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = line.with_context(|| format!("/proc/self/status has no {name}"))?;
            Ok(value.trim().trim_end_matches(" kB").parse()?)
        };
        Ok(Self {
            files,
            threads: fs::read_dir("/proc/self/task")?.count(),
            mappings: fs::read_to_string("/proc/self/maps")?.lines().count(),
            pinned_kib: field("VmPin")?,
            resident_kib: field("VmRSS")?,
        })
    }

    /// The usage once ending threads have ended.
    fn settled(wanted: Option<&Self>) -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            thread::sleep(Duration::from_millis(300));
            let now = Self::now()?;
            let is_settled = wanted.is_none_or(|wanted| wanted.compare(&now).is_ok());
            if is_settled || Instant::now() > deadline {
                return Ok(now);
            }
        }
    }

    fn compare(&self, after: &Self) -> Result<()> {
        ensure!(after.files == self.files, "open files: {:?}, before {:?}", after.files, self.files);
        ensure!(after.threads <= self.threads, "{} threads, before {}", after.threads, self.threads);
        // The allocator makes arenas for threads, up to a limit.
        ensure!(after.mappings <= self.mappings + 16, "{} mappings, before {}", after.mappings, self.mappings);
        ensure!(after.pinned_kib == 0, "{} KiB are pinned", after.pinned_kib);
        let grown_kib = after.resident_kib.saturating_sub(self.resident_kib);
        // Each guest has at least 5 MiB; 200 of them would show.
        ensure!(grown_kib <= 16 << 10, "{grown_kib} KiB more are resident");
        Ok(())
    }
}
