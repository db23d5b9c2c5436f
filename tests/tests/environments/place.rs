//! A directory with copies of the programs and a disk. The tests run the programs there in an environment.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    front_end::{
        rig::TestRam,
        session::{FrontEnd, Options},
    },
    needs::Need,
};
use serde_json::Value;
use tempfile::TempDir;

const DISK_BYTES: u64 = 4 << 20;
/// How long a program may take to end: much longer than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// A way to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Virtqueue,
    Direct,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Virtqueue => "virtqueue",
            Self::Direct => "direct",
        }
    }
}

/// The words that tell the helper program what to remove.
pub(crate) struct Environment {
    words: Vec<String>,
}

/// How a program ended that did not work.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its status, and what it printed on further lines.
    text: String,
    is_killed: bool,
}

impl Ended {
    fn new(status: ExitStatus, text: &str) -> Self {
        Self { text: format!("{status}\n{text}"), is_killed: status.code().is_none() }
    }

    fn of(output: &Output) -> Self {
        Self::new(output.status, &String::from_utf8_lossy(&output.stderr))
    }

    /// The number that follows `text`.
    pub(crate) fn number_after(&self, text: &str) -> Result<u64> {
        let (_, rest) = self.text.split_once(text).with_context(|| format!("no {text:?} in {}", self.text))?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().with_context(|| format!("no number after {text:?} in {}", self.text))
    }
}

/// Checks that the program ended by itself and printed one line with these parts.
pub(crate) fn assert_line(ended: &Ended, parts: &[&str]) -> Result<()> {
    ensure!(!ended.is_killed && !ended.text.contains("panicked"), "{ended:?}");
    let lines: Vec<&str> = ended.text.lines().filter(|line| line.starts_with("ringpass")).collect();
    ensure!(lines.len() == 1, "not one line: {ended:?}");
    for part in parts {
        ensure!(lines[0].contains(part), "{part:?} is missing in: {}", lines[0]);
    }
    Ok(())
}

/// What `ringpass probe` printed.
pub(crate) struct Report(Value);

impl Report {
    /// Whether a mode is available.
    pub(crate) fn has(&self, mode: Mode) -> Result<bool> {
        let name = if mode == Mode::Direct { "direct-guest-ram" } else { "virtqueue" };
        let modes = self.0["modes"].as_array().context("no modes")?;
        let mode = modes.iter().find(|mode| mode["name"] == name).with_context(|| format!("no mode {name}"))?;
        mode["available"].as_bool().context("the report does not say whether the mode is available")
    }

    pub(crate) fn advice(&self) -> Result<&str> {
        self.0["kernel"]["advice"].as_str().context("no advice")
    }
}

/// Cargo builds the examples of a workspace with its tests.
fn dd() -> Result<PathBuf> {
    let program = broker_process::program()?;
    let program = program.parent().context("a directory")?.join("examples/ringpass-dd");
    ensure!(program.exists(), "there is no {}: `cargo build -p ringpass-guest --examples`", program.display());
    Ok(program)
}

pub(crate) fn dd_need() -> Need {
    Need::new("the example `ringpass-dd`", || dd().map(drop))
}

