//! What ends the rings of queues, and how the rings come back.

use std::time::Duration;

use ringpass_guest_abi::epoch::driver::State;
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode};
use ringpass_test_utils::event::Event;

use super::attach::{attached, queue_zero, rig, start, verify};
use super::driver::wait_until;
use super::rig::contents;
use super::ring_driver::{refused, whole};
use crate::alone::alone;
use crate::vhost_user::Device;

#[test]
fn a_stopped_queue_is_attached_again_by_the_next_device_process() {
    let mut rig = rig(2, 2);
    let mut driver = attached(&mut rig, 1);
    for round in 1..6 {
        verify(&rig, &mut driver, round);
        let base = rig.engine.stop_queue(1).unwrap();
        assert_eq!(base, 1, "ARM was used, ATTACH is to be seen again");
        assert_eq!(driver.vring().used_idx().unwrap(), base);
        start(&mut rig, 1, driver.vring(), base);
        wait_until("the end of the epoch", || {
            driver.look().unwrap();
            !matches!(driver.state(), State::Running { .. })
        });
        driver.wait_open().unwrap();
        assert_eq!(driver.epoch(), Some(round as u32 + 1));
    }
}

#[test]
fn the_first_queue_that_stops_ends_the_rings_of_all() {
    let mut rig = rig(3, 1);
    let _first = queue_zero(&mut rig);
    let mut drivers = [attached(&mut rig, 1), attached(&mut rig, 2)];
    rig.engine.stop_queue(0);
    for driver in &mut drivers {
        wait_until("the end of the epoch", || {
            driver.look().unwrap();
            driver.epoch() != Some(1)
        });
    }
    assert_eq!(rig.engine.stop_queue(1), Some(1));
    assert_eq!(rig.engine.stop_queue(2), Some(1));
}

#[test]
fn requests_under_way_at_a_stop_are_completed_or_submitted_again() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    for round in 0..10_u64 {
        let data = contents(100 + round, 0, 8);
        driver.submit_write(0, &data, 7).unwrap();
        let base = rig.engine.stop_queue(1).unwrap();
        start(&mut rig, 1, driver.vring(), base);
        assert_eq!(driver.wait(7).unwrap(), 4096);
        assert_eq!(rig.on_disk(0, 4096), data);
        driver.wait_open().unwrap();
    }
}

#[test]
fn a_log_ends_rings_before_it_is_in_force_and_they_come_back_after_it() {
    let mut rig = rig(2, 1);
    let mut first = queue_zero(&mut rig);
    let mut driver = attached(&mut rig, 1);
    verify(&rig, &mut driver, 1);
    first.post_event().unwrap();
    first.wait_event().unwrap();
    let log = rig.dirty_log();
    rig.engine.set_dirty_log(Some(log));
    assert!(driver.has_attach_ended().unwrap(), "no ring is left when this returns");
    assert_eq!(driver.wait_attach().unwrap(), whole(ErrorCode::Mode));
    let payload = driver.payload().to_bytes();
    assert_eq!(refused(&mut driver, &payload), whole(ErrorCode::Mode));
    first.post_event().unwrap();
    assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES, "the end of the ring");
    first.post_event().unwrap();
    rig.engine.set_dirty_log(None);
    assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES, "rings may be asked for again");
    driver.attach().unwrap();
    verify(&rig, &mut driver, 2);
}

#[test]
fn a_front_end_that_vanishes_and_comes_back_finds_its_attachment() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    for round in 1..5 {
        driver.submit_write(0, &contents(round, 0, 8), round).unwrap();
        rig.engine.abandon();
        rig.engine.set_memory(rig.device_memory());
        let used_idx = driver.vring().used_idx().unwrap();
        start(&mut rig, 1, driver.vring(), used_idx);
        assert_eq!(driver.wait(round).unwrap(), 4096);
        driver.wait_open().unwrap();
    }
    rig.engine.reset();
}

#[test]
fn a_queue_that_is_disabled_has_no_ring_until_it_is_enabled_again() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    for round in 1..4 {
        verify(&rig, &mut driver, round);
        rig.engine.set_enabled(1, false);
        // Acknowledged, but nothing may be executed.
        wait_until("the end of the epoch", || {
            driver.look().unwrap();
            matches!(driver.state(), State::Idle { .. })
        });
        std::thread::sleep(Duration::from_millis(20));
        driver.look().unwrap();
        assert!(matches!(driver.state(), State::Idle { .. }));
        if round == 3 {
            assert_eq!(rig.engine.stop_queue(1), Some(1), "a ring that is not begun holds up nothing");
        } else {
            rig.engine.set_enabled(1, true);
            driver.wait_open().unwrap();
        }
    }
}

#[test]
fn what_was_said_with_a_kick_eventfd_that_is_replaced_is_heard() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    for _ in 0..50 {
        // The SQ thread sleeps.
        std::thread::sleep(Duration::from_millis(12));
        let new = Event::new().unwrap();
        driver.submit_write(0, &contents(1, 0, 8), 9).unwrap();
        rig.engine.set_kick(1, Some(new.to_eventfd().unwrap()));
        driver.vring().eventfds().set_kick(new);
        assert_eq!(driver.wait(9).unwrap(), 4096);
    }
    rig.engine.set_kick(1, None);
    wait_until("the end of a ring of which no eventfd tells", || driver.has_attach_ended().unwrap());
    assert_eq!(driver.wait_attach().unwrap(), whole(ErrorCode::Mode));
}

#[test]
fn an_engine_that_is_dropped_with_a_ring_leaves_no_thread_behind() {
    alone("engine::tests::ring_ends::an_engine_that_is_dropped_with_a_ring_leaves_no_thread_behind", || {
        let names = || -> Vec<String> {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(Result::unwrap);
            // A thread that ends meanwhile has no name.
            tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()).collect()
        };
        let own = ["worker-", "ring-builder"];
        let has = |own: &str| names().iter().any(|name| name.starts_with(own));
        let mut rig = rig(2, 1);
        let driver = attached(&mut rig, 1);
        assert!(own.into_iter().all(has), "another name? {:?}", names());
        drop(rig);
        drop(driver);
        wait_until("the end of the threads", || !own.into_iter().chain(["ringpass-", "writer-", "iou-"]).any(has));
    });
}
