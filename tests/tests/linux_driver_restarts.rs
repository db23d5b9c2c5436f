//! Brokers of a guest with the repository's driver are killed with I/O that hangs, while the virtual machine stands still,
//! in the middle of a change of mode, and come back in another mode. Every byte is verified.

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::linux_guest::{
    Job, LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{self, AWAIT_RINGS, ServedDisk, Serving, Ways, statistic},
};
use ringpass_tests::needs::Need;
use ringpass_tests::seed::Seed;
use ringpass_tests::stuck_disk::{StuckDisk, StuckKind};
use rustix::process::Signal;
use serde_json::json;

const DISK_BYTES: u64 = 32 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let needs = || on_rings::needs().into_iter().chain(StuckDisk::needs()).collect::<Vec<Need>>();
    harness::run(vec![test(
        "a_guest_on_rings_loses_nothing_when_brokers_are_killed_with_hanging_io_and_change_their_mode",
        needs(),
        restarts,
    )])
}

/// What happens besides the SIGKILL.
#[derive(Clone, Copy, Debug)]
enum Kill {
    /// The disk hangs, and goes on while the next broker serves.
    HangingDisk,
    /// The next broker gives no rings, and is killed as well.
    VirtqueuesMeanwhile,
    /// The virtual machine is stopped behind the SIGKILL, and continues when the next broker has its front-end.
    StoppedMachine,
    /// An operator has just asked for another mode.
    ChangeOfMode,
    /// The next broker is killed at once.
    Twice,
}

impl Kill {
    const ALL: [Self; 5] =
        [Self::HangingDisk, Self::VirtqueuesMeanwhile, Self::StoppedMachine, Self::ChangeOfMode, Self::Twice];
}

/// A disk whose I/O can hang, a broker, and a guest under load.
struct Scene<'a> {
    disk: &'a StuckDisk,
    served: ServedDisk,
    guest: LinuxGuest,
    load: Job,
    kills: u64,
    rng: fastrand::Rng,
}

fn restarts() -> Result<()> {
    let mut rng = Seed::from_env_or_random().rng();
    for kind in budget(vec![StuckKind::LoopDevice], vec![StuckKind::LoopDevice, StuckKind::File]) {
        let disk = StuckDisk::new(kind, DISK_BYTES)?;
        let served = ServedDisk::at(disk.path(), Serving::default().with(&["--direct-io", "on"]))?;
        let mut guest = served.boot(LinuxGuestConfig::default())?;
        let options = "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=8m --iodepth=32";
        let load = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
        let mut scene = Scene { disk: &disk, served, guest, load, kills: 0, rng: rng.fork() };
        for round in 0..budget(2, 60) {
            let mut kills = Kill::ALL;
            scene.rng.shuffle(&mut kills);
            for kill in kills {
                let start = Instant::now();
                scene.kill_once(kill).with_context(|| format!("{kill:?} in round {round} on a {kind}"))?;
                eprintln!("  {:5.1} s  {kill:?}", start.elapsed().as_secs_f64());
            }
        }
        scene.end()?;
    }
    Ok(())
}

