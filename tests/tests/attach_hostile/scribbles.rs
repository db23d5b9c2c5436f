//! A guest that writes random bytes to all shared memory, while its front-end makes the ordinary changes.

use std::{
    fs,
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::BrokerProcess,
    canaries::pattern,
    disks::DiskKind,
    front_end::{
        attach::bench::{QUEUE_SIZE, start_again, start_queue_zero, start_ring},
        event::Event,
        ram::RamRegion,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
    },
    harness,
    seed::Seed,
};
use vhost::vhost_user::message::FrontendReq;

use crate::{
    guest::{HostileGuest, HostileQueue},
    neighbour::{HOSTILE_BYTES, HOSTILE_GPA, Honest, Surroundings},
};

const DISK_BYTES: u64 = 16 << 20;
/// The longest that a front-end may wait for an answer, on a busy machine: rings end within milliseconds.
const ANSWER: Duration = Duration::from_secs(10);
/// The most by which the broker may grow. Only its allocator may keep something.
const GROWTH_BYTES: u64 = 8 << 20;
/// After so many rounds the broker has allocated everything that it ever needs.
const WARM_UP_ROUNDS: u64 = 5;
/// The honest queue, and the hostile guest's.
const HONEST: u16 = 1;
const HOSTILE: [u16; 3] = [0, 2, 3];

/// The broker, its front-end, the hostile guest and the honest queue.
struct Stage {
    rig: Rig,
    broker: BrokerProcess,
    surroundings: Surroundings,
    front_end: FrontEnd,
    guest: HostileGuest,
    queues: Vec<HostileQueue>,
    honest: Honest,
    worst_answer: Duration,
    canary: Vec<u8>,
    /// How often the test saw a hostile queue with an open ring.
    opened: u64,
}

/// Runs rounds for the time of the budget, and prints how many there were.
pub(crate) fn run(submission: &'static str) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut stage = Stage::new(submission, seed)?;
    let end = Instant::now() + harness::time_budget(Duration::from_secs(14), Duration::from_secs(600));
    let mut baseline = None;
    let mut round = 0;
    while Instant::now() < end {
        let result = stage.round(round, baseline).with_context(|| format!("round {round}, {seed}"));
        stage.broker.explain(result)?;
        round += 1;
        if round == WARM_UP_ROUNDS {
            baseline = Some(stage.settled()?);
        }
    }
    let result = stage.finish(baseline.context("too few rounds")?).with_context(|| format!("{round} rounds, {seed}"));
    stage.broker.explain(result)?;
    eprintln!(
        "{round} rounds, {} hostile rings; the longest answer took {:?}; {}",
        stage.opened,
        stage.worst_answer,
        stage.honest.summary()
    );
    // A ring that the guard ends comes again in the next round.
    ensure!(stage.opened > round / 8, "the hostile guest hardly had a ring");
    Ok(())
}

/// The broker's usage while no hostile queue is started.
#[derive(Debug, Clone, Copy)]
struct Baseline {
    fds: usize,
    anonymous_bytes: u64,
}

impl Stage {
    fn new(submission: &str, seed: Seed) -> Result<Self> {
        let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
        let canary = pattern(99, 64 << 10);
        fs::write(rig.directory().join("canary"), &canary)?;
        let arguments = ["--mode", "direct", "--num-queues", "4", "--submission", submission, "--sq-idle-ms", "2"];
        let broker = rig.broker(&arguments)?;
        let (surroundings, mut ram) = Surroundings::new()?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let _queue_zero = broker.explain(start_queue_zero(&front_end, &mut ram))?;
        front_end.stop_vring(0)?;
        let mut driver = start_ring(&front_end, &mut ram, HONEST)?;
        broker.explain(driver.attach())?;
        let region = HOSTILE_GPA..HOSTILE_GPA + HOSTILE_BYTES;
        let arena = &mut ram.arenas[1];
        let guest = HostileGuest::new(&ram.ram, region, arena, driver.addressing(), seed.derive("guest").rng())?;
        let queues = HOSTILE.iter().map(|&index| guest.queue(index, arena)).collect::<Result<_>>()?;
        let honest = Honest::new(driver, seed);
        let mut stage = Self {
            rig,
            broker,
            surroundings,
            front_end,
            guest,
            queues,
            honest,
            worst_answer: Duration::ZERO,
            canary,
            opened: 0,
        };
        (0..HOSTILE.len()).try_for_each(|number| stage.start_clean(number))?;
        Ok(stage)
    }

