//! The front-end stops queues and removes memory while the broker pins other memory.

use std::{os::unix::fs::MetadataExt, time::Instant};

use anyhow::{Result, ensure};
use nix::libc::EFAULT;
use ringpass_tests::{
    disks::DiskKind,
    front_end::{
        attach::{bench::Bench, wait_until},
        ram::RamRegion,
    },
};

use crate::{BLOCK_BYTES, DISK_BYTES, GIB};

/// A queue stops while its ATTACH waits for the pin of all memory. QEMU waits for the answer with its locks held, and
/// the kernel takes half a second to pin a GiB of untouched memory.
pub(crate) fn stop() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let region = RamRegion::new(4 * GIB, 12 * GIB)?;
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    let mut driver = bench.started(1)?;
    let before = bench.broker.usage()?.pinned_bytes;
    driver.send_both(&driver.payload().to_bytes())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > before + (16 << 20)))?;
    stop_before_pinned(&bench, 1, &region)?;
    bench.broker.wait_for_unpinned()
}

/// A queue stops while its ATTACH waits for the pin of an added region. The other queue has a ring.
pub(crate) fn stop_behind_a_region() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let mut driver = bench.started(2)?;
    let mut running = bench.attached(1)?;
    let before = bench.broker.usage()?.pinned_bytes;
    let region = RamRegion::new(4 * GIB, 8 * GIB)?;
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > before + (16 << 20)))?;
    driver.send_both(&driver.payload().to_bytes())?;
    // The broker takes ATTACH together with ARM, and has not answered ATTACH yet.
    wait_until("ARM is answered", || Ok(driver.vring().used_idx()? == 1))?;
    running.read(0, 512)?;
    stop_before_pinned(&bench, 2, &region)?;
    stop_before_pinned(&bench, 1, &region)?;
    bench.broker.wait_for_unpinned()
}

/// The front-end removes memory while the broker pins all memory for a first ring. Firmware and VMM of a starting guest
/// change its memory while a driver attaches.
pub(crate) fn leave_before_a_ring() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let (small, large) = (RamRegion::new(2 * GIB, 1 << 20)?, RamRegion::new(4 * GIB, 12 * GIB)?);
    for region in [&small, &large] {
        bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    }
    let mut driver = bench.started(1)?;
    driver.send_both(&driver.payload().to_bytes())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > 16 << 20))?;
    leave_before_pinned(&bench, &small, &large)?;
    wait_until("pinning again", || Ok(bench.broker.usage()?.pinned_bytes > 16 << 20))?;
    leave_before_pinned(&bench, &large, &large)?;
    let ring = driver.wait_open().and_then(|()| driver.read(0, 512));
    bench.broker.explain(ring)?;
    Ok(())
}

/// The front-end removes a region while the broker pins another one. It does not wait for that pin, and the ring still
/// gets the other region.
pub(crate) fn leave_behind_a_region() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let small = RamRegion::new(2 * GIB, 1 << 20)?;
    bench.front_end.connection().add_mem_reg(&small.message(), small.file())?;
    let mut driver = bench.attached(1)?;
    let epoch = driver.epoch();
    let before = bench.broker.usage()?.pinned_bytes;
    let large = RamRegion::new(4 * GIB, 2 * GIB)?;
    bench.front_end.connection().add_mem_reg(&large.message(), large.file())?;
    wait_until("pinning", || Ok(bench.broker.usage()?.pinned_bytes > before + (16 << 20)))?;
    leave_before_pinned(&bench, &small, &large)?;
    let result = (|| {
        let mut read = |gpa| driver.perform(driver.sqe_at(false, gpa, BLOCK_BYTES, 0, 5)?);
        ensure!(read(2 * GIB)? == -EFAULT, "the ring reaches removed memory");
        wait_until(
            "the large region is reached",
            || Ok(read(6 * GIB - u64::from(BLOCK_BYTES))? == BLOCK_BYTES as i32),
        )?;
        bench.front_end.connection().rem_mem_reg(&large.message(), Some(large.file()))?;
        ensure!(read(4 * GIB)? == -EFAULT, "the ring reaches removed memory");
        ensure!(driver.epoch() == epoch, "the ring ended");
        Ok(())
    })();
    bench.broker.explain(result)
}

/// Removes a region, and checks that this did not wait until `pinning` was pinned.
fn leave_before_pinned(bench: &Bench, region: &RamRegion, pinning: &RamRegion) -> Result<()> {
    let begin = Instant::now();
    bench.front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
    eprintln!("{} MiB left after {:?}", region.len_bytes() >> 20, begin.elapsed());
    ensure_not_pinned(pinning)
}

/// Stops a queue with a pending ATTACH, and checks that this did not wait until `pinning` was pinned.
fn stop_before_pinned(bench: &Bench, queue: u16, pinning: &RamRegion) -> Result<()> {
    let begin = Instant::now();
    let base = bench.front_end.stop_vring(queue)?;
    eprintln!(
        "queue {queue} stopped after {:?}, {} MiB pinned",
        begin.elapsed(),
        bench.broker.usage()?.pinned_bytes >> 20
    );
    ensure!(base == 1, "the queue stops at {base}, so the device would not see ATTACH again");
    ensure_not_pinned(pinning)
}

/// Checks that a region was never pinned as a whole: a pin allocates all pages of the file, and they stay.
fn ensure_not_pinned(region: &RamRegion) -> Result<()> {
    let allocated_bytes = region.file().metadata()?.blocks() * 512;
    let len_bytes = region.len_bytes();
    ensure!(allocated_bytes < len_bytes, "the front-end was answered when all {} MiB were pinned", len_bytes >> 20);
    Ok(())
}
