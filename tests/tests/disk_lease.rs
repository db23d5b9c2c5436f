//! Disks whose properties are known before they can be locked: while another process has them, or while I/O of an ended
//! process runs.

use std::{
    fs::File,
    process::{Command, ExitCode},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use ringpass_broker::disk::{Disk, DiskConfig, DiskLease, LeaseState, LocatedDisk, StartUp};
use ringpass_tests::{
    disk_holder::{self, DiskHolder, Held},
    disks::{DiskKind, LoopDevice, TestDisk},
    harness::{self, Test, test},
    needs::{Need, find_program},
    stuck_disk::{StuckDisk, StuckKind},
};
use rustix::fs::{FallocateFlags, fallocate};

const SIZE_BYTES: u64 = 4 << 20;
const BLOCK_BYTES: usize = 4096;
/// Longer than any step takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    if let Some(code) = disk_holder::run_child() {
        return code;
    }
    let mut tests: Vec<Test> = DiskKind::ALL
        .map(|kind| {
            test(format!("a_located_disk_tells_the_truth_about_a_disk_in_use_{kind}"), kind.needs(), move || {
                truth(kind)
            })
        })
        .into();
    let growing = DiskKind::Loop.needs();
    tests.push(test("a_located_disk_sees_that_the_device_has_grown", growing, a_growing_device));
    for kind in [StuckKind::LoopDevice, StuckKind::File] {
        let name = format!("a_start_goes_on_beside_io_of_a_killed_process_and_has_the_disk_after_it_{kind}");
        let needs = || StuckDisk::needs().into_iter().chain([Need::io_uring()]).collect::<Vec<_>>();
        tests.push(test(name, needs(), move || a_killed_process(kind)));
    }
    harness::run(tests)
}

/// Locates a disk that this process has open, and compares what it says with what works.
fn truth(kind: DiskKind) -> Result<()> {
    let made = TestDisk::new(kind, SIZE_BYTES)?;
    let disk = Disk::open(&made.config())?;
    let located = Disk::locate(&made.config())?;
    ensure!(located.size_bytes() == SIZE_BYTES && located.refresh_size()? == SIZE_BYTES);
    ensure!(located.logical_block_bytes() == disk.logical_block_bytes());
    ensure!(located.physical_block_bytes() == disk.physical_block_bytes());
    ensure!(located.direct_alignment() == disk.direct_alignment());
    ensure!(located.is_direct_io() == disk.is_direct_io());
    let error = located.try_lock().err().context("the disk was locked twice")?;
    ensure!(error.is_busy() && error.names_living_holder(), "{error}");

    let capabilities = located.capabilities();
    ensure!(capabilities.zero_range.is_some(), "this kind of disk cannot write zeroes");
    for (mode, told) in
        [(FallocateFlags::PUNCH_HOLE, capabilities.punch_hole), (FallocateFlags::ZERO_RANGE, capabilities.zero_range)]
    {
        write(&disk, 0, 0x5a)?;
        let done = fallocate(&disk, mode | FallocateFlags::KEEP_SIZE, 0, BLOCK_BYTES as u64);
        ensure!(done.is_ok() == told.is_some(), "{mode:?}: {done:?}, but the located disk says {told:?}");
        let expected = if done.is_ok() { 0 } else { 0x5a };
        let found = read_at_alignment(&disk, BLOCK_BYTES as u32)?;
        ensure!(found.iter().all(|&byte| byte == expected), "{mode:?}: the read returned other data");
        if let Some(limits) = told {
            let whole = limits.max_bytes.min(SIZE_BYTES);
            fallocate(&disk, mode | FallocateFlags::KEEP_SIZE, 0, whole).with_context(|| format!("{whole} bytes"))?;
        }
    }
    // The buffer's address has exactly the promised alignment.
    write(&disk, 0, 0xa5)?;
    let found = read_at_alignment(&disk, disk.memory_alignment_bytes())?;
    ensure!(found.iter().all(|&byte| byte == 0xa5), "the read returned other data");
    Ok(())
}

