use std::sync::atomic::Ordering;

use ringpass_guest_abi::epoch::{Announcement, Epoch, Phase};
use ringpass_guest_abi::request::ErrorCode;

use super::super::test_device::{DeviceQueue, Guest};
use super::*;

/// ATTACH is the second thing that a driver makes available.
const ATTACH: u16 = 1;
const DRAINED: Option<Announcement> = Some(Announcement { epoch: Epoch::new(1), phase: Phase::Drain });

fn read(gpa: u64, user_data: u64) -> Request {
    Request { write: false, offset_bytes: 0, gpa, len_bytes: 4096, durable: false, user_data }
}

/// A driver whose ring of epoch 1 runs.
fn running(guest: &Guest) -> (Driver, DeviceQueue) {
    let (mut driver, device) = guest.driver();
    driver.want_ring(guest.attachment());
    device.announce(ATTACH, 1, Phase::Open);
    driver.progress();
    assert!(driver.is_ring());
    (driver, device)
}

#[test]
fn an_idle_ring_that_is_to_drain_is_drained_at_the_first_look() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    device.announce(ATTACH, 1, Phase::Drain);
    // The one interrupt for it has one look for a consequence.
    driver.progress();
    assert_eq!(device.acknowledged(ATTACH), DRAINED);
}

#[test]
fn what_was_announced_while_interrupts_were_muted_is_seen_before_the_next_sleep() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    driver.set_muted(true);
    device.announce(ATTACH, 1, Phase::Drain);
    assert!(driver.reap().is_none());
    driver.set_muted(false);
    assert_eq!(device.acknowledged(ATTACH), DRAINED);
}

#[test]
fn requests_that_a_broken_device_has_keep_their_buffers_and_others_fail() {
    let guest = Guest::new();
    let (mut driver, device) = guest.driver();
    let buffer = guest.memory.allocate(4096).unwrap();
    assert!(driver.push(&read(buffer.gpa(), 7)));
    driver.send();
    device.say_used(9);
    assert_eq!(driver.reap(), None);
    assert!(matches!(driver.fault(), Some(Error::BrokenDevice(_))), "{:?}", driver.fault());
    assert!(driver.push(&read(buffer.gpa(), 8)));
    assert_eq!(driver.reap(), Some(Completion { user_data: 8, res: EIO }));
    assert_eq!((driver.reap(), driver.outstanding()), (None, 1));
}

#[test]
fn requests_on_a_ring_that_runs_keep_their_buffers_when_the_device_breaks_a_rule() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    let buffer = guest.memory.allocate(4096).unwrap();
    assert!(driver.push(&read(buffer.gpa(), 7)));
    driver.send();
    // Out of turn.
    device.announce(ATTACH, 5, Phase::Open);
    assert_eq!(driver.reap(), None);
    assert!(matches!(driver.fault(), Some(Error::BrokenDevice(_))), "{:?}", driver.fault());
    assert!(!driver.is_ring());
    assert!(driver.push(&read(buffer.gpa(), 8)));
    assert_eq!(driver.reap(), Some(Completion { user_data: 8, res: EIO }));
    assert_eq!((driver.reap(), driver.outstanding()), (None, 1));
}

#[test]
fn news_that_came_before_the_driver_saw_a_refusal_let_it_ask_again() {
    let guest = Guest::new();
    let (mut driver, mut device) = guest.driver();
    driver.want_ring(guest.attachment());
    device.complete_attach(0, ErrorCode::Mode);
    guest.news.fetch_add(1, Ordering::Release);
    driver.progress();
    assert_eq!((driver.refused(), device.available()), (Some(ErrorCode::Mode), 4), "ARM and ATTACH again");
    // Without news it does not ask.
    device.complete_attach(2, ErrorCode::Mode);
    driver.progress();
    driver.progress();
    assert_eq!(device.available(), 4);
    let buffer = guest.memory.allocate(4096).unwrap();
    assert!(driver.push(&read(buffer.gpa(), 7)));
    driver.send();
    assert_eq!(device.available(), 5, "requests go over the virtqueue meanwhile");
}
