//! The worker's part in the epochs of an attached queue. The test runs the worker by hand and is the builder itself, so
//! that a ring can be requested, cancelled and claimed at any moment.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;

use super::attach::{attach_config, driver_queue};
use super::driver::{eventfds, recorded_setup, wait_until};
use super::poll_iterations::{unread, with_worker};
use super::rig::{Options, Rig};
use super::ring_driver::{RingDriver, ring_queue_driver, whole};
use crate::engine::attach::{
    Attach, AttachEvent, BuildRequest, BuilderCommand, BuilderReceiver, SharedRings, builder_channel,
};
use crate::engine::command::{Command, CommandSender, WorkerSenders, command_channel};
use crate::engine::reply::Reply;
use crate::engine::worker::Worker;
use crate::ring_host::RingHost;

/// The queue that is attached.
const QUEUE: u16 = 1;
/// After so many the worker has done what it can.
const ITERATIONS: usize = 10;

/// A queue whose ATTACH is pending, its worker, and the builder's end of the commands.
struct Bench<'a, 'ring> {
    rig: &'a mut Rig,
    worker: &'a mut Worker<'ring>,
    commands: &'a CommandSender,
    requests: &'a BuilderReceiver,
    driver: RingDriver,
}

fn with_attached(act: impl FnOnce(Bench<'_, '_>)) {
    let (commands, obeyed) = command_channel().unwrap();
    let (sender, requests) = builder_channel();
    let workers = Arc::new(WorkerSenders::new(&Arc::from([commands.clone()])));
    let rings = Arc::new(SharedRings::new(QUEUE + 1));
    let (host, _events) = RingHost::in_threads(attach_config(), QUEUE + 1).unwrap().open().unwrap();
    let control = host.control().clone();
    let attach = Attach::new(Arc::new(attach_config()), QUEUE + 1, rings, sender, control, workers);
    let options = Options { queues: QUEUE + 1, ..Options::default() };
    with_worker(obeyed, options, 8, Some(attach), |rig, worker| {
        let memory = rig.device_memory();
        commands.send(Command::SetMemory { memory, reply: unread() });
        commands.send(Command::SetDisk { disk: rig.open_disk(), reply: unread() });
        let driver = ring_queue_driver(driver_queue(rig, QUEUE), QUEUE);
        let mut bench = Bench { rig, worker, commands: &commands, requests: &requests, driver };
        bench.start();
        bench.poll();
        let payload = bench.driver.payload().to_bytes();
        bench.driver.send_both(&payload).unwrap();
        act(bench);
    });
}

impl Bench<'_, '_> {
    fn start(&mut self) {
        let (vring, number) = (self.driver.vring(), usize::from(QUEUE));
        let (setup, eventfds) = (recorded_setup(vring, vring.used_idx().unwrap()), eventfds(vring));
        self.commands.send(Command::Start { queue: number, setup, eventfds });
        self.commands.send(Command::SetEnabled { queue: number, is_enabled: true, reply: unread() });
    }

    fn poll(&mut self) {
        for _ in 0..ITERATIONS {
            self.worker.poll_once();
        }
    }

    /// The request for a ring that the worker sends in its next poll iterations.
    fn requested(&mut self) -> BuildRequest {
        self.poll();
        match self.requests.next(Some(Duration::ZERO)) {
            Ok(BuilderCommand::Build(request)) => request,
            other => panic!("no ring was requested: {other:?}"),
        }
    }

    /// The same, and the builder makes the ring by now.
    fn claimed(&mut self) -> BuildRequest {
        let request = self.requested();
        assert!(request.token.claim());
        request
    }

    /// The builder could not make a ring that it claimed.
    fn fail(&self, request: &BuildRequest) {
        let BuildRequest { queue, attachment, .. } = *request;
        let event = AttachEvent::BuildFailed(ErrorCode::Memory);
        self.commands.send(Command::Attachment { queue: queue.into(), attachment, event });
    }

    /// Sends a command, and has the worker do what it can.
    fn send(&mut self, command: impl FnOnce(Reply<()>) -> Command) -> Receiver<()> {
        let (reply, answer) = sync_channel(1);
        self.commands.send(command(reply));
        self.poll();
        answer
    }

