//! Taking chains, returning them, kicks and signals.

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::driver::{AVAIL_RING, DESC_TABLE, Driver, MEMORY_BYTES, USED_RING, inflight_queue};
use crate::virtqueue::{QueueError, QueueSetup, SplitQueue};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

fn queue(driver: &Driver) -> SplitQueue {
    SplitQueue::new(driver.setup(), &driver.memory).expect("a good set-up")
}

fn refusal(driver: &Driver, change: impl FnOnce(&mut QueueSetup)) -> String {
    let mut setup = driver.setup();
    change(&mut setup);
    SplitQueue::new(setup, &driver.memory).expect_err("a bad set-up").to_string()
}

/// The id of the next chain.
fn pop(queue: &mut SplitQueue, driver: &Driver) -> Option<u64> {
    let (_, chain) = queue.pop_recorded(&driver.memory).expect("an honest driver")?;
    let ids: Vec<u64> = chain.map(|descriptor| descriptor.expect("in the table").addr().0).collect();
    assert_eq!(ids.len(), 1);
    Some(ids[0])
}

#[test]
fn chains_are_taken_in_order_and_returned_in_any_order() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    assert_eq!(pop(&mut queue, &driver), None);
    for (head, id) in [(5, 50), (0, 10), (7, 70)] {
        driver.submit(head, id);
    }
    assert!(queue.has_work());
    for id in [50, 10, 70] {
        assert_eq!(pop(&mut queue, &driver), Some(id));
    }
    assert!(!queue.has_work());
    assert_eq!((queue.in_flight(), queue.next_avail()), (3, 3));
    for (head, written_bytes) in [(7, 4097), (5, 1), (0, 0)] {
        queue.complete(head, written_bytes, None).expect("in flight");
        assert_eq!(driver.reap(), Some((u32::from(head), written_bytes)));
    }
    assert_eq!(driver.reap(), None);
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn rings_and_indexes_wrap_many_times() {
    let mut driver = Driver::at_index(4, 65530);
    let mut queue = queue(&driver);
    for round in 0..200_u64 {
        for head in 0..4 {
            driver.submit(head, 10 * round + u64::from(head));
        }
        for head in 0..4 {
            assert_eq!(pop(&mut queue, &driver), Some(10 * round + head));
        }
        for head in [2, 0, 3, 1] {
            queue.complete(head, u32::from(head), None).expect("in flight");
            assert_eq!(driver.reap(), Some((u32::from(head), u32::from(head))));
        }
    }
    assert_eq!(queue.next_avail(), 65530_u16.wrapping_add(800));
}

#[test]
fn an_available_index_beyond_the_queue_size_is_an_error() {
    let mut driver = Driver::new(8);
    driver.submit(0, 1);
    let mut queue = queue(&driver);
    assert_eq!(pop(&mut queue, &driver), Some(1));
    driver.store(AVAIL_RING + 2, 10);
    let error = queue.pop_recorded(&driver.memory).expect_err("9 entries in a ring of 8");
    assert_eq!(error, QueueError::AvailIndex { avail_idx: 10, next_avail: 1, size: 8 });
    assert_eq!(error.to_string(), "the driver's available index went from 1 to 10, which is more than the 8 entries");
    // Backwards is far forwards.
    driver.store(AVAIL_RING + 2, 0);
    assert!(matches!(
        queue.pop_recorded(&driver.memory),
        Err(QueueError::AvailIndex { avail_idx: 0, next_avail: 1, size: 8 })
    ));
}

#[test]
fn a_head_outside_the_table_is_an_error_and_is_not_taken() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    driver.make_available(8);
    for _ in 0..2 {
        let error = queue.pop_recorded(&driver.memory).expect_err("descriptor 8 of 8");
        assert_eq!(error.to_string(), "the driver made descriptor 8 available, but the queue has only 8");
    }
    assert_eq!((queue.next_avail(), queue.in_flight()), (0, 0));
}

