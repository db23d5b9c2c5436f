//! The child process of a run.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use anyhow::{Result, anyhow};
use ringpass_broker::{
    disk::{DirectIo, Disk, DiskConfig, LogicalBlock},
    kernel::{self, KernelRelease},
    limits::cap_file_growth,
};
use ringpass_restrictions::Access;
use ringpass_tests::{
    canaries::{Canaries, pattern},
    hostile_run::{ChildTask, DISK_BYTES, OTHER_DISK, answers},
    process_guest::ProcessGuest,
};
use ringpass_workload::hostile::{Target, script};

use crate::guest::{BUFFER_BYTES, Direction, EMPTY_HOLES, FILLED_HOLES, Guest, PAGE_BYTES, RAM, filled_ram};

const DISK_OFFSET_BYTES: u64 = 64 << 10;

/// The broker with the hostile guest, a second guest, and canaries.
pub(crate) fn main(task: &ChildTask) -> Result<()> {
    let how = task.run;
    let canaries = Canaries::new()?;
    let disk_config = DiskConfig::new(&task.disk)
        .read_only(how.access == Access::ReadOnly)
        .direct_io(if how.direct_io { DirectIo::On } else { DirectIo::Off })
        .logical_block(LogicalBlock::DirectIo);
    let disk = Arc::new(Disk::open(&disk_config)?);
    let other_disk = Arc::new(Disk::open(&DiskConfig::new(&task.other_disk).direct_io(DirectIo::Off))?);
    let policy = how.policy().compile(&kernel::support()?)?;
    let policy = if how.is_strict() { policy } else { policy.accept_unsafe() };
    let hostile_guest = ProcessGuest::with_policy(&disk, filled_ram(10)?, how.submission(), policy)?;
    let mut hostile = Guest::new(hostile_guest, how.place)?;
    let mut other = Guest::new(ProcessGuest::new(&other_disk, filled_ram(11)?, how.submission())?, how.place)?;
    if how.capped {
        cap_file_growth(&disk)?;
    }

    // This read puts data into the other guest's scratch memory.
    let hole = FILLED_HOLES[0].gpa;
    other.request(Direction::Read, hole, 0)?;

    let mappings = [hostile.guest.ram().map()?, other.guest.ram().map()?];
    let of_ram = mappings.iter().filter_map(|ram| Some(ram.pointer(0, 1)?.as_ptr().addr() as u64));
    let stack = (&raw const how).addr() as u64;
    let mut host_addresses = vec![canaries.address(), stack, task.heap_address()];
    host_addresses.extend(of_ram);
    host_addresses.extend(hostile.queue.window_address());
    let holes = kernel::affected(&KernelRelease::running()?);
    let target = Target {
        ram: &RAM,
        filled_holes: &FILLED_HOLES,
        empty_holes: &EMPTY_HOLES,
        addressing: hostile.guest.addressing(),
        buffer_gpa: hostile.buffer.gpa,
        buffer_bytes: BUFFER_BYTES,
        disk_bytes: DISK_BYTES,
        disk_offset_bytes: DISK_OFFSET_BYTES,
        read_only: disk.is_read_only(),
        host_addresses: &host_addresses,
        zero_length: !holes.iter().any(|hole| hole.cve == "CVE-2026-43006"),
    };
    let steps = script(&target).map_err(|error| anyhow!("{error}"))?;
    let report = hostile.run(steps, how.timeout());

    let mut findings = answers(&report, &target)?;
    findings.extend(canaries.damage()?);
    findings.extend(hostile.damage("RAM of the hostile guest that no request names")?);
    findings.extend(other.damage("RAM of the other guest")?);
    if how.is_strict() {
        // Both guests still have their rings, and each has scratch memory of its own.
        hostile.request(Direction::Read, hole, DISK_OFFSET_BYTES)?;
        findings.extend(hostile.damage("RAM of the hostile guest after a read into a hole")?);
        other.request(Direction::Write, hole, u64::from(PAGE_BYTES))?;
        let mut pages = vec![0; 2 * PAGE_BYTES as usize];
        File::open(&task.other_disk)?.read_exact_at(&mut pages, 0)?;
        let (first, second) = pages.split_at(PAGE_BYTES as usize);
        if first != second || first != &pattern(OTHER_DISK, PAGE_BYTES as usize)[..] {
            findings.push("damage: scratch memory of the other guest".to_owned());
        }
        hostile.queue.close()?;
        other.queue.close()?;
    }
    task.report(report.steps, &findings)
}
