//! The thread that pins the guest's memory and makes rings.
//!
//! Pinning takes half a second for each GiB, and making a ring a system call that waits for other rings: neither is for a
//! worker, which executes other queues, nor for the protocol thread, for which the front-end waits. Here one thing happens
//! after the other, so that nothing has to be said about the order of two changes of memory.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;

use super::discards::Discarded;
use super::order::{BuildOrder, Built, Order, OrderReceiver, OrderSender, order_channel};
use super::pinned::{Pinned, refused, regions};
use super::{AttachConfig, Gate, Refused, Ticket, WorkerSender};
use crate::disk::Disk;
use crate::engine::EngineError;
use crate::engine::command::{AttachEvent, Command, Reply};
use crate::engine::thread::AbortOnPanic;
use crate::log_limit::{Cause, LogLimit, LogLimits};
use crate::memory::{MemoryError, RegionConfig};
use crate::ring::{RingEnd, RingError};
use crate::threads::leave_signals_to_others;
use crate::vhost_user::DeviceMemory;

/// How often memory is looked at while it is pinned, and the words of rings that count.
const LOOK: Duration = Duration::from_millis(50);

/// Tells who waits, when it is dropped.
struct Answer(Reply<()>);

impl Drop for Answer {
    fn drop(&mut self) {
        // Nobody waits any more: then nobody has to know.
        let _ = self.0.send(());
    }
}

struct Builder {
    orders: OrderReceiver,
    config: Arc<AttachConfig>,
    gate: Arc<Gate>,
    workers: WorkerSender,
    memory: Option<Arc<DeviceMemory>>,
    disk: Option<Arc<Disk>>,
    pinned: Option<Pinned>,
    /// Rings that are to be made in memory of which an order tells that is to come, by their queue.
    postponed: BTreeMap<u16, BuildOrder>,
    /// Rings over memory that was let go of, which may not have ended.
    ending: Vec<RingEnd>,
    /// What a guest can bring about as often as it likes.
    refusals: LogLimits,
    pinnings: LogLimit,
    discards: LogLimit,
}

/// Starts the thread. It ends when nobody can order anything any more.
pub(in crate::engine) fn start(
    config: Arc<AttachConfig>,
    gate: Arc<Gate>,
    workers: WorkerSender,
) -> Result<OrderSender, EngineError> {
    let (sender, orders) = order_channel();
    thread::Builder::new()
        .name("ring-builder".into())
        .spawn(move || {
            leave_signals_to_others();
            // Queues and the front-end wait for what this thread does.
            let _guard = AbortOnPanic;
            Builder {
                orders,
                config,
                gate,
                workers,
                memory: None,
                disk: None,
                pinned: None,
                postponed: BTreeMap::new(),
                ending: Vec::new(),
                refusals: LogLimits::new(),
                pinnings: LogLimit::new(),
                discards: LogLimit::new(),
            }
            .run();
        })
        .map_err(EngineError::Thread)?;
    Ok(sender)
}

