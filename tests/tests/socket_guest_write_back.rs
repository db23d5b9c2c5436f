//! Errors of the host's write-back, which the kernel reports once, to a later durable write or flush.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ringpass_guest::vhost_user::{Disk, Operation, Queue, Way};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::{DiskKind, LoopDevice},
    harness::{self, test},
    needs::Need,
    socket_guest::{connect, options},
};

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
/// A block that has room on the disk.
const WITH_ROOM: u64 = 0;
/// A block that has none.
const WITHOUT_ROOM: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let needs = DiskKind::Loop.needs().into_iter().chain(broker_process::needs());
    harness::run(vec![test(
        "an_error_of_write_back_that_a_durable_write_on_a_ring_reports_reaches_the_application",
        needs.chain([Need::program("mount", "mount")]),
        reported,
    )])
}

/// A file system of 2 MiB in memory. The drop unmounts it.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "none"])
            .arg(directory.path())
            .status()
            .context("cannot start mount")?;
        ensure!(status.success(), "mount: {status}");
        Ok(Self(directory))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Leaves no room.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.path("filler"))?;
        loop {
            match file.write(&[1; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        match Command::new("umount").arg(self.0.path()).status() {
            Ok(status) if status.success() => {}
            other => eprintln!("{} is left behind: {other:?}", self.0.path().display()),
        }
    }
}

fn reported() -> Result<()> {
    let file_system = SmallFileSystem::new()?;
    let file = file_system.path("backing");
    File::create(&file)?.set_len(DISK_BYTES)?;
    let device = LoopDevice::new(&file, &[])?;
    let directory = tempfile::tempdir()?;
    let arguments = ["--mode", "direct", "--num-queues", "2", "--direct-io", "off"];
    let mut broker = BrokerProcess::start(&directory.path().join("broker.sock"), device.path(), &arguments)?;
    broker.explain(write_back_fails(broker.socket(), device.path(), &file_system))?;
    let status = broker.terminate()?;
    ensure!(status.success(), "the broker: {status}");
    drop(device);
    fs::remove_file(&file)?;
    Ok(())
}

fn write_back_fails(socket: &Path, device: &Path, file_system: &SmallFileSystem) -> Result<()> {
    let disk = connect(socket, options(1, 4 << 20, Way::Ring))?;
    let mut queue = disk.queue(1)?;
    // Another descriptor has its own mark of what was reported to it.
    let other = File::options().read(true).write(true).open(device)?;
    write(&disk, &mut queue, Operation::DurableWrite, WITH_ROOM)?.context("while there is room")?;
    file_system.fill()?;
    write(&disk, &mut queue, Operation::Write, WITHOUT_ROOM)?.context("into the page cache")?;
    ensure!(other.sync_all().is_err(), "the host has written a block for which it has no room");
    // Its own block has room. The driver must not send it again: the repeat would succeed, and a flush, too.
    let before = queue.counters();
    let result = write(&disk, &mut queue, Operation::DurableWrite, WITH_ROOM)?;
    let error = result.err().context("a durable write hides that an earlier write is lost")?;
    ensure!(queue.counters() == before, "the driver has sent it again: {:?}, before: {before:?}", queue.counters());
    eprintln!("the application gets: {error}");
    write(&disk, &mut queue, Operation::DurableWrite, WITH_ROOM)?.context("the kernel reports an error once")?;
    ensure!(queue.counters() == before, "the requests went another way: {:?}", queue.counters());
    Ok(())
}

/// Writes a block. The inner result is that of the request.
fn write(disk: &Disk, queue: &mut Queue, operation: Operation, offset_bytes: u64) -> Result<std::io::Result<u32>> {
    let buffer = disk.allocate(BLOCK_BYTES.into())?;
    ensure!(queue.submit(operation, buffer, offset_bytes, BLOCK_BYTES, 1).is_ok(), "the empty queue refuses a request");
    Ok(queue.wait(PATIENCE).context("a write does not end")?.result)
}
