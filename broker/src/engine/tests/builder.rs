//! The builder, which gets its commands from the test in the order that the test wants.

use std::sync::Arc;
use std::time::Instant;

use ringpass_guest_abi::SLOT_SHIFT_MIN;
use ringpass_guest_abi::attach::{AreaAddress, AttachPayload, Geometry};
use ringpass_guest_abi::epoch::Epoch;
use ringpass_guest_abi::probe::VERSION;

use super::attach::attach_config;
use super::driver::{PATIENCE, wait_until};
use super::rig::{Options, Rig};
use super::ring_memory::without;
use crate::alone::alone;
use crate::engine::attach::{
    AttachEvent, AttachmentId, BuildRequest, BuilderCommand, BuilderSender, Built, CancellationToken, RingKind,
    SharedRings, builder, ring_watch,
};
use crate::engine::command::{Command, CommandReceiver, WorkerSenders, command_channel};
use crate::engine::reply::{Pending, Reply};
use crate::limits::Memlock;
use crate::ring_host::RingHost;
use crate::vhost_user::DeviceMemory;

/// The builder, and the worker that it answers.
struct Bench {
    rings: Arc<SharedRings>,
    commands: BuilderSender,
    worker: CommandReceiver,
    rig: Rig,
}

impl Bench {
    fn new() -> Self {
        // An engine that offers no rings pins nothing.
        let rig = Rig::without_disk(Options::default());
        let (rings, (sender, worker)) = (Arc::new(SharedRings::new(4)), command_channel().unwrap());
        let workers = Arc::new(WorkerSenders::new(&Arc::from([sender])));
        let (host, events) = RingHost::in_threads(attach_config(), 4).unwrap().open().unwrap();
        ring_watch::start(events, rings.clone(), workers.clone()).unwrap();
        let commands = builder::start(host, rings.clone(), workers).unwrap();
        let bench = Self { rings, commands, worker, rig };
        let disk = Some(bench.rig.open_disk());
        bench.carry_out(|done| BuilderCommand::SetDisk { disk, done });
        let memory = bench.rig.device_memory();
        bench.set_memory(memory, false);
        bench
    }

    fn set_memory(&self, memory: Arc<DeviceMemory>, loses_some: bool) {
        self.carry_out(|done| BuilderCommand::SetMemory { memory, loses_some, done });
    }

    /// Sends a command, and waits until the builder has carried it out.
    fn carry_out(&self, command: impl FnOnce(Reply<()>) -> BuilderCommand) {
        let (done, pending) = Pending::new();
        self.commands.send(command(done));
        pending.wait().unwrap();
    }

    /// Attaches a queue, and requests its first ring.
    fn request(&self, queue: u16, token: CancellationToken) {
        let geometry = geometry(queue);
        self.rings.enter(queue, RingKind::Direct, &geometry).unwrap();
        let request = BuildRequest {
            queue,
            attachment: AttachmentId(queue.into()),
            geometry,
            epoch: Epoch::NONE.next(),
            call: None,
            call_generation: 0,
            token,
        };
        self.commands.send(BuilderCommand::Build(request));
    }

    /// The ring that is made next, and its queue.
    fn built(&self) -> (u16, Box<Built>) {
        let start = Instant::now();
        loop {
            match self.worker.next() {
                Some(Command::Attachment { queue, event: AttachEvent::Built(built), .. }) => {
                    return (queue as u16, built);
                }
                Some(other) => panic!("{other:?}"),
                None => std::thread::yield_now(),
            }
            assert!(start.elapsed() < PATIENCE, "no ring is made");
        }
    }
}

/// Areas in pages of the queue's own.
fn geometry(queue: u16) -> Geometry {
    let config = attach_config();
    let page = |number: u64| ((1 << 20) * u64::from(queue + 1) + 4096 * number).into();
    let payload = AttachPayload {
        version: VERSION.into(),
        sq_entries: 8.into(),
        cq_entries: 16.into(),
        control_gpa: page(0),
        areas: [1, 3].map(|number| AreaAddress { rings_gpa: page(number), sqes_gpa: page(number + 1) }),
        ..AttachPayload::default()
    };
    payload.check(&config.limits(SLOT_SHIFT_MIN)).unwrap()
}

fn pinned_bytes() -> u64 {
    Memlock::pinned_by_this_process().unwrap()
}

#[test]
fn memory_stays_pinned_for_a_queue_that_comes_while_the_last_one_leaves() {
    alone("engine::tests::builder::memory_stays_pinned_for_a_queue_that_comes_while_the_last_one_leaves", || {
        let bench = Bench::new();
        bench.request(0, CancellationToken::default());
        let (_, first) = bench.built();
        let (before_bytes, _) = (pinned_bytes(), drop(first));
        // The worker of queue 0 has found that its queue is the last one. The worker of queue 1 sends its command
        // first.
        assert!(bench.rings.leave(0));
        bench.request(1, CancellationToken::default());
        bench.commands.send(BuilderCommand::Unpin);
        let (_, second) = bench.built();
        // The rings use the memory that is pinned: no second pinning is beside it.
        bench.request(2, CancellationToken::default());
        let (_, third) = bench.built();
        assert_eq!(pinned_bytes(), before_bytes);
        drop((second, third));
        bench.rings.leave(1);
        bench.rings.leave(2);
        bench.commands.send(BuilderCommand::Unpin);
        wait_until("nothing is pinned", || pinned_bytes() == 0);
    });
}

#[test]
fn memory_that_comes_while_no_queue_is_attached_is_there_for_the_next_one() {
    alone("engine::tests::builder::memory_that_comes_while_no_queue_is_attached_is_there_for_the_next_one", || {
        let bench = Bench::new();
        let whole_memory = bench.rig.device_memory();
        bench.set_memory(without(&whole_memory, 1), true);
        bench.request(0, CancellationToken::default());
        let (_, first) = bench.built();
        let former_bytes = pinned_bytes();
        // The last queue leaves, and its ring is about to end. Another queue comes before the builder has released the
        // memory.
        assert!(bench.rings.leave(0));
        bench.set_memory(whole_memory, false);
        bench.request(1, CancellationToken::default());
        bench.commands.send(BuilderCommand::Unpin);
        let (_, second) = bench.built();
        drop(first);
        wait_until("only the second ring's memory is pinned", || pinned_bytes() < 3 * former_bytes);
        assert!(pinned_bytes() >= 2 * former_bytes, "the ring does not have all of the guest's memory");
        drop(second);
    });
}

#[test]
fn a_request_that_was_cancelled_makes_no_ring_and_is_not_answered() {
    let bench = Bench::new();
    let token = CancellationToken::default();
    assert!(token.cancel());
    bench.request(0, token);
    bench.request(1, CancellationToken::default());
    assert_eq!(bench.built().0, 1);
}
