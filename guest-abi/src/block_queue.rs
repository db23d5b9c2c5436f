//! A queue of a block device, as a driver uses it: reads and writes go in, completions come out.
//!
//! [`BlockQueue`] is the queue, whatever executes it. [`RingQueue`] is the one that the host kernel executes: a
//! [`DriverRing`] with the addressing of its device.

use core::fmt;

use crate::{AddressError, DriverRing, FixedAddressing, PushErrorReason, RingMemory, Sqe};

/// One read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Guest memory to disk, or the other way.
    pub write: bool,
    /// Position on the disk, in bytes.
    pub offset_bytes: u64,
    /// The buffer, guest-physical.
    pub gpa: u64,
    /// Length in bytes.
    pub len_bytes: u32,
    /// A write that is durable when it completes.
    pub durable: bool,
    /// Comes back in the [`Completion`].
    pub user_data: u64,
}

/// What became of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// [`Request::user_data`].
    pub user_data: u64,
    /// Bytes transferred, or a negated errno.
    pub res: i32,
}

/// Why a queue did not take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushRefusal {
    /// No room now: reap, and try again.
    Full,
    /// The queue can never take a buffer at this place.
    Address(AddressError),
}

/// A queue of a block device, driven by one thread.
pub trait BlockQueue {
    /// Puts a request into the queue. The device need not see it before [`publish`](Self::publish).
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal>;

    /// Shows all pushed requests to the device. True: it sleeps, ring the doorbell.
    #[must_use = "a sleeping device does not see the requests until the doorbell is rung"]
    fn publish(&mut self) -> bool;

    /// Takes the next completion, if there is one.
    fn reap(&mut self) -> Option<Completion>;

    /// Asks for no interrupts. One already under way may still come.
    fn mute(&mut self);

    /// Asks for interrupts again. True: a completion is already there, and no interrupt may come for it.
    #[must_use = "a completion that came before interrupts were on again is not signalled"]
    fn unmute(&mut self) -> bool;
}

/// A queue that is a ring of the host's io_uring.
#[derive(Debug)]
pub struct RingQueue<M> {
    ring: DriverRing<M>,
    addressing: FixedAddressing,
}

impl<M: RingMemory> RingQueue<M> {
    /// The queue on `ring`, of a device that addresses guest memory by `addressing`.
    pub fn new(ring: DriverRing<M>, addressing: FixedAddressing) -> Self {
        Self { ring, addressing }
    }

    /// The ring, for what a queue has no name for.
    pub fn ring_mut(&mut self) -> &mut DriverRing<M> {
        &mut self.ring
    }
}

impl<M: RingMemory> BlockQueue for RingQueue<M> {
    #[inline]
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal> {
        let address = self.addressing.resolve(request.gpa, request.len_bytes).map_err(PushRefusal::Address)?;
        let build = if request.write { Sqe::write_fixed } else { Sqe::read_fixed };
        let sqe = build(address, request.len_bytes, request.offset_bytes, request.user_data);
        let sqe = if request.durable { sqe.durable() } else { sqe };
        self.ring.push(&sqe).map_err(|error| match error.reason {
            PushErrorReason::SqFull | PushErrorReason::CqFull => PushRefusal::Full,
        })
    }

    #[inline]
    fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    #[inline]
    fn reap(&mut self) -> Option<Completion> {
        self.ring.reap().map(|cqe| Completion { user_data: cqe.user_data, res: cqe.res })
    }

    fn mute(&mut self) {
        self.ring.mute_interrupts();
    }

    fn unmute(&mut self) -> bool {
        self.ring.unmute_interrupts()
    }
}

impl fmt::Display for PushRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => write!(f, "the queue is full"),
            Self::Address(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for PushRefusal {}
