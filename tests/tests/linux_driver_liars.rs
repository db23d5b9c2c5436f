//! The repository's Linux driver with a device that speaks the guest ABI and lies: it refuses without end, takes rings away
//! again, describes rings that cannot be, and does not give queues back.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::{control::RingRecord, request::ErrorCode};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{self, BlockDriver, LinuxGuest, LinuxGuestConfig, VhostUserDisk, fio};
use ringpass_tests::lying_device::{Conduct, Counts, Lies, LyingDevice, QUEUES, RingLie, honest_record};

const RAM_MIB: u32 = 384;
/// How long the test watches a driver that a device wants to keep busy.
const WATCH: Duration = Duration::from_secs(3);
/// How often the driver's worker looks in a second, with three queues, in the seconds of a watch and those around it.
const LOOKS_MAX: usize = 44 * 5;
/// ATTACHs of both queues in that time: with waits of 1, 2 and 4 seconds, or ten at once and then no more for ten seconds.
const ATTACHES_MAX: usize = 2 * 22;

fn main() -> ExitCode {
    harness::run(vec![
        test("a_device_that_keeps_the_driver_busy_gets_few_requests_and_few_lines", linux_guest::needs(), busy),
        test("the_driver_learns_that_a_polled_queue_gets_no_ring", linux_guest::needs(), polled),
        test(
            "rings_that_cannot_be_end_with_io_errors_and_never_harm_the_guest",
            linux_guest::needs(),
            impossible_rings,
        ),
        test("memory_of_queues_that_the_device_keeps_stays_reserved", linux_guest::needs(), kept_queues),
    ])
}

/// A guest with a lying device.
struct Bench {
    device: LyingDevice,
    guest: LinuxGuest,
    // The socket and the RAM.
    _directory: tempfile::TempDir,
    _ram: tempfile::NamedTempFile,
}

impl Bench {
    fn boot(lies: Lies, parameters: &str) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
        let socket = directory.path().join("liar.sock");
        let ram = tempfile::NamedTempFile::new_in("/dev/shm").context("cannot make the guest's RAM")?;
        ram.as_file().set_len(u64::from(RAM_MIB) << 20)?;
        let device = LyingDevice::start(&socket, ram.path(), lies)?;
        let config = LinuxGuestConfig::default();
        let guest = LinuxGuest::boot(&LinuxGuestConfig {
            memory_mib: RAM_MIB,
            memory_file: Some(ram.path().to_owned()),
            disks: vec![VhostUserDisk { queues: QUEUES, ..VhostUserDisk::new("disk", &socket) }],
            block_driver: Some(BlockDriver::of(config.kernel)?),
            block_driver_parameters: parameters.to_owned(),
            ..config
        })?;
        Ok(Self { device, guest, _directory: directory, _ram: ram })
    }

    /// The driver takes the device anew, which has other lies now.
    fn load_again(&mut self, lies: Lies) -> Result<()> {
        self.guest.run("rmmod ringpass_blk && dmesg -c >/dev/null")?;
        self.device.change(lies);
        self.guest.run("load-module ringpass_blk").map(drop)
    }

    /// What the driver sends in this time.
    fn watch(&mut self, time: Duration) -> Result<Counts> {
        let before = self.device.counts();
        self.guest.let_run(time)?;
        let after = self.device.counts();
        Ok(Counts {
            probes: after.probes - before.probes,
            events: after.events - before.events,
            attaches: after.attaches - before.attaches,
            transfers: after.transfers - before.transfers,
        })
    }

    /// Waits until the driver has found the lie. A lie on a ring needs a request.
    fn end_by_lie(&mut self, has_rings: bool) -> Result<()> {
        let read = "dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>&1; true";
        if has_rings {
            self.wait_for_log("queue 1: on a ring")?;
            self.wait_for_log("queue 2: on a ring")?;
            let said = self.guest.run(read)?;
            ensure!(said.contains("error"), "{said}");
        }
        let log = self.wait_for_log("every request fails")?;
        ensure!(log.contains("breaks the protocol") && log.contains("on a ring") == has_rings, "{log}");
        let said = self.guest.run(read)?;
        ensure!(said.contains("error"), "{said}");
        Ok(())
    }

    /// The lines that the driver has written since it was loaded.
    fn log(&mut self) -> Result<String> {
        self.guest.run("dmesg | grep ringpass_blk")
    }

    /// Waits until the driver has written this.
    fn wait_for_log(&mut self, text: &str) -> Result<String> {
        let end = Instant::now() + Duration::from_secs(40);
        loop {
            let log = self.log()?;
            if log.contains(text) {
                return Ok(log);
            }
            ensure!(Instant::now() < end, "the driver does not say {text:?}:\n{log}");
            self.guest.let_run(Duration::from_millis(100))?;
        }
    }
}