    /// The guest's memory is another mapping of it.
    fn change_mapping(&self) {
        self.commands.send(Command::SetMemory { memory: self.rig.device_memory(), reply: unread() });
    }
}

#[test]
fn memory_of_a_ring_that_was_not_claimed_is_left_at_once_and_the_next_ring_is_in_the_new_memory() {
    with_attached(|mut bench| {
        let first = bench.requested();
        bench.change_mapping();
        let left = bench.send(|reply| Command::LeaveFormerMemory { reply });
        assert_eq!(left.try_recv(), Ok(()));
        assert!(!first.token.claim(), "the worker has cancelled it");
        // The driver acknowledges the end of an epoch that never began.
        bench.driver.look().unwrap();
        let second = bench.claimed();
        assert_eq!(second.attachment, first.attachment);
    });
}

#[test]
fn memory_of_a_ring_that_is_being_made_is_left_when_that_has_ended() {
    with_attached(|mut bench| {
        let request = bench.claimed();
        bench.change_mapping();
        let left = bench.send(|reply| Command::LeaveFormerMemory { reply });
        assert!(left.try_recv().is_err(), "its areas are in use");
        bench.fail(&request);
        bench.poll();
        assert_eq!(left.try_recv(), Ok(()));
    });
}

#[test]
fn disabling_a_queue_waits_for_its_ring_and_not_for_a_ring_of_a_front_end_that_is_gone() {
    with_attached(|mut bench| {
        let disable = |reply| Command::SetEnabled { queue: QUEUE.into(), is_enabled: false, reply };
        let request = bench.claimed();
        let disabled = bench.send(disable);
        assert!(disabled.try_recv().is_err(), "its ring is being made");
        bench.fail(&request);
        bench.poll();
        assert_eq!(disabled.try_recv(), Ok(()));
    });
    with_attached(|mut bench| {
        let disable = |reply| Command::SetEnabled { queue: QUEUE.into(), is_enabled: false, reply };
        let _request = bench.claimed();
        bench.commands.send(Command::Abandon);
        bench.commands.send(Command::SetMemory { memory: bench.rig.device_memory(), reply: unread() });
        bench.start();
        bench.poll();
        assert_eq!(bench.send(disable).try_recv(), Ok(()));
    });
}

#[test]
fn a_worker_that_sleeps_reports_at_the_deadline_which_queues_have_not_left_their_rings() {
    with_attached(|mut bench| {
        let _request = bench.claimed();
        let (reply, drained) = sync_channel(1);
        let deadline = Instant::now() + Duration::from_millis(50);
        bench.commands.send(Command::DrainRings { deadline, reply });
        bench.poll();
        assert!(drained.try_recv().is_err(), "the deadline has not come");
        // Nothing but the timer ends this.
        let undrained = loop {
            bench.worker.sleep();
            bench.poll();
            if let Ok(queues) = drained.try_recv() {
                break queues;
            }
        };
        assert!(Instant::now() >= deadline);
        assert_eq!(undrained, [QUEUE]);
    });
}

#[test]
fn a_driver_that_wants_its_queue_back_waits_for_no_ring_that_is_not_begun() {
    with_attached(|mut bench| {
        let request = bench.requested();
        bench.driver.detach().unwrap();
        // The kick comes through the worker's io_uring.
        wait_until("the end of ATTACH", || {
            bench.poll();
            bench.driver.has_attach_ended().unwrap()
        });
        assert!(!request.token.claim(), "the worker has cancelled the ring");
        assert_eq!(bench.driver.wait_attach().unwrap(), whole(ErrorCode::Detached));
    });
}

#[test]
fn a_drain_without_attached_queues_is_answered_at_once() {
    with_attached(|mut bench| {
        let request = bench.claimed();
        bench.fail(&request);
        bench.poll();
        let (reply, drained) = sync_channel(1);
        let deadline = Instant::now() + Duration::from_secs(3600);
        bench.commands.send(Command::DrainRings { deadline, reply });
        bench.poll();
        assert_eq!(drained.try_recv(), Ok(vec![]));
    });
}
