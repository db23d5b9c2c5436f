//! Guest memory that leaves and comes back while queues are rings.

use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::request::EVENT_QUEUES;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::attach::{attached, queue_zero, rig, verify};
use super::driver::wait_until;
use super::rig::Rig;
use super::ring_driver::{RingDriver, try_read};
use crate::vhost_user::{Device, DeviceMemory};

/// Has the device map all memory anew: the ring that is attached ends, and another opens over the new mapping.
fn change_mapping(rig: &mut Rig, driver: &mut RingDriver, memory: &Arc<DeviceMemory>) {
    rig.engine.set_memory(memory.clone());
    wait_until("a ring over the new mapping", || {
        driver.look().unwrap();
        driver.epoch() == Some(2)
    });
}

/// Memory without one of its two regions.
pub(super) fn without(memory: &DeviceMemory, region: usize) -> Arc<DeviceMemory> {
    let region = memory.iter().nth(region).unwrap();
    Arc::new(memory.remove_region(region.start_addr(), region.len()).unwrap().0)
}

#[test]
fn a_region_can_leave_and_come_back_under_a_ring_that_does_not_use_it() {
    let mut rig = rig(2, 1);
    // Control page and areas are in the second region: without the first one the virtqueue is held, and the ring runs on.
    let mut driver = attached(&mut rig, 1);
    let whole_memory = rig.device_memory();
    change_mapping(&mut rig, &mut driver, &whole_memory);
    rig.engine.set_memory(without(&whole_memory, 0));
    verify(&rig, &mut driver, 1);
    assert_eq!(try_read(&mut driver, 0), -nix::libc::EFAULT, "memory that has left is not reached");
    rig.engine.set_memory(whole_memory);
    wait_until("the memory that came back", || try_read(&mut driver, 0) == 512);
    // Tests that share a process with others see what those have pinned: then the ring ends, and another one comes.
    if std::env::var_os("NEXTEST").is_some() {
        assert_eq!(driver.epoch(), Some(2));
    }
}

#[test]
fn a_ring_whose_own_memory_leaves_ends_and_the_queue_is_a_virtqueue() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    let whole_memory = rig.device_memory();
    change_mapping(&mut rig, &mut driver, &whole_memory);
    let word = driver.announced();
    rig.engine.set_memory(without(&whole_memory, 1));
    assert!(driver.has_attach_ended().unwrap(), "the ring has ended when this returns, and the driver was not asked");
    assert_eq!(driver.announced(), word, "memory that has left is not written to");
    let is_untouched = driver.is_attach_answer_untouched().unwrap();
    assert!(is_untouched, "nor is the place of the answer, which has left, too");
    assert_eq!(rig.engine.control().rings().unwrap().queues[1].state, None, "it is not attached");
}

#[test]
fn used_rings_that_have_left_are_not_written_to_and_what_was_pending_is_answered_when_they_are_back() {
    let mut rig = rig(2, 1);
    let mut first = queue_zero(&mut rig);
    let mut driver = attached(&mut rig, 1);
    let whole_memory = rig.device_memory();
    change_mapping(&mut rig, &mut driver, &whole_memory);
    // Take what has been told until now, and have an EVENT pending.
    first.post_event().unwrap();
    first.wait_event().unwrap();
    first.post_event().unwrap();
    first.probe().unwrap();
    assert!(first.pending_event().is_some());
    // Both virtqueues are in the first region.
    rig.engine.set_memory(without(&whole_memory, 0));
    let before = (first.vring().used_idx().unwrap(), driver.vring().used_idx().unwrap());
    // The ring ends, and there is something to tell.
    let log = rig.dirty_log();
    rig.engine.set_dirty_log(Some(log));
    rig.engine.set_dirty_log(None);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(
        (first.vring().used_idx().unwrap(), driver.vring().used_idx().unwrap()),
        before,
        "memory that has left is written to"
    );
    rig.engine.set_memory(whole_memory);
    assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES);
    wait_until("ATTACH, which is seen again", || {
        driver.look().unwrap();
        driver.epoch() == Some(3)
    });
    verify(&rig, &mut driver, 1);
}

#[test]
fn a_queue_whose_used_ring_has_left_stops_without_writing_to_it() {
    let mut rig = rig(2, 1);
    let mut first = queue_zero(&mut rig);
    let whole_memory = rig.device_memory();
    rig.engine.set_memory(whole_memory.clone());
    first.post_event().unwrap();
    first.probe().unwrap();
    assert!(first.pending_event().is_some());
    rig.engine.set_memory(without(&whole_memory, 0));
    let before = first.vring().used_idx().unwrap();
    rig.engine.stop_queue(0);
    assert_eq!(first.vring().used_idx().unwrap(), before);
}
