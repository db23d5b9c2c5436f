//! Queues with rings are stopped or abandoned, and the same broker or a new one continues them. The device sees ATTACH
//! again exactly once, neither ATTACH nor ARM is ever in the in-flight region, and no request runs before the older I/O
//! has ended.

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode};
use ringpass_tests::{
    broker_process,
    canaries::pattern,
    disks::DiskKind,
    front_end::{
        attach::{
            RingDriver,
            bench::{Bench, QUEUE_SIZE, keep_records, start_again, start_queue_zero, start_ring},
            slow::SlowGuest,
            wait_until, whole,
        },
        session::{FrontEnd, Options},
        shared::InflightRegion,
    },
    harness::{self, Test, test},
    needs::Need,
    seed::Seed,
    stuck_disk::{StuckDisk, StuckKind},
};
use rustix::process::Signal;

const DISK_BYTES: u64 = 16 << 20;
/// How long a test watches that something does not happen. If it were wrong, it would happen at once.
const AT_ONCE: Duration = Duration::from_millis(300);
/// The most that an answer takes that waits for a ring but not for the disk.
const PROMPT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let needs = || DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    let slow_needs = || StuckDisk::needs().into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    let mut tests: Vec<Test> = Vec::new();
    for interruption in [Interruption::StopAndGoOn, Interruption::Vanish, Interruption::Kill] {
        for with_records in [true, false] {
            let records = if with_records { "with" } else { "without" };
            let name = format!("the_device_sees_attach_again_once_{}_{records}_in_flight_records", interruption.name());
            tests.push(test(name, needs(), move || restarts(interruption, with_records)));
        }
    }
    tests.extend([test("a_stopped_queue_waits_for_its_own_ring_and_for_no_other", slow_needs(), slow_stop)]);
    for kind in [StuckKind::LoopDevice, StuckKind::File] {
        let name = format!("a_killed_broker_s_ring_has_ended_only_when_its_io_has_on_a_{kind}");
        tests.push(test(name, slow_needs(), move || killed_with_slow_io(kind)));
    }
    harness::run(tests)
}

/// How the front-end or the broker is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interruption {
    /// The front-end stops all queues with GET_VRING_BASE and starts them again on the same connection.
    StopAndGoOn,
    /// The front-end closes its connection and connects again.
    Vanish,
    /// The broker is killed, and another one starts.
    Kill,
}

impl Interruption {
    fn name(self) -> &'static str {
        match self {
            Self::StopAndGoOn => "after_a_stop",
            Self::Vanish => "after_a_disconnect",
            Self::Kill => "after_a_kill",
        }
    }
}

/// A guest with queue 0 and one attached queue, and the in-flight region that its front-end keeps.
struct Guest {
    bench: Bench,
    driver: RingDriver,
    region: Option<InflightRegion>,
}

impl Guest {
    fn new(with_records: bool) -> Result<Self> {
        let mut bench = Bench::new(DiskKind::Ext4Direct, DISK_BYTES, 2, &[])?;
        let mut region = None;
        if with_records {
            // The region must come before any queue starts, and `Bench` has started queue 0.
            bench.front_end.stop_vring(0)?;
            region = Some(bench.front_end.new_inflight_region(2, QUEUE_SIZE)?);
            start_again(&bench.front_end, bench.queue_zero.vring(), 0)?;
        }
        let driver = bench.attached(1)?;
        Ok(Self { bench, driver, region })
    }

    /// Checks that the in-flight region has neither ARM nor ATTACH.
    fn check_attached(&self) -> Result<()> {
        let Some(region) = &self.region else { return Ok(()) };
        ensure!(region.heads(1)?.is_empty(), "in flight on an attached queue: {:?}", region.heads(1)?);
        Ok(())
    }

    /// Checks that the in-flight region has `first` requests of queue 0, and none of the attached queue.
    fn check_records(&self, first: usize) -> Result<()> {
        self.check_attached()?;
        let Some(region) = &self.region else { return Ok(()) };
        let found = region.heads(0)?;
        ensure!(found.len() == first, "in flight on queue 0: {found:?}, expected were {first}");
        Ok(())
    }

    /// Takes all news of the device, and leaves an EVENT pending, which is then in the in-flight region.
    fn post_event(&mut self) -> Result<()> {
        self.bench.queue_zero.post_event()?;
        wait_until("an EVENT that is pending and recorded", || {
            if !self.bench.queue_zero.has_event_ended()? {
                self.check_attached()?;
                return Ok(self.check_records(1).is_ok());
            }
            ensure!(self.bench.queue_zero.wait_event()? == EVENT_QUEUES);
            self.bench.queue_zero.post_event()?;
            Ok(false)
        })
    }

