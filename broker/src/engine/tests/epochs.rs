//! The worker's part in the epochs of an attached queue. The worker is run by hand and the test is the builder, so that a ring can
//! be ordered, taken back and begun at any moment.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;

use super::attach::{attach_config, driver_queue};
use super::rig::{Options, Rig};
use super::ring_driver::RingDriver;
use super::turns::{nobody, with_worker};
use crate::engine::attach::{Attach, BuildOrder, Gate, Order, OrderReceiver, WorkerSender, order_channel};
use crate::engine::command::{AttachEvent, Command, CommandSender, Reply, command_channel};
use crate::engine::worker::Worker;

/// The queue that is attached.
const QUEUE: u16 = 1;
/// After so many the worker has done what it can.
const TURNS: usize = 10;

/// A queue with a pending ATTACH, its worker, and who is asked for its rings.
struct Bench<'a, 'ring> {
    rig: &'a mut Rig,
    worker: &'a mut Worker<'ring>,
    commands: &'a CommandSender,
    orders: &'a OrderReceiver,
    driver: RingDriver,
}

fn with_attached(act: impl FnOnce(Bench<'_, '_>)) {
    let (commands, obeyed) = command_channel().unwrap();
    let (sender, orders) = order_channel();
    let workers = WorkerSender::new(&Arc::from([commands.clone()]));
    let attach = Attach::new(Arc::new(attach_config()), QUEUE + 1, Arc::new(Gate::new(QUEUE + 1)), sender, workers);
    let options = Options { queues: QUEUE + 1, ..Options::default() };
    with_worker(obeyed, options, 8, Some(attach), |rig, worker| {
        let memory = rig.ram.device_memory();
        commands.send(Command::SetMemory { memory, reply: nobody() });
        commands.send(Command::SetDisk { disk: rig.open_disk(), reply: nobody() });
        let queue = driver_queue(rig, QUEUE);
        let driver = RingDriver::new(&rig.ram, QUEUE, queue);
        let mut bench = Bench { rig, worker, commands: &commands, orders: &orders, driver };
        bench.start();
        bench.turns();
        bench.driver.attach();
        act(bench);
    });
}

impl Bench<'_, '_> {
    fn start(&self) {
        let (queue, number) = (&self.driver.queue, usize::from(QUEUE));
        let (setup, eventfds) = (queue.setup(queue.used_idx(), None), queue.eventfds());
        self.commands.send(Command::Start { queue: number, setup, eventfds });
        self.commands.send(Command::SetEnabled { queue: number, enabled: true, reply: nobody() });
    }

    fn turns(&mut self) {
        for _ in 0..TURNS {
            self.worker.turn();
        }
    }

    /// The order for a ring that the worker gives in its next turns.
    fn ordered(&mut self) -> BuildOrder {
        self.turns();
        match self.orders.next(Some(Duration::ZERO)) {
            Ok(Order::Build(order)) => order,
            other => panic!("no ring was ordered: {other:?}"),
        }
    }

    /// The same, and by now it is being made.
    fn begun(&mut self) -> BuildOrder {
        let order = self.ordered();
        assert!(order.ticket.begin());
        order
    }

    /// What was begun has come to nothing.
    fn fail(&self, order: &BuildOrder) {
        let BuildOrder { queue, attachment, .. } = *order;
        let event = AttachEvent::BuildFailed(ErrorCode::Memory);
        self.commands.send(Command::Attachment { queue: queue.into(), attachment, event });
    }

    /// Sends a command, and has the worker do what it can.
    fn send(&mut self, command: impl FnOnce(Reply<()>) -> Command) -> Receiver<()> {
        let (reply, answer) = sync_channel(1);
        self.commands.send(command(reply));
        self.turns();
        answer
    }

    /// The guest's memory is another mapping of it.
    fn change_mapping(&self) {
        self.commands.send(Command::SetMemory { memory: self.rig.ram.device_memory(), reply: nobody() });
    }
}

#[test]
fn memory_of_a_ring_that_was_not_begun_is_left_at_once_and_the_next_ring_is_in_the_other() {
    with_attached(|mut bench| {
        let first = bench.ordered();
        bench.change_mapping();
        let left = bench.send(|reply| Command::LeaveFormerMemory { reply });
        assert_eq!(left.try_recv(), Ok(()));
        assert!(!first.ticket.begin(), "it was taken back");
        // The driver acknowledges the end of an epoch that never began.
        bench.driver.look();
        let second = bench.begun();
        assert_eq!(second.attachment, first.attachment);
    });
}

#[test]
fn memory_of_a_ring_that_is_being_made_is_left_when_that_has_ended() {
    with_attached(|mut bench| {
        let order = bench.begun();
        bench.change_mapping();
        let left = bench.send(|reply| Command::LeaveFormerMemory { reply });
        assert!(left.try_recv().is_err(), "its areas are in use");
        bench.fail(&order);
        bench.turns();
        assert_eq!(left.try_recv(), Ok(()));
    });
}

#[test]
fn who_disables_a_queue_waits_for_its_ring_and_not_for_one_of_a_front_end_that_is_gone() {
    with_attached(|mut bench| {
        let disable = |reply| Command::SetEnabled { queue: QUEUE.into(), enabled: false, reply };
        let order = bench.begun();
        let disabled = bench.send(disable);
        assert!(disabled.try_recv().is_err(), "its ring is being made");
        bench.fail(&order);
        bench.turns();
        assert_eq!(disabled.try_recv(), Ok(()));
    });
    with_attached(|mut bench| {
        let disable = |reply| Command::SetEnabled { queue: QUEUE.into(), enabled: false, reply };
        let _order = bench.begun();
        bench.commands.send(Command::Abandon);
        bench.commands.send(Command::SetMemory { memory: bench.rig.ram.device_memory(), reply: nobody() });
        bench.start();
        bench.turns();
        assert_eq!(bench.send(disable).try_recv(), Ok(()));
    });
}
