//! The compared servers.

use std::{
    fmt, fs, io,
    os::unix::{net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Time-out for the start and the stop of a server.
const PATIENCE: Duration = Duration::from_secs(2);

/// A program that serves an image on a socket.
pub(crate) trait Server {
    fn name(&self) -> String;
    fn command(&self, image: &Path, socket: &Path) -> Command;
}

/// `ringpass serve` with its defaults.
pub(crate) struct Ringpass {
    program: PathBuf,
}

impl Ringpass {
    /// Builds the program in the profile that users run.
    pub(crate) fn build() -> Result<Self> {
        Ok(Self { program: ringpass_benches::build_program()? })
    }
}

impl Server for Ringpass {
    fn name(&self) -> String {
        "ringpass".into()
    }

    fn command(&self, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("serve").arg("--socket-path").arg(socket).arg("--blk-file").arg(image);
        command.args(["--num-queues", "1", "--direct-io", "off"]).env("RUST_LOG", "warn");
        command
    }
}

/// QEMU's engine for asynchronous I/O.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Aio {
    Threads,
    IoUring,
}

/// `qemu-storage-daemon` with an iothread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QemuStorageDaemon {
    aio: Aio,
    poll_max_ns: u64,
}

impl QemuStorageDaemon {
    /// The configurations to try: both engines for the page cache, and poll times from QEMU's default upwards.
    pub(crate) fn configurations() -> impl Iterator<Item = Self> {
        [Aio::Threads, Aio::IoUring]
            .into_iter()
            .flat_map(|aio| [32_768, 200_000, 2_000_000].map(|poll_max_ns| Self { aio, poll_max_ns }))
    }
}

impl fmt::Display for QemuStorageDaemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, poll-max-ns={}", self.aio.name(), self.poll_max_ns)
    }
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Self::Threads => "aio=threads",
            Self::IoUring => "aio=io_uring",
        }
    }
}

impl Server for QemuStorageDaemon {
    fn name(&self) -> String {
        format!("qemu-storage-daemon ({self})")
    }

    fn command(&self, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", &format!("iothread,id=iothread0,poll-max-ns={}", self.poll_max_ns)]);
        let blockdev =
            format!("driver=file,node-name=disk,filename={},cache.direct=off,{}", image.display(), self.aio.name());
        command.args(["--blockdev", &blockdev]);
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=1,\
             iothread=iothread0",
            socket.display()
        );
        command.args(["--export", &export]);
        command
    }
}

/// A started server.
pub(crate) struct Running {
    child: Child,
}

/// Starts a server on the second core that this process may use, and waits until it listens.
pub(crate) fn start(server: &dyn Server, image: &Path, socket: &Path) -> Result<Running> {
    let [ours, its] = two_cores()?;
    sched_setaffinity(None, &ours).context("cannot bind the client to its core")?;
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).context("cannot remove the old socket");
        }
        _ => {}
    }
    let name = server.name();
    let mut command = server.command(image, socket);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: `sched_setaffinity` is one system call on a copy of a plain value; nothing is allocated or locked.
    unsafe { command.pre_exec(move || sched_setaffinity(None, &its).map_err(Into::into)) };
    let mut child = command.spawn().with_context(|| format!("cannot start {name} (is it installed?)"))?;
    let deadline = Instant::now() + PATIENCE;
    // Do not test by connecting: some servers serve only one connection.
    while !is_listening(socket) {
        if let Some(status) = child.try_wait()? {
            bail!("{name} ended: {status}");
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            bail!("{name} does not listen on {socket:?}");
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(Running { child })
}

impl Running {
    /// Asks the server to end, and kills it if it does not: `qemu-storage-daemon` sometimes hangs when it is told to
    /// terminate just after its client has disconnected.
    pub(crate) fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// Whether a process listens on the socket: the kernel lists it with the flag of a listener (`__SO_ACCEPTCON`).
fn is_listening(socket: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let Ok(sockets) = fs::read_to_string("/proc/net/unix") else {
        // Without the list, connecting is the only way to know.
        return UnixStream::connect(socket).is_ok();
    };
    let name = socket.to_string_lossy();
    sockets.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        fields.nth(3) == Some(ACCEPTS_CONNECTIONS) && fields.last() == Some(&name)
    })
}

/// One core for the client and one for the server: the first two cores of this process's initial affinity.
fn two_cores() -> Result<[CpuSet; 2]> {
    // Ask only once, because the main thread of this process is bound to one of them later.
    static CORES: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    let cores = CORES.get_or_init(|| {
        let allowed = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).take(2).collect()
    });
    let [first, second] = cores[..] else {
        bail!("this benchmark needs two cores, one for the client and one for the server")
    };
    Ok([first, second].map(|cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        set
    }))
}
