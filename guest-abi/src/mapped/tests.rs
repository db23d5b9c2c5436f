//! [`MappedRing`] over two arrays: what it writes and reads where, and that it refuses everything outside.

use std::boxed::Box;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::FixedAddress;

const RINGS_BYTES: usize = 512;
const SQES: usize = 4;

/// Both areas between guard bytes, which nothing may change.
#[repr(C, align(64))]
struct Memory {
    guard0: [u8; 64],
    rings: [u8; RINGS_BYTES],
    guard1: [u8; 64],
    sqes: [u8; SQES * 64],
    guard2: [u8; 64],
}

struct Fixture {
    memory: *mut Memory,
}

impl Fixture {
    fn new() -> Self {
        let guard = [0xa5; 64];
        let (rings, sqes) = ([0; RINGS_BYTES], [0; SQES * 64]);
        Self { memory: Box::into_raw(Box::new(Memory { guard0: guard, rings, guard1: guard, sqes, guard2: guard })) }
    }

    fn ring(&self) -> MappedRing {
        // SAFETY: the fields of a live allocation; no reference is made.
        let rings = unsafe { &raw mut (*self.memory).rings };
        // SAFETY: as above.
        let sqes = unsafe { &raw mut (*self.memory).sqes };
        let (rings, sqes) = (NonNull::new(rings.cast()).unwrap(), NonNull::new(sqes.cast()).unwrap());
        // SAFETY: both areas are as long as said, aligned to 64 bytes, live as long as the fixture, and are otherwise
        // only copied out while the ring is idle.
        unsafe { MappedRing::new(rings, RINGS_BYTES as u64, sqes, (SQES * 64) as u64) }
    }

    fn copy(&self) -> Memory {
        // SAFETY: the allocation lives, and no other thread knows it.
        unsafe { self.memory.read_volatile() }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let memory = self.copy();
        for guard in [memory.guard0, memory.guard1, memory.guard2] {
            assert_eq!(guard, [0xa5; 64], "a byte outside the areas has changed");
        }
        // SAFETY: made by `Box::into_raw` and not freed before.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

fn is_refused<T>(access: impl FnOnce() -> T) -> bool {
    catch_unwind(AssertUnwindSafe(access)).is_err()
}

#[test]
fn words_are_accessed_at_their_offsets() {
    let fixture = Fixture::new();
    let ring = fixture.ring();
    ring.store_relaxed(0, 0x0102_0304);
    ring.store_release(RINGS_BYTES as u32 - 4, 0x0506_0708);
    let rings = fixture.copy().rings;
    assert_eq!(rings[..4], 0x0102_0304u32.to_ne_bytes());
    assert_eq!(rings[RINGS_BYTES - 4..], 0x0506_0708u32.to_ne_bytes());
    assert_eq!((ring.load_relaxed(0), ring.load_acquire(RINGS_BYTES as u32 - 4)), (0x0102_0304, 0x0506_0708));
    assert_eq!(rings[4..RINGS_BYTES - 4], [0; RINGS_BYTES - 8]);
}

#[test]
fn an_sqe_fills_its_slot_and_no_other() {
    let fixture = Fixture::new();
    let sqe =
        Sqe::write_fixed(FixedAddress { buf_index: 0x1122, addr: 0x3344_5566_7788 }, 0x99aa, 0xbbcc, 0xddee).durable();
    fixture.ring().write_sqe(SQES as u32 - 1, &sqe);
    let sqes = fixture.copy().sqes;
    let expected: std::vec::Vec<u8> = sqe.to_words().into_iter().flat_map(u64::to_ne_bytes).collect();
    assert_eq!(sqes[(SQES - 1) * 64..], expected);
    assert_eq!(sqes[..(SQES - 1) * 64], [0; (SQES - 1) * 64]);
}

#[test]
fn a_cqe_is_read_at_its_offset() {
    let fixture = Fixture::new();
    let ring = fixture.ring();
    let at = RINGS_BYTES as u32 - 16;
    for (index, word) in [0x1111_2222, 0x3333_4444, -5i32 as u32, 0x6666_7777].into_iter().enumerate() {
        ring.store_relaxed(at + 4 * index as u32, word);
    }
    let user_data = u64::from_ne_bytes(fixture.copy().rings[RINGS_BYTES - 16..][..8].try_into().unwrap());
    assert_eq!(ring.read_cqe(at), Cqe { user_data, res: -5, flags: 0x6666_7777 });
}

#[test]
fn accesses_outside_the_areas_or_unaligned_are_refused() {
    let fixture = Fixture::new();
    let ring = fixture.ring();
    let end = RINGS_BYTES as u32;
    for offset_bytes in [1, 2, 3, end - 3, end, end + 4, u32::MAX - 3, u32::MAX] {
        assert!(is_refused(|| ring.load_relaxed(offset_bytes)), "load_relaxed at {offset_bytes}");
        assert!(is_refused(|| ring.load_acquire(offset_bytes)), "load_acquire at {offset_bytes}");
        assert!(is_refused(|| ring.store_relaxed(offset_bytes, 1)), "store_relaxed at {offset_bytes}");
        assert!(is_refused(|| ring.store_release(offset_bytes, 1)), "store_release at {offset_bytes}");
    }
    for offset_bytes in [4, 12, end - 12, end - 8, end, u32::MAX - 7, u32::MAX - 15] {
        assert!(is_refused(|| ring.read_cqe(offset_bytes)), "read_cqe at {offset_bytes}");
    }
    for slot in [SQES as u32, SQES as u32 + 1, u32::MAX] {
        assert!(is_refused(|| ring.write_sqe(slot, &Sqe::default())), "write_sqe to {slot}");
    }
    let memory = fixture.copy();
    assert_eq!((memory.rings, memory.sqes), ([0; RINGS_BYTES], [0; SQES * 64]));
}
