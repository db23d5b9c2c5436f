//! The driver's side of a ring.
//!
//! # Memory orderings
//!
//! The driver and the host kernel share four indexes and two flag words. Each has one writer.
//!
//! | the driver's accesses | ordering | pairs with, in Linux |
//! | --- | --- | --- |
//! | SQEs, then `sq.tail` | store-release of the tail | `io_sqring_entries`: load-acquire of the tail, then SQEs are read |
//! | `sq.head`, then reuse of an SQE slot | load-acquire of the head | `io_commit_sqring`: store-release of the head, after SQEs were read |
//! | `cq.tail`, then CQEs | load-acquire of the tail | `io_commit_cqring`: store-release of the tail, after CQEs were written |
//! | CQEs, then `cq.head` | store-release of the head | `io_cqe_cache_refill`: load of the head, control dependency, store to a freed CQE |
//! | `sq.tail`, then `sq.flags` | **full fence** between | `io_sq_thread`: sets NEED_WAKEUP, `smp_mb__after_atomic`, reads the tail once more |
//! | `cq.flags` (unmute), then `cq.tail` | **full fence** between | `__io_cq_unlock_post`: writes the tail, `wq_has_sleeper` (`smp_mb`), `io_eventfd_grab` reads the flags |
//!
//! The last two are store-then-load on both sides (Dekker): without the fence both sides may miss each other, and a
//! submission would sleep or a completion never interrupt.
//!
//! The names are those of Linux 6.12 to 6.19, in `io_uring/`. The order of steps is the same since 6.6 (older kernels
//! have no `IORING_SETUP_NO_SQARRAY`). The last row does not hold for a ring with `IORING_SETUP_DEFER_TASKRUN`, nor for
//! a ring with `IORING_SETUP_IOPOLL` and without SQPOLL: there the kernel wakes no waiters and executes no fence, so
//! the driver can miss a completion when it unmutes interrupts. A device must not offer such a ring.
//!
//! `tests/loom_orderings` checks all six orderings against a model of the kernel's side, and shows for each that loom
//! finds a failure without it. To show that for the release of `cq.head`, the model posts completions without requests:
//! in a complete ring the next release of `sq.tail` also covers this case, because a slot of a full CQ is reused only
//! after a CQE was reaped.
//!
//! The doorbell must not overtake the tail. System calls, hypercalls and Linux's `writel` ensure this themselves; a
//! bare-metal guest on a weakly ordered machine needs a store barrier before its MMIO store.

use core::fmt;

use crate::{
    CQ_EVENTFD_DISABLED, Cqe, Doorbell, LayoutError, RingLayout, RingMemory, SQ_CQ_OVERFLOW, SQ_NEED_WAKEUP, Sqe,
};

/// The driver's side of one ring: the only producer of its SQEs and the only consumer of its CQEs.
///
/// The driver keeps its own copies of the indexes that it owns and never reads them back. It never has more requests
/// outstanding than the CQ holds, so the kernel never drops or holds back a completion.
///
/// The driver does not trust the other side's indexes: whatever they contain, the driver accesses only what its layout
/// covers and has at most `cq_entries` requests outstanding. With wrong indexes it may wait for ever or reap nonsense.
#[derive(Debug)]
pub struct DriverRing<M> {
    memory: M,
    layout: RingLayout,
    /// The SQ tail, including SQEs that are not yet published.
    sq_tail: u32,
    /// The SQ tail that the kernel sees.
    sq_tail_published: u32,
    cq_head: u32,
    /// Number of pushed requests whose CQE has not been reaped.
    outstanding: u32,
}

/// A refused push. The error returns the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushError {
    /// The request that was not queued.
    pub sqe: Sqe,
    /// The reason, which states what has to happen first.
    pub reason: PushErrorReason,
}

/// Why a push was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushErrorReason {
    /// The SQ is full: publish, and wait until the kernel has consumed SQEs. At least as many requests are outstanding
    /// as the SQ has entries, so a driver may sleep until the interrupt of the next completion.
    SqFull,
    /// As many requests are outstanding as the CQ has entries: reap first.
    CqFull,
}

impl<M: RingMemory> DriverRing<M> {
    /// The driver's side of a *new* ring in `memory`, whose indexes are all zero.
    pub fn new(memory: M, layout: RingLayout) -> Result<Self, LayoutError> {
        layout.validate()?;
        Ok(Self { memory, layout, sq_tail: 0, sq_tail_published: 0, cq_head: 0, outstanding: 0 })
    }