fn write(disk: &Disk, offset_bytes: u64, byte: u8) -> Result<()> {
    let mut page = MmapMut::map_anon(BLOCK_BYTES)?;
    page.fill(byte);
    ensure!(rustix::io::pwrite(disk, &page, offset_bytes)? == BLOCK_BYTES);
    Ok(())
}

fn read_at_alignment(disk: &Disk, alignment_bytes: u32) -> Result<Vec<u8>> {
    let start = alignment_bytes as usize;
    let mut pages = MmapMut::map_anon(start + BLOCK_BYTES)?;
    let buffer = &mut pages[start..];
    ensure!(rustix::io::pread(disk, &mut *buffer, 0)? == BLOCK_BYTES);
    Ok(buffer.to_vec())
}

fn a_growing_device() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES)?;
    let device = LoopDevice::new(made.path(), &[])?;
    let config = DiskConfig::new(device.path());
    let (disk, located) = (Disk::open(&config)?, Disk::locate(&config)?);
    File::options().write(true).open(made.path())?.set_len(2 * SIZE_BYTES)?;
    ensure!((disk.refresh_size()?, located.refresh_size()?) == (SIZE_BYTES, SIZE_BYTES), "the driver was not told yet");
    let status = Command::new(find_program("losetup").context("there is no program `losetup`")?)
        .arg("--set-capacity")
        .arg(device.path())
        .status()?;
    ensure!(status.success());
    ensure!((disk.refresh_size()?, located.refresh_size()?) == (2 * SIZE_BYTES, 2 * SIZE_BYTES));
    ensure!((disk.size_bytes(), located.size_bytes()) == (2 * SIZE_BYTES, 2 * SIZE_BYTES));
    Ok(())
}

fn lease(located: LocatedDisk) -> Result<(DiskLease, Receiver<Arc<Disk>>)> {
    let (sender, receiver) = channel();
    // The test may have ended by then.
    let lease = DiskLease::new(Arc::new(located), move |disk| drop(sender.send(disk)))?;
    Ok((lease, receiver))
}

fn a_killed_process(kind: StuckKind) -> Result<()> {
    let made = StuckDisk::new(kind, SIZE_BYTES)?;
    let mut writer = DiskHolder::start(Held::DiskAndRing, made.path())?;
    let (lease, held) = lease(Disk::locate(&made.config())?)?;
    let error = lease.start_up(StartUp::Grace(Duration::ZERO)).err().context("the start ignored a living process")?;
    ensure!(error.to_string().contains(&writer.name()?), "{error}");

    made.freeze()?;
    writer.write()?;
    writer.kill()?;
    // The disk can be located meanwhile.
    let again = Disk::locate(&made.config())?;
    ensure!(again.size_bytes() == SIZE_BYTES && again.capabilities() == lease.located().capabilities());
    let started = Instant::now();
    lease
        .start_up(StartUp::Grace(Duration::from_secs(3600)))
        .context("the start refuses, although no living process has the disk")?;
    ensure!(started.elapsed() < LIMIT, "the start waited for {:?}", started.elapsed());
    let early = held.recv_timeout(Duration::from_millis(500));
    ensure!(matches!(early, Err(RecvTimeoutError::Timeout)), "the lease got the disk before the write had ended");
    ensure!(matches!(lease.state(), LeaseState::Waiting { .. }));

    made.thaw()?;
    let disk = held.recv_timeout(LIMIT).context("the disk after the write")?;
    let found = read_at_alignment(&disk, BLOCK_BYTES as u32)?;
    // The kernel completes a write that it has issued. It may have cancelled a write that waited in an io-wq worker.
    let was_written = found.iter().all(|&byte| byte == 0);
    let was_cancelled = kind == StuckKind::File && found.iter().all(|&byte| byte == StuckDisk::INITIAL_BYTE);
    ensure!(was_written || was_cancelled, "the lease got the lock before the write was done");
    std::thread::sleep(Duration::from_millis(100));
    ensure!(read_at_alignment(&disk, BLOCK_BYTES as u32)? == found, "the disk changed after the lease got the lock");
    drop((disk, lease, held));
    Ok(())
}
