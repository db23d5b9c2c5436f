//! [`RingMemory`] over two plain mappings. This module has the only unsafe code of the crate.

#![allow(unsafe_code)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering, fence};

use crate::{Cqe, RingMemory, Sqe};

/// A ring whose two areas are mapped in this address space: guest RAM of a process or of a bare-metal guest, or the
/// window of a ring that the kernel allocated.
#[derive(Debug)]
pub struct MappedRing {
    rings: NonNull<u8>,
    rings_bytes: u64,
    sqes: NonNull<u8>,
    sqes_bytes: u64,
}

// SAFETY: the pointers are to memory that is valid for as long as the value lives (the contract of `new`), from any
// thread, and all accesses are atomic or volatile.
unsafe impl Send for MappedRing {}

impl MappedRing {
    /// A ring whose rings area is the `rings_bytes` bytes at `rings`, and whose SQE area is the `sqes_bytes` bytes at
    /// `sqes`.
    ///
    /// # Safety
    ///
    /// Both areas must be mapped readable and writable for as long as the value lives. `rings` must be aligned to 8
    /// bytes and `sqes` to 64 bytes. No Rust reference to the areas may exist.
    pub unsafe fn new(rings: NonNull<u8>, rings_bytes: u64, sqes: NonNull<u8>, sqes_bytes: u64) -> Self {
        Self { rings, rings_bytes, sqes, sqes_bytes }
    }

    fn word(&self, offset_bytes: u32) -> &AtomicU32 {
        assert!(offset_bytes % 4 == 0 && u64::from(offset_bytes) + 4 <= self.rings_bytes);
        // SAFETY: inside the area by the assertion, which `new`'s contract says is mapped for as long as `self`.
        let word = unsafe { self.rings.add(offset_bytes as usize) };
        // SAFETY: aligned to 4 bytes by the assertion and the alignment of `rings`; the memory is only ever accessed
        // atomically at this width by both sides, which is what an `AtomicU32` (with its interior mutability) allows.
        unsafe { AtomicU32::from_ptr(word.cast().as_ptr()) }
    }
}

impl RingMemory for MappedRing {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.word(offset_bytes).load(Ordering::Relaxed)
    }

    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.word(offset_bytes).load(Ordering::Acquire)
    }

    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.word(offset_bytes).store(value, Ordering::Relaxed);
    }

    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.word(offset_bytes).store(value, Ordering::Release);
    }

    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn write_sqe(&self, slot: u32, sqe: &Sqe) {
        let offset_bytes = u64::from(slot) * size_of::<Sqe>() as u64;
        assert!(offset_bytes + size_of::<Sqe>() as u64 <= self.sqes_bytes);
        // SAFETY: inside the area by the assertion, which `new`'s contract says is mapped for as long as `self`.
        let first = unsafe { self.sqes.add(offset_bytes as usize) }.cast::<u64>();
        for (index, word) in sqe.to_words().into_iter().enumerate() {
            // SAFETY: one of the eight words of the entry checked above.
            let at = unsafe { first.add(index) };
            // SAFETY: mapped and aligned (`sqes` is aligned to 64 bytes); volatile, since the kernel reads it.
            unsafe { at.write_volatile(word) };
        }
    }

    fn read_cqe(&self, offset_bytes: u32) -> Cqe {
        assert!(offset_bytes % 8 == 0);
        assert!(u64::from(offset_bytes) + size_of::<Cqe>() as u64 <= self.rings_bytes);
        // SAFETY: inside the area by the assertion, which `new`'s contract says is mapped for as long as `self`.
        let first = unsafe { self.rings.add(offset_bytes as usize) }.cast::<u64>();
        // SAFETY: the second word of the entry checked above.
        let second = unsafe { first.add(1) };
        // SAFETY: mapped and aligned to 8 bytes by the assertions; volatile, since the kernel writes it.
        let user_data = unsafe { first.read_volatile() };
        // SAFETY: as above.
        let result = unsafe { second.read_volatile() };
        Cqe::from_words([user_data, result])
    }
}

#[cfg(test)]
mod tests;
