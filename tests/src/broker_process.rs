//! The program `ringpass serve` as a process. Tests start it, watch it, and end it in every way.

use std::{
    env, fmt, fs,
    io::{BufRead, BufReader},
    ops::Add,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{needs::Need, stuck_disk};

/// The path of the program from the directory of all programs. Those of tests are in its directory `deps`.
const PROGRAM: &str = "ringpass";
/// How to build it.
const HOW_TO_BUILD: &str = "`cargo build` builds it, and so does `cargo xtask test`";
/// How long the program may take to start and to end: much longer than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many lines of the program's log an error shows.
const SHOWN_LINES: usize = 60;

/// The path of the program. It must be built from the same sources as the tests.
///
/// # Errors
///
/// The program is missing or older than its sources: cargo does not build the programs of other packages with the
/// tests.
pub fn program() -> Result<PathBuf> {
    let test_program = env::current_exe().context("cannot find the test program")?;
    let directory = test_program.parent().context("the test program is not in a target directory")?;
    let profile = directory.parent().filter(|_| directory.ends_with("deps")).unwrap_or(directory);
    let program = profile.join(PROGRAM);
    let built = fs::metadata(&program)
        .and_then(|found| found.modified())
        .with_context(|| format!("there is no {}: {HOW_TO_BUILD}", program.display()))?;
    // What cargo made it from: "PROGRAM: SOURCE SOURCE ...", with spaces in names escaped. Tests that run without such
    // a list or without the sources take the program as it is.
    let sources = fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    for source in sources.replace("\\ ", "\0").split_whitespace().skip(1) {
        let source = PathBuf::from(source.replace('\0', " "));
        let changed = fs::metadata(&source).and_then(|found| found.modified());
        if changed.is_ok_and(|changed| changed > built) {
            bail!("{} is older than {}: {HOW_TO_BUILD}", program.display(), source.display());
        }
    }
    Ok(program)
}

/// What a broker needs of the machine: the program and io_uring.
pub fn needs() -> Vec<Need> {
    vec![Need::io_uring(), Need::new("the program `ringpass`", || program().map(drop))]
}

/// The resources of a process at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Memory of its own, in bytes (`RssAnon`).
    pub anonymous_bytes: u64,
    /// Mapped pages of files, in bytes, without shared memory (`RssFile`).
    pub file_bytes: u64,
    /// Memory that is pinned, in bytes (`VmPin`): guest RAM that rings reach.
    pub pinned_bytes: u64,
    /// Open file descriptors.
    pub fds: usize,
    /// CPU time of all its threads so far, in nanoseconds (`/proc/PID/task/TID/schedstat`).
    pub cpu_ns: u64,
}

/// The log level, unless `RUST_LOG` says otherwise.
const LOG_LEVEL: &str = "info";
/// The levels that are always on, because tests wait for these lines: the end of start-up, and the start of vrings.
const AWAITED_LEVELS: &str = "ringpass::serve=info,ringpass_broker::vhost_user::session::rings=debug";

/// A running broker. The drop kills it.
#[derive(Debug)]
pub struct BrokerProcess {
    child: Child,
    socket: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    log_reader: Option<JoinHandle<()>>,
}

impl BrokerProcess {
    /// Starts `ringpass serve` for a disk with these further arguments, and waits until it logs that it waits for a
    /// front-end. Then it listens at `socket` and its start-up has ended, so its usage is the one without a front-end.
    ///
    /// # Errors
    ///
    /// The broker ends before it serves, or does not serve in time.
    pub fn start(socket: &Path, disk: &Path, arguments: &[&str]) -> Result<Self> {
        let mut process = Self::spawn(serve(socket, disk, arguments)?, socket)?;
        process.wait_for_start()?;
        Ok(process)
    }

    /// Starts a command that will listen at `socket`, and does not wait.
    ///
    /// # Errors
    ///
    /// The command does not start.
    pub fn spawn(mut command: Command, socket: &Path) -> Result<Self> {
        let mut child = command
            // Each broker has a directory of its own for its control socket.
            .env("RUNTIME_DIRECTORY", socket.parent().unwrap_or(Path::new(".")))
            .env("RUST_LOG", format!("{},{AWAITED_LEVELS}", env::var("RUST_LOG").as_deref().unwrap_or(LOG_LEVEL)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().context("its stderr is piped")?).lines();
        let kept = log.clone();
        let log_reader = thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { child, socket: socket.to_owned(), log, log_reader: Some(log_reader) })
    }

