//! Attach requests: what they are answered, and the rings that queues become.

use std::time::Duration;

use ringpass_guest_abi::attach::AttachPayload;
use ringpass_guest_abi::probe::{MAGIC, VERSION};
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode, T_ATTACH, T_EVENT, T_PROBE};
use ringpass_guest_abi::{FixedAddressing, SLOT_SHIFT_MIN};
use ringpass_restrictions::{Access, BuiltIn};
use ringpass_test_utils::attach::Found;
use ringpass_test_utils::vring::DriverVring;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::block_driver::BlockDriver;
use super::driver::{PATIENCE, eventfds, features, recorded_setup, setup, vring, wait_readable, wait_until};
use super::rig::{Options, Rig, contents};
use super::ring_driver::{
    QueueZero, RingDriver, index_of, queue_zero_driver, refused, ring_queue_driver, scribble, whole,
};
use crate::direct::{DirectConfig, SubmissionConfig};
use crate::disk::DirectIo;
use crate::engine::{AttachConfig, RingKind};
use crate::kernel;
use crate::memory::{IOVA_BASE, Sharing};
use crate::ring::{IoWorkers, SqThreadConfig};
use crate::vhost_user::Device;
use crate::virtqueue::QueueSetup;

pub(in crate::engine) fn attach_config() -> AttachConfig {
    let support = kernel::support().unwrap();
    let policy = BuiltIn::Direct(Access::ReadWrite).policy().compile(&support).unwrap();
    let idle = Duration::from_millis(5);
    let direct = DirectConfig {
        submission: SubmissionConfig::SqThread(SqThreadConfig { idle, cpu: None }),
        workers: IoWorkers::default(),
        sharing: Sharing::for_kernel(&support),
    };
    AttachConfig::new(direct, policy).unwrap()
}

pub(super) fn rig(queues: u16, workers: usize) -> Rig {
    Rig::new(Options { queues, workers, attach: Some(attach_config()), ..Options::default() })
}

pub(super) fn driver_queue(rig: &Rig, index: u16) -> DriverVring {
    vring(&rig.ram, index, rig.options.queue_size)
}

pub(super) fn start(rig: &mut Rig, index: u16, queue: &DriverVring, next_avail: u16) {
    rig.engine.start_queue(index, recorded_setup(queue, next_avail), eventfds(queue));
    rig.engine.set_enabled(index, true);
}

/// The driver of queue 0, which runs, after its first news.
pub(super) fn queue_zero(rig: &mut Rig) -> QueueZero {
    let queue = driver_queue(rig, 0);
    start(rig, 0, &queue, 0);
    let mut driver = queue_zero_driver(queue);
    if rig.options.attach.is_some() {
        driver.take_first_event().unwrap();
    }
    driver
}

fn ring_driver(rig: &mut Rig, index: u16) -> RingDriver {
    let queue = driver_queue(rig, index);
    start(rig, index, &queue, 0);
    ring_queue_driver(queue, index)
}

/// A queue whose ring is open.
pub(super) fn attached(rig: &mut Rig, index: u16) -> RingDriver {
    let mut driver = ring_driver(rig, index);
    driver.attach().unwrap();
    driver
}

pub(super) fn verify(rig: &Rig, driver: &mut RingDriver, generation: u64) {
    let sector = 64 * index_of(driver) + 8 * (generation % 8);
    let data = contents(generation, sector, 8);
    driver.write(sector * 512, &data).unwrap();
    assert_eq!(rig.on_disk(sector, 4096), data);
    assert_eq!(driver.read(sector * 512, 4096).unwrap(), data);
}

#[test]
fn a_device_says_what_it_offers_and_one_without_rings_does_not_know_the_question() {
    let mut rig = rig(3, 1);
    let (answer, status) = queue_zero(&mut rig).probe_answer().unwrap();
    assert_eq!(status, 0);
    let device = answer.check().unwrap();
    assert_eq!((answer.magic.get(), device.version, device.queue_count), (MAGIC, VERSION, 3));

    let mut plain = Rig::new(Options::default());
    let (answer, status) = queue_zero(&mut plain).probe_answer().unwrap();
    assert_eq!((status, answer.magic.get()), (2, u64::from_ne_bytes([0xff; 8])), "nothing but the status is written");
}

