//! Memory that is discarded while rings have it pinned.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::attach::{attach_config, attached, queue_zero, rig, verify};
use super::driver::wait_until;
use super::rig::{Options, Rig};
use super::ring_driver::{RingDriver, refused, whole};
use crate::engine::attach::{BuilderCommand, RingKind};
use crate::memory::Sharing;
use crate::vhost_user::{Device, DeviceMemory};

/// Longer than memory is left alone between two looks.
const SEVERAL_LOOKS: Duration = Duration::from_millis(200);

fn punch(file: &File, offset_bytes: u64) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, offset_bytes, 4096).unwrap();
}

/// Discards a page of RAM, and waits for the end of the ring.
fn discard(rig: &Rig, driver: &mut RingDriver) {
    punch(rig.ram.regions()[0].file(), 20 << 20);
    wait_until("the end of the ring", || driver.has_attach_ended().unwrap());
    assert_eq!(driver.wait_attach().unwrap(), whole(ErrorCode::Discarded));
}

fn closed(rig: &Rig) -> Option<ErrorCode> {
    rig.engine.control().rings().unwrap().closed(RingKind::Direct).map(|refused| refused.code)
}

#[test]
fn discarded_memory_ends_rings_until_all_queues_have_stopped() {
    let mut rig = rig(2, 1);
    let _first = queue_zero(&mut rig);
    let mut driver = attached(&mut rig, 1);
    verify(&rig, &mut driver, 1);
    discard(&rig, &mut driver);
    let payload = driver.payload().to_bytes();
    assert_eq!(refused(&mut driver, &payload), whole(ErrorCode::Discarded));
    assert_eq!(closed(&rig), Some(ErrorCode::Discarded));
    rig.engine.stop_queue(1);
    rig.engine.stop_queue(0);
    let mut driver = attached(&mut rig, 1);
    verify(&rig, &mut driver, 2);
}

#[test]
fn what_a_front_end_discarded_is_no_matter_to_the_next() {
    let mut rig = rig(2, 1);
    let _first = queue_zero(&mut rig);
    let mut driver = attached(&mut rig, 1);
    discard(&rig, &mut driver);
    // It vanishes: nothing is stopped.
    rig.engine.abandon();
    rig.engine.set_memory(Arc::new(DeviceMemory::new()));
    rig.engine.set_memory(rig.device_memory());
    assert_eq!(closed(&rig), None);
    let mut driver = attached(&mut rig, 1);
    verify(&rig, &mut driver, 1);
}

#[test]
fn memory_that_leaves_was_not_discarded_unseen() {
    let mut rig = rig(2, 1);
    let _first = queue_zero(&mut rig);
    let small = File::from(memfd_create("ringpass-test", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&small, 1 << 20).unwrap();
    let mapped = MmapRegion::from_file(FileOffset::new(small.try_clone().unwrap(), 0), 1 << 20).unwrap();
    let region = Arc::new(GuestRegionMmap::new(mapped, GuestAddress(1 << 32)).unwrap());
    let without = rig.device_memory();
    rig.engine.set_memory(Arc::new(without.insert_region(region).unwrap()));
    let mut driver = attached(&mut rig, 1);
    verify(&rig, &mut driver, 1);
    // As a machine does it that takes memory away: no look comes in between.
    punch(&small, 0);
    rig.engine.set_memory(without);
    wait_until("the end of rings", || closed(&rig) == Some(ErrorCode::Discarded));
}

#[test]
fn memory_stays_watched_while_a_queue_is_attached() {
    let mut rig = rig(2, 1);
    let _first = queue_zero(&mut rig);
    let mut driver = attached(&mut rig, 1);
    // Another queue was the last one to leave just before this one was attached, and its command comes late.
    rig.engine.control().attach.unwrap().command(BuilderCommand::Unpin);
    verify(&rig, &mut driver, 1);
    discard(&rig, &mut driver);
}

#[test]
fn memory_that_each_ring_pins_for_itself_is_not_missed_before() {
    let mut attach = attach_config();
    attach.direct.sharing = Sharing::PinAgain;
    let mut rig = Rig::new(Options { queues: 3, workers: 1, attach: Some(attach), ..Options::default() });
    let _first = queue_zero(&mut rig);
    let mut drivers = [1, 2].map(|index| attached(&mut rig, index));
    std::thread::sleep(SEVERAL_LOOKS);
    for driver in &mut drivers {
        verify(&rig, driver, 1);
    }
    assert_eq!(closed(&rig), None);
    let [mut driver, _other] = drivers;
    discard(&rig, &mut driver);
}
