//! `ringpass-dd` with a server that does not run, has another front-end, or is stopped: it says that it waits, gives up
//! in time, and ends on a signal.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::{Child, ExitCode, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest::vhost_user::{Disk, Error, Operation, Options, Way};
use ringpass_tests::{
    broker_process::BrokerProcess,
    dd::{self, Place, status_is, text},
    disks::DiskKind,
    front_end::rig::Rig,
    harness::{self, test},
};
use rustix::process::{Pid, Signal, kill_process};

/// Longer than any step takes that waits for nothing, on a busy machine.
const LIMIT: Duration = Duration::from_secs(40);
const BROKER_ARGUMENTS: [&str; 2] = ["--num-queues", "2"];
/// Longer than any test runs.
const LONG: &str = "86400";

fn main() -> ExitCode {
    harness::run(vec![
        test("a_copy_waits_for_a_server_that_starts_later", dd::needs(), late_server),
        test("a_copy_waits_for_a_server_with_another_front_end_and_gives_up", dd::needs(), held_server),
        test("a_copy_gives_up_on_a_stopped_server_before_and_while_it_copies", dd::needs(), stopped_server),
        test("signals_end_every_wait", dd::needs(), interrupted_waits),
        test("the_driver_gives_up_on_a_stopped_server_in_every_wait", dd::needs(), silent_device),
    ])
}

/// The running program, and its output line by line.
struct Running {
    child: Child,
    lines: Receiver<String>,
    before: Vec<String>,
}

impl Running {
    fn start(rig: &Rig, arguments: &[&str], stdin: Stdio) -> Result<Self> {
        let mut command = dd::command(&rig.socket(), arguments)?;
        let mut child = command.stdin(stdin).spawn()?;
        let (sender, lines) = channel();
        let stderr = child.stderr.take().context("it is piped")?;
        thread::spawn(move || {
            use std::io::{BufRead, BufReader};
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Ok(Self { child, lines, before: Vec::new() })
    }

    fn wait_for_line(&mut self, text: &str) -> Result<()> {
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(line) if line.contains(text) => return Ok(()),
                Ok(line) => self.before.push(line),
                Err(error) => bail!("the program does not print {text:?} ({error}): {:?}", self.before),
            }
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Returns the exit status and the output since the last awaited line. Kills the program if it does not end.
    fn end(mut self) -> Result<(Option<i32>, String)> {
        let end = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= end {
                self.child.kill()?;
                self.child.wait()?;
                bail!("the program does not end within {LIMIT:?}: {:?}", self.before);
            }
            thread::sleep(Duration::from_millis(5));
        };
        Ok((status.code(), self.lines.iter().collect::<Vec<_>>().join("\n")))
    }
}

fn rig() -> Result<Rig> {
    Rig::new(DiskKind::Ext4PageCache, dd::DISK_BYTES)
}

/// A broker that SIGSTOP has stopped. The drop continues it.
struct Stopped<'b>(&'b mut BrokerProcess);

impl<'b> Stopped<'b> {
    fn new(broker: &'b mut BrokerProcess) -> Result<Self> {
        broker.signal(Signal::STOP)?;
        let stopped = Self(broker);
        let begin = Instant::now();
        while !stopped.has_stopped()? {
            ensure!(begin.elapsed() < LIMIT, "the server does not stop");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(stopped)
    }
}

impl Stopped<'_> {
    /// Whether all its threads have stopped (proc_pid_stat(5)). The signal stops them one after the other.
    fn has_stopped(&self) -> Result<bool> {
        for task in fs::read_dir(format!("/proc/{}/task", self.0.pid()))? {
            // The thread may have ended meanwhile.
            let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
            if !stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('T')) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::CONT);
    }
}

fn late_server() -> Result<()> {
    let rig = rig()?;
    let mut running =
        Running::start(&rig, &["verify", "--input", "/dev/zero", "--length-bytes", "1MiB"], Stdio::null())?;
    running.wait_for_line("no process listens on ")?;
    let _broker = rig.broker(&BROKER_ARGUMENTS)?;
    let (status, said) = running.end()?;
    ensure!(status == Some(0), "{status:?}: {said}");
    Ok(())
}

fn held_server() -> Result<()> {
    let rig = rig()?;
    let broker = rig.broker(&BROKER_ARGUMENTS)?;
    // A connection becomes the front-end with its first message: VHOST_USER_GET_FEATURES, a header without a body.
    let mut other = UnixStream::connect(rig.socket())?;
    let header: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    other.write_all(&header)?;
    broker.explain(other.read_exact(&mut [0; 20]).context("the answer"))?;
    let mut running = Running::start(&rig, &["read", "--output", "-", "--patience-s", "2"], Stdio::null())?;
    running.wait_for_line("it serves one front-end at a time, and another one may be connected")?;
    let (status, said) = running.end()?;
    ensure!(status == Some(2), "{status:?}: {said}");
    ensure!(said.contains("no answer from the device within "), "{said}");
    drop(other);
    Ok(())
}

