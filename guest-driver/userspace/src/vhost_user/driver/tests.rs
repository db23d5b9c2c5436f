use std::sync::atomic::Ordering;

use ringpass_guest_abi::epoch::{Announcement, Epoch, Phase};
use ringpass_guest_abi::probe::{F_DSYNC, MAGIC, ProbeAnswer, VERSION};
use ringpass_guest_abi::request::ErrorCode;
use ringpass_guest_abi::{FixedAddress, SegmentLimits};

use super::super::config::Geometry;
use super::super::queue_zero::QueueZeroRequest;
use super::super::test_device::{DeviceQueue, Guest};
use super::*;

/// ATTACH is the second chain that a driver makes available.
const ATTACH: u16 = 1;
const DRAINED: Option<Announcement> = Some(Announcement { epoch: Epoch::new(1), phase: Phase::Drain });

fn read(gpa: u64, user_data: u64) -> Request {
    Request { write: false, offset_bytes: 0, gpa, len_bytes: 4096, durable: false, user_data }
}

/// The next request that has ended: its `user_data` and result.
fn ended(driver: &mut Driver) -> Option<(u64, i32)> {
    driver.reap().map(|ended| (ended.completion.user_data, ended.completion.res))
}

/// A driver whose ring of epoch 1 runs.
fn running(guest: &Guest) -> (Driver, DeviceQueue) {
    let (mut driver, device) = guest.driver();
    driver.want_ring(guest.offer_rings()).unwrap();
    device.announce(ATTACH, 1, Phase::Open);
    driver.progress();
    assert!(driver.is_ring());
    (driver, device)
}

#[test]
fn an_idle_ring_that_has_to_drain_is_drained_at_the_first_progress() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    device.announce(ATTACH, 1, Phase::Drain);
    // The device sends one interrupt for the announcement, and the application calls `progress` once for it.
    driver.progress();
    assert_eq!(device.acknowledged(ATTACH), DRAINED);
}

#[test]
fn the_driver_handles_an_announcement_of_a_muted_ring_when_interrupts_are_on_again() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    driver.set_muted(true);
    device.announce(ATTACH, 1, Phase::Drain);
    assert!(driver.reap().is_none());
    driver.set_muted(false);
    assert_eq!(device.acknowledged(ATTACH), DRAINED);
}

#[test]
fn requests_that_a_faulty_device_has_keep_their_buffers_and_others_fail() {
    let guest = Guest::new();
    let (mut driver, device) = guest.driver();
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 7), None).unwrap();
    driver.send();
    device.set_used_index(9);
    assert_eq!(ended(&mut driver), None);
    assert!(matches!(driver.fault(), Some(Error::BrokenDevice(_))), "{:?}", driver.fault());
    driver.push(&read(buffer.gpa(), 8), None).unwrap();
    assert_eq!(ended(&mut driver), Some((8, EIO)));
    assert_eq!((ended(&mut driver), driver.outstanding()), (None, 1));
}

#[test]
fn requests_on_a_running_ring_keep_their_buffers_when_the_device_violates_the_protocol() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 7), None).unwrap();
    driver.send();
    // Epoch 5 must not follow epoch 1.
    device.announce(ATTACH, 5, Phase::Open);
    assert_eq!(ended(&mut driver), None);
    assert!(matches!(driver.fault(), Some(Error::BrokenDevice(_))), "{:?}", driver.fault());
    assert!(!driver.is_ring());
    driver.push(&read(buffer.gpa(), 8), None).unwrap();
    assert_eq!(ended(&mut driver), Some((8, EIO)));
    assert_eq!((ended(&mut driver), driver.outstanding()), (None, 1));
}

#[test]
fn an_event_between_attach_and_its_refusal_lets_the_driver_ask_again() {
    let guest = Guest::new();
    let (mut driver, mut device) = guest.driver();
    driver.want_ring(guest.offer_rings()).unwrap();
    device.complete_attach(0, ErrorCode::Mode);
    guest.news.events.fetch_add(1, Ordering::Release);
    driver.progress();
    assert_eq!((driver.refused(), device.available()), (Some(ErrorCode::Mode), 4), "ARM and ATTACH again");
    // Without an event the driver does not ask again.
    device.complete_attach(2, ErrorCode::Mode);
    driver.progress();
    driver.progress();
    assert_eq!(device.available(), 4);
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 7), None).unwrap();
    driver.send();
    assert_eq!(device.available(), 5, "requests go over the virtqueue meanwhile");
}

