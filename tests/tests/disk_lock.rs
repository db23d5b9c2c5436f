//! Two brokers and one disk: the second broker refuses to start and names the process that has the disk.

use std::{fs, os::unix::fs::MetadataExt, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_broker::disk::{Disk, DiskConfig};
use ringpass_tests::{
    disk_holder::{self, DiskHolder, Held, refusal},
    disks::{DiskKind, TestDisk},
    harness::{self, test},
};
use rustix::fs::{CWD, FileType, Mode, mknodat};

const SIZE_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    if let Some(code) = disk_holder::run_child() {
        return code;
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

fn another_process(kind: DiskKind) -> Result<()> {
    let made = TestDisk::new(kind, SIZE_BYTES)?;
    let config = made.config().lock_wait(None);
    let holder = DiskHolder::start(Held::Disk, made.path())?;
    // For a device, the exclusive claim refuses before the lock does.
    let how = if kind == DiskKind::Loop { "is in use: " } else { "is locked: by " };
    refusal(&config, &[made.path().to_str().context("a plain path")?, how, &holder.name()?])?;
    refusal(&config.clone().read_only(true), &["is locked for writing: by ", &holder.name()?])?;
    holder.end()?;
    Disk::open(&config)?;
    Ok(())
}

fn a_posix_lock() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let holder = DiskHolder::start(Held::PosixLock, made.path())?;
    refusal(&made.config().lock_wait(None), &["is locked: by ", &holder.name()?])?;
    Ok(())
}

fn a_killed_process() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let holder = DiskHolder::start(Held::Disk, made.path())?;
    refusal(&made.config().lock_wait(None), &[])?;
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
    let holder = DiskHolder::start(Held::Disk, made.path())?;
    refusal(&DiskConfig::new(&second), &["is in use: ", &format!("open in {}", holder.name()?)])?;
    holder.end()?;
    Disk::open(&DiskConfig::new(&second))?;
    Ok(())
}

fn waiting_for_a_device() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, SIZE_BYTES)?;
    let holder = DiskHolder::start(Held::Disk, made.path())?;
    refusal(&made.config().lock_wait(Duration::from_millis(100)), &["is in use (still so after waiting 0."])?;
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
    refusal(&config, &["is locked: by ", &format!("[{}]", std::process::id())])?;
    Ok(())
}
