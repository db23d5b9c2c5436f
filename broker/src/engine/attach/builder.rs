//! The thread that pins the guest's memory and makes rings.
//!
//! Pinning takes half a second for each GiB, and making a ring a system call that waits for other rings: neither is for a
//! worker, which executes other queues, nor for the protocol thread, for which the front-end waits. Here one thing happens
//! after the other, so that nothing has to be said about the order of two changes of memory.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use ringpass_guest_abi::attach::Geometry;
use ringpass_guest_abi::epoch::Epoch;
use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::discards::Discarded;
use super::pinned::{Pinned, refused, regions};
use super::{AttachConfig, AttachmentId, Gate, LiveRing, Refused, Ticket, WorkerSender};
use crate::disk::Disk;
use crate::engine::EngineError;
use crate::engine::command::{AttachEvent, Command, Reply};
use crate::engine::thread::AbortOnPanic;
use crate::log_limit::LogLimit;
use crate::memory::MemoryError;
use crate::ring::RingEnd;
use crate::threads::leave_signals_to_others;
use crate::vhost_user::DeviceMemory;

/// How often memory is looked at while it is pinned, and the words of rings that count.
const LOOK: Duration = Duration::from_millis(50);

/// What the builder is asked for.
#[derive(Debug)]
pub(in crate::engine) enum Order {
    /// Make a ring.
    Build(BuildOrder),
    /// The guest's memory, from now on. Rings that run have it when `done` is told. If it `loses_some`, no I/O of a ring
    /// can land in that any more by then.
    SetMemory { memory: Arc<DeviceMemory>, loses_some: bool, done: Reply<()> },
    /// The disk of rings that are made from now on. `None`: it is let go when `done` is told. No ring may run.
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

/// Tells who waits, when it is dropped.
struct Answer(Reply<()>);

impl Drop for Answer {
    fn drop(&mut self) {
        // Nobody waits any more: then nobody has to know.
        let _ = self.0.send(());
    }
}

struct Builder {
    config: Arc<AttachConfig>,
    gate: Arc<Gate>,
    workers: WorkerSender,
    memory: Option<Arc<DeviceMemory>>,
    disk: Option<Arc<Disk>>,
    pinned: Option<Pinned>,
    /// Rings over memory that was let go of, which may not have ended.
    ending: Vec<RingEnd>,
    /// What a guest can bring about as often as it likes.
    refusals: LogLimit,
    pinnings: LogLimit,
    discards: LogLimit,
}

/// Starts the thread. It ends when nobody can order anything any more.
pub(in crate::engine) fn start(
    config: Arc<AttachConfig>,
    gate: Arc<Gate>,
    workers: WorkerSender,
) -> Result<Sender<Order>, EngineError> {
    let (sender, orders) = channel();
    thread::Builder::new()
        .name("ring-builder".into())
        .spawn(move || {
            leave_signals_to_others();
            // Queues and the front-end wait for what this thread does.
            let _guard = AbortOnPanic;
            Builder {
                config,
                gate,
                workers,
                memory: None,
                disk: None,
                pinned: None,
                ending: Vec::new(),
                refusals: LogLimit::new(),
                pinnings: LogLimit::new(),
                discards: LogLimit::new(),
            }
            .run(&orders);
        })
        .map_err(EngineError::Thread)?;
    Ok(sender)
}

impl Builder {
    fn run(&mut self, orders: &Receiver<Order>) {
        loop {
            let order = if self.pinned.is_some() {
                orders.recv_timeout(LOOK)
            } else {
                orders.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match order {
                Ok(order) => self.carry_out(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.gate.sample();
            self.look_for_discards();
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Build(order) if !order.ticket.is_wanted() => {}
            Order::Build(order) => {
                let (queue, attachment) = (order.queue, order.attachment);
                let pinned = self.pinned(&order.ticket);
                if !order.ticket.begin() {
                    return;
                }
                let event = match pinned.and_then(|pinned| pinned.make_ring(order)) {
                    Ok(built) => AttachEvent::Built(Box::new(built)),
                    Err(refused) => {
                        if let Some(total) = self.refusals.count() {
                            tracing::warn!(queue, total, "no ring for the queue: {} ({total} so far)", refused.why);
                        }
                        let code = refused.code;
                        self.gate.note_refusal(queue, refused);
                        AttachEvent::BuildFailed(code)
                    }
                };
                self.workers.send(queue, |queue| Command::Attachment { queue, attachment, event });
            }
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

    /// What makes rings; the guest's memory is pinned for the first of them.
    fn pinned(&mut self, ticket: &Ticket) -> Result<&mut Pinned, Refused> {
        if let Some(refused) = self.gate.status().closed {
            return Err(refused);
        }
        if self.pinned.is_none() {
            self.pinned = Some(self.pin(ticket)?);
        }
        // It is there now.
        self.pinned.as_mut().ok_or_else(|| refused(&MemoryError::NoRegions.into()))
    }

    fn pin(&self, ticket: &Ticket) -> Result<Pinned, Refused> {
        let (Some(memory), Some(disk)) = (&self.memory, &self.disk) else {
            let why = "the device has neither memory nor a disk any more: its front-end is going".into();
            return Err(Refused { code: ErrorCode::Mode, why });
        };
        let pinned = Pinned::new(&self.config, disk, memory, ticket)?;
        if let Some(total) = self.pinnings.count() {
            let bytes = pinned.len_bytes();
            tracing::info!(bytes, total, "guest memory is pinned for rings ({total} times so far)");
        }
        Ok(pinned)
    }

    /// Rings that run get the new memory, if they can be changed; otherwise they end, and are made anew over it.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>, loses_some: bool, done: Answer) {
        let regions = regions(&memory);
        // A front-end that is gone is not answered, and the next one does not wait for its rings.
        let is_gone = regions.is_empty();
        self.memory = Some(memory);
        if self.pinned.as_ref().is_some_and(|pinned| !pinned.has_open_rings()) {
            // Nothing runs: what is pinned is only in the way.
            self.unpin();
        }
        // What leaves is not looked at any more.
        self.look_for_discards();
        if let Some(mut pinned) = self.pinned.take() {
            if pinned.has_followed(&regions, loses_some, &self.gate) {
                self.pinned = Some(pinned);
            } else {
                self.workers.send_to_all(|| Command::EndRings { reason: ErrorCode::Memory });
                self.let_go(pinned);
            }
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
