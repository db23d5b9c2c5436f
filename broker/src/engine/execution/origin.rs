//! Where a request came from, and where its completion goes.

use vm_memory::GuestAddress;

use crate::virtio_blk::{Answer, Status};

/// Where a request came from. Execution carries it along and does not look at it, except for the queue's index in log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Origin {
    /// A descriptor chain of a virtqueue: it completes as an entry of the used ring.
    Chain(ChainOrigin),
}

/// The chain of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct ChainOrigin {
    /// The worker's number of the queue.
    pub(in crate::engine) queue: usize,
    /// Index of the queue in the device, for people.
    pub(in crate::engine) index: u16,
    /// The chain's head.
    pub(in crate::engine) head: u16,
    /// Where the status goes: one byte, in the memory that the request holds.
    pub(in crate::engine) status_gpa: GuestAddress,
    /// Device-writable bytes before the status.
    pub(in crate::engine) writable_bytes: u32,
}

impl Origin {
    /// Index of the queue in the device.
    pub(super) fn queue_index(&self) -> u16 {
        match self {
            Self::Chain(chain) => chain.index,
        }
    }
}

impl ChainOrigin {
    /// The answer to the chain.
    #[inline]
    pub(in crate::engine) fn answer(&self, status: Status, written_bytes: u32) -> Answer {
        let ChainOrigin { status_gpa, writable_bytes, .. } = *self;
        Answer { status, status_gpa, writable_bytes, written_bytes, refusal: None }
    }
}