impl Builder {
    fn run(&mut self) {
        loop {
            match self.orders.next(self.pinned.is_some().then_some(LOOK)) {
                Ok(order) => self.carry_out(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if !self.orders.changes().are_coming() {
                std::mem::take(&mut self.postponed).into_values().for_each(|order| self.build(order));
            }
            self.gate.sample();
            self.look_for_discards();
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Build(order) => self.build(order),
            Order::SetMemory { memory, loses_some, done } => self.set_memory(memory, loses_some, Answer(done)),
            Order::SetDisk { disk, done } => {
                let _done = Answer(done);
                self.unpin();
                self.disk = disk;
            }
            // Another queue has come meanwhile, and may have its ring.
            Order::Unpin if self.gate.is_in_use() => {}
            Order::Unpin => self.unpin(),
        }
    }

    fn build(&mut self, order: BuildOrder) {
        if !order.ticket.is_wanted() {
            return;
        }
        if self.orders.changes().are_coming() {
            // What is pinned may lack what the guest has by now.
            return self.postpone(order);
        }
        let prepared = self.prepare(&order.ticket);
        if prepared.is_err() && self.orders.changes().are_coming() {
            // Given up for that: whoever tells of the change may be waiting.
            return self.postpone(order);
        }
        if !order.ticket.begin() {
            return;
        }
        let (queue, attachment) = (order.queue, order.attachment);
        let event = match prepared.and_then(|()| self.make_ring(order)) {
            Ok(built) => AttachEvent::Built(Box::new(built)),
            Err(refused) => {
                if let Some(total) = self.refusals.count(Cause::new(refused.code)) {
                    tracing::warn!(queue, total, "no ring for the queue: {} ({total} so far)", refused.why);
                }
                let code = refused.code;
                self.gate.note_refusal(queue, refused);
                AttachEvent::BuildFailed(code)
            }
        };
        self.workers.send(queue, |queue| Command::Attachment { queue, attachment, event });
    }

    fn postpone(&mut self, order: BuildOrder) {
        // What the queue ordered before it has taken back.
        self.postponed.insert(order.queue, order);
    }

    /// The guest's memory is pinned for the first ring.
    fn prepare(&mut self, ticket: &Ticket) -> Result<(), Refused> {
        if let Some(refused) = self.gate.status().closed {
            return Err(refused);
        }
        if self.pinned.is_none() {
            self.pinned = Some(self.pin(ticket)?);
        }
        Ok(())
    }

    fn make_ring(&mut self, order: BuildOrder) -> Result<Built, Refused> {
        let pinned = self.pinned.as_mut().ok_or_else(|| refused(&MemoryError::NoRegions.into()))?;
        pinned.make_ring(order)
    }

    fn pin(&self, ticket: &Ticket) -> Result<Pinned, Refused> {
        let (Some(memory), Some(disk)) = (&self.memory, &self.disk) else {
            let why = "the device has neither memory nor a disk any more: its front-end is going".into();
            return Err(Refused { code: ErrorCode::Mode, why });
        };
        let changes = self.orders.changes();
        let is_wanted = || ticket.is_wanted() && !changes.are_coming();
        let pinned = Pinned::new(&self.config, disk, memory, &is_wanted)?;
        if let Some(total) = self.pinnings.count() {
            let bytes = pinned.len_bytes();
            tracing::info!(bytes, total, "guest memory is pinned for rings ({total} times so far)");
        }
        Ok(pinned)
    }

    /// Rings that run get the new memory, if they can be changed; otherwise they end, and are made anew over it. If it `loses_some`,
    /// `done` is told before memory that is new is pinned.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>, loses_some: bool, done: Answer) {
        let regions = regions(&memory);
        // An empty table: of a front-end that is gone, which is not answered, and the next one does not wait for its rings; or of one
        // that begins again (SET_OWNER), with no queue started.
        let is_gone = regions.is_empty();
        self.memory = Some(memory);
        if self.pinned.as_ref().is_some_and(|pinned| !pinned.has_open_rings()) {
            // Nothing runs: what is pinned is only in the way.
            self.unpin();
        }
        // What leaves is not looked at any more.
        self.look_for_discards();
        if loses_some || is_gone {
            self.lose(&regions);
        }
        if loses_some {
            // Not here: I/O that hangs would hold up whoever comes next.
            let done = Arc::new(done);
            for end in self.ending.drain(..) {
                // An end that nobody waits for any more never comes, and is not told.
                let done = ManuallyDrop::new(done.clone());
                end.on_end(move || drop(ManuallyDrop::into_inner(done)));
            }
        } else if is_gone {
            self.ending.clear();
        }
        self.gain(&regions);
    }

    /// No ring that runs has what is not among `regions`.
    fn lose(&mut self, regions: &[RegionConfig]) {
        let Some(mut pinned) = self.pinned.take() else { return };
        if pinned.has_lost_all_but(regions) {
            self.pinned = Some(pinned);
        } else {
            self.end_rings(pinned);
        }
    }

    /// Rings that run have `regions`, unless the guest has others by then: pinning takes long, and whoever tells of that may be
    /// waiting.
    fn gain(&mut self, regions: &[RegionConfig]) {
        let Some(mut pinned) = self.pinned.take() else { return };
        let (gate, changes) = (&self.gate, self.orders.changes());
        match pinned.follow(regions, &|| gate.is_in_use() && !changes.are_coming()) {
            Ok(()) => self.pinned = Some(pinned),
            // What is to come goes on from what is pinned.
            Err(RingError::Memory(MemoryError::NotWanted)) if changes.are_coming() => self.pinned = Some(pinned),
            // No queue was attached any more. One that is by now has its memory pinned anew.
            Err(RingError::Memory(MemoryError::NotWanted)) => self.let_go(pinned),
            Err(error) => {
                if self.gate.is_in_use() {
                    tracing::warn!(
                        "rings end, because the guest's memory changed in a way that they cannot follow: {error}"
                    );
                }
                self.end_rings(pinned);
            }
        }
    }

    fn end_rings(&mut self, pinned: Pinned) {
        self.workers.send_to_all(|| Command::EndRings { reason: ErrorCode::Memory });
        self.let_go(pinned);
    }

    /// Nothing stays pinned. A discard that is noticed only now is told; there is no ring to be taken away.
    fn unpin(&mut self) {
        let Some(mut pinned) = self.pinned.take() else { return };
        if let Some(discarded) = pinned.look_for_discards() {
            self.tell(&discarded);
        }
        self.let_go(pinned);
    }

    /// A ring that still runs keeps its memory until it ends.
    fn let_go(&mut self, pinned: Pinned) {
        self.ending.retain(|end| !end.has_ended());
        self.ending.extend(pinned.ends());
    }

    fn look_for_discards(&mut self) {
        let Some(discarded) = self.pinned.as_mut().and_then(|pinned| pinned.look_for_discards()) else { return };
        // First, so that no ring is asked for in between.
        self.gate.note_discard();
        self.tell(&discarded);
        self.workers.send_to_all(|| Command::FinishRings { reason: ErrorCode::Discarded, done: None });
        self.unpin();
    }

    fn tell(&self, discarded: &Discarded) {
        // A guest with a balloon can reset its device as often as it likes.
        if let Some(total) = self.discards.count() {
            tracing::error!(
                bytes = discarded.bytes,
                total,
                "guest memory was discarded while rings had it pinned: data that the guest wrote or read through a ring since \
                 then may be wrong. Direct mode ends, and does not come back before the driver resets the device. A balloon, \
                 free page reporting, virtio-mem and postcopy do this: use a guest without them, or --mode virtqueue \
                 ({total} times so far)"
            );
        }
    }
}
