//! One storage has one writer, also through loop devices and partitions.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::disk::{DirectIo, Disk, DiskConfig};
use ringpass_tests::{
    disk_holder::{self, DiskHolder, Held, refusal},
    disks::{DiskKind, LoopDevice, TestDisk},
    harness::{self, Test, test},
    mounts::run,
    needs::Need,
};

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 4 * MIB;
/// The first and the second half of the disk, as options of `losetup`.
const FIRST_HALF: [&str; 2] = ["--offset=0", "--sizelimit=2097152"];
const SECOND_HALF: [&str; 2] = ["--offset=2097152", "--sizelimit=2097152"];

fn main() -> ExitCode {
    if let Some(code) = disk_holder::run_child() {
        return code;
    }
    let case_with = |needs: Vec<Need>, name: &str, body: fn() -> Result<()>| {
        test(name, DiskKind::Loop.needs().into_iter().chain(needs), body)
    };
    let case = |name: &str, body: fn() -> Result<()>| case_with(Vec::new(), name, body);
    let addpart = || vec![Need::program("addpart", "util-linux")];
    let tests: Vec<Test> = vec![
        case("a_loop_device_over_a_file_in_use_is_refused", file_then_loop),
        case("a_file_under_a_loop_device_in_use_is_refused", loop_then_file),
        case("a_second_loop_device_over_a_file_is_refused", two_loops),
        case("loop_devices_over_disjoint_parts_of_a_file_are_served_side_by_side", disjoint_loops),
        case("a_storage_has_one_writer_through_a_stack_of_loop_devices", stacked_loops),
        case_with(addpart(), "a_storage_has_one_writer_through_partitions", partitions),
        case_with(
            addpart(),
            "a_loop_device_over_a_partition_and_the_disk_of_the_partition_keep_each_other_out",
            loop_over_partition,
        ),
        case_with(
            DiskKind::Zram.needs(),
            "a_loop_device_over_a_block_device_and_that_device_keep_each_other_out",
            loop_over_device,
        ),
        case("readers_share_a_storage_through_all_devices_and_keep_writers_out", readers),
        case("qemu_that_has_the_file_keeps_out_a_loop_device_over_any_part", qemu),
        case("a_loop_device_over_a_file_without_a_name_is_refused_beside_another", nameless_file),
        case("waiting_for_a_loop_device_ends_when_its_file_is_free", waiting),
        case("brokers_that_start_at_once_get_the_storage_one_after_the_other", at_once),
        case("a_located_loop_device_is_followed_when_it_is_set_up_anew", set_up_anew),
        case("a_located_disk_has_its_storage_once", acquired_twice),
    ];
    harness::run(tests)
}

fn image() -> Result<TestDisk> {
    Ok(TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?)
}

fn config(path: &Path) -> DiskConfig {
    DiskConfig::new(path).direct_io(DirectIo::Off)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a plain path")
}

/// Asserts that the disk is refused beside the holder, in these words, and free when the holder has ended or was killed.
fn refused_until_the_end(path: &Path, held: Held, held_path: &Path, parts: &[&str]) -> Result<()> {
    for is_killed in [false, true] {
        let holder = DiskHolder::start(held, held_path)?;
        refusal(&config(path), &[parts, &[text(path)?, &holder.name()?]].concat())?;
        if is_killed {
            drop(holder);
        } else {
            holder.end()?;
        }
        Disk::open(&config(path)).context("the disk is free")?.close();
        // Nothing of that is left either.
        DiskHolder::start(held, held_path)?.end()?;
    }
    Ok(())
}

fn file_then_loop() -> Result<()> {
    let made = image()?;
    let device = LoopDevice::new(made.path(), &[])?;
    let lies_on = format!("lies on {:?}, which is locked: by ", made.path());
    refused_until_the_end(device.path(), Held::Disk, made.path(), &[&lies_on])
}

fn loop_then_file() -> Result<()> {
    let made = image()?;
    let device = LoopDevice::new(made.path(), &[])?;
    let over = format!("in use on the same storage: {}", text(device.path())?);
    refused_until_the_end(made.path(), Held::Disk, device.path(), &["is locked: by ", &over])
}

fn two_loops() -> Result<()> {
    let made = image()?;
    let (first, second) = (LoopDevice::new(made.path(), &[])?, LoopDevice::new(made.path(), &["--offset=4096"])?);
    for (path, held) in [(first.path(), second.path()), (second.path(), first.path())] {
        let lies_on = format!("lies on {:?}, which is locked: by ", made.path());
        let over = format!("in use on the same storage: {}", text(held)?);
        refused_until_the_end(path, Held::Disk, held, &[&lies_on, &over])?;
    }
    Ok(())
}