#[test]
fn a_queue_becomes_a_ring_of_the_host_and_a_virtqueue_again() {
    for workers in [1, 2] {
        let mut rig = rig(2, workers);
        let mut first = queue_zero(&mut rig);
        first.post_event().unwrap();
        let mut driver = attached(&mut rig, 1);
        assert_eq!(driver.epoch(), Some(1));
        // As small as the table of fixed buffers allows.
        assert_eq!(Ok(driver.addressing()), FixedAddressing::new(IOVA_BASE, SLOT_SHIFT_MIN));
        assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES);
        verify(&rig, &mut driver, 1);

        driver.detach().unwrap();
        assert_eq!(driver.wait_attach().unwrap(), whole(ErrorCode::Detached));
        let mut block = BlockDriver::new(1, driver.into_vring());
        assert_eq!(block.read(80, 8).data, rig.on_disk(80, 4096));
    }
}

#[test]
fn completions_interrupt_the_driver_also_through_another_eventfd() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    for round in 0..20 {
        let call = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        rig.engine.set_call(1, Some(call.try_clone().unwrap()));
        assert!(wait_readable(&call, Duration::ZERO), "the new one is signalled once");
        call.read().unwrap();
        driver.read(4096 * round, 4096).unwrap();
        assert!(wait_readable(&call, Duration::from_secs(10)), "a completion signals it");
    }
    // A queue that polls.
    rig.engine.set_call(1, None);
    driver.read(0, 4096).unwrap();
}

#[test]
fn an_event_is_completed_empty_when_its_queue_stops_and_the_first_one_after_a_start_is_news() {
    let mut rig = rig(2, 1);
    let mut first = queue_zero(&mut rig);
    first.post_event().unwrap();
    // Behind it: when this is answered, EVENT was taken.
    first.probe().unwrap();
    assert!(first.pending_event().is_some());
    assert_eq!(rig.engine.stop_queue(0), Some(3));
    assert_eq!(first.wait_event().unwrap(), 0);
    // The device's predecessor may have died before it completed an EVENT.
    start(&mut rig, 0, first.vring(), 3);
    first.take_first_event().unwrap();
    let mut driver = attached(&mut rig, 1);
    first.post_event().unwrap();
    assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES, "the ring is open");
    // One is enough: a second one sends the first back.
    first.post_event().unwrap();
    let earlier = first.pending_event().unwrap();
    first.post_event().unwrap();
    assert_eq!(first.next_used().unwrap().head, earlier);
    driver.read(0, 4096).unwrap();
}

#[test]
fn attachments_that_cannot_be_are_refused_with_the_field_and_leave_a_virtqueue() {
    let mut rig = rig(3, 1);
    let other = attached(&mut rig, 1);
    let mut driver = ring_driver(&mut rig, 2);
    let good = driver.payload();
    let with = |change: &dyn Fn(&mut AttachPayload)| {
        let mut payload = good;
        change(&mut payload);
        payload.to_bytes().to_vec()
    };
    let across_regions = |p: &mut AttachPayload| {
        p.cq_entries = 256.into();
        p.areas[0].rings_gpa = ((16_u64 << 20) - 0x1000).into();
    };
    let long = [with(&|_| {}), vec![0, 1]].concat();
    for (payload, code, field) in [
        (with(&|p| p.version = 2.into()), ErrorCode::Version, 0),
        (with(&|p| p.version = 0.into()), ErrorCode::Version, 0),
        (with(&|p| p.reserved[1] = 1.into()), ErrorCode::Reserved, 2),
        (with(&|p| p.features = (1 << 63).into()), ErrorCode::Features, 8),
        (with(&|p| p.sq_entries = 0.into()), ErrorCode::Entries, 16),
        (with(&|p| p.sq_entries = 48.into()), ErrorCode::Entries, 16),
        (with(&|p| p.cq_entries = 8192.into()), ErrorCode::Entries, 20),
        (with(&|p| p.control_gpa = 0x10.into()), ErrorCode::Alignment, 24),
        (with(&|p| p.areas[0].rings_gpa = (!0xfff).into()), ErrorCode::Range, 32),
        (with(&|p| p.areas[1].sqes_gpa = p.control_gpa), ErrorCode::Overlap, 56),
        (with(&|p| p.areas[1].rings_gpa = (1_u64 << 40).into()), ErrorCode::Memory, 48),
        // Across the boundary of two regions.
        (with(&across_regions), ErrorCode::Memory, 32),
        (with(&|p| p.areas[0].sqes_gpa = other.payload().areas[1].sqes_gpa), ErrorCode::Busy, 40),
        (vec![0; 8], ErrorCode::Length, u32::MAX),
        (vec![0; 5000], ErrorCode::Length, u32::MAX),
        (long, ErrorCode::Reserved, u32::MAX),
    ] {
        let outcome = Found { code: code as u32, field_offset_bytes: field, status: 1 };
        assert_eq!(refused(&mut driver, &payload), outcome, "{code:?}");
    }
    // Not right behind ARM.
    driver.send_attach(&good.to_bytes()).unwrap();
    assert_eq!(driver.wait_attach().unwrap(), whole(ErrorCode::Order));
    let mut block = BlockDriver::new(2, driver.into_vring());
    assert_eq!(block.read(0, 8).data, rig.on_disk(0, 4096));
}

