//! What a front-end may do to queues that run, and what becomes of queues that break.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{TryRecvError, sync_channel};
use std::time::Duration;

use ringpass_test_utils::descriptor::Descriptor;
use ringpass_test_utils::event::Event;
use ringpass_test_utils::ram::Ram;
use rustix::event::EventfdFlags;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::block_driver::BlockDriver;
use super::driver::{PATIENCE, device_memory, wait_readable, wait_until};
use super::rig::{Options, RAM_BYTES, Rig, SPARE_GPA, content, contents};
use crate::engine::command::Command;
use crate::vhost_user::Device;
use crate::virtio_blk::GuestError;
use crate::virtqueue::{InflightFile, InflightRegion, SplitQueue};

/// Reads at depth 8 and checks the content until it is told to end; `ended` counts what was read.
fn read_until(driver: &mut BlockDriver, end: &AtomicBool, ended: &AtomicU32) {
    let mut sent = 0;
    let mut sectors = HashMap::new();
    while !(end.load(Ordering::Relaxed) && driver.depth() == 0) {
        while !end.load(Ordering::Relaxed) && driver.depth() < 8 {
            let sector = sent * 8 % 16_000;
            sectors.insert(driver.add_read(sector, 8), sector);
            sent += 1;
        }
        if driver.depth() == 0 {
            break;
        }
        let outcome = driver.wait();
        assert_eq!(outcome.status, 0);
        assert_eq!(outcome.data, contents(0, sectors[&outcome.head], 8));
        ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// Does something to the engine again and again while a driver reads.
fn under_load(options: Options, by_interrupt: bool, rounds: u32, mut act: impl FnMut(&mut Rig, u32)) {
    let mut rig = Rig::new(options);
    let mut driver = rig.driver(0);
    driver.by_interrupt = by_interrupt;
    driver.vring.set_event_idx(true);
    rig.start(&driver);
    let end = AtomicBool::new(false);
    let ended = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_until(&mut driver, &end, &ended));
        // The rounds may be over sooner than a thread begins.
        while ended.load(Ordering::Relaxed) == 0 && !reader.is_finished() {
            std::thread::yield_now();
        }
        for round in 0..rounds {
            act(&mut rig, round);
        }
        end.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

#[test]
fn memory_tables_can_be_exchanged_under_load() {
    under_load(Options::default(), false, 500, |rig, _| {
        // The same memory, mapped anew: the old mapping goes as soon as nothing under way needs it.
        rig.engine.set_memory(rig.device_memory());
    });
}

#[test]
fn a_queue_can_be_disabled_and_enabled_under_load() {
    for poll_us in [0, 32] {
        let options = Options { poll_time: Duration::from_micros(poll_us), ..Options::default() };
        under_load(options, true, 500, |rig, _| {
            rig.engine.set_enabled(0, false);
            rig.engine.set_enabled(0, true);
        });
    }
}

#[test]
fn a_disabled_queue_takes_nothing() {
    let mut rig = Rig::new(Options::default());
    let mut driver = rig.running(0);
    rig.engine.set_enabled(0, false);
    driver.add_read(0, 8);
    driver.vring.kick().unwrap();
    rig.engine.set_enabled(0, false);
    assert_eq!(driver.poll(), None);
    rig.engine.set_enabled(0, true);
    assert_eq!(driver.wait().data, contents(0, 0, 8));
}

#[test]
fn the_call_eventfd_can_change_under_load_and_no_interrupt_is_lost() {
    let mut rig = Rig::new(Options { poll_time: Duration::ZERO, ..Options::default() });
    let mut driver = rig.driver(0);
    driver.by_interrupt = true;
    rig.start(&driver);
    for round in 0..200 {
        driver.add_read(round * 8, 8);
        driver.kick();
        let call = Event::new().unwrap();
        rig.engine.set_call(0, Some(call.to_eventfd().unwrap()));
        // From now on the driver listens to the new one only.
        driver.vring.eventfds().set_call(call);
        assert_eq!(driver.wait().data, contents(0, round * 8, 8));
    }
}

#[test]
fn the_kick_eventfd_can_change_and_no_kick_is_lost() {
    let mut rig = Rig::new(Options { poll_time: Duration::ZERO, ..Options::default() });
    let mut driver = rig.running(0);
    for round in 0..200 {
        let kick = Event::new().unwrap();
        rig.engine.set_kick(0, Some(kick.to_eventfd().unwrap()));
        driver.vring.eventfds().set_kick(kick);
        assert_eq!(driver.read(round * 8, 8).data, contents(0, round * 8, 8));
    }
}

#[test]
fn kicks_with_nothing_available_are_harmless() {
    let mut rig = Rig::new(Options { poll_time: Duration::ZERO, ..Options::default() });
    let mut driver = rig.running(0);
    let counters = rig.engine.control().counters()[0].clone();
    for round in 0..100 {
        driver.vring.kick().unwrap();
        wait_until("the kick", || counters.kicks.get() > round);
    }
    assert_eq!(driver.read(0, 8).data, contents(0, 0, 8));
}

/// Reading such an eventfd takes one from its count at a time, and it stays readable.
#[test]
fn a_semaphore_with_a_huge_count_as_kick_does_not_keep_the_worker_busy() {
    let mut rig = Rig::new(Options { poll_time: Duration::ZERO, ..Options::default() });
    let mut driver = rig.driver(0);
    let kick = Event::with_flags(EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE).unwrap();
    kick.add(1 << 40).unwrap();
    driver.vring.eventfds().set_kick(kick);
    rig.start(&driver);
    let counters = rig.engine.control().counters()[0].clone();
    for round in 0..300 {
        assert_eq!(driver.read(round * 8, 8).data, contents(0, round * 8, 8));
    }
    let kicks = counters.kicks.get();
    std::thread::sleep(Duration::from_millis(100));
    let since = counters.kicks.get() - kicks;
    assert!(since <= 2, "{since} kicks without any");
    // And none is lost.
    for round in 0..300 {
        assert_eq!(driver.read(round * 8, 8).data, contents(0, round * 8, 8));
    }
}

#[test]
fn a_queue_without_call_and_kick_eventfds_is_polled() {
    let mut rig = Rig::new(Options { poll_time: Duration::ZERO, ..Options::default() });
    let mut driver = rig.driver(0);
    rig.engine.start_queue(0, driver.setup(0, None), Default::default());
    rig.engine.set_enabled(0, true);
    for sector in 0..100 {
        driver.add_read(sector, 1);
        // No kick.
        assert_eq!(driver.vring.next_used_by_spinning(PATIENCE).unwrap().len_bytes, 513);
    }
    assert_eq!(rig.engine.stop_queue(0), Some(100));
}

#[test]
fn a_broken_queue_stops_alone_and_says_so() {
    type Break = fn(&mut BlockDriver);
    let breaks: [(&str, Break); 3] = [
        ("an available index beyond the ring", |driver| driver.vring.write_avail_idx(5000).unwrap()),
        ("a head outside of the table", |driver| {
            driver.vring.add_head(0x4000).unwrap();
            driver.vring.publish_quietly().unwrap();
        }),
        ("a chain without a byte for the status", |driver| {
            driver.vring.add(&[Descriptor::readable(SPARE_GPA, 16)]).unwrap();
            driver.vring.publish_quietly().unwrap();
        }),
    ];
    for (what, break_queue) in breaks {
        let mut rig = Rig::new(Options { queues: 2, poll_time: Duration::ZERO, ..Options::default() });
        let (mut bad, mut good) = (rig.driver(0), rig.running(1));
        let err = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut eventfds = bad.eventfds();
        eventfds.err = Some(err.try_clone().unwrap());
        rig.engine.start_queue(0, bad.setup(0, None), eventfds);
        rig.engine.set_enabled(0, true);
        assert_eq!(bad.read(0, 1).data, content(0, 0));
        break_queue(&mut bad);
        bad.vring.kick().unwrap();
        assert!(wait_readable(&err, PATIENCE), "{what}: the error eventfd is signalled");
        assert_eq!(good.read(8, 8).data, contents(0, 8, 8), "{what}: the other queue goes on");
        let control = rig.engine.control();
        assert_eq!(control.counters()[0].broken.get(), 1, "{what}");
        let errors = control.guest_errors();
        assert_eq!(errors.count(GuestError::BrokenRing) + errors.count(GuestError::MalformedChain), 1, "{what}");
        // The driver resets the queue, and all is well again.
        rig.engine.stop_queue(0);
        let mut bad = rig.running(0);
        assert_eq!(bad.read(0, 1).data, content(0, 0), "{what}: after a new start");
    }
}

#[test]
fn rings_outside_of_memory_signal_the_error_eventfd() {
    let mut rig = Rig::new(Options::default());
    let driver = rig.driver(0);
    let mut setup = driver.setup(5, None);
    setup.avail_ring = vm_memory::GuestAddress(RAM_BYTES);
    let err = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut eventfds = driver.eventfds();
    eventfds.err = Some(err.try_clone().unwrap());
    rig.engine.start_queue(0, setup, eventfds);
    assert!(wait_readable(&err, PATIENCE));
    assert_eq!(rig.engine.stop_queue(0), Some(5));
}

#[test]
fn a_queue_whose_rings_are_not_in_memory_for_a_while_goes_on_when_they_come_back() {
    let mut rig = Rig::new(Options { queues: 2, poll_time: Duration::ZERO, ..Options::default() });
    let (mut one, mut two) = (rig.running(0), rig.running(1));
    assert_eq!(two.read(0, 1).data, content(0, 0));
    // The rings of the second queue are not in what is left.
    let small = Ram::in_two_regions(RAM_BYTES / 64).unwrap();
    rig.engine.set_memory(device_memory(&small));
    two.add_read(8, 8);
    two.vring.kick().unwrap();
    // Answered by the worker, after it has had every chance to look at the queue.
    rig.engine.set_enabled(1, true);
    rig.engine.set_enabled(1, true);
    assert_eq!(two.poll(), None);
    rig.engine.set_memory(rig.device_memory());
    assert_eq!(two.wait().data, contents(0, 8, 8));
    assert_eq!(one.read(0, 1).data, content(0, 0));
    let control = rig.engine.control();
    assert_eq!([0, 1].map(|queue| control.counters()[queue].broken.get()), [0, 0]);
}

#[test]
fn a_queue_whose_rings_are_not_in_memory_can_be_stopped() {
    let mut rig = Rig::new(Options { queues: 2, ..Options::default() });
    let mut two = rig.running(1);
    assert_eq!(two.read(0, 1).data, content(0, 0));
    let small = Ram::in_two_regions(RAM_BYTES / 64).unwrap();
    rig.engine.set_memory(device_memory(&small));
    assert_eq!(rig.engine.stop_queue(1), Some(1));
}

fn region(file: &InflightFile) -> InflightRegion {
    InflightRegion::from_fd(file.fd.try_clone().unwrap(), 0, file.size_bytes, 1, 256).unwrap()
}

#[test]
fn a_stop_is_answered_when_what_an_earlier_process_had_taken_is_executed() {
    // It may be told to stop before or after it was set up, and before the disk is there.
    for (has_disk, is_set_up) in [(true, true), (true, false), (false, false)] {
        let mut rig = Rig::without_disk(Options::default());
        let disk = rig.open_disk();
        if has_disk {
            rig.engine.control().set_disk(&disk);
        }
        let mut driver = rig.driver(0);
        let file = InflightRegion::create(1, rig.options.queue_size).unwrap();
        for sector in [0, 8, 16] {
            driver.add_write(sector, &contents(1, sector, 8));
        }
        let memory = rig.device_memory();
        let mut killed = SplitQueue::new(driver.setup(0, region(&file).queue(0)), &memory).unwrap();
        while killed.pop_recorded(&memory).unwrap().is_some() {}
        drop(killed);
        // What no process has taken yet.
        driver.add_write(24, &contents(1, 24, 8));

        // It is not even enabled: a front-end disables a queue before it stops it.
        rig.engine.start_queue(0, driver.setup(0, region(&file).queue(0)), driver.eventfds());
        if is_set_up {
            rig.engine.set_enabled(0, false);
            rig.engine.set_enabled(0, false);
        }
        let (reply, answer) = sync_channel(1);
        rig.engine.control().send(0, |queue| Command::Stop { queue, reply });
        if !has_disk {
            rig.engine.set_enabled(0, false);
            rig.engine.set_enabled(0, false);
            assert_eq!(answer.try_recv(), Err(TryRecvError::Empty), "the disk is not there yet");
            assert_eq!(driver.poll(), None);
            rig.engine.control().set_disk(&disk);
        }
        assert_eq!(answer.recv(), Ok(3));
        for _ in 0..3 {
            assert_eq!(driver.poll().expect("a request that has ended").status, 0);
        }
        assert_eq!(driver.poll(), None);
        assert_eq!(rig.on_disk(0, 32 * 512), [contents(1, 0, 24), contents(0, 24, 8)].concat());
    }
}

#[test]
fn a_front_end_that_vanishes_under_load_and_comes_back_loses_nothing() {
    let mut rig = Rig::new(Options::default());
    let file = InflightRegion::create(1, rig.options.queue_size).unwrap();
    let mut driver = rig.driver(0);
    let mut sectors = HashMap::new();
    let mut next = 0;
    for round in 0..50 {
        let (ram, inflight) = (rig.device_memory(), region(&file).queue(0));
        rig.engine.set_memory(ram);
        // The index is what a front-end guesses that knows nothing: the in-flight region knows better.
        let guess = driver.vring.used_idx().unwrap();
        rig.engine.start_queue(0, driver.setup(guess, inflight), driver.eventfds());
        rig.engine.set_enabled(0, true);
        for _ in 0..40 {
            while driver.depth() < 16 {
                let (sector, data) = (next % 1000 * 16, contents(next, next % 1000 * 16, 8));
                sectors.insert(driver.add_write(sector, &data), (sector, data));
                next += 1;
            }
            let outcome = driver.wait();
            assert_eq!(outcome.status, 0, "round {round}");
            sectors.remove(&outcome.head).expect("an outstanding request");
        }
        // With requests outstanding, some of them under way.
        rig.engine.abandon();
    }
    let inflight = region(&file).queue(0);
    rig.engine.set_memory(rig.device_memory());
    rig.engine.start_queue(0, driver.setup(0, inflight), driver.eventfds());
    rig.engine.set_enabled(0, true);
    while driver.depth() > 0 {
        let outcome = driver.wait();
        assert_eq!(outcome.status, 0);
        let (sector, data) = sectors.remove(&outcome.head).expect("an outstanding request");
        assert_eq!(rig.on_disk(sector, 8 * 512), data, "sector {sector}");
    }
    assert_eq!(driver.poll(), None, "nothing is completed twice");
}

#[test]
fn reset_stops_all_queues_and_forgets_what_the_driver_chose() {
    let mut rig = Rig::new(Options { queues: 2, ..Options::default() });
    let features = rig.engine.device_features();
    rig.engine.set_driver_features(features);
    rig.engine.write_config(32, &[0]).unwrap();
    assert_eq!(rig.engine.config_space()[32], 0, "write-through");
    let (mut one, two) = (rig.running(0), rig.running(1));
    assert_eq!(one.write_data(0, &[1; 512]).status, 0);
    rig.engine.reset();
    one.add_read(0, 1);
    one.vring.kick().unwrap();
    rig.engine.set_enabled(0, true);
    assert_eq!(one.poll(), None, "the queue has stopped");
    assert_eq!(rig.engine.config_space()[32], 1, "write-back");
    drop((one, two));
    let mut one = rig.running(0);
    assert_eq!(one.read(0, 1).data, [1; 512], "the memory table is still in force");
}

#[test]
fn eventfds_that_block_do_not_block_the_engine() {
    let mut rig = Rig::new(Options { poll_time: Duration::ZERO, ..Options::default() });
    let mut driver = rig.driver(0);
    let blocking = || Event::with_flags(EventfdFlags::empty()).unwrap();
    driver.vring.eventfds().set_kick(blocking());
    driver.vring.eventfds().set_call(blocking());
    rig.start(&driver);
    driver.by_interrupt = true;
    for sector in 0..50 {
        assert_eq!(driver.read(sector, 1).data, content(0, sector));
    }
    // A counter that takes no more: nothing reads this eventfd.
    let full = blocking();
    full.add(u64::MAX - 1).unwrap();
    rig.engine.set_call(0, Some(full.to_eventfd().unwrap()));
    driver.by_interrupt = false;
    driver.vring.want_interrupts(true).unwrap();
    for sector in 0..50 {
        assert_eq!(driver.read(sector, 1).data, content(0, sector));
    }
    assert_eq!(rig.engine.stop_queue(0), Some(100));
}