/// A guest of a device with these limits for the segments of a request.
fn guest_of(segments_max: u32, segment_bytes_max: u32) -> Guest {
    Guest::with(Geometry { segments_max, segment_bytes_max, ..Geometry::read(&[], 0) })
}

#[test]
fn a_request_longer_than_a_segment_has_as_many_segments_as_it_needs() {
    let guest = guest_of(8, 4096);
    let (mut driver, mut device) = guest.driver();
    let buffer = guest.memory.allocate(16384).unwrap();
    let gpa = buffer.gpa();
    driver.push(&Request { offset_bytes: 8192, len_bytes: 10240, ..read(gpa, 7) }, Some(buffer)).unwrap();
    driver.send();
    assert_eq!(device.transfer(0), (8192, vec![(gpa, 4096), (gpa + 4096, 4096), (gpa + 8192, 2048)]));
    device.complete(0, &[], 0);
    assert_eq!(ended(&mut driver), Some((7, 10240)));
    assert_eq!(device.available(), 1);
}

#[test]
fn a_request_longer_than_all_segments_is_sent_in_parts_one_after_the_other() {
    let guest = guest_of(2, 4096);
    let (mut driver, mut device) = guest.driver();
    let buffer = guest.memory.allocate(20480).unwrap();
    let gpa = buffer.gpa();
    let request = Request { write: true, durable: true, len_bytes: 20480, ..read(gpa, 7) };
    driver.push(&request, Some(buffer)).unwrap();
    driver.send();
    for (part, segments) in [
        (0, vec![(gpa, 4096), (gpa + 4096, 4096)]),
        (1, vec![(gpa + 8192, 4096), (gpa + 12288, 4096)]),
        (2, vec![(gpa + 16384, 4096)]),
    ] {
        assert_eq!(device.available(), part + 1);
        assert_eq!(device.transfer(part), (u64::from(part) * 8192, segments));
        device.complete(part, &[], 0);
        assert_eq!(ended(&mut driver), None, "the rest, or the flush, follows");
    }
    // One flush follows the last part.
    let mut queue_zero = guest.device_queue_zero();
    assert_eq!((device.available(), queue_zero.available()), (3, 1));
    queue_zero.complete(0, &[], 0);
    driver.progress();
    assert_eq!(ended(&mut driver), Some((7, 20480)));
}

#[test]
fn a_request_whose_second_part_fails_fails() {
    let guest = guest_of(1, 4096);
    let (mut driver, mut device) = guest.driver();
    let buffer = guest.memory.allocate(8192).unwrap();
    driver.push(&Request { len_bytes: 8192, ..read(buffer.gpa(), 7) }, Some(buffer)).unwrap();
    driver.send();
    device.complete(0, &[], 0);
    assert_eq!(ended(&mut driver), None);
    device.complete(1, &[], 1);
    assert_eq!(ended(&mut driver), Some((7, EIO)));
}

#[test]
fn a_request_across_a_boundary_goes_over_the_ring_in_two_parts() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    let gpa = (12 << 20) - 4096;
    driver.push(&Request { offset_bytes: 8192, len_bytes: 12288, ..read(gpa, 7) }, None).unwrap();
    driver.send();
    assert_eq!(device.sqe(ATTACH, 0), (FixedAddress { buf_index: 2, addr: (1 << 30) + gpa }, 4096, 8192));
    device.complete_sqe(ATTACH, 0, 4096);
    assert_eq!(ended(&mut driver), None);
    driver.send();
    assert_eq!(device.sqe(ATTACH, 1), (FixedAddress { buf_index: 3, addr: (1 << 30) + gpa + 4096 }, 8192, 12288));
    device.complete_sqe(ATTACH, 1, 8192);
    assert_eq!(ended(&mut driver), Some((7, 12288)));
    assert_eq!(driver.counters().resubmitted, 0, "parts that the driver planned are not sent again");
}

