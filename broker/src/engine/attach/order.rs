//! What is asked of the thread that makes rings, and the way there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringpass_guest_abi::attach::Geometry;
use ringpass_guest_abi::epoch::Epoch;
use vmm_sys_util::eventfd::EventFd;

use super::{AttachmentId, LiveRing, Ticket};
use crate::disk::Disk;
use crate::engine::command::Reply;
use crate::vhost_user::DeviceMemory;

/// What the builder is asked for.
#[derive(Debug)]
pub(in crate::engine) enum Order {
    /// Make a ring.
    Build(BuildOrder),
    /// The guest's memory, from now on. If it `loses_some`, `done` is told as soon as no I/O of a ring can land in that any more,
    /// otherwise when rings that run have what is new.
    SetMemory { memory: Arc<DeviceMemory>, loses_some: bool, done: Reply<()> },
    /// The disk of rings that are made from now on. `None`: it is let go when `done` is told, except by rings that are ending.
    SetDisk { disk: Option<Arc<Disk>>, done: Reply<()> },
    /// No queue is attached any more: nothing has to stay pinned.
    Unpin,
}

/// A ring that is to be made.
#[derive(Debug)]
pub(in crate::engine) struct BuildOrder {
    pub(in crate::engine) queue: u16,
    pub(in crate::engine) attachment: AttachmentId,
    pub(in crate::engine) geometry: Geometry,
    pub(in crate::engine) epoch: Epoch,
    /// What completions signal.
    pub(in crate::engine) call: Option<EventFd>,
    pub(in crate::engine) call_generation: u32,
    /// By which the order can be taken back.
    pub(in crate::engine) ticket: Ticket,
}

/// A ring that was made.
#[derive(Debug)]
pub(in crate::engine) struct Built {
    pub(in crate::engine) ring: LiveRing,
    /// The call eventfd that it has.
    pub(in crate::engine) call_generation: u32,
}

/// A way to the builder.
#[derive(Clone, Debug)]
pub(in crate::engine) struct OrderSender {
    notes: Sender<Note>,
    changes: Changes,
    repeated: Arc<Mutex<Repeated>>,
}

/// The builder's end of it.
#[derive(Debug)]
pub(in crate::engine) struct OrderReceiver {
    notes: Receiver<Note>,
    changes: Changes,
    repeated: Arc<Mutex<Repeated>>,
}

/// What is on its way to the builder.
#[derive(Debug)]
enum Note {
    Order(Order),
    /// The order of this queue in [`Repeated`].
    Build(u16),
    /// The one there.
    Unpin,
}

/// Orders that a guest brings about as often as it likes, also while the builder is busy with something that takes long. Each kind
/// is on its way once at most, so that nothing piles up.
#[derive(Debug, Default)]
struct Repeated {
    /// The last one of each queue: a queue that orders a ring has taken back what it ordered before.
    builds: BTreeMap<u16, BuildOrder>,
    unpin: bool,
}

/// Orders on their way that change the guest's memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes(Arc<AtomicUsize>);

impl Changes {
    /// Whether the guest has other memory by now, of which an order tells that is to come. Nothing is read on the strength of
    /// that but the order.
    pub(super) fn are_coming(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// A way to the builder, and its end.
pub(in crate::engine) fn order_channel() -> (OrderSender, OrderReceiver) {
    let ((sender, receiver), changes, repeated) = (channel(), Changes::default(), Arc::default());
    (
        OrderSender { notes: sender, changes: changes.clone(), repeated: Arc::clone(&repeated) },
        OrderReceiver { notes: receiver, changes, repeated },
    )
}

impl OrderSender {
    /// Sends an order. A builder that has ended builds nothing any more: the engine is going.
    pub(in crate::engine) fn send(&self, order: Order) {
        let note = match order {
            Order::Build(order) => {
                let queue = order.queue;
                let former = lock(&self.repeated).builds.insert(queue, order);
                former.is_none().then_some(Note::Build(queue))
            }
            Order::Unpin => {
                let is_ordered = std::mem::replace(&mut lock(&self.repeated).unpin, true);
                (!is_ordered).then_some(Note::Unpin)
            }
            Order::SetMemory { .. } => {
                // Before the order, so that there are never less than none.
                self.changes.0.fetch_add(1, Ordering::Relaxed);
                Some(Note::Order(order))
            }
            Order::SetDisk { .. } => Some(Note::Order(order)),
        };
        if let Some(note) = note {
            let _ = self.notes.send(note);
        }
    }
}

impl OrderReceiver {
    /// The next order, at most for so long.
    pub(in crate::engine) fn next(&self, timeout: Option<Duration>) -> Result<Order, RecvTimeoutError> {
        let note = match timeout {
            Some(timeout) => self.notes.recv_timeout(timeout)?,
            None => self.notes.recv().map_err(|_| RecvTimeoutError::Disconnected)?,
        };
        let order = match note {
            Note::Order(order) => order,
            Note::Build(queue) => {
                let order = lock(&self.repeated).builds.remove(&queue);
                Order::Build(order.expect("it was put there before the note was sent"))
            }
            Note::Unpin => {
                lock(&self.repeated).unpin = false;
                Order::Unpin
            }
        };
        if matches!(order, Order::SetMemory { .. }) {
            self.changes.0.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(order)
    }

    /// Tells of changes that are coming.
    pub(super) fn changes(&self) -> &Changes {
        &self.changes
    }
}

fn lock(repeated: &Mutex<Repeated>) -> MutexGuard<'_, Repeated> {
    repeated.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::gate::tests::geometry;
    use super::*;

    fn build(queue: u16, id: u64) -> BuildOrder {
        BuildOrder {
            queue,
            attachment: AttachmentId(id),
            geometry: geometry(0),
            epoch: Epoch::NONE.next(),
            call: None,
            call_generation: 0,
            ticket: Ticket::default(),
        }
    }

    #[test]
    fn what_a_guest_orders_over_and_over_while_nobody_looks_is_on_its_way_once() {
        let (sender, receiver) = order_channel();
        for id in 0..1000 {
            sender.send(Order::Build(build(1, id)));
            sender.send(Order::Unpin);
            sender.send(Order::Build(build(2, id)));
        }
        let next = || receiver.next(Some(Duration::ZERO));
        assert!(matches!(next(), Ok(Order::Build(BuildOrder { queue: 1, attachment: AttachmentId(999), .. }))));
        assert!(matches!(next(), Ok(Order::Unpin)));
        assert!(matches!(next(), Ok(Order::Build(BuildOrder { queue: 2, attachment: AttachmentId(999), .. }))));
        assert!(matches!(next(), Err(RecvTimeoutError::Timeout)));

        // What comes afterwards is on its way again.
        sender.send(Order::Unpin);
        sender.send(Order::Build(build(1, 1000)));
        assert!(matches!(next(), Ok(Order::Unpin)));
        assert!(matches!(next(), Ok(Order::Build(BuildOrder { queue: 1, attachment: AttachmentId(1000), .. }))));
        assert!(matches!(next(), Err(RecvTimeoutError::Timeout)));
    }
}