#[test]
fn attach_requests_are_refused_on_queues_that_they_are_not_for() {
    let mut rig = rig(2, 1);
    let mut first = queue_zero(&mut rig);
    let mut driver = ring_driver(&mut rig, 1);
    for kind in [T_PROBE, T_EVENT] {
        let head = driver.send_other(kind, &[]).unwrap();
        assert_eq!(driver.vring().next_used_by_spinning(PATIENCE).unwrap().head, head);
        assert_eq!(driver.other_outcome().unwrap(), whole(ErrorCode::Queue));
    }
    let payload = driver.payload().to_bytes();
    assert_eq!(first.outcome_of(T_ATTACH, &payload).unwrap(), whole(ErrorCode::Queue));
}

#[test]
fn a_driver_gets_its_queue_back_in_every_state_by_a_word_and_a_kick() {
    // A worker that polls hears of kicks, too.
    for poll_time in [Duration::ZERO, Duration::from_secs(3600)] {
        let options = Options { queues: 2, attach: Some(attach_config()), poll_time, ..Options::default() };
        let mut rig = Rig::new(options);
        let mut driver = attached(&mut rig, 1);
        let gets_it_back = |driver: &mut RingDriver| {
            driver.detach().unwrap();
            assert_eq!(driver.wait_attach().unwrap(), whole(ErrorCode::Detached));
        };
        gets_it_back(&mut driver);
        // At the same moment as ATTACH.
        let payload = driver.payload().to_bytes();
        for _ in 0..20 {
            driver.send_both(&payload).unwrap();
            gets_it_back(&mut driver);
        }
        // Without a ring: the driver has not acknowledged the end.
        driver.attach().unwrap();
        rig.engine.set_enabled(1, false);
        rig.engine.set_enabled(1, true);
        assert_eq!(driver.announced() & 3, 3, "the end is announced");
        gets_it_back(&mut driver);
        // Without a ring: the queue is disabled.
        driver.attach().unwrap();
        rig.engine.set_enabled(1, false);
        wait_until("the end of the epoch", || {
            driver.look().unwrap();
            driver.epoch().is_none()
        });
        gets_it_back(&mut driver);
        rig.engine.set_enabled(1, true);
        driver.attach().unwrap();
        verify(&rig, &mut driver, 1);
    }
}

