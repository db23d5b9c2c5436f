//! The in-flight region: its file, and the recovery from it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

use super::driver::inflight_queue;
use crate::virtqueue::inflight::InflightQueue;
use crate::virtqueue::recovery::{Recovered, recover};
use crate::virtqueue::{InflightRegion, QueueError};

pub(super) const RECORD_AREA_BYTES: u64 = 576;

pub(super) fn memfd(size_bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, size_bytes).expect("memory");
    fd
}

#[test]
fn a_new_region_has_the_same_size_as_in_other_back_ends() {
    // Header and entries of 16 bytes, each queue at a multiple of 64, and behind them the record of the device.
    for (queues, queue_size, size_bytes) in
        [(1, 1, 64), (1, 3, 64), (1, 4, 128), (4, 128, 4 * 2112), (2, 256, 2 * 4160)]
    {
        let file = InflightRegion::create(queues, queue_size).expect("a memfd");
        let size_bytes = size_bytes + RECORD_AREA_BYTES;
        assert_eq!(file.size_bytes, size_bytes, "{queues} queues of {queue_size}");
        assert_eq!(rustix::fs::fstat(&file.fd).expect("a file").st_size as u64, size_bytes);
    }
}

#[test]
fn a_new_region_cannot_be_shortened() {
    let file = InflightRegion::create(1, 8).expect("a memfd");
    let seals = rustix::fs::fcntl_get_seals(file.fd.as_fd()).expect("a memfd");
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), "{seals:?}");
    assert!(rustix::fs::ftruncate(&file.fd, 0).is_err());
}

