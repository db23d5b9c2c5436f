//! The broker refuses an impossible attachment with a reason, and the queue stays a virtqueue.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::{
    attach::AttachPayload,
    request::{ErrorCode, NO_FIELD, T_ATTACH, T_EVENT, T_PROBE},
};
use ringpass_tests::{
    canaries::pattern,
    disks::{DiskKind, TestDisk},
    front_end::{
        attach::{
            Found, PATIENCE, RingDriver,
            bench::{Bench, start_again},
            wait_until, whole,
        },
        descriptor::Descriptor,
        ram::RamRegion,
    },
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

const DISK_BYTES: u64 = 16 << 20;
/// DETACH in version 0 of the ABI.
const DETACH_OF_VERSION_0: u32 = 0x7270_0009;
const GIB: u64 = 1 << 30;

/// A second region, which begins where the first ends. The guest sees one range of RAM, the device two regions.
const SECOND_GPA: u64 = 16 << 20;
const SECOND_BYTES: u64 = 1 << 20;

/// Sends ARM and an ATTACH, and returns how the broker refuses it.
fn refused(driver: &mut RingDriver, payload: &[u8]) -> Result<Found> {
    driver.send_both(payload)?;
    driver.wait_attach()
}

/// Checks that the broker serves the queue as a virtqueue: a read reaches memory that the driver uses for nothing else.
fn is_virtqueue(driver: &mut RingDriver, expected: &[u8]) -> Result<()> {
    let buffers = driver.buffers();
    let data = Descriptor::writable(buffers.at(1), 4096);
    let head = driver.send_block(VIRTIO_BLK_T_IN, 0, data)?;
    loop {
        driver.vring().spin_for_used(PATIENCE)?;
        if driver.vring().take_used()?.context("nothing is used")?.head == head {
            break;
        }
    }
    ensure!(driver.block_status()? == 0, "status {}", driver.block_status()?);
    ensure!(driver.buffer(1, 4096)? == expected, "the read returned other data");
    Ok(())
}

/// Every kind of bad geometry.
pub(crate) fn bad_geometry() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 3, &[])?;
    let second = RamRegion::new(SECOND_GPA, SECOND_BYTES)?;
    bench.front_end.connection().add_mem_reg(&second.message(), second.file())?;
    let mut other = bench.attached(1)?;
    let expected = pattern(7, 4096);
    other.write(0, &expected)?;
    let taken = other.payload();
    let mut driver = bench.started(2)?;
    let good = driver.payload();
    for case in cases(&good, &taken) {
        let Case { what, payload, code, field_offset_bytes } = case;
        let found = refused(&mut driver, &payload).with_context(|| what.to_owned())?;
        let expected_found = Found { code: code as u32, field_offset_bytes, status: 1 };
        ensure!(found == expected_found, "{what}: {found:?} instead of {expected_found:?} ({code:?})");
        is_virtqueue(&mut driver, &expected).with_context(|| format!("after {what}"))?;
    }
    // Requests on the wrong queue, in the wrong order, or without a payload.
    driver.send_attach(&good.to_bytes())?;
    ensure!(driver.wait_attach()? == whole(ErrorCode::Order), "ATTACH without ARM");
    ensure!(bench.queue_zero.outcome_of(T_ATTACH, &good.to_bytes())? == whole(ErrorCode::Queue), "ATTACH on queue 0");
    let unknown = bench.queue_zero.outcome_of(DETACH_OF_VERSION_0, &[0; 8])?;
    ensure!(unknown.status == 2, "a request number of version 0 is answered: {unknown:?}");
    for kind in [T_PROBE, T_EVENT] {
        driver.send_other(kind, &[])?;
        driver.vring().spin_for_used(PATIENCE)?;
        driver.vring().take_used()?;
        ensure!(
            driver.other_outcome()? == whole(ErrorCode::Queue),
            "request {kind:#x} on a queue that can be attached"
        );
    }
    // After all refusals the queue can have a ring, and the other queue still has its own.
    driver.attach()?;
    ensure!(driver.read(0, 4096)? == expected && other.read(0, 4096)? == expected);
    ensure!(other.epoch() == Some(1) && driver.epoch() == Some(1));

    // While the queue is attached, nothing may stand behind ATTACH. The broker stops the queue and ends its ring, and
    // the front-end can set the queue up again.
    driver.send_other(T_ATTACH, &good.to_bytes())?;
    bench.broker.wait_for_log("behind ATTACH")?;
    ensure!(bench.front_end.stop_vring(2)? == driver.vring().used_idx()?);
    driver.restart()?;
    start_again(&bench.front_end, driver.vring(), 2)?;
    driver.attach()?;
    ensure!(driver.read(0, 4096)? == expected);
    Ok(())
}

struct Case {
    what: &'static str,
    payload: Vec<u8>,
    code: ErrorCode,
    field_offset_bytes: u32,
}

