//! Queues that become rings: the device's side of `docs/abi.md`.
//!
//! A driver asks for a ring on an ordinary virtqueue, so it is the worker of that queue who hears of it and who runs the
//! queue's epoch machine ([`ringpass_guest_abi::epoch::device`]). What takes long or may wait is done elsewhere:
//!
//! - [`Attachment`]: a queue with a pending ATTACH. Belongs to the queue's worker.
//! - [`Gate`]: what all queues share: who has which ranges of guest memory, and whether rings are given out at all.
//! - [`builder`]: the thread that pins the guest's memory and makes rings, one thing after the other.
//! - [`pinned`]: what it owns from the first ring to the end of the last attachment, the
//!   [`DirectDevice`](crate::direct::DirectDevice): memory is pinned only while there are rings.
//! - [`discards`]: notices that the front-end discards memory that is pinned.
//! - [`Order`]: what it is asked for. [`Ticket`]: lets a worker take back what it ordered of the builder.
//! - [`Reply`]: a request of the interface that is to be answered, now or later.
//!
//! The steps of the machine are carried out by the worker in `engine/epochs.rs`, the requests taken in `engine/interface.rs`.

mod attachment;
pub(super) mod builder;
mod discards;
mod gate;
mod order;
mod pinned;
mod reply;
mod ticket;

use std::sync::Arc;

use ringpass_guest_abi::attach::AttachLimits;
use ringpass_guest_abi::probe::{F_DSYNC, MAGIC, ProbeAnswer, VERSION};
use ringpass_restrictions::CompiledPolicy;

pub(super) use attachment::{Attachment, AttachmentId, LiveRing, PendingRing, Ranges, host_address};
pub(super) use gate::Gate;
pub use gate::{GateStatus, Refused, RingCounts, RingStatus};
pub(super) use order::{BuildOrder, Built, Order, OrderSender};
#[cfg(test)]
pub(super) use order::{OrderReceiver, order_channel};
pub(super) use reply::Reply;
pub(super) use ticket::Ticket;

use super::command::{Command, CommandSender};
use super::worker::Alignment;
use crate::direct::DirectConfig;
use crate::memory::IOVA_BASE;
use crate::ring::{RingError, refuse_unsafe};

/// Alignment of control page and areas, and the unit of their lengths: the page size of the kernel.
fn page_bytes() -> u32 {
    rustix::param::page_size() as u32
}

/// Most bytes of one SQE. Long enough that splitting costs nothing, short enough that an SQ thread, which copies what is in
/// the page cache, gets to the other queues in between.
const SEGMENT_BYTES_MAX: u32 = 4 << 20;

/// What a device offers to drivers that can have rings.
#[derive(Debug, Clone)]
pub struct AttachConfig {
    /// How rings are executed.
    pub direct: DirectConfig,
    /// What a guest's ring may do.
    pub policy: CompiledPolicy,
    /// Most SQ entries of a ring: a power of two, at most 32768.
    pub sq_entries_max: u32,
    /// Most CQ entries of a ring: a power of two, at least `sq_entries_max`, at most 65536.
    pub cq_entries_max: u32,
}

impl AttachConfig {
    /// With rings of at most 2048 SQ and 4096 CQ entries: twice what front-ends and drivers use for queues.
    ///
    /// # Errors
    ///
    /// [`RingError::UnsafePolicy`] for a policy with lint errors that nobody [accepted](CompiledPolicy::accept_unsafe).
    pub fn new(direct: DirectConfig, policy: CompiledPolicy) -> Result<Self, RingError> {
        refuse_unsafe(&policy)?;
        Ok(Self { direct, policy, sq_entries_max: 2048, cq_entries_max: 4096 })
    }

    /// What ATTACH may ask for.
    pub fn limits(&self) -> AttachLimits {
        AttachLimits {
            features: F_DSYNC,
            sq_entries_max: self.sq_entries_max,
            cq_entries_max: self.cq_entries_max,
            page_bytes: page_bytes(),
        }
    }

    /// Most bytes of one SQE.
    pub fn segment_bytes_max(&self) -> u32 {
        SEGMENT_BYTES_MAX
    }
}

/// What the workers of a device that offers rings share.
#[derive(Clone, Debug)]
pub(super) struct Attach {
    config: Arc<AttachConfig>,
    queue_count: u16,
    pub(super) gate: Arc<Gate>,
    orders: OrderSender,
    workers: WorkerSender,
}

impl Attach {
    pub(super) fn new(
        config: Arc<AttachConfig>,
        queue_count: u16,
        gate: Arc<Gate>,
        orders: OrderSender,
        workers: WorkerSender,
    ) -> Self {
        Self { config, queue_count, gate, orders, workers }
    }

    pub(super) fn limits(&self) -> AttachLimits {
        self.config.limits()
    }

    pub(super) fn queue_count(&self) -> u16 {
        self.queue_count
    }

    /// The answer to PROBE, for a disk that wants its buffers aligned so.
    pub(super) fn probe_answer(&self, alignment: Option<Alignment>) -> ProbeAnswer {
        let AttachLimits { features, sq_entries_max, cq_entries_max, page_bytes } = self.limits();
        // Blocks are no smaller than the alignment of memory.
        let align_bytes = alignment.map_or(1, |alignment| alignment.write_block_bytes);
        ProbeAnswer {
            magic: MAGIC.into(),
            answer_bytes: (ProbeAnswer::BYTES as u32).into(),
            version_min: VERSION.into(),
            version_max: VERSION.into(),
            features: features.into(),
            iova_base: IOVA_BASE.into(),
            sq_entries_max: sq_entries_max.into(),
            cq_entries_max: cq_entries_max.into(),
            page_bytes: page_bytes.into(),
            segment_align_bytes: align_bytes.into(),
            segment_bytes_max: SEGMENT_BYTES_MAX.into(),
            queue_count: self.queue_count.into(),
            reserved: 0.into(),
        }
    }

    /// Hands an order to the builder.
    pub(super) fn order(&self, order: Order) {
        self.orders.send(order);
    }

    /// Sends a command about one queue to its worker.
    pub(super) fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        self.workers.send(index, command);
    }

    /// The same for somebody who tells of something later.
    pub(super) fn sender(&self) -> WorkerSender {
        self.workers.clone()
    }
}

/// Reaches the workers. They do not end for want of somebody who sends, but because they are told: they must hear of the end of
/// their rings also when the engine is gone.
#[derive(Clone, Debug)]
pub(super) struct WorkerSender(Arc<[CommandSender]>);

impl WorkerSender {
    pub(super) fn new(workers: &Arc<[CommandSender]>) -> Self {
        Self(Arc::clone(workers))
    }

    /// Sends a command about one queue to its worker.
    pub(super) fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        let (index, count) = (usize::from(index), self.0.len());
        self.0[index % count].send(command(index / count));
    }

    /// Sends a command to all workers.
    pub(super) fn send_to_all(&self, command: impl Fn() -> Command) {
        self.0.iter().for_each(|worker| worker.send(command()));
    }
}