#[test]
fn the_rest_of_a_part_that_the_ring_did_only_in_part_goes_over_queue_0() {
    let guest = guest_of(8, 1 << 20);
    let (mut driver, device) = running(&guest);
    let buffer = guest.memory.allocate(12288).unwrap();
    let gpa = buffer.gpa();
    driver.push(&Request { len_bytes: 12288, ..read(gpa, 7) }, Some(buffer)).unwrap();
    driver.send();
    device.complete_sqe(ATTACH, 0, 4096);
    driver.progress();
    assert_eq!(ended(&mut driver), None);
    let mut queue_zero = guest.device_queue_zero();
    assert_eq!(queue_zero.transfer(0), (4096, vec![(gpa + 4096, 8192)]));
    queue_zero.complete(0, &[], 0);
    driver.progress();
    assert_eq!(ended(&mut driver), Some((7, 12288)));
}

#[test]
fn a_result_of_more_bytes_than_asked_for_is_an_error() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 7), Some(buffer)).unwrap();
    driver.send();
    device.complete_sqe(ATTACH, 0, 1 << 20);
    assert_eq!(ended(&mut driver), Some((7, EIO)));
}

/// A durable write whose SQE has this result: how it ended, and how many requests queue 0 has got.
fn durable_write_with(res: i32) -> (Option<(u64, i32)>, u16) {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    let buffer = guest.memory.allocate(4096).unwrap();
    let request = Request { write: true, durable: true, ..read(buffer.gpa(), 7) };
    driver.push(&request, Some(buffer)).unwrap();
    driver.send();
    device.complete_sqe(ATTACH, 0, res);
    driver.progress();
    (ended(&mut driver), guest.device_queue_zero().available())
}

#[test]
fn an_error_of_the_storage_is_the_answer_and_the_write_is_not_repeated() {
    for errno in [5, 28, 30, 61] {
        assert_eq!(durable_write_with(-errno), (Some((7, -errno)), 0));
    }
}

#[test]
fn a_request_that_the_ring_or_a_dying_process_failed_goes_over_queue_0() {
    for errno in [4, 11, 12, 14, 125] {
        assert_eq!(durable_write_with(-errno), (None, 1), "{errno}");
    }
}

#[test]
fn requests_go_over_queue_0_while_the_queue_is_attached_and_has_no_ring() {
    let guest = Guest::new();
    let (mut driver, device) = guest.driver();
    driver.want_ring(guest.offer_rings()).unwrap();
    let mut queue_zero = guest.device_queue_zero();
    let mut answered = 0;
    let mut over_queue_zero = |driver: &mut Driver, user_data: u64| {
        let buffer = guest.memory.allocate(4096).unwrap();
        driver.push(&read(buffer.gpa(), user_data), Some(buffer)).unwrap();
        driver.send();
        assert_eq!(queue_zero.available(), answered + 1, "request {user_data}");
        queue_zero.complete(answered, &[], 0);
        answered += 1;
        driver.progress();
        assert_eq!(ended(driver), Some((user_data, 4096)));
    };
    over_queue_zero(&mut driver, 1);
    device.announce(ATTACH, 1, Phase::Open);
    driver.progress();
    // A request that the ring does not answer keeps the driver from acknowledging the drain.
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 2), Some(buffer)).unwrap();
    driver.send();
    device.announce(ATTACH, 1, Phase::Drain);
    driver.progress();
    over_queue_zero(&mut driver, 3);
    device.complete_sqe(ATTACH, 0, 4096);
    driver.progress();
    assert_eq!((ended(&mut driver), device.acknowledged(ATTACH)), (Some((2, 4096)), DRAINED));
    over_queue_zero(&mut driver, 4);
    assert_eq!(device.available(), 2, "nothing is behind ATTACH");
}

#[test]
fn a_driver_asks_for_its_queue_with_a_word_and_a_kick() {
    let guest = Guest::new();
    let (mut driver, device) = running(&guest);
    let _ = device.vring().kick.read();
    driver.detach();
    assert!(device.has_detach_word(ATTACH));
    assert_eq!(device.vring().kick.read().unwrap(), 1);
    assert_eq!(guest.device_queue_zero().available(), 0);
}