fn cases(good: &AttachPayload, taken: &AttachPayload) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |what, code, field_offset_bytes, change: &dyn Fn(&mut AttachPayload)| {
        let mut payload = *good;
        change(&mut payload);
        cases.push(Case { what, payload: payload.to_bytes().to_vec(), code, field_offset_bytes });
    };
    let end = SECOND_GPA + SECOND_BYTES;
    use ErrorCode::{Alignment, Busy, Entries, Features, Length, Memory, Overlap, Range, Reserved, Version};
    add("a later version", Version, 0, &|p| p.version = 2.into());
    add("the version of the draft", Version, 0, &|p| p.version = 0.into());
    add("a reserved field", Reserved, 2, &|p| p.reserved[2] = 0x8000.into());
    add("an unknown feature", Features, 8, &|p| p.features = (1 << 40).into());
    add("no SQ entries", Entries, 16, &|p| p.sq_entries = 0.into());
    add("a number of SQ entries that is no power of two", Entries, 16, &|p| p.sq_entries = 33.into());
    add("a huge number of SQ entries", Entries, 16, &|p| p.sq_entries = (1 << 31).into());
    add("no CQ entries", Entries, 20, &|p| p.cq_entries = 0.into());
    add("a huge number of CQ entries", Entries, 20, &|p| p.cq_entries = (1 << 31).into());
    add("fewer CQ than SQ entries", Entries, 20, &|p| p.cq_entries = 16.into());
    add("an unaligned control page", Alignment, 24, &|p| p.control_gpa = (p.control_gpa.get() + 8).into());
    add("unaligned SQEs", Alignment, 56, &|p| p.areas[1].sqes_gpa = (p.areas[1].sqes_gpa.get() + 64).into());
    add("the last page of all", Range, 24, &|p| p.control_gpa = (u64::MAX - 4095).into());
    add("memory beyond 16 TiB", Range, 32, &|p| p.areas[0].rings_gpa = (16 << 40).into());
    add("two areas at the same address", Overlap, 48, &|p| p.areas[1] = p.areas[0]);
    add("SQEs over the control page", Overlap, 40, &|p| p.areas[0].sqes_gpa = p.control_gpa);
    add("address 0 behind the last RAM", Memory, 24, &|p| p.control_gpa = end.into());
    add("RAM that is not there", Memory, 48, &|p| p.areas[1].rings_gpa = (3 * GIB).into());
    // With 256 entries the CQ takes more than a page.
    add("rings across the border of two regions", Memory, 32, &|p| {
        p.cq_entries = 256.into();
        p.areas[0].rings_gpa = (SECOND_GPA - 4096).into();
        // The other area moves, so that longer rings do not overlap it.
        p.areas[1].rings_gpa = (SECOND_GPA + 0x8000).into();
    });
    add("rings across the end of RAM", Memory, 32, &|p| {
        p.cq_entries = 256.into();
        p.areas[0].rings_gpa = (end - 4096).into();
        p.areas[1].rings_gpa = (SECOND_GPA + 0x8000).into();
    });
    add("the control page of another queue", Busy, 24, &|p| p.control_gpa = taken.control_gpa);
    add("the live area of another queue", Busy, 40, &|p| p.areas[0].sqes_gpa = taken.areas[1].rings_gpa);
    add("the idle area of another queue", Busy, 48, &|p| p.areas[1].rings_gpa = taken.areas[0].sqes_gpa);
    let bytes = good.to_bytes();
    let mut add = |what, payload: Vec<u8>, code| {
        cases.push(Case { what, payload, code, field_offset_bytes: NO_FIELD });
    };
    add("no payload", Vec::new(), Length);
    add("half a payload", bytes[..32].to_vec(), Length);
    add("a payload that is too long", [&bytes[..], &[0; 4096]].concat(), Length);
    add("more than this version knows", [&bytes[..], &[0, 0, 1]].concat(), Reserved);
    cases
}

/// Memory of a kind that the kernel cannot pin. The broker pins all memory of the device for a ring, so no queue can
/// attach while this memory is there.
pub(crate) fn other_kinds_of_memory() -> Result<()> {
    // In the directory of the disks, which is a file system of its own.
    let directory = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let file = tempfile::tempfile_in(directory.path().parent().context("a directory")?)?;
    file.set_len(1 << 20)?;
    let regions = [
        (RamRegion::of_file(Arc::new(file), 0, 4 * GIB, 1 << 20)?, "at guest-physical 0x100000000"),
        (RamRegion::new(20 << 40, 1 << 20)?, "ends above 16 TiB"),
    ];
    for (region, why) in &regions {
        // A broker limits the rate of its messages, so each region has a broker of its own.
        let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
        let mut driver = bench.started(1)?;
        one_kind(&bench, &mut driver, region, why).with_context(|| format!("the region {why}"))?;
    }
    Ok(())
}

fn one_kind(bench: &Bench, driver: &mut RingDriver, region: &RamRegion, why: &str) -> Result<()> {
    let zeroes = vec![0; 4096];
    let connection = bench.front_end.connection();
    connection.add_mem_reg(&region.message(), region.file())?;
    for _ in 0..3 {
        let payload = driver.payload().to_bytes();
        let found = refused(driver, &payload)?;
        ensure!(found == whole(ErrorCode::Memory), "{found:?}");
        is_virtqueue(driver, &zeroes)?;
    }
    bench.broker.wait_for_log(why)?;
    ensure!(bench.broker.usage()?.pinned_bytes == 0, "something stays pinned");

    // The region leaves, and the queue can attach.
    bench.front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
    driver.attach()?;
    ensure!(driver.read(0, 4096)? == zeroes);
    // The region comes while a ring runs. The ring cannot have it, so the ring ends, and the queue is a virtqueue
    // again.
    bench.front_end.connection().add_mem_reg(&region.message(), region.file())?;
    wait_until("the end of the ring", || {
        if driver.has_attach_ended()? {
            return Ok(true);
        }
        driver.look()?;
        Ok(false)
    })?;
    let found = driver.wait_attach()?;
    ensure!(found == whole(ErrorCode::Memory), "{found:?}");
    is_virtqueue(driver, &zeroes)?;
    bench.front_end.connection().rem_mem_reg(&region.message(), Some(region.file()))?;
    bench.broker.wait_for_unpinned()
}
