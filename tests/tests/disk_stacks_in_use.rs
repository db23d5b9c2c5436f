//! Storage that is in use without a lock: by a mount, and by I/O of a process that was killed. And servers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, mpsc::channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::disk::{DirectIo, Disk, DiskConfig, DiskLease, StartUp};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disk_holder::{self, DiskHolder, Held, refusal},
    disks::{DiskKind, LoopDevice, TestDisk},
    harness::{self, test},
    mounts::{FileSystem, Mounted},
    needs::Need,
    stuck_disk::{StuckDisk, StuckKind},
};

const SIZE_BYTES: u64 = 4 << 20;
/// Longer than anything takes on a machine with other work.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    if let Some(code) = disk_holder::run_child() {
        return code;
    }
    let servers = || DiskKind::Loop.needs().into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    harness::run(vec![
        test("the_image_of_a_mounted_file_system_is_refused_for_writing", FileSystem::Ext4.needs(), mounted),
        test("a_file_waits_for_io_of_a_killed_process_on_a_loop_device_over_it", StuckDisk::needs(), killed_with_io),
        test("a_server_on_a_loop_device_keeps_servers_off_the_file_until_it_is_killed", servers(), two_servers),
        test("a_server_that_cannot_lock_the_file_behind_a_loop_device_warns_and_serves", servers(), unlocked),
    ])
}

fn config(path: &Path) -> DiskConfig {
    DiskConfig::new(path).direct_io(DirectIo::Off)
}

/// The file behind a loop device.
fn backing_file(device: &Path) -> Result<PathBuf> {
    let name = device.file_name().and_then(|name| name.to_str()).context("the name of a loop device")?;
    Ok(fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"))?.trim_end().into())
}

fn mounted() -> Result<()> {
    let mounted = Mounted::new(FileSystem::Ext4, 512)?;
    let device = mounted_device(mounted.path())?;
    let image = backing_file(&device)?;
    let is_mounted = format!("is mounted on {:?}", mounted.path());
    let same = format!("has the same storage as {device:?}, which is in use: ");
    refusal(&config(&image), &[&same, &is_mounted])?;
    let over_device = LoopDevice::new(&device, &[])?;
    refusal(&config(over_device.path()), &[&same, &is_mounted])?;
    Disk::open(&config(&image).read_only(true)).context("a reader of the image")?;
    // A file in that file system is another storage.
    let file = mounted.path().join("disk.img");
    fs::write(&file, [0; 4096])?;
    Disk::open(&config(&file))?;
    Ok(())
}

/// The device that is mounted there.
fn mounted_device(mount_point: &Path) -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let line = fields.find(|fields| fields.get(1).is_some_and(|point| Path::new(point) == mount_point));
    Ok(line.context("a mount")?[0].into())
}

/// The lock on the file ends with the process, and the claim on the loop device with the I/O.
fn killed_with_io() -> Result<()> {
    let made = StuckDisk::new(StuckKind::LoopDevice, SIZE_BYTES)?;
    let image = backing_file(made.path())?;
    let mut writer = DiskHolder::start(Held::DiskAndRing, made.path())?;
    let (sender, held) = channel();
    let located = Disk::locate(&config(&image))?;
    let lease = DiskLease::new(Arc::new(located), move |disk| drop(sender.send(disk)))?;
    let error = lease.start_up(StartUp::Grace(Duration::ZERO)).err().context("a living process was passed over")?;
    ensure!(error.to_string().contains(&writer.name()?), "{error}");

    made.freeze()?;
    writer.write()?;
    writer.kill()?;
    let started = Instant::now();
    lease.start_up(StartUp::Grace(Duration::from_secs(3600))).context("no living process has the file")?;
    ensure!(started.elapsed() < LIMIT, "the start waited for {:?}", started.elapsed());
    ensure!(held.recv_timeout(Duration::from_millis(500)).is_err(), "the write was still under way");
    made.thaw()?;
    let disk = held.recv_timeout(LIMIT).context("the file after the write")?;
    let mut block = [1; 4096];
    ensure!(rustix::io::pread(&*disk, &mut block, 0)? == block.len());
    ensure!(block == [0; 4096], "the file was passed on before the write was done");
    drop((disk, lease, held));
    Ok(())
}

fn unlocked() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let device = LoopDevice::new(made.path(), &[])?;
    let directory = made.directory().context("a directory")?;
    fs::rename(made.path(), directory.join("renamed.img"))?;
    let server = BrokerProcess::start(&directory.join("first.sock"), device.path(), &[])?;
    ensure!(!server.has_logged("is not locked"), "the kernel knows where the file is now: {}", server.log());
    drop(server);
    fs::remove_file(directory.join("renamed.img"))?;
    let server = BrokerProcess::start(&directory.join("second.sock"), device.path(), &[])?;
    server.wait_for_log("is not locked: its path leads nowhere or elsewhere")
}

fn two_servers() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let device = LoopDevice::new(made.path(), &[])?;
    let directory = made.directory().context("a directory")?;
    let (first, second) = (directory.join("first.sock"), directory.join("second.sock"));
    for (served, other) in [(device.path(), made.path()), (made.path(), device.path())] {
        let mut server = BrokerProcess::start(&first, served, &[])?;
        let refused = BrokerProcess::start(&second, other, &["--lock-wait-s", "0"]);
        let log = format!("{:#}", refused.err().context("two servers serve one storage")?);
        ensure!(log.contains("is locked ") && log.contains(&format!("by ringpass[{}]", server.pid())), "{log}");
        ensure!(log.contains(&made.path().display().to_string()), "the file is not named: {log}");
        ensure!(log.contains(&device.path().display().to_string()), "the device is not named: {log}");
        server.kill()?;
        BrokerProcess::start(&second, other, &[])?.terminate()?;
    }
    Ok(())
}
