//! Chains that a queue has taken: recorded in the in-flight region, left unrecorded, or put back.

use super::driver::{Driver, inflight_queue};
use super::inflight::left;
use crate::virtqueue::inflight::InflightQueue;
use crate::virtqueue::{PoppedChain, QueueError, QueueSetup, SplitQueue, UnrecordedChain};

/// A queue that starts with `region`.
fn begin(driver: &Driver, region: &InflightQueue) -> SplitQueue {
    let setup = QueueSetup { inflight: Some(region.clone()), ..driver.setup() };
    SplitQueue::new(setup, &driver.memory).expect("a good set-up")
}

/// Takes the next chain and records it.
fn pop(queue: &mut SplitQueue) -> Option<u16> {
    queue.pop().expect("good rings").map(PoppedChain::record)
}

/// Takes the next chain and leaves it unrecorded.
fn pop_unrecorded(queue: &mut SplitQueue) -> UnrecordedChain {
    queue.pop().expect("good rings").expect("a chain").leave_unrecorded()
}

fn heads(queue: &mut SplitQueue) -> Vec<u16> {
    std::iter::from_fn(|| pop(queue)).collect()
}

/// A driver that has made chains available, a region, and a queue over both.
fn available(heads: &[u16]) -> (Driver, InflightQueue, SplitQueue) {
    let mut driver = Driver::new(8);
    for &head in heads {
        driver.submit(head, 0);
    }
    let region = inflight_queue(8);
    let queue = begin(&driver, &region);
    (driver, region, queue)
}

#[test]
fn a_chain_can_be_read_before_it_is_decided() {
    let mut driver = Driver::new(8);
    driver.submit(2, 77);
    let mut queue = begin(&driver, &inflight_queue(8));
    let popped = queue.pop().expect("good rings").expect("a chain");
    for _ in 0..2 {
        let ids: Vec<u64> = popped.chain(&driver.memory).map(|descriptor| descriptor.expect("good").addr().0).collect();
        assert_eq!(ids, [77]);
    }
    assert_eq!(popped.record(), 2);
}

#[test]
fn an_unrecorded_chain_was_never_taken_for_a_later_process() {
    let (driver, region, mut queue) = available(&[2, 5]);
    assert_eq!(pop(&mut queue), Some(2));
    assert_eq!(pop_unrecorded(&mut queue).head(), 5);
    assert_eq!((region.is_in_flight(2), region.is_in_flight(5)), (true, false));
    assert_eq!((queue.in_flight(), queue.next_avail()), (2, 2));

    // The first chain is replayed, the second one is taken anew.
    let mut successor = begin(&driver, &region);
    assert_eq!(successor.next_avail(), 1);
    assert_eq!(heads(&mut successor), [2, 5]);
}

#[test]
fn an_unrecorded_chain_can_be_recorded_later_or_completed_as_it_is() {
    let (mut driver, region, mut queue) = available(&[2, 5]);
    let later = pop_unrecorded(&mut queue);
    assert!(!region.is_in_flight(2));
    queue.record(later);
    assert!(region.is_in_flight(2));
    let never = pop_unrecorded(&mut queue);
    queue.complete(never.head(), 0, None).unwrap();
    assert_eq!((region.is_in_flight(2), region.is_in_flight(5), region.used_idx()), (true, false, 1));
    assert_eq!(driver.reap(), Some((5, 0)));
    queue.record(never);
    assert!(!region.is_in_flight(5), "it is the driver's");
    assert_eq!(heads(&mut begin(&driver, &region)), [2]);
}

#[test]
fn a_chain_that_is_put_back_at_once_comes_again() {
    let (_driver, region, mut queue) = available(&[2, 5]);
    assert_eq!(pop(&mut queue), Some(2));
    for _ in 0..3 {
        queue.pop().expect("good rings").expect("a chain").undo();
        assert_eq!((queue.in_flight(), queue.next_avail(), region.is_in_flight(5)), (1, 1, false));
    }
    assert_eq!(queue.complete(5, 0, None), Err(QueueError::NotInFlight { head: 5 }));
    assert_eq!(heads(&mut queue), [5]);
}

#[test]
fn a_replayed_chain_keeps_its_place_in_the_region() {
    let driver = Driver::new(8);
    let region = left(8, 0, &[(1, 7), (4, 3)]);
    let mut queue = begin(&driver, &region);
    for head in [4, 1] {
        assert_eq!(pop(&mut queue), Some(head));
    }
    assert_eq!((region.counter(4), region.counter(1)), (3, 7));
}

#[test]
fn a_replayed_chain_stays_recorded_and_is_put_back_only_at_once() {
    let driver = Driver::new(8);
    let region = left(8, 0, &[(1, 7), (4, 3)]);
    let mut queue = begin(&driver, &region);
    queue.pop_replay().expect("a chain").undo();
    assert_eq!((queue.in_flight(), queue.next_avail()), (2, 2));
    let chain = pop_unrecorded(&mut queue);
    assert_eq!(chain.head(), 4);
    assert!(!queue.undo_pop(chain), "the region has it");
    assert_eq!((queue.in_flight(), queue.next_avail()), (2, 2));
    let chain = pop_unrecorded(&mut queue);
    queue.record(chain);
    assert_eq!((region.counter(4), region.counter(1)), (3, 7));
    assert!(region.is_in_flight(4) && region.is_in_flight(1));
}

#[test]
fn only_the_chain_that_was_taken_last_can_be_put_back_later() {
    let (_driver, _region, mut queue) = available(&[2, 5]);
    let (first, last) = (pop_unrecorded(&mut queue), pop_unrecorded(&mut queue));
    assert!(!queue.undo_pop(first));
    assert_eq!((queue.in_flight(), queue.next_avail()), (2, 2));
    assert!(queue.undo_pop(last));
    assert_eq!((queue.in_flight(), queue.next_avail()), (1, 1));
    assert_eq!(heads(&mut queue), [5]);
}

#[test]
fn a_chain_that_was_completed_cannot_be_put_back() {
    for publishes in [false, true] {
        let (_driver, _region, mut queue) = available(&[2]);
        let chain = pop_unrecorded(&mut queue);
        queue.add_used(2, 0, None).unwrap();
        if publishes {
            queue.publish(None);
        }
        assert!(!queue.undo_pop(chain), "published: {publishes}");
        assert_eq!((queue.in_flight(), queue.next_avail()), (0, 1));
    }
}

#[test]
fn counters_continue_after_a_restart_and_wrap() {
    let mut driver = Driver::new(8);
    let region = left(8, 0, &[(2, u64::MAX)]);
    driver.submit(2, 20);
    driver.submit(3, 30);
    let setup = QueueSetup { inflight: Some(region.clone()), ..driver.setup() };
    let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good region");
    for head in [2, 3] {
        assert_eq!(pop(&mut queue), Some(head));
    }
    assert_eq!(region.counter(3), 0);
    assert!(region.is_in_flight(3));
}
