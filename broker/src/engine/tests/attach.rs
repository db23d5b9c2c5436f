//! Queues that become rings, and everything that can happen to them while they are.

use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::attach::AttachPayload;
use ringpass_guest_abi::epoch::driver::State;
use ringpass_guest_abi::probe::{MAGIC, VERSION};
use ringpass_guest_abi::request::{EVENT_QUEUES, ErrorCode, T_ATTACH, T_EVENT, T_PROBE};
use ringpass_restrictions::{Access, BuiltIn};
use ringpass_test_utils::attach::Found;
use ringpass_test_utils::event::Event;
use ringpass_test_utils::vring::DriverVring;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::driver::{PATIENCE, eventfds, setup, vring, wait_readable, wait_until};
use super::rig::{BlockDriver, Options, Rig, contents};
use super::ring_driver::{
    FirstQueue, RingDriver, first_queue_driver, index_of, refused, ring_queue_driver, scribble, try_read, whole,
};
use crate::alone::alone;
use crate::direct::{DirectConfig, SubmissionConfig};
use crate::engine::AttachConfig;
use crate::kernel;
use crate::memory::{IOVA_BASE, Sharing};
use crate::ring::{IoWorkers, SqThreadConfig};
use crate::vhost_user::{Device, DeviceMemory};

pub(super) fn attach_config() -> AttachConfig {
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

fn start(rig: &mut Rig, index: u16, queue: &DriverVring, next_avail: u16) {
    rig.engine.start_queue(index, setup(queue, next_avail, None), eventfds(queue));
    rig.engine.set_enabled(index, true);
}

pub(super) fn first_queue(rig: &mut Rig) -> FirstQueue {
    let queue = driver_queue(rig, 0);
    start(rig, 0, &queue, 0);
    first_queue_driver(queue)
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
    let (answer, status) = first_queue(&mut rig).probe_answer().unwrap();
    assert_eq!(status, 0);
    let device = answer.check().unwrap();
    assert_eq!((answer.magic.get(), device.version, device.queue_count), (MAGIC, VERSION, 3));
    assert_eq!(device.addressing.iova_base, IOVA_BASE);

    let mut plain = Rig::new(Options::default());
    let (answer, status) = first_queue(&mut plain).probe_answer().unwrap();
    assert_eq!((status, answer.magic.get()), (2, u64::from_ne_bytes([0xff; 8])), "nothing but the status is written");
}

#[test]
fn a_queue_becomes_a_ring_of_the_host_and_a_virtqueue_again() {
    for workers in [1, 2] {
        let mut rig = rig(2, workers);
        let mut first = first_queue(&mut rig);
        first.post_event().unwrap();
        let mut driver = attached(&mut rig, 1);
        assert_eq!(driver.epoch(), Some(1));
        assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES);
        verify(&rig, &mut driver, 1);

        first.post_event().unwrap();
        driver.set_detach();
        assert_eq!(first.detach(1).unwrap(), whole(ErrorCode::None));
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
    let _first = first_queue(&mut rig);
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
fn an_event_is_completed_empty_when_its_queue_stops_and_news_are_kept_for_the_next() {
    let mut rig = rig(2, 1);
    let mut first = first_queue(&mut rig);
    first.post_event().unwrap();
    // Behind it: when this is answered, EVENT was taken.
    first.probe().unwrap();
    assert!(first.pending_event().is_some());
    assert_eq!(rig.engine.stop_queue(0), Some(2));
    assert_eq!(first.wait_event().unwrap(), 0);
    let mut driver = attached(&mut rig, 1);
    start(&mut rig, 0, first.vring(), 2);
    first.post_event().unwrap();
    assert_eq!(first.wait_event().unwrap(), EVENT_QUEUES);
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
        (with(&|p| p.version = 1.into()), ErrorCode::Version, 0),
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
fn requests_of_the_interface_are_refused_on_queues_that_they_are_not_for() {
    let mut rig = rig(2, 1);
    let mut first = first_queue(&mut rig);
    assert_eq!(first.detach(0).unwrap(), whole(ErrorCode::Queue));
    assert_eq!(first.detach(2).unwrap(), whole(ErrorCode::Queue));
    let mut driver = ring_driver(&mut rig, 1);
    for kind in [T_PROBE, T_EVENT] {
        let head = driver.send_other(kind, &[]).unwrap();
        assert_eq!(driver.vring().next_used_by_spinning(PATIENCE).unwrap().head, head);
        assert_eq!(driver.other_outcome().unwrap(), whole(ErrorCode::Queue));
    }
    let payload = driver.payload().to_bytes();
    assert_eq!(first.outcome_of(T_ATTACH, &payload).unwrap(), whole(ErrorCode::Queue));
    // Detaching what is not attached does nothing.
    assert_eq!(first.detach(1).unwrap(), whole(ErrorCode::None));
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
fn a_log_ends_rings_before_it_is_in_force_and_they_come_back_after_it() {
    let mut rig = rig(2, 1);
    let mut first = first_queue(&mut rig);
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
fn used_rings_that_have_left_are_not_written_to_and_what_was_pending_is_answered_when_they_are_back() {
    let mut rig = rig(2, 1);
    let mut first = first_queue(&mut rig);
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
    let mut first = first_queue(&mut rig);
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
    alone("engine::tests::attach::an_engine_that_is_dropped_with_a_ring_leaves_no_thread_behind", || {
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