#[test]
fn the_limits_of_segments_are_those_of_the_ring() {
    let guest = Guest::new();
    let (mut driver, device) = guest.driver();
    driver.want_ring(guest.offer_rings()).unwrap();
    let limits = SegmentLimits { address_align_bytes: 4, length_align_bytes: 4096, bytes_max: 8192 };
    device.announce_with(ATTACH, 1, Phase::Open, &limits);
    driver.progress();
    let buffer = guest.memory.allocate(16384).unwrap();
    let gpa = buffer.gpa();
    driver.push(&Request { len_bytes: 512, ..read(gpa, 1) }, None).unwrap();
    driver.push(&Request { offset_bytes: 512, ..read(gpa, 2) }, None).unwrap();
    driver.push(&read(gpa + 2, 3), None).unwrap();
    driver.push(&Request { len_bytes: 12288, ..read(gpa + 4, 4) }, None).unwrap();
    driver.send();
    driver.progress();
    assert_eq!(guest.device_queue_zero().available(), 3, "what the ring does not take");
    assert_eq!(device.sqe(ATTACH, 0).1, 8192, "the first part");
    device.complete_sqe(ATTACH, 0, 8192);
    driver.progress();
    assert_eq!(device.sqe(ATTACH, 1).1, 4096);
}

/// An answer to PROBE with rings of at most so many SQ entries.
fn probe_answer(sq_entries_max: u32) -> [u8; ProbeAnswer::BYTES] {
    let answer = ProbeAnswer {
        magic: MAGIC.into(),
        answer_bytes: (ProbeAnswer::BYTES as u32).into(),
        version_min: VERSION.into(),
        version_max: VERSION.into(),
        features: F_DSYNC.into(),
        sq_entries_max: sq_entries_max.into(),
        cq_entries_max: 64.into(),
        page_bytes: 4096.into(),
        address_align_bytes: 4.into(),
        length_align_bytes: 512.into(),
        segment_bytes_max: (1 << 20).into(),
        queue_count: 2.into(),
        ..ProbeAnswer::default()
    };
    answer.to_bytes()
}

#[test]
fn a_driver_takes_a_late_answer_to_probe_and_gives_a_ring_to_a_queue_that_is_in_use() {
    let guest = Guest::new();
    guest.queue_zero.lock().probe(Duration::from_millis(1)).unwrap();
    assert_eq!(guest.queue_zero.device(), (None, true));
    let (mut driver, device) = guest.driver();
    driver.want_ring(guest.rings()).unwrap();
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 7), Some(buffer)).unwrap();
    driver.send();
    assert_eq!((device.available(), driver.is_virtqueue()), (1, true), "requests do not wait for PROBE");
    let mut device = device;
    device.complete(0, &[], 0);
    assert_eq!(ended(&mut driver), Some((7, 4096)));
    let mut queue_zero = guest.device_queue_zero();
    queue_zero.complete(0, &probe_answer(64), 0);
    guest.queue_zero.wait_for_device().unwrap();
    assert_eq!(guest.queue_zero.device().0.map(|device| device.queue_count), Some(2));
    assert_eq!(queue_zero.available(), 2, "EVENT follows PROBE");
    driver.progress();
    assert_eq!((device.available(), driver.is_virtqueue()), (3, false), "ARM and ATTACH");
}

#[test]
fn a_queue_in_use_stays_a_virtqueue_if_the_late_answer_to_probe_offers_no_rings() {
    let guest = Guest::new();
    guest.queue_zero.lock().probe(Duration::from_millis(1)).unwrap();
    let (mut driver, device) = guest.driver();
    driver.want_ring(guest.rings()).unwrap();
    guest.device_queue_zero().complete(0, &[], 2);
    guest.queue_zero.wait_for_device().unwrap();
    driver.progress();
    let buffer = guest.memory.allocate(4096).unwrap();
    driver.push(&read(buffer.gpa(), 7), Some(buffer)).unwrap();
    driver.send();
    assert_eq!((device.available(), driver.is_virtqueue()), (1, true));
}

