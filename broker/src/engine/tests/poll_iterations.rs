//! Single poll iterations of a worker that the test runs by hand: in a thread of its own they would be a matter of time.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use nix::libc;

use super::block_driver::BlockDriver;
use super::driver::{wait_readable, wait_until};
use super::rig::{Options, Rig, SECTOR, config, contents};
use crate::engine::Shared;
use crate::engine::attach::Attach;
use crate::engine::command::{Command, CommandReceiver, CommandSender, DiskRelease, WorkerSenders, command_channel};
use crate::engine::execution::bounce::BouncePool;
use crate::engine::execution::slot::Slots;
use crate::engine::poll::PollPolicy;
use crate::engine::reply::{Pending, Reply};
use crate::engine::ring::{self, Ring, RingPolicy};
use crate::engine::vring::Vring;
use crate::engine::worker::{Worker, WorkerParts};

/// Runs `act` with a worker of one queue that has room for `slots_max` requests.
fn by_hand(slots_max: usize, act: impl FnOnce(&mut Rig, &mut Worker<'_>, &CommandSender)) {
    let (sender, commands) = command_channel().unwrap();
    with_worker(commands, Options::default(), slots_max, None, |rig, worker| act(rig, worker, &sender));
}

/// Runs `act` with a worker that obeys `commands` when it is told to.
pub(super) fn with_worker(
    commands: CommandReceiver,
    options: Options,
    slots_max: usize,
    attach: Option<Attach>,
    act: impl FnOnce(&mut Rig, &mut Worker<'_>),
) {
    let mut rig = Rig::without_disk(options);
    let device = config(&rig.options).device;
    let (limits, segments_max) = (device.request_limits(), device.segment_capacity());
    let mut ring = ring::open(64, &RingPolicy::of_this_kernel()).unwrap();
    let mut worker = Worker::new(
        Ring::new(&mut ring).unwrap(),
        WorkerParts {
            number: 0,
            workers: WorkerSenders::new(&Arc::from([])),
            commands,
            vrings: (0..rig.options.queues).map(|index| Vring::new(index, Arc::default())).collect(),
            slots: Slots::new(slots_max, segments_max),
            bounce: BouncePool::new().unwrap(),
            limits,
            poll: PollPolicy::new(Duration::ZERO),
            shared: Arc::new(Shared::new(device, 1)),
            attach,
        },
    );
    act(&mut rig, &mut worker);
}

/// For a command whose answer the test does not read.
pub(super) fn unread<T>() -> Reply<T> {
    sync_channel(1).0
}

/// A driver for the queue, which runs after the next turn.
fn running(rig: &Rig, sender: &CommandSender) -> BlockDriver {
    running_at(rig, sender, 0)
}

/// The same, with its rings where the guest has those of queue `place`.
fn running_at(rig: &Rig, sender: &CommandSender, place: u16) -> BlockDriver {
    let driver = rig.driver(place);
    sender.send(Command::SetMemory { memory: rig.device_memory(), reply: unread() });
    sender.send(Command::SetDisk { disk: rig.open_disk(), reply: unread() });
    sender.send(Command::Start { queue: 0, setup: driver.setup(0, None), eventfds: driver.eventfds() });
    sender.send(Command::SetEnabled { queue: 0, is_enabled: true, reply: unread() });
    driver
}

#[test]
fn a_wake_up_that_comes_after_its_command_was_obeyed_wakes_the_worker_once() {
    by_hand(8, |_, worker, sender| {
        worker.poll_once();
        // Its command was found by polling, before this.
        sender.eventfd().write(1).unwrap();
        worker.sleep();
        worker.poll_once();
        assert!(!wait_readable(sender.eventfd(), Duration::ZERO), "the next sleep would end at once");
    });
}

#[test]
fn a_worker_without_room_for_requests_does_not_stay_awake_for_chains_that_it_cannot_take() {
    by_hand(0, |rig, worker, sender| {
        let mut driver = running(rig, sender);
        driver.add_read(0, 8);
        worker.poll_once();
        assert!(!worker.poll_once(), "there is nothing that it can do");
        assert!(!worker.enable_kicks(), "it would look again at once");
    });
}

#[test]
fn a_turn_looks_at_no_queue_behind_the_last_that_is_started() {
    let (sender, commands) = command_channel().unwrap();
    let options = Options { queues: 256, ..Options::default() };
    with_worker(commands, options, 8, None, |rig, worker| {
        worker.poll_once();
        assert_eq!(worker.queues.in_use(), 0);
        let mut driver = running(rig, &sender);
        worker.poll_once();
        assert_eq!(worker.queues.in_use(), 1);
        driver.add_read(0, 8);
        wait_until("the end of the read", || {
            worker.poll_once();
            driver.poll().is_some()
        });
        let last = rig.driver(1);
        sender.send(Command::Start { queue: 255, setup: last.setup(0, None), eventfds: last.eventfds() });
        worker.poll_once();
        assert_eq!(worker.queues.in_use(), 256);
        sender.send(Command::Stop { queue: 255, reply: unread() });
        worker.poll_once();
        assert_eq!(worker.queues.in_use(), 1);
    });
}

#[test]
fn a_worker_that_waits_for_the_end_of_a_queue_has_nothing_to_do() {
    by_hand(8, |rig, worker, sender| {
        let mut driver = running(rig, sender);
        worker.poll_once();
        driver.add_flush();
        assert!(worker.take(0));
        let (reply, stopped) = sync_channel(1);
        sender.send(Command::Stop { queue: 0, reply });
        worker.obey();
        worker.settle();
        assert!(!worker.take(0));
        assert!(!worker.is_unsettled, "it would look again at once");
        wait_until("the stop", || {
            worker.poll_once();
            stopped.try_recv() == Ok(1)
        });
    });
}

#[test]
fn what_is_under_way_is_logged_where_it_began_also_when_the_next_front_end_keeps_no_log() {
    by_hand(8, |rig, worker, sender| {
        let log = rig.dirty_log();
        sender.send(Command::SetDirtyLog { log: Some(log), reply: unread() });
        let mut driver = running(rig, sender);
        worker.poll_once();
        rig.clear_log();
        let place = driver.place_pages();
        // A flush, which ends on another thread.
        driver.add_flush();
        worker.poll_once();
        sender.send(Command::Abandon);
        sender.send(Command::SetDirtyLog { log: None, reply: unread() });
        wait_until("the end of the flush", || {
            worker.poll_once();
            worker.execution.under_way() == 0
        });
        assert_eq!(driver.poll().expect("the flush has ended").status, 0);
        assert_eq!(rig.marked_pages(), [driver.vring.layout().used_gpa / 4096, place]);
    });
}

#[test]
fn write_zeroes_where_no_hole_can_be_punched_write_zeroes() {
    by_hand(8, |rig, worker, sender| {
        let mut driver = running(rig, sender);
        worker.poll_once();
        driver.add_write_zeroes(8, 8, true);
        assert!(worker.take(0));
        // As if a file system had said so that cannot punch holes.
        worker.execution.completed(0, -libc::EOPNOTSUPP);
        let mut outcome = None;
        wait_until("the end of the request", || {
            worker.poll_once();
            outcome = driver.poll();
            outcome.is_some()
        });
        assert_eq!(outcome.unwrap().status, 0);
        assert_eq!(rig.on_disk(0, 24 * SECTOR), [contents(0, 0, 8), vec![0; 4096], contents(0, 16, 8)].concat());
    });
}

#[test]
fn a_disk_that_comes_before_the_former_one_is_let_go_is_there_afterwards() {
    let (sender, commands) = command_channel().unwrap();
    // Its lock is shared, so it can be had again meanwhile.
    let options = Options { read_only: true, ..Options::default() };
    with_worker(commands, options, 8, None, |rig, worker| {
        let mut former = running(rig, &sender);
        worker.poll_once();
        former.add_read(0, 8);
        assert!(worker.take(0));
        sender.send(Command::Abandon);
        let (reply, let_go) = Pending::new();
        sender.send(Command::ReleaseDisk { reply });
        let mut driver = running_at(rig, &sender, 1);
        worker.obey();
        worker.settle();
        assert!(matches!(let_go.next_while(|| false), Some(DiskRelease::AfterFormerIo)), "the read has not ended");
        driver.add_read(0, 8);
        let mut outcome = None;
        wait_until("the end of the request", || {
            worker.poll_once();
            outcome = driver.poll();
            outcome.is_some()
        });
        assert_eq!(outcome.unwrap().status, 0);
        wait_until("the release of the former disk", || {
            worker.poll_once();
            matches!(let_go.next_while(|| false), Some(DiskRelease::Now(Some(_))))
        });
    });
}
