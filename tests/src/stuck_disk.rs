//! A disk whose I/O a test can make hang and continue, for tests of what must hold while a request does not end.
//!
//! An ext4 file system in an image is mounted from a loop device, and holds the disk's file. Freezing that file system
//! (`fsfreeze(8)`) holds back every write to it, however it was submitted, until it is thawed. The disk is the file
//! itself, or a second loop device over it:
//!
//! - [`StuckKind::LoopDevice`]: an issued write hangs in the device, as on a drive that does not answer. The driver
//!   executes one request after the other, so *reads* behind a hanging write hang too.
//! - [`StuckKind::File`]: a write hangs in an io-wq worker before it is issued. Writes that find no worker are queued.

use std::{
    env,
    ffi::OsString,
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::disk::{DirectIo, DiskConfig, LogicalBlock};

use crate::{
    disks::LoopDevice,
    needs::{Need, find_program},
};

/// A script that undoes everything when its standard input ends: when the disk is dropped, and also when the test is
/// killed, so that nothing is left behind. A killed process with hanging I/O may keep its files open until that I/O
/// ends. Therefore the script also undoes a freeze that lasts too long. The arguments are the mount point, the loop
/// device of the file system, the loop device of the disk (or an empty word), the directory, and the longest freeze in
/// seconds.
const CLEAN_UP: &str = r#"
limit=
while read -r ${limit:+-t "$limit"} word; do
    case "$word" in freeze) limit="$5" ;; thaw) limit= ;; esac
done
fsfreeze --unfreeze "$1"
test -z "$3" || losetup --detach "$3"
left=100
until umount "$1"; do
    left=$((left - 1))
    test "$left" -gt 0 || { umount --lazy "$1"; break; }
    sleep 0.1
done
losetup --detach "$2"
rm -rf "$4"
"#;

/// Much longer than a test needs, and shorter than the 120 s after which the kernel complains about a hanging task.
const LONGEST_FREEZE_SECONDS: &str = "60";

/// How long a write may take until it hangs. Only other work on the machine delays that. The time is shorter than a
/// freeze.
const HANG_PATIENCE: Duration = Duration::from_secs(30);

/// Enough space for ext4's own data.
const FILE_SYSTEM_BYTES: u64 = 16 << 20;

/// The kind of the disk on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StuckKind {
    /// A loop device: issued I/O hangs in the device.
    LoopDevice,
    /// A file: writes hang in io-wq workers.
    File,
}

impl fmt::Display for StuckKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LoopDevice => "loop",
            Self::File => "file",
        })
    }
}

/// A disk of this test whose I/O the test can stop. The drop lets hanging I/O continue, and removes everything.
///
/// Its content is [`INITIAL_BYTE`](Self::INITIAL_BYTE) everywhere.
#[derive(Debug)]
pub struct StuckDisk {
    kind: StuckKind,
    path: PathBuf,
    mount_point: PathBuf,
    guardian: Guardian,
}

impl StuckDisk {
    /// What [`new`](Self::new) needs of the machine.
    pub fn needs() -> Vec<Need> {
        vec![
            Need::root(),
            Need::io_uring(),
            Need::file("/dev/loop-control"),
            Need::program("bash", "bash"),
            Need::program("losetup", "mount"),
            Need::program("mount", "mount"),
            Need::program("mkfs.ext4", "e2fsprogs"),
            Need::program("fsfreeze", "util-linux"),
        ]
    }

    /// Makes a disk of `size_bytes`, a multiple of 4096. All its blocks are written.
    ///
    /// # Errors
    ///
    /// A program that [`needs`](Self::needs) names fails. Nothing is left behind.
    pub fn new(kind: StuckKind, size_bytes: u64) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("ringpass-stuck-").tempdir()?;
        let (image, mount_point) = (directory.path().join("image"), directory.path().join("mnt"));
        fs::create_dir(&mount_point)?;
        File::create_new(&image)?.set_len(size_bytes + size_bytes / 8 + FILE_SYSTEM_BYTES)?;
        program("mkfs.ext4", &["-q", "-F", "-b", "4096", "-O", "^has_journal", path(&image)?])?;

        let device = LoopDevice::new(&image, &[])?;
        program("mount", &["-t", "ext4", path(device.path())?, path(&mount_point)?])?;
        let mounted = MountGuard(&mount_point);
        let file = mount_point.join("disk.img");
        let mut content = io::repeat(Self::INITIAL_BYTE).take(size_bytes);
        let mut written = File::create_new(&file)?;
        io::copy(&mut content, &mut written)?;
        written.sync_all()?;
        drop(written);
        let disk_device = match kind {
            StuckKind::LoopDevice => Some(LoopDevice::new(&file, &[])?),
            StuckKind::File => None,
        };