#[test]
fn a_driver_whose_ring_is_too_large_for_a_device_that_took_over_asks_for_what_that_device_has() {
    let guest = Guest::new();
    let (mut driver, mut device) = guest.driver();
    driver.want_ring(guest.offer_rings()).unwrap();
    assert_eq!(device.sq_entries(ATTACH), 8);
    let free_bytes = guest.memory.free_bytes();
    device.complete_attach(0, ErrorCode::Entries);
    driver.progress();
    let mut queue_zero = guest.device_queue_zero();
    assert_eq!((device.available(), queue_zero.available()), (2, 1), "PROBE, and no ATTACH before its answer");
    queue_zero.complete(0, &probe_answer(4), 0);
    guest.queue_zero.wait_for_device().unwrap();
    driver.progress();
    assert_eq!((device.available(), device.sq_entries(3)), (4, 4));
    assert_eq!(guest.memory.free_bytes(), free_bytes, "the former memory is free again");
    // The same refusal again is final.
    device.complete_attach(2, ErrorCode::Entries);
    driver.progress();
    assert_eq!((device.available(), queue_zero.available()), (4, 2), "no PROBE, only the EVENT of before");
    assert!(driver.is_virtqueue());
    assert_eq!(driver.refused(), Some(ErrorCode::Entries));
}

#[test]
fn a_request_over_queue_0_keeps_to_the_limits_of_the_device() {
    let guest = guest_of(2, 4096);
    let (mut driver, _device) = running(&guest);
    // No slot of the ring reaches this memory.
    let gpa = 64 << 30;
    driver.push(&Request { len_bytes: 12288, ..read(gpa, 7) }, None).unwrap();
    driver.send();
    let mut queue_zero = guest.device_queue_zero();
    assert_eq!(queue_zero.transfer(0), (0, vec![(gpa, 4096), (gpa + 4096, 4096)]));
    queue_zero.complete(0, &[], 0);
    driver.progress();
    assert_eq!((queue_zero.available(), queue_zero.transfer(1)), (2, (8192, vec![(gpa + 8192, 4096)])));
    assert_eq!(ended(&mut driver), None);
    queue_zero.complete(1, &[], 0);
    driver.progress();
    assert_eq!(ended(&mut driver), Some((7, 12288)));
}

#[test]
fn a_queue_whose_server_was_replaced_by_a_server_without_rings_gets_a_ring_from_the_next_server() {
    const UNSUPP: u8 = 2;
    let guest = Guest::new();
    let (mut driver, mut device) = guest.driver();
    let mut queue_zero = guest.device_queue_zero();
    let reap = || guest.queue_zero.lock().reap().unwrap();
    guest.queue_zero.lock().probe(Duration::from_millis(1)).unwrap();
    queue_zero.complete(0, &probe_answer(64), 0);
    reap();
    driver.want_ring(guest.rings()).unwrap();
    assert_eq!((device.available(), queue_zero.available()), (2, 2), "ARM and ATTACH, PROBE and EVENT");
    // The server that takes over knows neither EVENT nor ATTACH.
    device.complete(0, &[], UNSUPP);
    device.complete(1, &[], UNSUPP);
    queue_zero.complete(1, &[], UNSUPP);
    driver.progress();
    reap();
    assert_eq!((device.available(), queue_zero.available()), (2, 2), "the driver does not ask again at once");
    guest.queue_zero.lock().end_wait_for_event();
    reap();
    assert_eq!(queue_zero.available(), 3, "EVENT again");
    // The next server completes the first EVENT at once.
    queue_zero.complete(2, &[1, 0, 0, 0, 0, 0, 0, 0], 0);
    reap();
    driver.progress();
    assert_eq!((device.available(), queue_zero.available()), (4, 4), "ARM and ATTACH again, and the next EVENT");
}

#[test]
fn a_driver_sends_probe_and_event_when_queue_0_has_room_again() {
    let guest = Guest::new();
    let mut queue_zero = guest.device_queue_zero();
    let reap = || guest.queue_zero.lock().reap().unwrap();
    let mut requests = 0;
    while guest.queue_zero.lock().send(&QueueZeroRequest::GetId, None).is_some() {
        requests += 1;
    }
    guest.queue_zero.lock().probe_again();
    assert!(guest.queue_zero.lock().is_probing());
    reap();
    assert_eq!(queue_zero.available(), requests, "there is no room");
    queue_zero.complete(0, &[], 0);
    reap();
    assert_eq!(queue_zero.available(), requests + 1, "PROBE");
    queue_zero.complete(requests, &probe_answer(64), 0);
    reap();
    assert_eq!(queue_zero.available(), requests + 2, "EVENT");
}
