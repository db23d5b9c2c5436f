//! The thread that makes rings, told by the test in what order things come to it.

use std::sync::Arc;
use std::time::Instant;

use ringpass_guest_abi::attach::{AreaAddress, AttachPayload, Geometry};
use ringpass_guest_abi::epoch::Epoch;

use super::attach::{attach_config, without};
use super::driver::{PATIENCE, wait_until};
use super::rig::{Options, Rig};
use crate::alone::alone;
use crate::engine::attach::{AttachmentId, BuildOrder, Built, Gate, Order, OrderSender, Ticket, WorkerSender, builder};
use crate::engine::command::{AttachEvent, Command, CommandReceiver, Pending, Reply, command_channel};
use crate::limits::Memlock;
use crate::vhost_user::DeviceMemory;

/// The builder, and the worker that hears of it.
struct Bench {
    gate: Arc<Gate>,
    orders: OrderSender,
    worker: CommandReceiver,
    rig: Rig,
}

impl Bench {
    fn new() -> Self {
        // An engine that offers no rings pins nothing.
        let rig = Rig::without_disk(Options::default());
        let (gate, (sender, worker)) = (Arc::new(Gate::new(4)), command_channel().unwrap());
        let workers = WorkerSender::new(&Arc::from([sender]));
        let orders = builder::start(Arc::new(attach_config()), gate.clone(), workers).unwrap();
        let bench = Self { gate, orders, worker, rig };
        let disk = Some(bench.rig.open_disk());
        bench.carried_out(|done| Order::SetDisk { disk, done });
        let memory = bench.rig.ram.device_memory();
        bench.set_memory(memory, false);
        bench
    }

    fn set_memory(&self, memory: Arc<DeviceMemory>, loses_some: bool) {
        self.carried_out(|done| Order::SetMemory { memory, loses_some, done });
    }

    fn carried_out(&self, order: impl FnOnce(Reply<()>) -> Order) {
        let (done, pending) = Pending::new();
        self.orders.send(order(done));
        pending.wait().unwrap();
    }

    /// Has a ring made for a queue that has come.
    fn order(&self, queue: u16, ticket: Ticket) {
        let geometry = geometry(queue);
        self.gate.enter(queue, &geometry).unwrap();
        let order = BuildOrder {
            queue,
            attachment: AttachmentId(queue.into()),
            geometry,
            epoch: Epoch::NONE.next(),
            call: None,
            call_generation: 0,
            ticket,
        };
        self.orders.send(Order::Build(order));
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
        sq_entries: 8.into(),
        cq_entries: 16.into(),
        control_gpa: page(0),
        areas: [1, 3].map(|number| AreaAddress { rings_gpa: page(number), sqes_gpa: page(number + 1) }),
        ..AttachPayload::default()
    };
    payload.check(&config.limits()).unwrap()
}

fn pinned_bytes() -> u64 {
    Memlock::pinned_by_this_process().unwrap()
}

#[test]
fn memory_stays_pinned_for_a_queue_that_comes_while_the_last_one_leaves() {
    alone("engine::tests::builder::memory_stays_pinned_for_a_queue_that_comes_while_the_last_one_leaves", || {
        let bench = Bench::new();
        bench.order(0, Ticket::default());
        let (_, first) = bench.built();
        let (before_bytes, _) = (pinned_bytes(), drop(first));
        // The worker of queue 0 has found that it is the last one, that of queue 1 is quicker with its order.
        assert!(bench.gate.leave(0));
        bench.order(1, Ticket::default());
        bench.orders.send(Order::Unpin);
        let (_, second) = bench.built();
        // Made of what is pinned: there is no second pinning beside it.
        bench.order(2, Ticket::default());
        let (_, third) = bench.built();
        assert_eq!(pinned_bytes(), before_bytes);
        drop((second, third));
        bench.gate.leave(1);
        bench.gate.leave(2);
        bench.orders.send(Order::Unpin);
        wait_until("nothing is pinned", || pinned_bytes() == 0);
    });
}

#[test]
fn memory_that_comes_while_no_queue_is_attached_is_there_for_the_next_one() {
    alone("engine::tests::builder::memory_that_comes_while_no_queue_is_attached_is_there_for_the_next_one", || {
        let bench = Bench::new();
        let whole_memory = bench.rig.ram.device_memory();
        bench.set_memory(without(&whole_memory, 1), true);
        bench.order(0, Ticket::default());
        let (_, first) = bench.built();
        let former_bytes = pinned_bytes();
        // The last queue leaves, and its ring is about to end. Another one comes before what is pinned was let go.
        assert!(bench.gate.leave(0));
        bench.set_memory(whole_memory, false);
        bench.order(1, Ticket::default());
        bench.orders.send(Order::Unpin);
        let (_, second) = bench.built();
        drop(first);
        wait_until("only the second ring's memory is pinned", || pinned_bytes() < 3 * former_bytes);
        assert!(pinned_bytes() >= 2 * former_bytes, "the ring does not have all of the guest's memory");
        drop(second);
    });
}

#[test]
fn an_order_that_was_taken_back_makes_no_ring_and_is_not_answered() {
    let bench = Bench::new();
    let ticket = Ticket::default();
    assert!(ticket.withdraw());
    bench.order(0, ticket);
    bench.order(1, Ticket::default());
    assert_eq!(bench.built().0, 1);
}
