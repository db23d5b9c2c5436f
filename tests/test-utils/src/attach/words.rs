//! A ring or a control page in guest RAM, as its driver reaches it.

use std::sync::atomic::{Ordering, fence};

use ringpass_guest_abi::{Cqe, RingMemory, Sqe};
use vm_memory::{Bytes, GuestAddress};

use crate::ram::Ram;

/// The words of a ring or a control page, and the SQEs of the ring. All of them must be in RAM.
#[derive(Debug, Clone)]
pub struct Words {
    ram: Ram,
    gpa: u64,
    sqes_gpa: u64,
}

impl Words {
    /// The words from `gpa` on, and the SQEs from `sqes_gpa` on.
    pub fn new(ram: &Ram, gpa: u64, sqes_gpa: u64) -> Self {
        Self { ram: ram.clone(), gpa, sqes_gpa }
    }

    fn load(&self, offset: u32, order: Ordering) -> u32 {
        self.ram.memory().load(GuestAddress(self.gpa + u64::from(offset)), order).expect("a word in RAM")
    }

    fn store(&self, offset: u32, value: u32, order: Ordering) {
        self.ram.memory().store(value, GuestAddress(self.gpa + u64::from(offset)), order).expect("a word in RAM");
    }
}

impl RingMemory for Words {
    fn load_acquire(&self, offset: u32) -> u32 {
        self.load(offset, Ordering::Acquire)
    }

    fn load_relaxed(&self, offset: u32) -> u32 {
        self.load(offset, Ordering::Relaxed)
    }

    fn store_release(&self, offset: u32, value: u32) {
        self.store(offset, value, Ordering::Release);
    }

    fn store_relaxed(&self, offset: u32, value: u32) {
        self.store(offset, value, Ordering::Relaxed);
    }

    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn write_sqe(&self, index: u32, sqe: &Sqe) {
        let at = GuestAddress(self.sqes_gpa + u64::from(index) * size_of::<Sqe>() as u64);
        let words = sqe.to_words().map(u64::to_ne_bytes);
        self.ram.memory().write_slice(words.as_flattened(), at).expect("an SQE in RAM");
    }

    fn read_cqe(&self, offset: u32) -> Cqe {
        let mut words = [[0; 8]; 2];
        let at = GuestAddress(self.gpa + u64::from(offset));
        self.ram.memory().read_slice(words.as_flattened_mut(), at).expect("a CQE in RAM");
        Cqe::from_words(words.map(u64::from_ne_bytes))
    }
}