    /// The layout of the ring.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// Returns the memory when the ring is no longer in use.
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// The number of pushed requests whose completion has not been reaped.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Writes `sqe` into the next slot. The kernel does not see it before [`publish`](Self::publish).
    pub fn push(&mut self, sqe: &Sqe) -> Result<(), PushError> {
        let refused = |reason| Err(PushError { sqe: *sqe, reason });
        if self.outstanding >= self.layout.cq_entries {
            return refused(PushErrorReason::CqFull);
        }
        // If fewer requests are outstanding than the SQ has entries, there is room regardless of the head: the kernel
        // takes SQEs in order and has read every SQE whose completion was reaped. So the driver reads the head, in a
        // cache line that the kernel writes, only when needed. The head alone would not suffice: the kernel moves it
        // only at the end of a batch (`io_submit_sqes`), when the driver may have reaped completions of the batch
        // already, so that the SQ could look full for ever with nothing outstanding.
        if self.outstanding >= self.layout.sq_entries {
            // Acquire: the kernel read the SQE in the slot before it moved the head past the slot.
            let sq_head = self.memory.load_acquire(self.layout.sq_head_offset);
            if self.sq_tail.wrapping_sub(sq_head) >= self.layout.sq_entries {
                return refused(PushErrorReason::SqFull);
            }
        }
        self.memory.write_sqe(self.sq_tail & (self.layout.sq_entries - 1), sqe);
        self.sq_tail = self.sq_tail.wrapping_add(1);
        self.outstanding += 1;
        Ok(())
    }

    /// Makes every pushed SQE visible to the kernel. Returns true if the driver must ring the doorbell now; otherwise
    /// the kernel may never look at the SQEs. Returns false if no SQE was pushed since the last call.
    #[must_use = "a sleeping SQ thread does not see the SQEs until the doorbell is rung"]
    pub fn publish(&mut self) -> bool {
        if self.sq_tail == self.sq_tail_published {
            return false;
        }
        // Release: the SQEs are written before the tail covers them.
        self.memory.store_release(self.layout.sq_tail_offset, self.sq_tail);
        self.sq_tail_published = self.sq_tail;
        match self.layout.doorbell {
            Doorbell::Always => true,
            Doorbell::WhenAsleep => {
                // The SQ thread sets NEED_WAKEUP and then reads the tail again; the driver writes the tail and then
                // reads NEED_WAKEUP. With a full fence between on both sides, at least one side sees the other's write.
                self.memory.full_fence();
                self.memory.load_relaxed(self.layout.sq_flags_offset) & SQ_NEED_WAKEUP != 0
            }
        }
    }

    /// Takes the next completion, if there is one.
    ///
    /// A faulty device can invent completions: check `user_data` before you use it as an index.
    pub fn reap(&mut self) -> Option<Cqe> {
        // Acquire: the kernel wrote the CQE before the tail covered it.
        let cq_tail = self.memory.load_acquire(self.layout.cq_tail_offset);
        if cq_tail == self.cq_head {
            return None;
        }
        let index = self.cq_head & (self.layout.cq_entries - 1);
        let cqe = self.memory.read_cqe(self.layout.cqes_offset + index * size_of::<Cqe>() as u32);
        self.cq_head = self.cq_head.wrapping_add(1);
        // Release: the driver has copied the CQE before the kernel may write the slot again.
        self.memory.store_release(self.layout.cq_head_offset, self.cq_head);
        self.outstanding = self.outstanding.saturating_sub(1);
        Some(cqe)
    }

    /// Whether a completion waits to be reaped.
    pub fn has_completion(&self) -> bool {
        self.memory.load_acquire(self.layout.cq_tail_offset) != self.cq_head
    }

    /// Asks the kernel not to signal completions while the driver polls. A signal that is already under way may still
    /// arrive.
    pub fn mute_interrupts(&mut self) {
        self.memory.store_relaxed(self.layout.cq_flags_offset, CQ_EVENTFD_DISABLED);
    }

    /// Asks the kernel to signal again. Returns true if a completion is already there: reap it first, because no signal
    /// may arrive for it.
    #[must_use = "a completion that arrived before interrupts were unmuted is not signalled"]
    pub fn unmute_interrupts(&mut self) -> bool {
        self.memory.store_relaxed(self.layout.cq_flags_offset, 0);
        // The kernel writes the tail and then reads the flag; the driver writes the flag and then reads the tail. With
        // a full fence between on both sides, at least one side sees the other's write.
        self.memory.full_fence();
        self.has_completion()
    }

    /// Whether the kernel holds back completions because the CQ was full. Never true for a driver that uses only this
    /// type.
    pub fn has_overflowed(&self) -> bool {
        self.memory.load_relaxed(self.layout.sq_flags_offset) & SQ_CQ_OVERFLOW != 0
    }
}

impl fmt::Display for PushError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            PushErrorReason::SqFull => write!(f, "the submission queue is full"),
            PushErrorReason::CqFull => {
                write!(f, "as many requests are outstanding as the completion queue has entries")
            }
        }
    }
}

impl core::error::Error for PushError {}

#[cfg(test)]
mod tests;
