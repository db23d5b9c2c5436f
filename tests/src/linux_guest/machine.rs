//! One QEMU process with its two connections: the monitor and the guest's agent.

use std::{
    fs::{self, File},
    mem,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    agent::Agent,
    config::{Accelerator, LinuxGuestConfig, Places, Start, Version, arguments},
    qmp::Qmp,
};
use crate::{kernel_log, needs::find_program};

/// The name of the QEMU program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// How long QEMU may take until its monitor answers. It connects to all back-ends first.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a wait checks the limits, and whether the guest still runs.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How many lines of the console a failure shows.
const CONSOLE_TAIL_LINES: usize = 40;

/// A running QEMU. The drop kills it.
#[derive(Debug)]
pub(super) struct Machine {
    child: Child,
    directory: tempfile::TempDir,
    pub(super) qmp: Qmp,
    pub(super) agent: Agent,
}

impl Machine {
    /// Starts QEMU and connects to it.
    ///
    /// # Errors
    ///
    /// There is no QEMU, or it ends at once. The error has its messages.
    pub(super) fn start(config: &LinuxGuestConfig, start: &Start<'_>, accelerator: Accelerator) -> Result<Self> {
        let directory =
            tempfile::Builder::new().prefix("ringpass-guest-").tempdir().context("cannot make a directory")?;
        let places = Places(directory.path());
        let program = find_program(PROGRAM).with_context(|| format!("there is no {PROGRAM}"))?;
        let arguments = arguments(config, start, accelerator, version(&program)?, &places);
        match start {
            Start::Kernel(image) | Start::Incoming(image) if config.has_own_initramfs() => {
                let initramfs = image.initramfs_with(&config.programs, config.block_driver.as_ref())?;
                fs::write(places.initramfs(), initramfs).context("cannot write the initramfs")?;
            }
            _ => {}
        }
        let stderr = File::create(places.stderr()).context("cannot make a file for QEMU's messages")?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context("cannot start QEMU")?;
        let mut starting = Starting { child: Some(child) };
        // The connection to the guest comes first: its output is lost while the port is not connected.
        let connected = starting
            .wait_for_socket(&places.agent())
            .and_then(|()| Agent::connect(&places.agent()))
            .and_then(|agent| Ok((agent, Qmp::connect(&places.qmp())?)));
        let said = || format!("QEMU said: {}", fs::read_to_string(places.stderr()).unwrap_or_default().trim());
        let (agent, qmp) = connected.with_context(said)?;
        let child = starting.child.take().context("QEMU is gone")?;
        Ok(Self { child, directory, qmp, agent })
    }

    /// Reads from the guest until `look` returns a value.
    ///
    /// # Errors
    ///
    /// `look` does not return a value in this time, or QEMU or the guest's kernel ends. The error has the console.
    pub(super) fn wait_until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&mut Agent) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            if let Some(found) = look(&mut self.agent) {
                return Ok(found);
            }
            if Instant::now() >= end {
                bail!("waiting for {what}: it takes longer than {limit:?}\n{}", self.describe());
            }
            self.take_output(end).with_context(|| format!("cannot wait for {what}"))?;
        }
    }

    /// Takes the guest's output. It waits a short time for it, at most until `end`.
    ///
    /// # Errors
    ///
    /// QEMU or the guest's kernel has ended. The error has the console.
    pub(super) fn take_output(&mut self, end: Instant) -> Result<()> {
        let wait = end.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), LOOK_INTERVAL);
        if !self.agent.pump(wait)? {
            bail!("QEMU closed the guest's serial port ({:?})\n{}", self.child.try_wait(), self.describe());
        }
        if let Some(panic) = self.console().lines().find(|line| line.contains("Kernel panic")) {
            bail!("{panic}\n{}", self.describe());
        }
        Ok(())
    }

    /// Waits until QEMU ends by itself.
    ///
    /// # Errors
    ///
    /// QEMU does not end in this time.
    pub(super) fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for QEMU")? {
                return Ok(status);
            }
            ensure!(Instant::now() < end, "QEMU still runs after {limit:?}\n{}", self.describe());
            // QEMU would wait until someone reads its output.
            self.agent.pump(Duration::from_millis(20))?;
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Takes over the scripts of a guest that has migrated to this machine. The old machine has ended.
    ///
    /// # Errors
    ///
    /// The rest of the old machine's output cannot be read.
    pub(super) fn go_on_from(&mut self, mut old: Self) -> Result<()> {
        mem::swap(&mut self.agent, &mut old.agent);
        self.agent.move_to(&mut old.agent)
    }

    /// The output of the firmware and the guest's kernel.
    pub(super) fn console(&self) -> String {
        let bytes = fs::read(Places(self.directory.path()).console()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The lines of the console in which the guest's kernel reports trouble.
    pub(super) fn kernel_trouble(&self) -> Vec<String> {
        self.console().lines().filter(|line| kernel_log::is_trouble(line)).map(str::to_owned).collect()
    }

    /// The directory of this QEMU, for sockets of its own.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The last output of the console, the scripts and QEMU, for the report of a failure.
    pub(super) fn describe(&self) -> String {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let console = lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..].join("\n    ");
        let agent = self.agent.tail().collect::<Vec<_>>().join("\n    ");
        let stderr = fs::read_to_string(Places(self.directory.path()).stderr()).unwrap_or_default();
        format!("  console:\n    {console}\n  scripts:\n    {agent}\n  QEMU:\n    {}", stderr.trim())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A QEMU that may not work yet. The drop kills the child unless it was taken out.
struct Starting {
    child: Option<Child>,
}

impl Starting {
    fn wait_for_socket(&mut self, path: &Path) -> Result<()> {
        let child = self.child.as_mut().context("QEMU is gone")?;
        let end = Instant::now() + START_LIMIT;
        // QEMU makes the socket of its monitor before this one.
        while UnixStream::connect(path).is_err() {
            if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
                bail!("QEMU ended at once: {status}");
            }
            ensure!(Instant::now() < end, "QEMU makes no socket in {START_LIMIT:?}");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
        eprintln!("QEMU cannot be ended: {error}");
    }
}

fn version(program: &Path) -> Result<Version> {
    let output = Command::new(program).arg("--version").output().context("cannot ask QEMU for its version")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Version::parse(&text).with_context(|| format!("QEMU says this of its version: {text}"))
}
