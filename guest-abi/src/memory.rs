//! The memory accesses that the driver's side of a ring needs.

use crate::{Cqe, Sqe};

/// The guest's access to the two areas of one ring.
///
/// The *rings area* holds the indexes, flags and CQEs, and is addressed by the byte offsets of a
/// [`RingLayout`](crate::RingLayout). The *SQE area* is an array of 64-byte [`Sqe`]s, addressed by slot.
///
/// The other side (the host kernel, or the broker in mediated mode) can change this memory at any time. Therefore an
/// implementation must use volatile or atomic accesses of exactly the stated width, must never form a reference to the
/// memory, and must copy every value once.
///
/// An implementation must accept every offset and slot inside the areas that its layout was validated for
/// ([`RingLayout::validate`](crate::RingLayout::validate)), and may panic on others.
pub trait RingMemory {
    /// Reads the `u32` at `offset_bytes` of the rings area with no ordering (`READ_ONCE`).
    fn load_relaxed(&self, offset_bytes: u32) -> u32;

    /// Reads the `u32` at `offset_bytes` of the rings area; later accesses are not moved before it
    /// (`smp_load_acquire`).
    fn load_acquire(&self, offset_bytes: u32) -> u32;

    /// Writes the `u32` at `offset_bytes` of the rings area with no ordering (`WRITE_ONCE`).
    fn store_relaxed(&self, offset_bytes: u32, value: u32);

    /// Writes the `u32` at `offset_bytes` of the rings area; earlier accesses are not moved behind it
    /// (`smp_store_release`).
    fn store_release(&self, offset_bytes: u32, value: u32);

    /// Orders every earlier access before every later access, including a store before a load (`smp_mb`).
    fn full_fence(&self);

    /// Writes the SQE in `slot` of the SQE area, with no ordering: the slot belongs to the driver until the tail covers
    /// it.
    fn write_sqe(&self, slot: u32, sqe: &Sqe);

    /// Copies the CQE at `offset_bytes` of the rings area, with no ordering: the CQE belongs to the driver when the
    /// tail covers it.
    fn read_cqe(&self, offset_bytes: u32) -> Cqe;
}
