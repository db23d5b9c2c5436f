//! Requests that belong to features: only what the queue's driver negotiated is executed.

use super::rig::{Options, Rig, SECTOR, contents};
use crate::vhost_user::Device;
use crate::virtqueue::{InflightFile, InflightQueue, InflightRegion, QueueSetup, SplitQueue};

const OK: u8 = 0;
const UNSUPP: u8 = 2;

const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

#[test]
fn what_the_driver_did_not_negotiate_is_unsupported_and_changes_nothing() {
    for (features, statuses) in [
        (0, [UNSUPP, UNSUPP, UNSUPP, OK]),
        (FLUSH, [UNSUPP, UNSUPP, UNSUPP, OK]),
        (DISCARD, [OK, UNSUPP, UNSUPP, OK]),
        (WRITE_ZEROES, [UNSUPP, OK, OK, OK]),
        (FLUSH | DISCARD | WRITE_ZEROES, [OK; 4]),
    ] {
        let mut rig = Rig::new(Options::default());
        let mut driver = rig.driver(0);
        driver.blk_features = features;
        rig.start(&driver);
        let requests =
            [driver.discard(0, 8), driver.write_zeroes(8, 8, true), driver.write_zeroes(16, 8, false), driver.flush()];
        assert_eq!(requests.map(|outcome| outcome.status), statuses, "{features:#x}");
        for (number, status) in (0..3).zip(statuses) {
            let expected = if status == OK { vec![0; 8 * 512] } else { contents(0, 8 * number, 8) };
            assert_eq!(rig.on_disk(8 * number, 8 * SECTOR), expected, "request {number} with {features:#x}");
        }
        let refused = statuses.iter().filter(|&&status| status == UNSUPP).count() as u64;
        assert_eq!(rig.engine.control().counters()[0].refused.get(), refused);
    }
}

#[test]
fn the_features_that_count_are_those_with_which_the_queue_was_started_last() {
    let mut rig = Rig::new(Options::default());
    for (features, status) in [(DISCARD, OK), (0, UNSUPP), (DISCARD, OK)] {
        let mut driver = rig.driver(0);
        driver.blk_features = features;
        rig.start(&driver);
        assert_eq!(driver.discard(0, 8).status, status);
        rig.engine.stop_queue(0);
    }
}

/// Of a driver that has accepted nothing: rings and queues need no feature.
#[test]
fn indirect_tables_and_queues_beyond_the_first_are_served_without_their_features() {
    let mut rig = Rig::new(Options { queues: 2, ..Options::default() });
    let mut driver = rig.driver(1);
    driver.blk_features = 0;
    driver.indirect = true;
    rig.start(&driver);
    assert_eq!(driver.write_data(8, &contents(1, 8, 8)).status, OK);
    assert_eq!(driver.read(8, 8).data, contents(1, 8, 8));
}

fn region(file: &InflightFile) -> Option<InflightQueue> {
    let fd = file.fd.try_clone().unwrap();
    InflightRegion::from_fd(fd, 0, file.size_bytes, 1, 256).unwrap().queue(0)
}

/// Takes what is available as a process does that is killed then.
fn take_and_die(rig: &Rig, setup: QueueSetup) {
    let memory = rig.device_memory();
    let mut taken = SplitQueue::new(setup, &memory).unwrap();
    assert!(taken.pop_recorded(&memory).unwrap().is_some());
}

#[test]
fn what_an_earlier_process_had_taken_is_executed_by_the_features_that_the_front_end_sets_again() {
    for (features, status) in [(0, UNSUPP), (DISCARD, OK)] {
        let mut rig = Rig::new(Options::default());
        let file = InflightRegion::create(1, 256).unwrap();
        let mut driver = rig.driver(0);
        driver.add_discard(0, 8);
        take_and_die(&rig, driver.setup(0, region(&file)));
        driver.blk_features = features;
        rig.engine.start_queue(0, driver.setup(0, region(&file)), driver.eventfds());
        rig.engine.set_enabled(0, true);
        assert_eq!(driver.wait().status, status);
    }
}