    /// Lets the guest act, checks that nothing outside has changed, and starts the hostile queues again.
    fn round(&mut self, round: u64, baseline: Option<Baseline>) -> Result<()> {
        self.end_pauses()?;
        for number in 0..self.queues.len() {
            self.guest.ask_for_ring(&mut self.queues[number], true)?;
        }
        if self.guest.rng().bool() {
            self.await_rings()?;
        }
        for _ in 0..self.guest.rng().usize(1..60) {
            let number = self.guest.rng().usize(..self.queues.len());
            match self.guest.rng().u8(..24) {
                0 => self.change_something(number)?,
                1..4 => self.honest.step()?,
                _ => self.guest.act(&mut self.queues[number])?,
            }
        }
        self.honest.step()?;
        self.stop_hostile()?;
        self.surroundings.check()?;
        match baseline {
            Some(Baseline { fds, .. }) if round % 8 == 0 => {
                self.honest.step()?;
                self.broker.wait_for_fds(fds)?;
            }
            _ => {}
        }
        (0..HOSTILE.len()).try_for_each(|number| self.start_clean(number))
    }

    /// What the guest scribbles can be more requests than it may have. Then its queues get no rings for a while, unless
    /// the operator allows them.
    fn end_pauses(&self) -> Result<()> {
        let output = self.rig.dev(&["set", "vhost", "mode", "auto"])?.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Waits a moment for the rings of the hostile queues.
    fn await_rings(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_millis(50);
        for queue in self.queues.iter().filter(|queue| queue.index != 0) {
            while !self.guest.has_ring(queue)? && Instant::now() < end {
                thread::yield_now();
            }
            self.opened += u64::from(self.guest.has_ring(queue)?);
        }
        Ok(())
    }

    /// Runs `work`, for which the front-end waits, and fails if it takes too long.
    fn timed<T>(&mut self, what: &str, work: impl FnOnce(&FrontEnd) -> Result<T>) -> Result<T> {
        let begin = Instant::now();
        let result = work(&self.front_end).with_context(|| what.to_owned())?;
        let took = begin.elapsed();
        ensure!(took < ANSWER, "{what} took {took:?}");
        self.worst_answer = self.worst_answer.max(took);
        Ok(result)
    }

    fn stop_hostile(&mut self) -> Result<()> {
        let mut order = HOSTILE;
        self.guest.rng().shuffle(&mut order);
        for index in order {
            self.timed("stopping a queue", |front_end| front_end.stop_vring(index))?;
        }
        Ok(())
    }

    fn start_clean(&mut self, number: usize) -> Result<()> {
        self.guest.clear(&mut self.queues[number])?;
        self.start(number, 0)
    }

    fn start(&mut self, number: usize, base: u16) -> Result<()> {
        let HostileQueue { index, ref vring, .. } = self.queues[number];
        let (layout, eventfds) = (vring.layout(), vring.eventfds().clone());
        self.timed("starting a queue", |front_end| {
            // What a hostile queue has left in flight is not for its next driver.
            front_end.new_inflight_region(front_end.queues(), QUEUE_SIZE)?;
            front_end.start_vring(index, &layout, &eventfds, base)
        })
    }

    /// Makes one of the changes that front-ends make.
    fn change_something(&mut self, number: usize) -> Result<()> {
        let index = self.queues[number].index;
        let eventfds = self.queues[number].vring.eventfds().clone();
        match self.guest.rng().u8(..9) {
            0 => {
                self.timed("stopping a queue", |front_end| front_end.stop_vring(index))?;
                let base = self.guest.base(&mut self.queues[number])?;
                self.start(number, base)
            }
            1 => self.timed("disabling and enabling a queue", |front_end| {
                front_end.connection().set_vring(FrontendReq::SET_VRING_ENABLE, index, 0)?;
                front_end.connection().set_vring(FrontendReq::SET_VRING_ENABLE, index, 1)
            }),
            2 => self.timed("changing a call eventfd", |front_end| {
                let event = Event::new()?;
                front_end.connection().set_vring_fd(FrontendReq::SET_VRING_CALL, index, Some(event.as_fd()))?;
                eventfds.change_call(event)
            }),
            3 => self.timed("changing a kick eventfd", |front_end| {
                let event = Event::new()?;
                front_end.connection().set_vring_fd(FrontendReq::SET_VRING_KICK, index, Some(event.as_fd()))?;
                eventfds.change_kick(event)
            }),
            4 => self.timed("adding a region and removing it", |front_end| {
                let region = RamRegion::new(HOSTILE_GPA + (64 << 20), 1 << 20)?;
                front_end.connection().add_mem_reg(&region.message(), region.file())?;
                front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))
            }),
            // The rings of the hostile queues are in this region.
            5 => self.timed("removing the hostile region and adding it", |front_end| {
                let region = front_end.ram().regions()[1].clone();
                front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
                front_end.connection().add_mem_reg(&region.message(), region.file())
            }),
            6 => {
                self.timed("hanging up", |front_end| Ok(front_end.connection().wire().hang_up()?))?;
                let ram = self.front_end.ram().clone();
                let begin = Instant::now();
                self.front_end = FrontEnd::connect(&self.rig.socket(), &ram, Options::default())?;
                ensure!(begin.elapsed() < ANSWER, "connecting took {:?}", begin.elapsed());
                self.start_all()
            }
            7 => {
                self.timed("a reset", |front_end| {
                    front_end.connection().tell(FrontendReq::RESET_DEVICE, &[], &[])?;
                    front_end.connection().set_features(front_end.features())
                })?;
                self.start_all()
            }
            _ => {
                self.timed("stopping the honest queue", |front_end| front_end.stop_vring(HONEST))?;
                start_again(&self.front_end, self.honest.driver.vring(), HONEST)
            }
        }
    }

    fn start_all(&mut self) -> Result<()> {
        for number in 0..self.queues.len() {
            let base = self.guest.base(&mut self.queues[number])?;
            self.start(number, base)?;
        }
        start_again(&self.front_end, self.honest.driver.vring(), HONEST)
    }

    /// The broker's usage once the hostile rings have ended.
    fn settled(&mut self) -> Result<Baseline> {
        self.stop_hostile()?;
        self.honest.step()?;
        // The broker closes some files a little later.
        thread::sleep(Duration::from_millis(300));
        let usage = self.broker.usage()?;
        (0..HOSTILE.len()).try_for_each(|number| self.start_clean(number))?;
        Ok(Baseline { fds: usage.fds, anonymous_bytes: usage.anonymous_bytes })
    }

    /// Checks that the device works for the honest queue and for a new, honest driver of the hostile queues.
    fn finish(&mut self, baseline: Baseline) -> Result<()> {
        self.stop_hostile()?;
        self.honest.check_all()?;
        self.broker.wait_for_fds(baseline.fds)?;
        let grown_bytes = self.broker.usage()?.anonymous_bytes.saturating_sub(baseline.anonymous_bytes);
        ensure!(grown_bytes < GROWTH_BYTES, "the broker has grown by {grown_bytes} bytes");
        let length_bytes = self.rig.disk_file()?.metadata()?.len();
        ensure!(length_bytes == DISK_BYTES, "the disk has {length_bytes} bytes");
        ensure!(fs::read(self.rig.directory().join("canary"))? == self.canary, "another file has changed");
        self.end_pauses()?;
        // The new driver uses all of the hostile region.
        let ram = self.front_end.ram().clone();
        let arenas = vec![ram.regions()[1].arena()];
        let mut ram = TestRam { ram, arenas };
        self.front_end.new_inflight_region(self.front_end.queues(), QUEUE_SIZE)?;
        let mut queue_zero = start_queue_zero(&self.front_end, &mut ram)?;
        for index in [2, 3] {
            let mut driver = start_ring(&self.front_end, &mut ram, index)?;
            driver.attach().context("a good driver after all")?;
            let data = pattern(index.into(), 4096);
            driver.write(u64::from(index) * 4096, &data)?;
            ensure!(driver.read(u64::from(index) * 4096, 4096)? == data, "the read returned other data");
        }
        queue_zero.probe()?;
        self.surroundings.check()
    }
}