#[test]
fn a_head_that_is_made_available_twice_is_an_error() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    driver.submit(3, 1);
    driver.submit(3, 2);
    assert!(pop(&mut queue, &driver).is_some());
    let error = queue.pop_recorded(&driver.memory).expect_err("3 is in flight");
    assert_eq!(error.to_string(), "the driver made descriptor 3 available again while it is in flight");
    queue.complete(3, 0, None).expect("in flight");
    assert_eq!(pop(&mut queue, &driver), Some(2));
}

#[test]
fn a_chain_that_is_not_in_flight_cannot_be_completed() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    driver.submit(3, 1);
    assert_eq!(queue.complete(3, 0, None), Err(QueueError::NotInFlight { head: 3 }));
    assert!(pop(&mut queue, &driver).is_some());
    queue.complete(3, 0, None).expect("in flight");
    for head in [3, 8, u16::MAX] {
        assert_eq!(queue.complete(head, 0, None), Err(QueueError::NotInFlight { head }));
    }
    assert_eq!(driver.reap(), Some((3, 0)));
    assert_eq!(driver.reap(), None);
}

#[test]
fn neither_side_may_use_a_batch_before_it_is_published() {
    let mut driver = Driver::new(8);
    let region = inflight_queue(8);
    let setup = QueueSetup { inflight: Some(region.clone()), ..driver.setup() };
    let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
    for head in [3, 5] {
        driver.submit(head, 0);
        assert!(pop(&mut queue, &driver).is_some());
        queue.add_used(head, u32::from(head), None).expect("in flight");
    }
    assert_eq!((driver.reap(), queue.in_flight()), (None, 0));
    assert_eq!(queue.add_used(3, 0, None), Err(QueueError::NotInFlight { head: 3 }));
    driver.submit(5, 1);
    assert!(matches!(queue.pop_recorded(&driver.memory), Err(QueueError::HeadInFlight { head: 5 })));
    assert!(region.is_in_flight(3) && region.is_in_flight(5));

    queue.publish(None);
    assert_eq!((driver.reap(), driver.reap(), driver.reap()), (Some((3, 3)), Some((5, 5)), None));
    assert!(!region.is_in_flight(3) && !region.is_in_flight(5));
    assert_eq!(region.used_idx(), 2);
    assert_eq!(pop(&mut queue, &driver), Some(1));
}

#[test]
fn a_queue_starts_where_the_front_end_says() {
    let mut driver = Driver::at_index(8, 100);
    driver.submit(1, 10);
    driver.submit(2, 20);
    let mut setup = driver.setup();
    setup.next_avail = 101;
    let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
    assert_eq!(pop(&mut queue, &driver), Some(20));
    queue.complete(2, 5, None).expect("in flight");
    assert_eq!(driver.reap(), Some((2, 5)), "in the entry at the used ring's index");
}

#[test]
fn bad_set_ups_are_refused() {
    let driver = Driver::new(8);
    for (size, reason) in [(0, "0"), (3, "3"), (0xffff, "65535")] {
        assert_eq!(
            refusal(&driver, |setup| setup.size = size),
            format!("a queue of {reason} descriptors: the size must be a power of two of at most 32768")
        );
    }
    assert_eq!(
        refusal(&driver, |setup| setup.desc_table = GuestAddress(DESC_TABLE + 8)),
        "the descriptor table at 0x1008 is not aligned to 16 bytes"
    );
    assert_eq!(
        refusal(&driver, |setup| setup.avail_ring = GuestAddress(AVAIL_RING + 1)),
        "the available ring at 0x9001 is not aligned to 2 bytes"
    );
    assert_eq!(
        refusal(&driver, |setup| setup.used_ring = GuestAddress(USED_RING + 2)),
        "the used ring at 0xb002 is not aligned to 4 bytes"
    );
    assert_eq!(
        refusal(&driver, |setup| setup.used_ring = GuestAddress(MEMORY_BYTES - 64)),
        "the used ring of 68 bytes at 0x1ffc0 is not inside one region of guest memory"
    );
    for gpa in [MEMORY_BYTES, !15] {
        assert_eq!(
            refusal(&driver, |setup| setup.desc_table = GuestAddress(gpa)),
            format!("the descriptor table of 128 bytes at {gpa:#x} is not inside one region of guest memory")
        );
    }
}