/// A directory in which every user can work.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Result<Self> {
        let place = Self(TempDir::with_prefix("ringpass-environment-")?);
        fs::set_permissions(place.0.path(), Permissions::from_mode(0o777))?;
        fs::copy(broker_process::program()?, place.path("ringpass"))?;
        fs::copy(dd()?, place.path("ringpass-dd"))?;
        fs::File::create(place.path("disk.img"))?.set_len(DISK_BYTES)?;
        fs::set_permissions(place.path("disk.img"), Permissions::from_mode(0o666))?;
        fs::create_dir(place.path("kernel"))?;
        fs::write(place.path("kernel/io_uring_disabled"), "1\n")?;
        fs::write(place.path("kernel/io_uring_group"), "-1\n")?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn environment(&self, words: &[&str]) -> Result<Environment> {
        let directory = self.0.path().to_str().context("a path that is text")?;
        Ok(Environment { words: words.iter().map(|word| word.replace("DIRECTORY", directory)).collect() })
    }

    /// A program of this place in the environment, without the variables of this process.
    fn command(&self, environment: &Environment, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_in_environment"));
        command.args(&environment.words).arg("--").arg(self.path(program)).args(arguments).current_dir(self.0.path());
        for variable in ["XDG_RUNTIME_DIR", "TMPDIR", "RUST_LOG"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Returns `None` if the server serves: a front-end has written a block and read it.
    pub(crate) fn serve(&self, environment: &Environment, mode: Mode) -> Result<Option<Ended>> {
        let socket = self.path("vhost.sock");
        let socket_text = socket.to_str().context("a path that is text")?;
        let arguments = ["serve", "--socket-path", socket_text, "--blk-file", "disk.img", "--mode", mode.name()];
        let mut broker = BrokerProcess::spawn(self.command(environment, "ringpass", &arguments), &socket)?;
        let end = Instant::now() + PATIENCE;
        while !broker.has_logged("waiting for a front-end") {
            if !broker.is_running()? {
                let status = broker.wait()?;
                ensure!(!status.success(), "the server ended with success and has not served: {}", broker.log());
                ensure!(!socket.exists(), "the server has not removed its socket");
                return Ok(Some(Ended::new(status, &broker.log())));
            }
            ensure!(Instant::now() < end, "the server neither serves nor ends: {}", broker.log());
            thread::sleep(Duration::from_millis(2));
        }
        broker.explain(write_and_read(&socket))?;
        let status = broker.terminate()?;
        ensure!(status.success(), "{status}: {}", broker.log());
        Ok(None)
    }

    pub(crate) fn probe(&self, environment: &Environment) -> Result<Report> {
        let output = self.run(self.command(environment, "ringpass", &["probe", "--json"]))?;
        let report = serde_json::from_slice(&output.stdout).with_context(|| format!("{:?}", Ended::of(&output)))?;
        Ok(Report(report))
    }

    /// Returns `None` if the demo measured at least one way.
    pub(crate) fn demo(&self, environment: &Environment) -> Result<Option<Ended>> {
        let output = self.run(self.command(
            environment,
            "ringpass",
            &["demo", "--seconds", "0.1", "--json", "--blk-file", "disk.img"],
        ))?;
        if output.status.success() {
            return Ok(None);
        }
        // A demo in which no guest can run ends with this status, and gives the reason for each.
        match serde_json::from_slice::<Value>(&output.stdout) {
            Err(_) => Ok(Some(Ended::of(&output))),
            Ok(report) => {
                let skipped = report["skipped"].as_array().context("no list of what was skipped")?;
                let why: Vec<&str> = skipped.iter().filter_map(|skipped| skipped["why"].as_str()).collect();
                Ok(Some(Ended::new(output.status, &format!("ringpass: {}", why.join("; ")))))
            }
        }
    }

    /// Returns `None` if `ringpass-dd` has read the disk of a server outside of the environment.
    pub(crate) fn dd(&self, environment: &Environment) -> Result<Option<Ended>> {
        let socket = self.path("outside.sock");
        let broker = BrokerProcess::start(&socket, &self.path("disk.img"), &["--mode", "virtqueue"])?;
        fs::set_permissions(&socket, Permissions::from_mode(0o777))?;
        let socket = socket.to_str().context("a path that is text")?;
        let output =
            self.run(self.command(environment, "ringpass-dd", &["--socket", socket, "read", "--output", "-"]))?;
        if output.status.success() {
            ensure!(output.stdout.len() as u64 == DISK_BYTES, "{} bytes were read", output.stdout.len());
            return Ok(None);
        }
        drop(broker);
        Ok(Some(Ended::of(&output)))
    }

    /// Runs a program and fails if it does not end.
    fn run(&self, mut command: Command) -> Result<Output> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (stdout, stderr) = (child.stdout.take().context("piped")?, child.stderr.take().context("piped")?);
        let read = |mut from: Box<dyn std::io::Read + Send>| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                from.read_to_end(&mut bytes).map(|_| bytes)
            })
        };
        let (stdout, stderr) = (read(Box::new(stdout)), read(Box::new(stderr)));
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() >= end {
                child.kill()?;
                child.wait()?;
                bail!("the program does not end: {command:?}");
            }
            thread::sleep(Duration::from_millis(5));
        };
        let bytes = |reader: thread::JoinHandle<std::io::Result<Vec<u8>>>| -> Result<Vec<u8>> {
            Ok(reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??)
        };
        Ok(Output { status, stdout: bytes(stdout)?, stderr: bytes(stderr)? })
    }
}

fn write_and_read(socket: &Path) -> Result<()> {
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(socket, &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    let data: Vec<u8> = (0..4096u32).map(|index| (index * 31) as u8).collect();
    driver.write(8, &data)?;
    driver.flush()?;
    ensure!(driver.read(8, 4096)? == data, "the read returned other data");
    Ok(())
}