    /// Interrupts the device, and starts the queues again in this order.
    fn restart(&mut self, interruption: Interruption, order: [u16; 2]) -> Result<()> {
        let Self { bench, driver, .. } = self;
        match interruption {
            Interruption::StopAndGoOn => {
                for index in order {
                    let base = bench.front_end.stop_vring(index)?;
                    let vring = if index == 0 { bench.queue_zero.vring() } else { driver.vring() };
                    let used = vring.used_idx()?;
                    ensure!(base == used, "queue {index} stops at {base}, and {used} are used");
                }
                self.check_records(0)?;
            }
            Interruption::Vanish => self.reconnect()?,
            Interruption::Kill => {
                bench.broker.kill()?;
                self.check_attached()?;
                let Self { bench, .. } = self;
                bench.broker = bench.rig.broker(&["--mode", "direct", "--num-queues", "2"])?;
                self.reconnect()?;
            }
        }
        let Self { bench, driver, .. } = self;
        for index in order {
            let vring = if index == 0 { bench.queue_zero.vring() } else { driver.vring() };
            start_again(&bench.front_end, vring, index)?;
        }
        Ok(())
    }

    fn reconnect(&mut self) -> Result<()> {
        let Self { bench, region, .. } = self;
        // The broker serves one front-end at a time.
        bench.front_end.connection().wire().hang_up()?;
        bench.front_end = FrontEnd::connect(&bench.rig.socket(), &bench.ram.ram, Options::default())?;
        match region {
            Some(region) => bench.front_end.set_inflight_region(region),
            // The front-end has lost what was in flight, and keeps records from now on.
            None => keep_records(&bench.front_end),
        }
    }
}

fn restarts(interruption: Interruption, with_records: bool) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut rng = seed.derive("order").rng();
    let mut guest = Guest::new(with_records)?;
    let broker_explains = |guest: &Guest, result: Result<()>| guest.bench.broker.explain(result);
    for round in 1..=harness::budget(10, 500) {
        let result = one_restart(&mut guest, interruption, round, rng.bool());
        broker_explains(&guest, result.with_context(|| format!("round {round}, {seed}")))?;
    }
    let result = detach(&mut guest);
    broker_explains(&guest, result)
}

fn one_restart(guest: &mut Guest, interruption: Interruption, round: u32, queue_zero_first: bool) -> Result<()> {
    let offset_bytes = u64::from(round % 64) * 4096;
    let data = pattern(round.into(), 4096);
    guest.driver.write(offset_bytes, &data)?;
    ensure!(guest.driver.read(offset_bytes, 4096)? == data);
    // Without records, a front-end that loses its back-end knows only how many requests of a queue were used, not
    // which. It then loses the requests that are pending on queue 0.
    let has_event = interruption == Interruption::StopAndGoOn || guest.region.is_some();
    if has_event {
        guest.post_event()?;
    }
    // These writes are in flight when the ring ends.
    for request in 0..16 {
        guest.driver.submit(guest.driver.sqe(true, 1 + request, 4096, (64 + request) * 4096, 100 + request)?)?;
    }
    guest.restart(interruption, if queue_zero_first { [0, 1] } else { [1, 0] })?;
    guest.driver.wait_epoch(round + 1)?;
    for request in 0..16 {
        let res = guest.driver.wait(100 + request)?;
        ensure!(res == 4096, "request {request}: {res}");
    }
    ensure!(guest.driver.vring().used_idx()? == 1, "ARM is used, and nothing else");
    if has_event {
        let events = guest.bench.queue_zero.wait_event()?;
        // If the ring ends before queue 0 stops, the device has news.
        let is_empty = interruption == Interruption::StopAndGoOn && events == 0;
        ensure!(is_empty || events == EVENT_QUEUES, "EVENT says {events:#x}");
    }
    guest.check_records(0)
}

/// The device answers ATTACH once, however often it has seen it.
fn detach(guest: &mut Guest) -> Result<()> {
    guest.driver.detach()?;
    let found = guest.driver.wait_attach()?;
    ensure!(found == whole(ErrorCode::Detached), "{found:?}");
    thread::sleep(Duration::from_millis(50));
    ensure!(guest.driver.vring().used_idx()? == 2, "a request was used twice");
    guest.bench.broker.wait_for_unpinned()?;
    ensure!(guest.bench.front_end.stop_vring(1)? == 2);
    guest.check_records(0)
}

