//! What is asked of the thread that makes rings, and the way there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
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
    /// The guest's memory, from now on. Rings that run have it when `done` is told. If it `loses_some`, no I/O of a ring
    /// can land in that any more by then.
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
    orders: Sender<Order>,
    changes: Changes,
}

/// The builder's end of it.
#[derive(Debug)]
pub(super) struct OrderReceiver {
    orders: Receiver<Order>,
    changes: Changes,
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
pub(super) fn order_channel() -> (OrderSender, OrderReceiver) {
    let ((sender, receiver), changes) = (channel(), Changes::default());
    (OrderSender { orders: sender, changes: changes.clone() }, OrderReceiver { orders: receiver, changes })
}

impl OrderSender {
    /// Sends an order. A builder that has ended builds nothing any more: the engine is going.
    pub(in crate::engine) fn send(&self, order: Order) {
        if matches!(order, Order::SetMemory { .. }) {
            // Before the order, so that there are never less than none.
            self.changes.0.fetch_add(1, Ordering::Relaxed);
        }
        let _ = self.orders.send(order);
    }
}

impl OrderReceiver {
    /// The next order, at most for so long.
    pub(super) fn next(&self, timeout: Option<Duration>) -> Result<Order, RecvTimeoutError> {
        let order = match timeout {
            Some(timeout) => self.orders.recv_timeout(timeout)?,
            None => self.orders.recv().map_err(|_| RecvTimeoutError::Disconnected)?,
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
