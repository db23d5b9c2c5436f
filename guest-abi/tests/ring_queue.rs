//! A queue that is a ring: what the requests look like in it.

use std::cell::RefCell;
use std::rc::Rc;

use ringpass_guest_abi::block_queue::{BlockQueue, Completion, PushRefusal, Request, RingQueue};
use ringpass_guest_abi::{
    AddressError, CQ_EVENTFD_DISABLED, Cqe, Doorbell, DriverRing, FixedAddressing, RingLayout, RingMemory, Sqe,
};

#[derive(Default)]
struct Areas {
    words: [u32; 8],
    sqes: Vec<Sqe>,
    cqe: Cqe,
}

#[derive(Clone, Default)]
struct Memory(Rc<RefCell<Areas>>);

impl RingMemory for Memory {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.0.borrow().words[offset_bytes as usize / 4]
    }
    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.load_relaxed(offset_bytes)
    }
    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.0.borrow_mut().words[offset_bytes as usize / 4] = value;
    }
    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.store_relaxed(offset_bytes, value);
    }
    fn full_fence(&self) {}
    fn write_sqe(&self, _slot: u32, sqe: &Sqe) {
        self.0.borrow_mut().sqes.push(*sqe);
    }
    fn read_cqe(&self, _offset_bytes: u32) -> Cqe {
        self.0.borrow().cqe
    }
}

const CQ_TAIL: usize = 4;
const CQ_FLAGS: usize = 5;

fn queue() -> (RingQueue<Memory>, Memory) {
    let layout = RingLayout {
        sq_entries: 4,
        cq_entries: 8,
        sq_head_offset: 0,
        sq_tail_offset: 4,
        sq_flags_offset: 8,
        cq_head_offset: 12,
        cq_tail_offset: 16,
        cq_flags_offset: 20,
        cqes_offset: 32,
        rings_bytes: 32 + 8 * 16,
        sqes_bytes: 4 * 64,
        doorbell: Doorbell::WhenAsleep,
    };
    let memory = Memory::default();
    let ring = DriverRing::new(memory.clone(), layout).unwrap();
    (RingQueue::new(ring, FixedAddressing::new(1 << 40, 22).expect("in range")), memory)
}

const READ: Request =
    Request { write: false, offset_bytes: 8192, gpa: (5 << 30) + 4096, len_bytes: 512, durable: false, user_data: 7 };

#[test]
fn a_request_becomes_the_sqe_for_its_direction_address_and_durability() {
    let (mut queue, memory) = queue();
    queue.push(&READ).unwrap();
    queue.push(&Request { write: true, ..READ }).unwrap();
    queue.push(&Request { write: true, durable: true, ..READ }).unwrap();
    let read = Sqe {
        opcode: 4,
        flags: 1,
        off_bytes: 8192,
        addr: (1 << 40) + (5 << 30) + 4096,
        len_bytes: 512,
        user_data: 7,
        buf_index: 5 << 8,
        ..Sqe::default()
    };
    let write = Sqe { opcode: 5, ..read };
    // RWF_DSYNC
    assert_eq!(memory.0.borrow().sqes, [read, write, Sqe { rw_flags: 2, ..write }]);
}

#[test]
fn a_full_ring_and_an_address_that_cannot_be_named_are_told_apart() {
    let (mut queue, _) = queue();
    let across = Request { gpa: (1 << 30) - 256, ..READ };
    let error = queue.push(&across).unwrap_err();
    assert_eq!(error, PushRefusal::Address(AddressError::CrossesBoundary { gpa: across.gpa, len_bytes: 512 }));
    assert!(error.to_string().contains("crosses a 4 MiB boundary"));
    for _ in 0..4 {
        queue.push(&READ).unwrap();
    }
    assert_eq!(queue.push(&READ), Err(PushRefusal::Full));
}

#[test]
fn completions_and_muting_pass_through() {
    let (mut queue, memory) = queue();
    queue.mute();
    assert_eq!(memory.0.borrow().words[CQ_FLAGS], CQ_EVENTFD_DISABLED);
    assert!(!queue.unmute());
    assert_eq!(memory.0.borrow().words[CQ_FLAGS], 0);
    memory.0.borrow_mut().cqe = Cqe { user_data: 7, res: -5, flags: 0 };
    memory.0.borrow_mut().words[CQ_TAIL] = 1;
    assert!(queue.unmute());
    assert_eq!(queue.reap(), Some(Completion { user_data: 7, res: -5 }));
    assert_eq!(queue.reap(), None);
}