fn slow_stop() -> Result<()> {
    let mut guest = SlowGuest::new(StuckKind::LoopDevice)?;
    let front_end = guest.connect()?;
    let mut queue_zero = start_queue_zero(&front_end, &mut guest.ram)?;
    let mut stuck = start_ring(&front_end, &mut guest.ram, 1)?;
    let mut idle = start_ring(&front_end, &mut guest.ram, 2)?;
    stuck.attach()?;
    idle.attach()?;
    guest.hang(&mut stuck)?;
    let stopped = (|| -> Result<()> {
        for (index, base) in [(2, 1), (0, queue_zero.vring().used_idx()?)] {
            let begin = Instant::now();
            let found = front_end.stop_vring(index)?;
            ensure!(found == base, "queue {index} stops at {found}, not at {base}");
            ensure!(begin.elapsed() < PROMPT, "queue {index} took {:?} to stop", begin.elapsed());
        }
        // The first stop ends the rings of all queues. The ring with the hanging write has not ended yet.
        thread::sleep(AT_ONCE);
        ensure!(stuck.announced() >> 2 == 1 && stuck.announced() & 3 == 1, "word {:#x}", stuck.announced());
        start_again(&front_end, idle.vring(), 2)?;
        idle.wait_epoch(2)?;
        Ok(())
    })();
    // The stop of the queue with the hanging write waits for it.
    let begin = Instant::now();
    let own = thread::scope(|scope| {
        let stopping = scope.spawn(|| front_end.stop_vring(1));
        thread::sleep(AT_ONCE);
        let early = stopping.is_finished();
        guest.disk.thaw()?;
        let base = stopping.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        ensure!(!early, "the queue has stopped before its I/O had ended");
        Ok(base)
    });
    guest.broker.explain(stopped)?;
    let base = guest.broker.explain(own)?;
    ensure!(base == 1, "queue 1 stops at {base} after {:?}", begin.elapsed());
    start_again(&front_end, stuck.vring(), 1)?;
    let res = guest.broker.explain(stuck.wait(77))?;
    ensure!(res == 4096, "the write: {res}");
    Ok(())
}

fn killed_with_slow_io(kind: StuckKind) -> Result<()> {
    let mut guest = SlowGuest::new(kind)?;
    let front_end = guest.connect()?;
    let region = front_end.new_inflight_region(3, QUEUE_SIZE)?;
    let mut queue_zero = start_queue_zero(&front_end, &mut guest.ram)?;
    let mut driver = start_ring(&front_end, &mut guest.ram, 1)?;
    driver.attach()?;
    guest.hang(&mut driver)?;
    guest.broker.signal(Signal::KILL)?;
    let new = guest.start_beside();
    drop(front_end);
    let silent = (|| -> Result<FrontEnd> {
        let begin = Instant::now();
        let front_end = guest.connect()?;
        ensure!(front_end.connection().config(8)?.len() == 8);
        front_end.set_inflight_region(&region)?;
        start_again(&front_end, queue_zero.vring(), 0)?;
        start_again(&front_end, driver.vring(), 1)?;
        ensure!(begin.elapsed() < PROMPT, "the new broker took {:?} to answer", begin.elapsed());
        queue_zero.post_event()?;
        let used = queue_zero.vring().used_idx()?;
        let end = Instant::now() + AT_ONCE;
        while Instant::now() < end {
            let word = driver.announced();
            ensure!(word == 1 << 2 | 1, "{word:#x} is announced before the old I/O has ended");
            ensure!(
                queue_zero.vring().used_idx()? == used,
                "the broker executed a request before the old I/O had ended"
            );
            ensure!(
                region.heads(0)?.is_empty() && region.heads(1)?.is_empty(),
                "the broker took a request before the old I/O had ended"
            );
            thread::sleep(Duration::from_millis(1));
        }
        Ok(front_end)
    })();
    guest.disk.thaw()?;
    let new = new?;
    let front_end = new.explain(silent)?;
    guest.broker.wait()?;
    let mut finish = || -> Result<()> {
        driver.wait_epoch(2)?;
        let res = driver.wait(77)?;
        if res != 4096 {
            // An error of a ring whose process was killed does not tell whether the request was executed (docs/abi.md,
            // section 7).
            ensure!(res < 0, "the write: {res}");
            eprintln!("the write has ended with {res} and is sent again");
            let res = driver.perform(driver.sqe(true, 0, 4096, 8192, 78)?)?;
            ensure!(res == 4096, "the second write: {res}");
        }
        ensure!(queue_zero.wait_event()? == EVENT_QUEUES);
        ensure!(region.heads(1)?.is_empty());
        ensure!(driver.read(12288, 4096)? == [StuckDisk::INITIAL_BYTE; 4096]);
        ensure!(driver.read(8192, 4096)? == [0; 4096], "the write did not reach the disk");
        ensure!(driver.outstanding().is_empty());
        Ok(())
    };
    new.explain(finish())?;
    drop(front_end);
    Ok(())
}
