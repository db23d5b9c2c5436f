//! References to removed memory: rings, and requests that the broker has not answered.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode};
use ringpass_tests::{
    disks::DiskKind,
    front_end::{
        attach::{
            QueueZero, RequestPlaces, RingDriver,
            bench::{Bench, QUEUE_SIZE},
            wait_until, whole,
        },
        ram::{Ram, RamRegion},
    },
};

use crate::{DISK_BYTES, GIB};

/// A ring, an EVENT and an ATTACH that are older than the removal of a region do not keep it.
pub(crate) fn let_go() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let region = RamRegion::new(4 * GIB, 24 << 20)?;
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    let mut driver = bench.attached(1)?;
    bench.queue_zero.post_event()?;
    ensure!(bench.queue_zero.wait_event()? == EVENT_QUEUES);
    bench.queue_zero.post_event()?;
    ensure!(!bench.queue_zero.has_event_ended()?);
    let usage = bench.broker.usage()?;
    let mappings = || bench.broker.processes().map(mapping_lengths).collect::<Result<Vec<_>>>();
    let is_mapped = |lengths: &Vec<u64>| lengths.contains(&region.len_bytes());
    ensure!(mappings()?.iter().all(is_mapped), "the region is not mapped in both processes");
    bench.front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
    let result = (|| {
        // After this read the workers know the change.
        driver.read(0, 512)?;
        bench.broker.wait_for_fds(usage.fds - 2)?;
        ensure!(!mappings()?.iter().any(is_mapped), "the region is still mapped");
        wait_until("only the region that is left is pinned", || {
            Ok(bench.broker.usage()?.pinned_bytes < usage.pinned_bytes - (8 << 20))
        })?;
        driver.read(0, 512)
    })();
    bench.broker.explain(result)?;
    Ok(())
}

/// The lengths of the mappings of guest RAM in a process, in bytes.
fn mapping_lengths(pid: u32) -> Result<Vec<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let ranges = maps.lines().filter(|line| line.contains("ringpass-test-ram"));
    let lengths = ranges.map(|line| {
        let (begin, rest) = line.split_once('-').context("a range of addresses")?;
        let end = rest.split(' ').next().unwrap_or_default();
        Ok(u64::from_str_radix(end, 16)? - u64::from_str_radix(begin, 16)?)
    });
    lengths.collect()
}

/// The RAM of a bench and one more region.
fn ram_with(bench: &Bench, region: &RamRegion) -> Result<Ram> {
    Ram::new(bench.ram.ram.regions().iter().chain([region]).cloned())
}

/// Requests stay pending for as long as a queue is attached. Meanwhile the front-end may replace the memory of their
/// answers.
pub(crate) fn answers_move() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let gpa = 4 * GIB;
    let before = RamRegion::new(gpa, 1 << 20)?;
    bench.front_end.connection().add_mem_reg(&before.message(), before.file())?;
    let ram = ram_with(&bench, &before)?;
    let mut places = before.arena();
    let mut vring = bench.ram.vring(&bench.front_end, QUEUE_SIZE)?;
    vring.set_ram(&ram);
    bench.front_end.start_vring(1, &vring.layout(), vring.eventfds(), 0)?;
    let requests = RequestPlaces::take(&mut places, RingDriver::PLACES)?;
    let mut driver = RingDriver::with_requests(vring, &mut bench.ram.arenas[0], requests)?;
    bench.front_end.stop_vring(0)?;
    let mut vring = bench.ram.vring(&bench.front_end, QUEUE_SIZE)?;
    vring.set_ram(&ram);
    bench.front_end.start_vring(0, &vring.layout(), vring.eventfds(), 0)?;
    let mut queue_zero = QueueZero::new(vring, &mut places)?;
    let result = (|| {
        driver.attach()?;
        queue_zero.post_event()?;
        // The device first answers with old news; the next EVENT stays pending.
        wait_until("an EVENT that is pending", || {
            // The device announces the ring a moment before it answers EVENT.
            thread::sleep(Duration::from_millis(20));
            if !queue_zero.has_event_ended()? {
                return Ok(true);
            }
            ensure!(queue_zero.wait_event()? == EVENT_QUEUES);
            queue_zero.post_event()?;
            Ok(false)
        })?;
        let connection = bench.front_end.connection();
        let after = RamRegion::new(gpa, 1 << 20)?;
        let ram = ram_with(&bench, &after)?;
        connection.rem_mem_reg(&before.message(), Some(before.file()))?;
        connection.add_mem_reg(&after.message(), after.file())?;
        driver.vring().set_ram(&ram);
        queue_zero.vring().set_ram(&ram);

        driver.detach()?;
        let found = driver.wait_attach()?;
        ensure!(found == whole(ErrorCode::Detached), "ATTACH: {found:?}");
        ensure!(queue_zero.wait_event()? == EVENT_QUEUES, "EVENT");
        Ok(())
    })();
    bench.broker.explain(result)
}