#[test]
fn a_front_end_without_an_in_flight_region_gets_no_rings_and_probe_says_so() {
    let mut rig = rig(2, 1);
    let queues = [0, 1].map(|index| driver_queue(&rig, index));
    for (index, queue) in (0..).zip(&queues) {
        rig.engine.start_queue(index, setup(queue, 0, None), eventfds(queue));
        rig.engine.set_enabled(index, true);
    }
    let [first, second] = queues;
    let (mut first, mut driver) = (queue_zero_driver(first), ring_queue_driver(second, 1));
    assert_eq!(first.probe().unwrap().refusal, Some(Some(ErrorCode::Inflight)));
    let payload = driver.payload().to_bytes();
    assert_eq!(refused(&mut driver, &payload), whole(ErrorCode::Inflight));
    let why = rig.engine.control().rings().unwrap().closed(RingKind::Direct).unwrap().why.clone();
    assert!(why.contains("keeps no in-flight region"), "{why}");

    // The same guest with a front-end that keeps one.
    let bases = [0, 1].map(|index| rig.engine.stop_queue(index).unwrap());
    start(&mut rig, 0, first.vring(), bases[0]);
    start(&mut rig, 1, driver.vring(), bases[1]);
    assert_eq!(first.probe().unwrap().refusal, None);
    driver.attach().unwrap();
    verify(&rig, &mut driver, 1);
}

#[test]
fn drivers_of_legacy_devices_get_no_rings() {
    let mut rig = rig(2, 1);
    let queue = driver_queue(&rig, 0);
    let driver_features = features(&queue, !(1 << VIRTIO_F_VERSION_1));
    let setup = QueueSetup { driver_features, ..recorded_setup(&queue, 0) };
    rig.engine.start_queue(0, setup, eventfds(&queue));
    rig.engine.set_enabled(0, true);
    let (answer, status) = queue_zero_driver(queue).probe_answer().unwrap();
    assert_eq!((status, answer.magic.get()), (2, u64::from_ne_bytes([0xff; 8])), "nothing but the status is written");
}

#[test]
fn the_record_of_a_ring_has_the_limits_of_its_segments() {
    for direct_io in [DirectIo::Off, DirectIo::On] {
        let options = Options { queues: 2, direct_io, attach: Some(attach_config()), ..Options::default() };
        let mut rig = Rig::new(options);
        let offered = queue_zero(&mut rig).probe().unwrap().segments;
        let driver = attached(&mut rig, 1);
        assert_eq!(driver.segments(), Some(offered));
        assert_eq!(offered.length_align_bytes > 1, direct_io == DirectIo::On, "{offered:?}");
    }
}

#[test]
fn something_behind_attach_stops_the_queue_until_it_is_set_up_again() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    driver.send_other(T_PROBE, &[]).unwrap();
    let counters = rig.engine.control().counters()[1].clone();
    wait_until("the stop of the queue", || counters.broken.get() == 1);
    assert_eq!(rig.engine.stop_queue(1), Some(1));
    // A driver that begins again is served.
    let mut driver = attached(&mut rig, 1);
    verify(&rig, &mut driver, 3);
}

#[test]
fn what_a_ring_does_is_counted_from_its_own_words() {
    let mut rig = rig(2, 1);
    let mut driver = attached(&mut rig, 1);
    for _ in 0..10 {
        driver.read(0, 4096).unwrap();
    }
    let control = rig.engine.control();
    let counts = || {
        let counts = control.rings().unwrap().queues[1].counts;
        (counts.submitted, counts.completed)
    };
    assert_eq!(counts(), (10, 10));
    let base = rig.engine.stop_queue(1).unwrap();
    start(&mut rig, 1, driver.vring(), base);
    assert_eq!(counts(), (10, 10), "also when the ring has ended");
    wait_until("the next epoch", || {
        driver.look().unwrap();
        driver.epoch() == Some(2)
    });
    driver.read(0, 4096).unwrap();
    assert_eq!(counts(), (11, 11));
}

#[test]
fn a_driver_that_scribbles_on_its_control_page_harms_itself_only() {
    let mut rig = rig(3, 1);
    let mut good = attached(&mut rig, 1);
    let mut bad = attached(&mut rig, 2);
    for word in 0..2000_u32 {
        scribble(&mut bad, word);
        if word % 100 == 0 {
            verify(&rig, &mut good, u64::from(word));
        }
    }
    assert_eq!(rig.engine.stop_queue(2), Some(1));
    verify(&rig, &mut good, 7);
}
