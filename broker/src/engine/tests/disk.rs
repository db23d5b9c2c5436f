//! The engine and its disk: not there yet, taken back, of another size.

use std::sync::atomic::Ordering;

use super::driver::PATIENCE;
use super::rig::{DISK_BYTES, Options, Rig, SECTOR, content, contents};
use crate::disk::{Disk, DiskConfig, DiskError};
use crate::vhost_user::Device;

#[test]
fn nothing_is_executed_before_the_disk_is_there_and_everything_after() {
    let mut rig = Rig::without_disk(Options::default());
    let mut driver = rig.running(0);
    assert_eq!(rig.calls.requests.load(Ordering::SeqCst), 1, "the start asks for the disk");
    driver.add_write(0, &contents(1, 0, 8));
    driver.add_read(100, 8);
    driver.vring.kick().unwrap();
    // The answer comes from the worker, after it has had every chance to look at the queue.
    rig.engine.set_enabled(0, true);
    rig.engine.set_enabled(0, true);
    assert_eq!(driver.poll(), None);
    assert_eq!(rig.on_disk(0, 8 * SECTOR), contents(0, 0, 8));

    rig.engine.control().set_disk(&rig.open_disk());
    let outcomes = [driver.wait(), driver.wait()];
    assert!(outcomes.iter().all(|outcome| outcome.status == 0));
    assert_eq!(rig.on_disk(0, 8 * SECTOR), contents(1, 0, 8));
}

#[test]
fn a_queue_that_never_got_the_disk_stops_at_once_with_the_index_it_was_started_with() {
    let mut rig = Rig::without_disk(Options::default());
    let driver = rig.driver(0);
    rig.engine.start_queue(0, driver.setup(77, None), driver.eventfds());
    rig.engine.set_enabled(0, true);
    assert_eq!(rig.engine.stop_queue(0), Some(77));
}

#[test]
fn the_last_queue_that_stops_while_a_log_is_kept_frees_the_disk_for_others() {
    let mut rig = Rig::new(Options { queues: 2, workers: 2, ..Options::default() });
    let (mut one, mut two) = (rig.running(0), rig.running(1));
    let try_open = |rig: &Rig| Disk::open(&DiskConfig::new(rig.image.path()));
    assert!(matches!(try_open(&rig), Err(DiskError::Locked { .. })), "the engine has the lock");

    let log = rig.dirty_log();
    rig.engine.set_dirty_log(Some(log));
    assert_eq!(one.read(0, 8).status, 0);
    assert_eq!(rig.engine.stop_queue(0), Some(1));
    assert_eq!(rig.calls.releases.load(Ordering::SeqCst), 0, "the other queue still runs");
    assert_eq!(two.read(0, 8).status, 0);
    assert_eq!(rig.engine.stop_queue(1), Some(1));
    assert_eq!(rig.calls.releases.load(Ordering::SeqCst), 1);
    let other = try_open(&rig).expect("the lock is free when the stop was answered");

    // The migration failed, and the guest goes on here.
    let requests = rig.calls.requests.load(Ordering::SeqCst);
    rig.engine.start_queue(0, one.setup(1, None), one.eventfds());
    rig.engine.set_enabled(0, true);
    assert_eq!(rig.calls.requests.load(Ordering::SeqCst), requests + 1);
    one.add_read(8, 8);
    one.kick();
    rig.engine.set_enabled(0, true);
    assert_eq!(one.poll(), None, "the other has the disk");
    drop(other);
    rig.engine.control().set_disk(&rig.open_disk());
    assert_eq!(one.wait().data, contents(0, 8, 8));
}

#[test]
fn without_a_log_a_stop_keeps_the_disk() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    assert_eq!(driver.read(0, 8).status, 0);
    rig.engine.stop_queue(0);
    assert_eq!(rig.calls.releases.load(Ordering::SeqCst), 0);
    assert!(matches!(Disk::open(&DiskConfig::new(rig.image.path())), Err(DiskError::Locked { .. })));
}

#[test]
fn a_grown_disk_is_told_and_can_be_used_to_its_new_end() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    let old_end = DISK_BYTES / SECTOR;
    assert_ne!(driver.read(old_end, 8).status, 0);
    assert!(!rig.engine.refresh_capacity().unwrap(), "nothing has changed yet");
    rig.image.as_file().set_len(DISK_BYTES + 4096).unwrap();
    assert!(rig.engine.refresh_capacity().unwrap());
    assert_eq!(rig.engine.config_space()[..8], (old_end + 8).to_le_bytes());
    assert_eq!(driver.read(old_end, 8).data, vec![0; 4096]);
    assert_ne!(driver.read(old_end + 8, 1).status, 0);
}

#[test]
fn a_disk_that_shrank_refuses_what_is_beyond_its_new_end() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    rig.image.as_file().set_len(DISK_BYTES / 2).unwrap();
    assert!(rig.engine.refresh_capacity().unwrap());
    assert_ne!(driver.write_data(DISK_BYTES / 2 / SECTOR, &[1; 512]).status, 0);
    assert_eq!(driver.read(0, 1).data, content(0, 0));
    assert_eq!(rig.image.as_file().metadata().unwrap().len(), DISK_BYTES / 2, "the file did not grow");
}

#[test]
fn pages_that_requests_write_are_marked_and_others_are_not() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    assert_eq!(driver.read(0, 1).status, 0);
    let log = rig.dirty_log();
    rig.engine.set_dirty_log(Some(log));
    let used_ring_page = driver.vring.layout().used_gpa / 4096;
    assert_eq!(rig.marked_pages(), [used_ring_page], "what was written to the used ring before");

    driver.misalignment_bytes = 0x800;
    assert_eq!(driver.read(0, 8).status, 0);
    let place = driver.place_pages();
    // Header and status are on the first page, the data on the second and, misaligned, on the third.
    assert_eq!(rig.marked_pages(), [used_ring_page, place, place + 1, place + 2]);
    rig.clear_log();
    assert_eq!(driver.write_data(0, &[1; 4096]).status, 0);
    assert_eq!(rig.marked_pages(), [used_ring_page, place], "a write writes its status only");
    rig.engine.set_dirty_log(None);
    rig.clear_log();
    assert_eq!(driver.read(0, 8).status, 0);
    assert_eq!(rig.marked_pages(), [0; 0], "after the end of logging");
}

#[test]
fn shutdown_ends_what_is_under_way_and_frees_the_disk() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    driver.by_interrupt = true;
    for number in 0..32 {
        driver.add_write(number * 8, &contents(3, number * 8, 8));
    }
    driver.kick();
    let Rig { engine, image, .. } = rig;
    engine.shutdown();
    let mut ended = 0;
    while let Some(outcome) = driver.poll() {
        assert_eq!(outcome.status, 0);
        ended += 1;
    }
    assert!(ended == 0 || driver.vring.eventfds().call().wait(PATIENCE).unwrap(), "the driver is told");
    Disk::open(&DiskConfig::new(image.path())).expect("no process has the disk any more");
}

#[test]
fn a_worker_that_does_not_poll_ends_when_its_last_request_has_ended() {
    for _ in 0..50 {
        let mut rig = Rig::new(Options { poll_time: std::time::Duration::ZERO, ..Options::default() });
        let mut driver = rig.running(0);
        // A flush, which ends on another thread while the worker sleeps.
        driver.add_flush();
        driver.kick();
        rig.engine.shutdown();
    }
}