fn busy() -> Result<()> {
    use ErrorCode::{Cost, Features, Mode, Resources, Version};
    let flooding = |conduct| Lies { floods_events: true, ..Lies::of(conduct) };
    let all = [
        ("refuses, and says in turn that there may be rings", flooding(Conduct::Refuse(vec![Mode, Cost]))),
        ("refuses what it has said in PROBE", Lies::of(Conduct::Refuse(vec![Version, Features]))),
        ("refuses for changing reasons", flooding(Conduct::Refuse(vec![Version, Mode, Features, Resources]))),
        ("opens rings and takes them away", flooding(Conduct::OpenAndTake)),
        ("goes from epoch to epoch", flooding(Conduct::EndlessEpochs)),
    ];
    let mut bench: Option<Bench> = None;
    for (name, lies) in all {
        let bench = match &mut bench {
            Some(bench) => {
                bench.load_again(lies)?;
                bench
            }
            none => none.insert(Bench::boot(lies, "")?),
        };
        let counts = bench.watch(WATCH)?;
        eprintln!("a device that {name}: {counts:?} in {WATCH:?}");
        ensure!(counts.probes <= LOOKS_MAX && counts.events <= LOOKS_MAX, "{name}: {counts:?}");
        ensure!(counts.attaches <= ATTACHES_MAX, "{name}: {counts:?}");
        let log = bench.log()?;
        // Thirty for each queue, and what the driver says of a disk.
        ensure!(log.lines().count() <= 70, "{name}:\n{log}");
        ensure!(!log.contains("protocol"), "{name}:\n{log}");
        // A disk is there all the time.
        let run = fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=512k --iodepth=4");
        bench.guest.run(&run).with_context(|| name.to_owned())?;
    }
    bench.context("a bench")?.guest.shut_down()
}

fn polled() -> Result<()> {
    // The device completes no EVENT for a refusal, this queue has no interrupt, and queue 1 is never attached again.
    let lies = Lies::of(Conduct::Refuse(vec![ErrorCode::Memory, ErrorCode::Resources]));
    let mut bench = Bench::boot(lies, "poll_queues=1")?;
    bench.wait_for_log("queue 2: a virtqueue, because the device gives it no ring (error 15)")?;
    bench.guest.shut_down()
}