fn disjoint_loops() -> Result<()> {
    let made = image()?;
    let (first, second) = (LoopDevice::new(made.path(), &FIRST_HALF)?, LoopDevice::new(made.path(), &SECOND_HALF)?);
    let first_holder = DiskHolder::start(Held::Disk, first.path())?;
    let second_holder = DiskHolder::start(Held::Disk, second.path())?;
    let overlapping = LoopDevice::new(made.path(), &["--offset=2093056", "--sizelimit=4096"])?;
    let message = refusal(&config(overlapping.path()), &["which is locked: by ", &first_holder.name()?])?;
    ensure!(!message.contains(&second_holder.name()?), "the process with another part is named: {message}");
    refusal(&config(made.path()), &["is locked: by ", &first_holder.name()?, &second_holder.name()?])?;
    first_holder.end()?;
    Disk::open(&config(overlapping.path()))?;
    Ok(())
}

fn stacked_loops() -> Result<()> {
    let made = image()?;
    let lower = LoopDevice::new(made.path(), &[])?;
    let upper = LoopDevice::new(lower.path(), &SECOND_HALF)?;
    refused_until_the_end(made.path(), Held::Disk, upper.path(), &["is locked: by "])?;
    refused_until_the_end(lower.path(), Held::Disk, upper.path(), &["is locked: by "])?;
    let on_file = format!("lies on {:?}, which is locked: by ", made.path());
    refused_until_the_end(upper.path(), Held::Disk, made.path(), &[&on_file])?;
    refused_until_the_end(upper.path(), Held::Disk, lower.path(), &[&on_file])?;
    // The part that the upper device does not have.
    let _holder = DiskHolder::start(Held::Disk, upper.path())?;
    let beside = LoopDevice::new(made.path(), &FIRST_HALF)?;
    Disk::open(&config(beside.path()))?;
    Ok(())
}