    fn wait_for_start(&mut self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !self.has_logged("waiting for a front-end") {
            if let Some(status) = self.child.try_wait()? {
                self.join_log();
                bail!("the broker ended with {status} before it served:\n{}", self.log());
            }
            ensure!(Instant::now() < end, "the broker does not serve after {PATIENCE:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process that makes the rings of guests, unless the broker offers none.
    pub fn ring_process(&self) -> Option<u32> {
        // The broker has no other child.
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap_or_default();
        children.split_whitespace().next().and_then(|pid| pid.parse().ok())
    }

    /// The broker, and its ring process if there is one.
    pub fn processes(&self) -> impl Iterator<Item = u32> {
        [self.pid()].into_iter().chain(self.ring_process())
    }

    /// The last lines of its log.
    pub fn log(&self) -> String {
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }

    /// Whether a line of its log has this text.
    pub fn has_logged(&self, text: &str) -> bool {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|line| line.contains(text))
    }

    /// Waits until its log has a line with this text.
    ///
    /// # Errors
    ///
    /// The line does not come in time.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !self.has_logged(text) {
            ensure!(Instant::now() < end, "the broker does not say {text:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Adds the broker's log to an error.
    ///
    /// # Errors
    ///
    /// `result` is an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let log = self.log();
            let text = error.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n  because: ");
            anyhow::anyhow!("{text}\nthe broker's log:\n{log}")
        })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // The process has not been waited for, so no other process has its number.
        ensure!(self.child.try_wait()?.is_none(), "the broker has ended:\n{}", self.log());
        kill_process(Pid::from_child(&self.child), signal)?;
        Ok(())
    }

    /// Kills the process with SIGKILL and waits for its end. Its I/O may still run.
    ///
    /// # Errors
    ///
    /// The process cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.join_log();
        Ok(())
    }

    /// Ends the broker with SIGTERM, and returns its exit status.
    ///
    /// # Errors
    ///
    /// The process does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    /// Waits for the end of the broker, and returns its exit status.
    ///
    /// # Errors
    ///
    /// The process does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.join_log();
                return Ok(status);
            }
            ensure!(Instant::now() < end, "the broker has not ended after {PATIENCE:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether it still runs.
    ///
    /// # Errors
    ///
    /// The process cannot be waited for.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Whether a thread of the broker waits in the kernel and cannot be interrupted.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn has_hanging_thread(&self) -> Result<bool> {
        let hanging = self.processes().map(stuck_disk::has_hanging_thread).collect::<Result<Vec<_>>>()?;
        Ok(hanging.contains(&true))
    }

    /// The resources of the broker, with its ring process.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn usage(&self) -> Result<Usage> {
        self.processes().try_fold(Usage::default(), |sum, pid| Ok(sum + usage_of(pid)?))
    }

    /// Waits until the broker has `fds` file descriptors again. It closes those of a connection soon after the
    /// connection.
    ///
    /// # Errors
    ///
    /// The broker keeps more descriptors.
    pub fn wait_for_fds(&self, fds: usize) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let open = self.usage()?.fds;
            if open <= fds {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{open} descriptors are open, {fds} were: {}", self.open_files());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the broker pins no memory. Rings end a little after they were closed.
    ///
    /// # Errors
    ///
    /// The broker keeps memory pinned.
    pub fn wait_for_unpinned(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let pinned_bytes = self.usage()?.pinned_bytes;
            if pinned_bytes == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{pinned_bytes} bytes stay pinned");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The files that the broker has open, for a message.
    fn open_files(&self) -> String {
        let entries =
            self.processes().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok()).flatten().flatten();
        let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut links: Vec<String> = links.map(|link| link.display().to_string()).collect();
        links.sort();
        links.join(", ")
    }

    /// Waits for the rest of the log.
    fn join_log(&mut self) {
        if let Some(reader) = self.log_reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            if let Err(error) = self.kill() {
                eprintln!("the broker {} does not end: {error:#}", self.pid());
            }
        }
        // The sandbox must allow everything that a test makes the broker do.
        let is_refused = self.has_logged("the sandbox refused");
        assert!(!is_refused || thread::panicking(), "the sandbox of a broker is too narrow:\n{}", self.log());
    }
}

/// Displays as its socket and process.
impl fmt::Display for BrokerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker {} at {}", self.pid(), self.socket.display())
    }
}

/// The resources of one process.
fn usage_of(pid: u32) -> Result<Usage> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let status = fs::read_to_string(directory.join("status")).context("cannot read the broker's status")?;
    let bytes = |field: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let text = line.and_then(|text| text.trim().strip_suffix(" kB")).context("a field of the status")?;
        Ok(text.trim().parse::<u64>()? << 10)
    };
    let mut cpu_ns = 0;
    for task in fs::read_dir(directory.join("task"))? {
        // The thread may have ended meanwhile.
        let Ok(statistics) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        cpu_ns += statistics.split(' ').next().context("the time of a thread")?.parse::<u64>()?;
    }
    Ok(Usage {
        anonymous_bytes: bytes("RssAnon")?,
        file_bytes: bytes("RssFile")?,
        pinned_bytes: bytes("VmPin")?,
        fds: fs::read_dir(directory.join("fd"))?.count(),
        cpu_ns,
    })
}

impl Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            anonymous_bytes: self.anonymous_bytes + other.anonymous_bytes,
            file_bytes: self.file_bytes + other.file_bytes,
            pinned_bytes: self.pinned_bytes + other.pinned_bytes,
            fds: self.fds + other.fds,
            cpu_ns: self.cpu_ns + other.cpu_ns,
        }
    }
}

fn serve(socket: &Path, disk: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("serve").arg("--socket-path").arg(socket).arg("--blk-file").arg(disk).args(arguments);
    Ok(command)
}
