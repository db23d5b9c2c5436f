//! Two brokers and one disk: the second broker refuses to start and names the process that has the disk.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use ringpass_broker::disk::{Disk, DiskConfig, DiskError};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, test},
};
use rustix::fs::{CWD, FileType, Mode, mknodat};

const SIZE_BYTES: u64 = 1 << 20;

/// Set for the child process that has a disk: how it locks the disk. Its argument is the path.
const HOLD_VARIABLE: &str = "RINGPASS_TEST_HOLD";

fn main() -> ExitCode {
    if let Ok(how) = env::var(HOLD_VARIABLE) {
        hold(&how).expect("holding the disk");
        return ExitCode::SUCCESS;
    }
    let file = || DiskKind::Ext4PageCache.needs();
    let device = || DiskKind::Loop.needs();
    harness::run(vec![
        test("the_refusal_names_the_process_that_has_the_file", file(), || another_process(DiskKind::Ext4PageCache)),
        test("the_refusal_names_the_process_that_has_the_device", device(), || another_process(DiskKind::Loop)),
        test("the_refusal_names_the_process_that_has_a_posix_lock", file(), a_posix_lock),
        test("a_killed_process_leaves_no_lock", file(), a_killed_process),
        test("a_broker_refuses_a_second_node_of_a_device_in_use", device(), a_second_node),
        test("a_broker_that_waits_for_a_device_gets_it_when_it_is_free", device(), waiting_for_a_device),
        test("read_only_disks_share_a_device_and_keep_writers_out", device(), read_only_devices),
    ])
}

/// The child: locks the disk, says so, and keeps it until its standard input ends.
fn hold(how: &str) -> Result<()> {
    let path = env::args_os().nth(1).context("a path")?;
    let _disk = (how == "disk").then(|| Disk::open(&DiskConfig::new(&path))).transpose()?;
    let file = fs::File::options().read(true).write(true).open(&path)?;
    if how == "posix" {
        let whole =
            libc::flock { l_type: libc::F_WRLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(&file, FcntlArg::F_SETLK(&whole))?;
    }
    println!("held");
    std::io::stdout().flush()?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// A child process that has the disk. The drop kills it.
struct Holder(Child);

impl Holder {
    fn start(how: &str, path: &Path) -> Result<Self> {
        let child = Command::new(env::current_exe()?)
            .arg(path)
            .env(HOLD_VARIABLE, how)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut holder = Self(child);
        let mut line = String::new();
        BufReader::new(holder.0.stdout.as_mut().context("a pipe")?).read_line(&mut line)?;
        ensure!(line == "held\n", "the child says {line:?}");
        Ok(holder)
    }

    fn name(&self) -> Result<String> {
        let pid = self.0.id();
        Ok(format!("{}[{pid}]", fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end()))
    }

    fn end(mut self) -> Result<()> {
        drop(self.0.stdin.take());
        ensure!(self.0.wait()?.success());
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn refusal(config: &DiskConfig) -> Result<DiskError> {
    match Disk::open(config) {
        Ok(_) => bail!("{:?} was not refused", config.path),
        Err(error) => Ok(error),
    }
}

fn ensure_has(error: &DiskError, parts: &[&str]) -> Result<()> {
    let message = error.to_string();
    for part in parts {
        ensure!(message.contains(part), "{part:?} is missing in: {message}");
    }
    Ok(())
}

fn another_process(kind: DiskKind) -> Result<()> {
    let made = TestDisk::new(kind, SIZE_BYTES)?;
    let config = made.config().lock_wait(None);
    let holder = Holder::start("disk", made.path())?;
    let error = refusal(&config)?;
    // For a device, the exclusive claim refuses before the lock does.
    let how = if kind == DiskKind::Loop { "is in use: " } else { "is locked: by " };
    ensure_has(&error, &[made.path().to_str().context("a plain path")?, how, &holder.name()?])?;
    let error = refusal(&config.clone().read_only(true))?;
    ensure_has(&error, &["is locked for writing: by ", &holder.name()?])?;
    holder.end()?;
    Disk::open(&config)?;
    Ok(())
}

fn a_posix_lock() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let holder = Holder::start("posix", made.path())?;
    let error = refusal(&made.config().lock_wait(None))?;
    ensure_has(&error, &["is locked: by ", &holder.name()?])
}

fn a_killed_process() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let holder = Holder::start("disk", made.path())?;
    refusal(&made.config().lock_wait(None))?;
    drop(holder);
    Disk::open(&made.config())?;
    Ok(())
}

/// An OFD lock belongs to the node. Only the exclusive claim on the device can refuse a second node.
fn a_second_node() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, SIZE_BYTES)?;
    let second = made.directory().context("a loop device has a directory")?.join("node");
    let number = fs::metadata(made.path())?.rdev();
    mknodat(CWD, &second, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number)?;
    let holder = Holder::start("disk", made.path())?;
    let error = refusal(&DiskConfig::new(&second))?;
    ensure_has(&error, &["is in use: ", &format!("open in {}", holder.name()?)])?;
    holder.end()?;
    Disk::open(&DiskConfig::new(&second))?;
    Ok(())
}

fn waiting_for_a_device() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, SIZE_BYTES)?;
    let holder = Holder::start("disk", made.path())?;
    let error = refusal(&made.config().lock_wait(Duration::from_millis(100)))?;
    ensure_has(&error, &["is in use (still so after waiting 0."])?;
    let config = made.config().lock_wait(Duration::from_secs(60));
    let waiting = std::thread::spawn(move || Disk::open(&config).map(|_| ()));
    std::thread::sleep(Duration::from_millis(50));
    ensure!(!waiting.is_finished());
    holder.end()?;
    waiting.join().expect("no panic")?;
    Ok(())
}

fn read_only_devices() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, SIZE_BYTES)?;
    let config = made.config().lock_wait(None);
    let read_only = config.clone().read_only(true);
    let _first = Disk::open(&read_only)?;
    let _second = Disk::open(&read_only)?;
    ensure_has(&refusal(&config)?, &["is locked: by ", &format!("[{}]", std::process::id())])
}