/// A disk with two partitions of one MiB after the first MiB, which the kernel is told of: it need not know a table.
fn partitioned() -> Result<(TestDisk, LoopDevice, [PathBuf; 2])> {
    let made = image()?;
    // With this option the partitions end with the device.
    let device = LoopDevice::new(made.path(), &["--partscan"])?;
    for (number, start_sectors) in [("1", "2048"), ("2", "4096")] {
        run("addpart", [text(device.path())?, number, start_sectors, "2048"])?;
    }
    let partitions = [1, 2].map(|number| PathBuf::from(format!("{}p{number}", device.path().display())));
    let end = Instant::now() + Duration::from_secs(10);
    while !partitions.iter().all(|path| path.exists()) {
        ensure!(Instant::now() < end, "{partitions:?} do not appear");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok((made, device, partitions))
}

fn partitions() -> Result<()> {
    let (made, device, [first, second]) = partitioned()?;
    let on_file = format!("lies on {:?}, which is locked: by ", made.path());
    // The kernel refuses a claim on the device beside a claim on a partition of it.
    refused_until_the_end(&first, Held::Disk, device.path(), &["is in use: "])?;
    refused_until_the_end(device.path(), Held::Disk, &first, &["is in use: "])?;
    refused_until_the_end(&first, Held::Disk, made.path(), &[&on_file])?;
    let over = format!("in use on the same storage: {}", text(&first)?);
    refused_until_the_end(made.path(), Held::Disk, &first, &["is locked: by ", &over])?;
    let same_part = LoopDevice::new(made.path(), &["--offset=1048576", "--sizelimit=1048576"])?;
    refused_until_the_end(same_part.path(), Held::Disk, &first, &[&on_file, &over])?;
    refused_until_the_end(&first, Held::Disk, same_part.path(), &[&on_file])?;

    let _holder = DiskHolder::start(Held::Disk, &first)?;
    Disk::open(&config(&second)).context("another partition")?.close();
    let other_part = LoopDevice::new(made.path(), &["--offset=2097152", "--sizelimit=1048576"])?;
    Disk::open(&config(other_part.path())).context("a loop device over another part")?;
    Ok(())
}

fn loop_over_partition() -> Result<()> {
    let (made, device, [first, second]) = partitioned()?;
    let upper = LoopDevice::new(&first, &[])?;
    refused_until_the_end(upper.path(), Held::Disk, &first, &["lies on ", "which is locked: by "])?;
    refused_until_the_end(&first, Held::Disk, upper.path(), &["is locked: by "])?;
    let lies_on = format!("lies on {:?}, which is locked: by ", made.path());
    refused_until_the_end(upper.path(), Held::Disk, device.path(), &[&lies_on])?;
    refused_until_the_end(device.path(), Held::Disk, upper.path(), &[&lies_on, "in use on the same storage: "])?;
    let _holder = DiskHolder::start(Held::Disk, upper.path())?;
    Disk::open(&config(&second)).context("another partition")?;
    Ok(())
}

/// The device has no storage of its own that could be locked.
fn loop_over_device() -> Result<()> {
    let lower = TestDisk::new(DiskKind::Zram, SIZE_BYTES)?;
    let upper = LoopDevice::new(lower.path(), &[])?;
    let lies_on = format!("lies on {:?}, which is locked: by ", lower.path());
    refused_until_the_end(upper.path(), Held::Disk, lower.path(), &[&lies_on])?;
    let over = format!("has the same storage as {:?}, which is in use: ", upper.path());
    refused_until_the_end(lower.path(), Held::Disk, upper.path(), &[&over])
}

fn readers() -> Result<()> {
    let made = image()?;
    let lower = LoopDevice::new(made.path(), &[])?;
    let upper = LoopDevice::new(lower.path(), &[])?;
    let paths = [made.path(), lower.path(), upper.path()];
    for held in paths {
        let holder = DiskHolder::start(Held::ReadOnlyDisk, held)?;
        for path in paths {
            Disk::open(&config(path).read_only(true)).with_context(|| format!("{path:?} beside {held:?}"))?.close();
            refusal(&config(path), &["is locked: by ", &holder.name()?])?;
        }
        holder.end()?;
        let holder = DiskHolder::start(Held::Disk, held)?;
        for path in paths {
            refusal(&config(path).read_only(true), &["is locked for writing: by ", &holder.name()?])?;
        }
        holder.end()?;
    }
    Ok(())
}

fn qemu() -> Result<()> {
    let made = image()?;
    for part in [FIRST_HALF, SECOND_HALF] {
        let device = LoopDevice::new(made.path(), &part)?;
        let lies_on = format!("lies on {:?}, which is locked: by ", made.path());
        refused_until_the_end(device.path(), Held::QemuLocks, made.path(), &[&lies_on])?;
    }
    Ok(())
}

/// No path leads to the file, so the broker cannot lock it and only sees that another device is claimed.
fn nameless_file() -> Result<()> {
    let made = image()?;
    let (first, second) = (LoopDevice::new(made.path(), &[])?, LoopDevice::new(made.path(), &[])?);
    fs::remove_file(made.path())?;
    let over = format!("has the same storage as {:?}, which is in use: ", first.path());
    refused_until_the_end(second.path(), Held::Disk, first.path(), &[&over])
}

fn waiting() -> Result<()> {
    let made = image()?;
    let device = LoopDevice::new(made.path(), &[])?;
    for (path, held) in [(made.path(), device.path()), (device.path(), made.path())] {
        let holder = DiskHolder::start(Held::Disk, held)?;
        let config = config(path).lock_wait(Duration::from_secs(60));
        let waiting = std::thread::spawn(move || Disk::open(&config).map(|_| ()));
        std::thread::sleep(Duration::from_millis(50));
        ensure!(!waiting.is_finished());
        holder.end()?;
        waiting.join().expect("no panic")?;
    }
    Ok(())
}

/// Each path to the storage again and again, all at the same time.
fn at_once() -> Result<()> {
    let made = image()?;
    let (lower, beside) = (LoopDevice::new(made.path(), &[])?, LoopDevice::new(made.path(), &SECOND_HALF)?);
    let upper = LoopDevice::new(lower.path(), &SECOND_HALF)?;
    let is_held = AtomicBool::new(false);
    let take_turns = |path: &Path| -> Result<()> {
        for round in 0..8 {
            let disk = Disk::open(&config(path).lock_wait(Duration::from_secs(60)))
                .with_context(|| format!("{path:?}, round {round}"))?;
            ensure!(!is_held.swap(true, Ordering::SeqCst), "{path:?} was opened beside another, round {round}");
            std::thread::sleep(Duration::from_millis(1));
            is_held.store(false, Ordering::SeqCst);
            disk.close();
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let paths = [made.path(), lower.path(), beside.path(), upper.path()];
        let threads = paths.map(|path| scope.spawn(move || take_turns(path)));
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

fn set_up_anew() -> Result<()> {
    let (made, other) = (image()?, image()?);
    let device = LoopDevice::new(made.path(), &[])?;
    let located = Disk::locate(&config(device.path()))?;
    let path = device.path().to_owned();
    drop(device);
    let again = LoopDevice::new(other.path(), &[])?;
    ensure!(again.path() == path, "another loop device was free: {again:?}");
    let disk = located.try_lock()?;
    let name = format!("[{}]", std::process::id());
    refusal(&config(other.path()), &["is locked: by ", &name])?;
    Disk::open(&config(made.path())).context("the former file")?;
    drop(disk);
    Disk::open(&config(other.path())).context("the file of a disk that was dropped")?;
    Ok(())
}

fn acquired_twice() -> Result<()> {
    let made = image()?;
    let device = LoopDevice::new(made.path(), &[])?;
    let located = Disk::locate(&config(device.path()))?;
    let disk = located.try_lock()?;
    let error = located.try_lock().err().context("the disk was acquired twice")?;
    ensure!(error.is_busy() && error.names_living_holder(), "{error}");
    refusal(&config(made.path()), &["is locked: by "])?;
    disk.close();
    located.try_lock()?.close();
    Disk::open(&config(made.path()))?;
    Ok(())
}