/// Records that break each of the rules of docs/abi.md, section 5.
fn wrong_records() -> Vec<(&'static str, RingRecord)> {
    let honest = honest_record();
    vec![
        ("an index that is no word", RingRecord { sq_tail_offset_bytes: 2.into(), ..honest }),
        ("an index behind the end", RingRecord { cq_head_offset_bytes: 0x2000.into(), ..honest }),
        ("an index at the end of all numbers", RingRecord { sq_flags_offset_bytes: 0xffff_fffc.into(), ..honest }),
        ("CQEs behind the end", RingRecord { cqes_offset_bytes: 0x1800.into(), ..honest }),
        ("CQEs at the end of all numbers", RingRecord { cqes_offset_bytes: 0xffff_fff8.into(), ..honest }),
        ("CQEs at an odd place", RingRecord { cqes_offset_bytes: 1028.into(), ..honest }),
        ("no doorbell", RingRecord { doorbell: 0.into(), ..honest }),
        ("slots that are too small", RingRecord { slot_shift: 21.into(), ..honest }),
        ("slots that are too large", RingRecord { slot_shift: 63.into(), ..honest }),
        ("addresses from 0 on", RingRecord { iova_base: 0.into(), ..honest }),
        ("addresses that wrap", RingRecord { iova_base: 0xffff_ffff_c000_0000.into(), ..honest }),
        ("an alignment of 0", RingRecord { address_align_bytes: 0.into(), ..honest }),
        ("a unit that is no power of two", RingRecord { length_align_bytes: 1536.into(), ..honest }),
        ("segments of no length", RingRecord { segment_bytes_max: 0.into(), ..honest }),
    ]
}

fn impossible_rings() -> Result<()> {
    let ring_lies = [
        ("a ring that follows without the end of the one before", RingLie::Announce(2 << 2 | 1)),
        ("no epoch any more", RingLie::Announce(0)),
        ("a phase that is none", RingLie::Announce(1 << 2)),
        ("more completions than requests", RingLie::TooManyCompletions),
        ("two completions of one request", RingLie::SecondCompletion),
        ("a completion of a request that cannot be", RingLie::UnknownIndex),
        ("a completion of a request that has ended", RingLie::EarlierUse),
        ("more bytes than were asked for", RingLie::TooManyBytes),
    ];
    let records = wrong_records().into_iter().map(|(name, record)| (name, Conduct::Open(record), false));
    let lies = ring_lies.map(|(name, lie)| (name, Conduct::Tell(lie, 1), true));
    let mut bench: Option<Bench> = None;
    for (name, conduct, has_rings) in records.chain(lies) {
        let lies = Lies::of(conduct);
        let bench = match &mut bench {
            Some(bench) => {
                bench.load_again(lies)?;
                bench
            }
            none => none.insert(Bench::boot(lies, "")?),
        };
        bench.end_by_lie(has_rings).with_context(|| name.to_owned())?;
    }
    bench.context("a bench")?.guest.shut_down()
}

fn kept_queues() -> Result<()> {
    let limit = "detach_seconds=1";
    let keeping = |conduct| Lies { keeps_queues: true, ..Lies::of(conduct) };
    let mut bench = Bench::boot(keeping(Conduct::Open(honest_record())), limit)?;
    bench.wait_for_log("queue 2: on a ring")?;
    // It was taken away and the memory of its queues is not used by anything else.
    let start = Instant::now();
    bench.guest.run("rmmod ringpass_blk")?;
    let time = start.elapsed();
    let log = bench.log()?;
    ensure!(log.matches("bytes stay reserved").count() == 2, "{log}");
    ensure!(time < Duration::from_secs(20), "the driver has waited for {time:?}");

    // A device that breaks the protocol while it has requests, and keeps them.
    bench.device.change(keeping(Conduct::Tell(RingLie::Announce(29), 4)));
    bench.guest.run(&format!("dmesg -c >/dev/null; load-module ringpass_blk {limit}"))?;
    bench.wait_for_log("queue 2: on a ring")?;
    let run = fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=1m --iodepth=8");
    let job = bench.guest.spawn(&run)?;
    let ended = bench.guest.wait_output(job, Duration::from_secs(40))?;
    ensure!(ended.status != 0, "fio has noticed nothing: {ended:?}");
    let log = bench.wait_for_log("every request fails")?;
    ensure!(log.contains("bytes stay reserved") && !log.contains("never end"), "{log}");
    // No request is left, so the driver can go.
    bench.guest.run("rmmod ringpass_blk")?;
    bench.guest.shut_down()
}
