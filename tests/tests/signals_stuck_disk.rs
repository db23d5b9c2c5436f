//! Signals to a server whose I/O hangs: some wait for the I/O, and some end the process at once.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    front_end::{
        rig::TestRam,
        session::{FrontEnd, Options},
    },
    harness::{self, test},
    stuck_disk::{StuckDisk, StuckKind},
};
use rustix::process::Signal;
use tempfile::TempDir;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

const DISK_BYTES: u64 = 4 << 20;
/// Longer than any step takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// Longer than the time in which the server takes a second signal for the same request.
const LATER: Duration = Duration::from_millis(1500);

fn main() -> ExitCode {
    let needs = || StuckDisk::needs().into_iter().chain(broker_process::needs());
    harness::run(vec![
        test("the_server_ignores_a_repeated_sigterm_and_ends_at_once_on_a_later_one", needs(), second_signal),
        test("the_server_ends_at_once_on_sigquit_although_its_io_hangs", needs(), quit),
    ])
}

/// A server with a write that hangs.
struct Stuck {
    // The server drops first, so that nothing uses the disk when it drops.
    broker: BrokerProcess,
    disk: StuckDisk,
    directory: TempDir,
    _front_end: FrontEnd,
    _ram: TestRam,
}

impl Stuck {
    fn new() -> Result<Self> {
        let disk = StuckDisk::new(StuckKind::LoopDevice, DISK_BYTES)?;
        let directory = TempDir::with_prefix("ringpass-signals-")?;
        let socket = directory.path().join("vm.sock");
        let broker = BrokerProcess::start(&socket, disk.path(), &["--poll-us", "0"])?;
        let mut ram = TestRam::new(1, 8 << 20)?;
        let front_end = broker.explain(FrontEnd::connect(&socket, &ram.ram, Options::default()))?;
        let mut driver = ram.driver(&front_end, 0, 4096)?;
        driver.write(0, &[1; 4096])?;
        ensure!(directory.path().join("vm.control").exists(), "no control socket");
        disk.freeze()?;
        let chain = [driver.put_header(VIRTIO_BLK_T_OUT, 0)?, driver.put_data(&[2; 4096])?, driver.put_status()?];
        driver.vring().add(&chain)?;
        driver.vring().publish()?;
        let stuck = Self { broker, disk, directory, _front_end: front_end, _ram: ram };
        stuck.wait_for_kicks(2)?;
        Ok(stuck)
    }

    /// Waits until the server has taken so many kicks of queue 0, and the requests with them.
    fn wait_for_kicks(&self, kicks: u64) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let mut control = UnixStream::connect(self.directory.path().join("vm.control"))?;
            control.write_all(b"{\"request\":\"stats\"}\n")?;
            let stats: serde_json::Value = serde_json::from_reader(control)?;
            if stats["queues"][0]["by_device"]["kicks"].as_u64().context("a count")? >= kicks {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the server does not take the request: {stats}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Checks that the server ends although its I/O hangs, says so, and removes its sockets.
    fn ends_at_once(&mut self, said: &str) -> Result<()> {
        let status = self.broker.wait()?;
        ensure!(status.code() == Some(1), "{status}:\n{}", self.broker.log());
        ensure!(self.broker.has_logged(said), "the server does not log {said:?}:\n{}", self.broker.log());
        self.has_no_sockets()?;
        self.disk.thaw()
    }

    fn has_no_sockets(&self) -> Result<()> {
        let entries = self.directory.path().read_dir()?;
        let left = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

fn second_signal() -> Result<()> {
    let mut stuck = Stuck::new()?;
    stuck.broker.signal(Signal::TERM)?;
    stuck.broker.wait_for_log("SIGTERM: stopping")?;
    stuck.broker.signal(Signal::TERM)?;
    stuck.broker.wait_for_log("SIGTERM ignored: it repeats the same request within 1s")?;
    stuck.broker.wait_for_log("waiting for the last I/O")?;
    ensure!(stuck.broker.is_running()?, "the server does not wait for its I/O:\n{}", stuck.broker.log());
    // The server has removed its sockets. A front-end that connects again gets an error rather than no answer, and a
    // successor can use the paths.
    stuck.has_no_sockets()?;
    let socket = stuck.directory.path().join("vm.sock");
    let mut successor = BrokerProcess::start(&socket, stuck.disk.path(), &["--poll-us", "0", "--incoming"])?;
    drop(successor.explain(UnixStream::connect(&socket).context("cannot connect to the successor"))?);
    thread::sleep(LATER);
    stuck.broker.signal(Signal::TERM)?;
    let status = stuck.broker.wait()?;
    ensure!(status.code() == Some(1), "{status}:\n{}", stuck.broker.log());
    ensure!(stuck.broker.has_logged("SIGTERM: ending at once"), "{}", stuck.broker.log());
    // The ended server has not removed the files of its successor.
    successor.explain(UnixStream::connect(&socket).context("cannot connect to the successor"))?;
    successor.signal(Signal::TERM)?;
    ensure!(successor.wait()?.success(), "{}", successor.log());
    stuck.has_no_sockets()?;
    stuck.disk.thaw()
}

fn quit() -> Result<()> {
    let mut stuck = Stuck::new()?;
    stuck.broker.signal(Signal::QUIT)?;
    stuck.ends_at_once("SIGQUIT: ending at once")
}