        let disk_path = disk_device.as_ref().map_or(file, |device| device.path().to_owned());
        let disk_device_path = disk_device.as_ref().map_or("", |_| disk_path.to_str().unwrap_or_default());
        let arguments = [path(&mount_point)?, path(device.path())?, disk_device_path, path(directory.path())?];
        let guardian = Guardian::start(&arguments)?;
        // From here on the guardian cleans up.
        std::mem::forget((disk_device, mounted, device));
        let _ = directory.keep();
        Ok(Self { kind, path: disk_path, mount_point, guardian })
    }

    /// Every byte of a new disk.
    pub const INITIAL_BYTE: u8 = 0x5a;

    /// The kind of the disk.
    pub fn kind(&self) -> StuckKind {
        self.kind
    }

    /// The file or the device node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration with which a broker opens the disk: read-write, with direct I/O, without waiting for the lock.
    pub fn config(&self) -> DiskConfig {
        DiskConfig::new(&self.path).direct_io(DirectIo::On).logical_block(LogicalBlock::DirectIo)
    }

    /// The same, but it waits for the lock long enough for a ring whose I/O has ended.
    pub fn config_waiting(&self) -> DiskConfig {
        self.config().lock_wait(Duration::from_secs(60))
    }

    /// Makes writes hang until [`thaw`](Self::thaw) or the drop, for at most a minute.
    ///
    /// # Errors
    ///
    /// `fsfreeze` fails, for example because it is frozen already.
    pub fn freeze(&self) -> Result<()> {
        self.guardian.tell("freeze")?;
        program("fsfreeze", &["--freeze", path(&self.mount_point)?]).map(drop)
    }

    /// Waits until a write of the process `pid` hangs: in the device, or in a thread of that process (an io-wq worker
    /// or a thread of its own). Call it between [`freeze`](Self::freeze) and [`thaw`](Self::thaw).
    ///
    /// # Errors
    ///
    /// No write hangs in time.
    pub fn wait_for_hanging_write(&self, has_hanging_thread: impl Fn() -> Result<bool>) -> Result<()> {
        let is_hanging = || match self.kind {
            StuckKind::LoopDevice => self.writes_in_device(),
            StuckKind::File => has_hanging_thread(),
        };
        let end = Instant::now() + HANG_PATIENCE;
        while !is_hanging()? {
            ensure!(Instant::now() < end, "no write hangs after {HANG_PATIENCE:?}");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether the device has a write in flight (`/sys/block/NAME/inflight`: reads, then writes).
    fn writes_in_device(&self) -> Result<bool> {
        let name = self.path.file_name().and_then(|name| name.to_str()).context("the name of the loop device")?;
        let inflight =
            fs::read_to_string(format!("/sys/block/{name}/inflight")).context("cannot read what is in flight")?;
        let writes = inflight.split_whitespace().nth(1).context("the writes in flight")?;
        Ok(writes.parse::<u64>()? > 0)
    }

    /// Lets all hanging I/O continue.
    ///
    /// # Errors
    ///
    /// `fsfreeze` fails, for example because it is not frozen.
    pub fn thaw(&self) -> Result<()> {
        program("fsfreeze", &["--unfreeze", path(&self.mount_point)?])?;
        self.guardian.tell("thaw")
    }
}

impl Drop for StuckDisk {
    fn drop(&mut self) {
        self.guardian.finish();
    }
}

/// Whether a thread of a process waits in the kernel and cannot be interrupted (state D, proc_pid_stat(5)).
///
/// # Errors
///
/// There is no such process.
pub fn has_hanging_thread(pid: u32) -> Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // The thread may have ended meanwhile.
        let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
        if stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('D')) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The process that cleans up. It is in a process group of its own, so that a signal to the test's group does not end
/// it.
#[derive(Debug)]
struct Guardian {
    process: Child,
    lifeline: Option<ChildStdin>,
}

impl Guardian {
    fn start(arguments: &[&str]) -> Result<Self> {
        let mut process = Command::new(find_program("bash").context("there is no program `bash`")?)
            .args(["-c", CLEAN_UP, "guardian"])
            .args(arguments)
            .arg(LONGEST_FREEZE_SECONDS)
            .env("PATH", search_path())
            .stdin(Stdio::piped())
            // A test runner waits until no process has the test's output open.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the process that cleans up")?;
        let lifeline = process.stdin.take();
        Ok(Self { process, lifeline })
    }

    fn tell(&self, word: &str) -> Result<()> {
        let mut lifeline = self.lifeline.as_ref().context("the process that cleans up is gone")?;
        writeln!(lifeline, "{word}").context("cannot tell the process that cleans up")
    }

    fn finish(&mut self) {
        self.lifeline = None;
        if let Err(error) = self.process.wait() {
            eprintln!("the process that cleans up a stuck disk cannot be waited for: {error}");
        }
    }
}

/// A mounted file system, until the guardian has it.
struct MountGuard<'a>(&'a Path);

impl Drop for MountGuard<'_> {
    fn drop(&mut self) {
        if let Err(error) = path(self.0).and_then(|point| program("umount", &[point])) {
            eprintln!("a file system is left mounted: {error:#}");
        }
    }
}

fn program(name: &str, arguments: &[&str]) -> Result<String> {
    let found = find_program(name).with_context(|| format!("there is no program `{name}`"))?;
    let output = Command::new(found).args(arguments).output().with_context(|| format!("cannot start {name}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} {arguments:?}: {}", message.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `PATH` with the directories that an ordinary user's often lacks.
fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{path:?} is not UTF-8"))
}