#[test]
fn a_ring_may_end_at_the_end_of_memory() {
    let driver = Driver::new(8);
    let mut setup = driver.setup();
    setup.desc_table = GuestAddress(MEMORY_BYTES - 128);
    setup.avail_ring = GuestAddress(0);
    SplitQueue::new(setup, &driver.memory).expect("the first and the last bytes of memory");
}

#[test]
fn without_event_idx_a_ring_ends_with_its_last_entry() {
    let driver = Driver::new(8);
    for (setup, ring) in [
        (QueueSetup { avail_ring: GuestAddress(MEMORY_BYTES - (4 + 8 * 2)), ..driver.setup() }, "available ring"),
        (QueueSetup { used_ring: GuestAddress(MEMORY_BYTES - (4 + 8 * 8)), ..driver.setup() }, "used ring"),
    ] {
        let mut queue = SplitQueue::new(setup.clone(), &driver.memory).expect("the whole ring is in memory");
        queue.set_memory(&driver.memory).expect("the whole ring is in memory");
        let error = SplitQueue::new(QueueSetup { driver_features: EVENT_IDX, ..setup }, &driver.memory)
            .expect_err("2 more bytes");
        assert!(matches!(error, QueueError::OutsideMemory { ring: refused, .. } if refused == ring), "{error}");
    }
}

#[test]
fn a_ring_across_two_regions_is_refused() {
    let half = MEMORY_BYTES / 2;
    let halves = [(GuestAddress(0), half as usize), (GuestAddress(half), half as usize)];
    let memory = GuestMemoryMmap::from_ranges(&halves).expect("guest memory");
    let mut setup = Driver::new(8).setup();
    setup.desc_table = GuestAddress(half - 16);
    let error = SplitQueue::new(setup, &memory).expect_err("7 of 8 descriptors are in the other region");
    assert!(matches!(error, QueueError::OutsideMemory { ring: "descriptor table", len_bytes: 128, .. }), "{error}");
}

#[test]
fn a_queue_follows_changed_memory_and_keeps_the_old_one_without_its_rings() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    driver.submit(1, 10);
    assert_eq!(pop(&mut queue, &driver), Some(10));

    let mut moved = Driver::new(8);
    moved.avail_idx = 1;
    moved.submit(2, 20);
    queue.set_memory(&moved.memory).expect("the rings are in the new memory");
    assert_eq!(pop(&mut queue, &moved), Some(20));
    queue.complete(1, 7, None).expect("in flight");
    assert_eq!((driver.reap(), moved.reap()), (None, Some((1, 7))));

    let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x9000)]).expect("guest memory");
    let error = queue.set_memory(&small).expect_err("no available ring there");
    assert!(matches!(error, QueueError::OutsideMemory { ring: "available ring", .. }), "{error}");
    drop(small);
    queue.complete(2, 8, None).expect("in flight");
    assert_eq!(moved.reap(), Some((2, 8)));
}

/// Takes and returns one chain.
fn serve(queue: &mut SplitQueue, driver: &mut Driver) {
    driver.submit(0, 0);
    assert!(pop(queue, driver).is_some());
    queue.complete(0, 0, None).expect("in flight");
    assert!(driver.reap().is_some());
}

