//! Ring memory for unit tests. It refuses every access outside the two areas.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use crate::{Cqe, RingLayout, RingMemory, Sqe};

/// Memory of the size of a layout, shared by the driver and the test that plays the other side. Only written words take
/// memory, so an area may have any size.
#[derive(Clone, Debug)]
pub(crate) struct TestMemory(Rc<Areas>);

#[derive(Debug)]
struct Areas {
    rings_bytes: u64,
    sqes_bytes: u64,
    words: RefCell<HashMap<u32, u32>>,
    sqes: RefCell<HashMap<u32, Sqe>>,
}

impl TestMemory {
    pub(crate) fn new(layout: &RingLayout) -> Self {
        let (words, sqes) = Default::default();
        Self(Rc::new(Areas { rings_bytes: layout.rings_bytes, sqes_bytes: layout.sqes_bytes, words, sqes }))
    }

    pub(crate) fn sqe(&self, slot: u32) -> Sqe {
        self.0.sqes.borrow()[&slot]
    }

    pub(crate) fn write_cqe(&self, offset_bytes: u32, cqe: Cqe) {
        let [u0, u1] = [cqe.user_data as u32, (cqe.user_data >> 32) as u32];
        for (index, word) in [u0, u1, cqe.res as u32, cqe.flags].into_iter().enumerate() {
            self.store_relaxed(offset_bytes + 4 * index as u32, word);
        }
    }

    fn check(&self, offset_bytes: u32, len_bytes: u64, align_bytes: u32) {
        assert!(offset_bytes % align_bytes == 0, "access at {offset_bytes} is not aligned to {align_bytes}");
        let end_bytes = u64::from(offset_bytes) + len_bytes;
        assert!(end_bytes <= self.0.rings_bytes, "access up to {end_bytes} in an area of {}", self.0.rings_bytes);
    }
}

impl RingMemory for TestMemory {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.check(offset_bytes, 4, 4);
        self.0.words.borrow().get(&offset_bytes).copied().unwrap_or(0)
    }

    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.load_relaxed(offset_bytes)
    }

    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.check(offset_bytes, 4, 4);
        self.0.words.borrow_mut().insert(offset_bytes, value);
    }

    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.store_relaxed(offset_bytes, value);
    }

    fn full_fence(&self) {}

    fn write_sqe(&self, slot: u32, sqe: &Sqe) {
        let end_bytes = (u64::from(slot) + 1) * size_of::<Sqe>() as u64;
        assert!(end_bytes <= self.0.sqes_bytes, "SQE {slot} in an area of {} bytes", self.0.sqes_bytes);
        self.0.sqes.borrow_mut().insert(slot, *sqe);
    }

    fn read_cqe(&self, offset_bytes: u32) -> Cqe {
        self.check(offset_bytes, size_of::<Cqe>() as u64, 8);
        let [u0, u1, res, flags] = [0, 4, 8, 12].map(|at| self.load_relaxed(offset_bytes + at));
        Cqe { user_data: u64::from(u1) << 32 | u64::from(u0), res: res as i32, flags }
    }
}