#[test]
fn the_queues_of_a_region_do_not_overlap() {
    let file = InflightRegion::create(3, 8).expect("a memfd");
    let region = InflightRegion::from_fd(file.fd, 0, file.size_bytes, 3, 8).expect("our own region");
    let queues: Vec<InflightQueue> = (0..3).map(|index| region.queue(index).expect("one of 3")).collect();
    assert!(region.queue(3).is_none());
    for (index, queue) in (1..).zip(&queues) {
        queue.set_used_idx(index);
        for head in 0..8 {
            queue.set_in_flight(head, true);
            queue.set_counter(head, u64::MAX);
            queue.set_next(head, u16::MAX);
        }
    }
    assert_eq!(queues.iter().map(InflightQueue::used_idx).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(queues.iter().all(|queue| queue.version() == 0));
}

#[test]
fn bad_regions_are_refused() {
    let refusal = |fd, offset_bytes, size_bytes, queues, queue_size| {
        InflightRegion::from_fd(fd, offset_bytes, size_bytes, queues, queue_size).expect_err("a bad region").to_string()
    };
    let shape = |what: &str| format!("an in-flight region for {what} descriptors: it must be for 1 to 32768 of each");
    assert_eq!(refusal(memfd(4096), 0, 4096, 0, 8), shape("0 queues of 8"));
    assert_eq!(refusal(memfd(4096), 0, 4096, 1, 32769), shape("1 queues of 32769"));
    assert_eq!(refusal(memfd(4096), 0, 2111, 1, 128), "an in-flight region of 2111 bytes: 1 queues of 128 need 2112");
    assert_eq!(
        refusal(memfd(4096), 4096, 2112, 1, 128),
        "the in-flight region: a shared area of 2112 bytes at offset 4096 of a file of 4096 bytes: it must end inside \
         the file"
    );
    assert_eq!(
        refusal(memfd(8192), 100, 2112, 1, 128),
        "the in-flight region: a shared area at offset 100 of its file: the offset must be a multiple of the page size \
         4096"
    );
    assert!(InflightRegion::create(1, 0).is_err());
    assert!(InflightRegion::create(0, 1).is_err());
}

/// A region as another process left it.
pub(super) fn left(size: u16, used_idx: u16, in_flight: &[(u16, u64)]) -> InflightQueue {
    let region = inflight_queue(size);
    region.set_version(1);
    region.set_used_idx(used_idx);
    for &(head, counter) in in_flight {
        region.set_counter(head, counter);
        region.set_in_flight(head, true);
    }
    region
}

#[test]
fn an_unused_region_is_prepared_and_the_front_end_trusted() {
    let region = inflight_queue(8);
    // The contents of an unused region have no meaning.
    region.set_in_flight(3, true);
    region.set_last_batch_head(7);
    let recovered = recover(&region, 8, 500, 503).expect("a new region");
    assert_eq!(recovered, Recovered { next_avail: 503, ..Recovered::default() });
    assert_eq!((region.version(), region.used_idx(), region.last_batch_head()), (1, 500, 0));
    assert!((0..8).all(|head| !region.is_in_flight(head)));
}

#[test]
fn chains_in_flight_are_replayed_in_the_order_of_taking() {
    let region = left(8, 65535, &[(1, 70), (2, 50), (6, 60)]);
    let recovered = recover(&region, 8, 65535, 0).expect("a good region");
    assert_eq!(recovered.replay, [2, 6, 1]);
    assert_eq!((recovered.next_avail, recovered.next_counter), (2, 71), "65535 and the three in flight");
}

#[test]
fn a_batch_that_another_back_end_published_is_completed() {
    // Another back-end linked and published 4, 5 and 0, but did not update their marks and the index.
    let region = left(8, 100, &[(0, 1), (4, 2), (5, 3), (7, 4)]);
    region.set_last_batch_head(4);
    region.set_next(4, 5);
    region.set_next(5, 0);
    region.set_next(0, 7);
    let recovered = recover(&region, 8, 103, 0).expect("a good region");
    assert_eq!((recovered.replay, recovered.next_avail), (vec![7], 104));
    assert_eq!(region.used_idx(), 103);
}

#[test]
fn a_region_that_does_not_match_the_ring_is_refused_unchanged() {
    let far = left(8, 100, &[(0, 1)]);
    let error = recover(&far, 8, 109, 0).expect_err("9 entries of 8");
    let expected = "the used index is 109 in the ring and 100 in the in-flight region; a matching region is at most 8 \
                    entries behind";
    assert_eq!(error.to_string(), expected);
    assert!(far.is_in_flight(0));
    assert_eq!(far.used_idx(), 100);

    for bad_head in [8, u16::MAX] {
        let nowhere = left(8, 100, &[(0, 1), (1, 2)]);
        nowhere.set_last_batch_head(1);
        nowhere.set_next(1, bad_head);
        assert!(matches!(recover(&nowhere, 8, 102, 0), Err(QueueError::InflightUsedIndex { .. })));
        assert!(nowhere.is_in_flight(1));
    }
}

#[test]
fn a_region_without_records_does_not_stop_a_new_ring() {
    let region = left(8, 40_000, &[]);
    region.set_last_batch_head(u16::MAX);
    let recovered = recover(&region, 8, 0, 0).expect("nothing is in flight");
    assert_eq!(recovered, Recovered::default());
    assert_eq!((region.version(), region.used_idx()), (1, 0));
}

#[test]
fn an_unanswered_chain_does_not_stop_a_new_ring() {
    // A chain of a previous driver, whose ring broke with this chain in flight.
    let region = left(8, 40_000, &[(3, 7)]);
    let recovered = recover(&region, 8, 0, 0).expect("a ring that begins");
    assert_eq!(recovered, Recovered::default());
    assert_eq!((region.version(), region.used_idx(), region.is_in_flight(3)), (1, 0, false));

    // The region of a process that died with its first chains in flight matches: the queue takes them again.
    let region = left(8, 0, &[(3, 0)]);
    assert_eq!(recover(&region, 8, 0, 0).expect("a good region").replay, [3]);
}

#[test]
fn after_begin_again_the_front_end_is_trusted() {
    let region = left(8, 1, &[(3, 7)]);
    region.begin_again();
    // A chain behind the lost one was already returned: the queue must not take it a second time.
    assert_eq!(recover(&region, 8, 1, 2).expect("as if new"), Recovered { next_avail: 2, ..Recovered::default() });
    assert!(!region.is_in_flight(3));
}

#[test]
fn a_region_of_another_version_or_with_too_few_entries_is_refused() {
    let region = inflight_queue(8);
    region.set_version(2);
    let error = recover(&region, 8, 0, 0).expect_err("version 2");
    let expected = "the in-flight region of this queue has version 2; this back-end only knows version 1";
    assert_eq!(error.to_string(), expected);
    let error = recover(&inflight_queue(8), 16, 0, 0).expect_err("8 entries for 16");
    assert_eq!(error.to_string(), "the in-flight region has 8 entries per queue, but this queue has 16 descriptors");
}

#[test]
fn the_driver_settings_survive_the_records_of_the_queues() {
    let file = InflightRegion::create(2, 8).expect("a memfd");
    let map = || {
        let fd = file.fd.try_clone().expect("a file descriptor");
        InflightRegion::from_fd(fd, 0, file.size_bytes, 2, 8).expect("our own region")
    };
    let region = map();
    assert_eq!(region.driver_settings(), 0, "no process has used the region");
    region.set_driver_settings(0x81);
    for index in 0..2 {
        let queue = region.queue(index).expect("two queues");
        assert_eq!(recover(&queue, 8, 5, 5).expect("a new region").next_avail, 5);
        queue.begin_again();
    }
    assert_eq!(map().driver_settings(), 0x81, "the next process finds the settings");
    region.set_driver_settings(0);
    assert_eq!(map().driver_settings(), 0);
    let bytes = std::fs::read(format!("/proc/self/fd/{}", file.fd.as_raw_fd())).expect("the region");
    assert_eq!(bytes[..8], [0; 8], "`features` is 0, as other back-ends expect");
}