#[test]
fn a_new_queue_signals_once_in_any_case() {
    for driver_features in [0, EVENT_IDX] {
        let driver = Driver::new(8);
        driver.set_avail_flags(1);
        driver.set_used_event(1000);
        let mut queue =
            SplitQueue::new(QueueSetup { driver_features, ..driver.setup() }, &driver.memory).expect("a good set-up");
        assert!(queue.needs_signal(), "an earlier process may have died before it signalled");
        assert!(!queue.needs_signal(), "no chain was returned since");
    }
}

#[test]
fn without_event_idx_the_flag_of_the_available_ring_decides() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    assert!(queue.needs_signal());
    serve(&mut queue, &mut driver);
    assert!(queue.needs_signal());
    assert!(!queue.needs_signal(), "no chain was returned since");
    driver.set_avail_flags(1);
    serve(&mut queue, &mut driver);
    assert!(!queue.needs_signal(), "VRING_AVAIL_F_NO_INTERRUPT");
    driver.set_avail_flags(0);
    serve(&mut queue, &mut driver);
    assert!(queue.needs_signal());
}

#[test]
fn with_event_idx_the_signal_comes_when_the_wanted_entry_was_used() {
    // Around every point at which an index wraps.
    for start in [0, 100, 32766, 65533] {
        let mut driver = Driver::at_index(8, start);
        driver.set_avail_flags(1);
        let setup = QueueSetup { driver_features: EVENT_IDX, ..driver.setup() };
        let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
        assert!(queue.needs_signal());
        driver.set_used_event(start.wrapping_add(2));
        let mut wanted = Vec::new();
        for _ in 0..5 {
            serve(&mut queue, &mut driver);
            wanted.push(queue.needs_signal());
        }
        assert_eq!(wanted, [false, false, true, false, false], "from index {start}");
        // The queue asks once after several chains: the wanted entry was among them.
        driver.set_used_event(start.wrapping_add(6));
        for _ in 0..3 {
            serve(&mut queue, &mut driver);
        }
        assert!(queue.needs_signal(), "from index {start}");
    }
}

#[test]
fn without_event_idx_the_flag_of_the_used_ring_asks_for_kicks() {
    let mut driver = Driver::new(8);
    let mut queue = queue(&driver);
    queue.disable_kicks(None);
    assert_eq!(driver.used_flags(), 1, "VRING_USED_F_NO_NOTIFY");
    assert!(!queue.enable_kicks(None));
    assert_eq!(driver.used_flags(), 0);
    driver.submit(0, 0);
    assert!(queue.enable_kicks(None), "there is work, for which no kick comes");
}

#[test]
fn with_event_idx_the_queue_asks_for_a_kick_at_the_next_entry() {
    let mut driver = Driver::at_index(8, 65535);
    let setup = QueueSetup { driver_features: EVENT_IDX, ..driver.setup() };
    let mut queue = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
    driver.submit(0, 0);
    assert!(queue.enable_kicks(None));
    assert_eq!(driver.avail_event(), 65535);
    assert!(pop(&mut queue, &driver).is_some());
    queue.disable_kicks(None);
    assert_eq!((driver.avail_event(), driver.used_flags()), (65535, 0), "nothing is written");
    assert!(!queue.enable_kicks(None));
    assert_eq!(driver.avail_event(), 0);
}

#[test]
fn chains_to_be_replayed_count_as_work() {
    let mut driver = Driver::new(8);
    let setup = QueueSetup { inflight: Some(inflight_queue(8)), ..driver.setup() };
    driver.submit(0, 5);
    let mut first = SplitQueue::new(setup.clone(), &driver.memory).expect("a good set-up");
    assert!(pop(&mut first, &driver).is_some());
    drop(first);
    let mut second = SplitQueue::new(setup, &driver.memory).expect("a good set-up");
    assert!(second.has_work());
    assert!(second.enable_kicks(None));
    assert_eq!((second.in_flight(), second.next_avail()), (1, 1));
    assert_eq!(pop(&mut second, &driver), Some(5));
    assert!(!second.has_work());
}