fn stopped_server() -> Result<()> {
    let mut place = Place::new(&BROKER_ARGUMENTS)?;
    {
        let stopped = Stopped::new(&mut place.broker)?;
        let running = Running::start(&place.rig, &["read", "--output", "-", "--patience-s", "1"], Stdio::null())?;
        let (status, said) = running.end()?;
        ensure!(status == Some(2) && said.contains("no answer from the device within"), "{status:?}: {said}");
        drop(stopped);
    }
    // The server stops in the middle of the copy, and is still stopped when the program drops the disk.
    let mut running = Running::start(&place.rig, &["write", "--input", "-", "--patience-s", "3"], Stdio::piped())?;
    let mut input = running.child.stdin.take().context("it is piped")?;
    // More than the program has in flight, so that it waits for the server in between.
    input.write_all(&vec![1; 5 << 20])?;
    let begin = Instant::now();
    while !place.disk()?.starts_with(&[1; 4096]) {
        ensure!(begin.elapsed() < LIMIT, "nothing is written");
        thread::sleep(Duration::from_millis(5));
    }
    let stopped = Stopped::new(&mut place.broker)?;
    // As much as the program reads before it waits.
    let writing = thread::spawn(move || input.write_all(&vec![2; 36 << 20]));
    running.wait_for_line("the server does not answer; waiting up to 3 s")?;
    let (status, said) = running.end()?;
    ensure!(status == Some(2) && said.contains("no answer from the server for 3 s"), "{status:?}: {said}");
    drop(stopped);
    let _ = writing.join();
    // The server serves the next front-end.
    let output: Output =
        place.run(&["verify", "--input", "/dev/zero", "--offset-bytes", "46MiB", "--length-bytes", "1MiB"])?;
    place.broker.explain(status_is(&output, 0)).with_context(|| text(&output))
}

fn interrupted_waits() -> Result<()> {
    let rig = rig()?;
    for signal in [Signal::INT, Signal::TERM] {
        // No server listens.
        let mut running = Running::start(&rig, &["read", "--output", "-", "--patience-s", LONG], Stdio::null())?;
        running.wait_for_line("no process listens on ")?;
        running.signal(signal)?;
        let (status, said) = running.end()?;
        ensure!(status == Some(2) && said.contains("interrupted after 0 bytes"), "{status:?}: {said}");

        // No server answers.
        let mut broker = rig.broker(&BROKER_ARGUMENTS)?;
        let stopped = Stopped::new(&mut broker)?;
        let mut running = Running::start(&rig, &["read", "--output", "-", "--patience-s", LONG], Stdio::null())?;
        running.wait_for_line("it serves one front-end at a time")?;
        running.signal(signal)?;
        let (status, said) = running.end()?;
        ensure!(status == Some(2) && said.contains("interrupted after 0 bytes"), "{status:?}: {said}");
        drop(stopped);

        // The input does not come, and then the server does not stop its queues. The program gets two signals at once.
        let mut running = Running::start(&rig, &["write", "--input", "-", "--patience-s", LONG], Stdio::piped())?;
        let _input = running.child.stdin.take();
        broker.wait_for_log("vring starts")?;
        let stopped = Stopped::new(&mut broker)?;
        running.signal(signal)?;
        running.signal(signal)?;
        let (status, said) = running.end()?;
        ensure!(status == Some(2) && said.contains("interrupted after 0 bytes"), "{status:?}: {said}");
        drop(stopped);
        ensure!(broker.terminate()?.success(), "{}", broker.log());
    }
    Ok(())
}

/// Runs everything in the library that waits, with a server that is stopped in between.
fn silent_device() -> Result<()> {
    const PATIENCE: Duration = Duration::from_millis(400);
    let rig = rig()?;
    let mut broker = rig.broker(&BROKER_ARGUMENTS)?;
    let options = Options::default().memory_bytes(4 << 20).way(Way::Virtqueue).patience(PATIENCE);
    let patient = options.patience(LIMIT);
    fn is_silent<T>(what: &str, result: Result<T, Error>) -> Result<()> {
        ensure!(matches!(result, Err(Error::Silent { .. })), "{what}: {:?}", result.err());
        Ok(())
    }

    {
        let stopped = Stopped::new(&mut broker)?;
        is_silent("connect", Disk::connect(rig.socket(), options))?;
        drop(stopped);
    }
    let disk = Disk::connect(rig.socket(), patient)?;
    disk.close()?;
    for way in [Way::Virtqueue, Way::Auto] {
        let disk = Disk::connect(rig.socket(), options.way(way)).context("cannot connect to the continued server")?;
        let mut queue = disk.queue(1)?;
        let buffer = disk.allocate(4096)?;
        queue.submit(Operation::DurableWrite, buffer, 0, 4096, 1).expect("an empty queue has room");
        let done = queue.wait(LIMIT).context("a write")?;
        ensure!(done.result? == 4096);

        let stopped = Stopped::new(&mut broker)?;
        is_silent("flush", disk.flush())?;
        is_silent("serial", disk.serial())?;
        is_silent("discard", disk.discard(0, 4096))?;
        // No call on a queue waits for the server.
        queue.submit(Operation::DurableWrite, done.buffer, 0, 4096, 2).expect("there is room");
        let begin = Instant::now();
        ensure!(
            way == Way::Auto || queue.wait(Duration::from_millis(50)).is_none(),
            "a stopped server completed a request"
        );
        ensure!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
        is_silent("memory", disk.add_memory(1 << 32, 1 << 20))?;
        drop(stopped);
        // After a message without an answer the library connects again.
        let begin = Instant::now();
        while disk.reconnects() == 0 {
            ensure!(begin.elapsed() < LIMIT, "the library does not connect again");
            thread::sleep(Duration::from_millis(2));
        }
        if way == Way::Virtqueue {
            ensure!(queue.wait(LIMIT).context("the second write")?.result? == 4096);
        }

        let stopped = Stopped::new(&mut broker)?;
        let begin = Instant::now();
        drop(queue);
        let closed = disk.close();
        ensure!(matches!(closed, Err(Error::NotStopped { .. })), "{closed:?}");
        ensure!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
        drop(stopped);
    }
    Disk::connect(rig.socket(), patient)?.close()?;
    Ok(())
}