impl Scene<'_> {
    /// Kills a broker or two. Afterwards the guest has rings and goes on.
    fn kill_once(&mut self, kill: Kill) -> Result<()> {
        let pause = Duration::from_millis(self.rng.u64(100..800));
        let went_on = self.guest.let_run(pause);
        self.served.broker.explain(went_on)?;
        match kill {
            Kill::HangingDisk => self.with_a_hanging_disk()?,
            Kill::VirtqueuesMeanwhile => self.with_virtqueues_meanwhile()?,
            Kill::StoppedMachine => self.with_a_stopped_machine()?,
            Kill::ChangeOfMode => self.in_a_change_of_mode()?,
            Kill::Twice => {
                self.replace(&[])?;
                let pause = Duration::from_millis(self.rng.u64(0..1500));
                self.guest.let_run(pause)?;
                self.replace(&[])?;
            }
        }
        let result = self.go_on();
        let result = result.map_err(|error| {
            let log = self.guest.run("dmesg | grep ringpass_blk; grep . /sys/block/vda/ringpass/*/*");
            error.context(log.unwrap_or_else(|error| format!("{error:#}")))
        });
        self.served.broker.explain(result)
    }

    /// Kills the broker, lets the guest run alone for a moment, and starts another one.
    fn replace(&mut self, arguments: &[&str]) -> Result<()> {
        self.served.broker.kill()?;
        self.kills += 1;
        self.guest.let_run(Duration::from_millis(self.rng.u64(0..200)))?;
        self.served.start_again_with(arguments).map(drop)
    }

    /// Waits until requests go over the rings of the last broker.
    fn go_on(&mut self) -> Result<()> {
        self.served.broker.wait_for_log(": Open")?;
        self.guest.run(AWAIT_RINGS)?;
        Ways::await_more(&mut self.guest, "vda", |ways| ways.ring > 10).context("over the rings")?;
        if self.guest.has_ended(self.load)? {
            bail!("fio has ended: {:?}", self.guest.wait_output(self.load, LIMIT)?);
        }
        Ok(())
    }

    /// Kills the broker while a write hangs. Its successor answers the front-end, and executes nothing before that write
    /// has ended.
    fn with_a_hanging_disk(&mut self) -> Result<()> {
        let epochs = "cat /sys/block/vda/ringpass/queue*/epoch";
        let before = self.guest.run(epochs)?;
        self.disk.freeze()?;
        let broker = &self.served.broker;
        self.disk.wait_for_hanging_write(|| broker.has_hanging_thread())?;
        self.served.broker.signal(Signal::KILL)?;
        self.kills += 1;
        let mut old = self.served.start_again_with(&[])?;
        // Longer than QEMU takes to connect again.
        self.guest.let_run(Duration::from_millis(1500))?;
        let ways = Ways::during(&mut self.guest, "vda", |guest| guest.let_run(Duration::from_millis(500)))?;
        let hanging = self.guest.run(epochs)?;
        self.disk.thaw()?;
        old.wait()?;
        ensure!(hanging == before, "a ring while older I/O hangs: before {before}, then {hanging}");
        ensure!(ways == Ways::default(), "requests while older I/O hangs: {ways:?}");
        Ok(())
    }

    /// QEMU 7.2 never connects again if it has stopped the machine before the broker ends, and so before it learns that.
    fn with_a_stopped_machine(&mut self) -> Result<()> {
        self.served.broker.kill()?;
        self.kills += 1;
        self.guest.let_run(Duration::from_millis(200))?;
        self.guest.qmp(json!({"execute": "stop"}))?;
        self.served.start_again()?;
        self.served.broker.wait_for_log("front-end connected")?;
        self.guest.qmp(json!({"execute": "cont"})).map(drop)
    }

    fn with_virtqueues_meanwhile(&mut self) -> Result<()> {
        self.replace(&["--mode", "virtqueue"])?;
        let no_rings = "until [ \"$(cat /sys/block/vda/ringpass/queue[1-9]*/mode | sort -u)\" = virtqueue ]; do
                usleep 20000
            done";
        let result = self.guest.run(no_rings);
        self.served.broker.explain(result)?;
        let ways = Ways::await_more(&mut self.guest, "vda", |ways| ways.virtqueue > 10)?;
        ensure!(ways.ring == 0, "with virtqueues: {ways:?}");
        self.replace(&[])
    }

    fn in_a_change_of_mode(&mut self) -> Result<()> {
        let moment = Duration::from_micros(self.rng.u64(0..30_000));
        let result = thread::scope(|scope| {
            let served = &self.served;
            // It succeeds or not: the broker dies meanwhile.
            let change = scope.spawn(move || served.set_mode("virtqueue"));
            thread::sleep(moment);
            let pid = rustix::process::Pid::from_raw(served.broker.pid() as i32).context("the broker's pid")?;
            rustix::process::kill_process(pid, Signal::KILL)?;
            Ok::<_, anyhow::Error>(change.join().is_ok())
        })?;
        ensure!(result, "the change of mode panicked");
        self.replace(&[])
    }

    fn end(mut self) -> Result<()> {
        self.guest.run(fio::STOP)?;
        let said = self.served.broker.explain(self.guest.wait(self.load, LIMIT))?;
        let aside = statistic(&mut self.guest, "virtqueue_requests")?;
        eprintln!("{} kills in {} runs of fio, {aside} requests over virtqueues", self.kills, said.lines().count());
        self.guest.run("rmmod ringpass_blk")?;
        let log = self.guest.run("dmesg | grep ringpass_blk")?;
        ensure!(!log.contains("not given") && !log.contains("protocol"), "{log}");
        self.guest.shut_down()?;
        self.served.end()
    }
}
