//! A ring in loom's memory: atomics whose loads may return any value that the C11 model allows, and entries whose
//! unordered access is a failure.

use std::cell::Cell;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use ringpass_guest_abi::{Cqe, Doorbell, RingLayout, RingMemory, Sqe};

const SQ_HEAD: u32 = 0;
const SQ_TAIL: u32 = 4;
const SQ_FLAGS: u32 = 8;
const CQ_HEAD: u32 = 12;
const CQ_TAIL: u32 = 16;
const CQ_FLAGS: u32 = 20;
const CQES: u32 = 24;

/// The memory that the driver and the kernel share.
pub(crate) struct SharedRing {
    pub(crate) sq_head: AtomicU32,
    pub(crate) sq_tail: AtomicU32,
    pub(crate) sq_flags: AtomicU32,
    pub(crate) cq_head: AtomicU32,
    pub(crate) cq_tail: AtomicU32,
    pub(crate) cq_flags: AtomicU32,
    pub(crate) sqes: Vec<UnsafeCell<Sqe>>,
    pub(crate) cqes: Vec<UnsafeCell<Cqe>>,
}

// SAFETY: loom runs one thread at a time and stops the model when two accesses to a cell, one of them a write, are not
// ordered by happens-before. Everything else in here is Sync by itself.
unsafe impl Sync for SharedRing {}

impl SharedRing {
    pub(crate) fn new(sq_entries: usize, cq_entries: usize) -> Arc<Self> {
        Arc::new(Self {
            sq_head: AtomicU32::new(0),
            sq_tail: AtomicU32::new(0),
            sq_flags: AtomicU32::new(0),
            cq_head: AtomicU32::new(0),
            cq_tail: AtomicU32::new(0),
            cq_flags: AtomicU32::new(0),
            sqes: (0..sq_entries).map(|_| UnsafeCell::new(Sqe::default())).collect(),
            cqes: (0..cq_entries).map(|_| UnsafeCell::new(Cqe::default())).collect(),
        })
    }

    pub(crate) fn layout(&self, doorbell: Doorbell) -> RingLayout {
        let (sq_entries, cq_entries) = (self.sqes.len() as u32, self.cqes.len() as u32);
        RingLayout {
            sq_entries,
            cq_entries,
            sq_head_offset: SQ_HEAD,
            sq_tail_offset: SQ_TAIL,
            sq_flags_offset: SQ_FLAGS,
            cq_head_offset: CQ_HEAD,
            cq_tail_offset: CQ_TAIL,
            cq_flags_offset: CQ_FLAGS,
            cqes_offset: CQES,
            rings_bytes: u64::from(CQES + cq_entries * size_of::<Cqe>() as u32),
            sqes_bytes: u64::from(sq_entries * size_of::<Sqe>() as u32),
            doorbell,
        }
    }

    fn word(&self, offset_bytes: u32) -> &AtomicU32 {
        match offset_bytes {
            SQ_HEAD => &self.sq_head,
            SQ_TAIL => &self.sq_tail,
            SQ_FLAGS => &self.sq_flags,
            CQ_HEAD => &self.cq_head,
            CQ_TAIL => &self.cq_tail,
            CQ_FLAGS => &self.cq_flags,
            other => panic!("no word at offset {other}"),
        }
    }
}

/// One of the driver's six orderings, which a test removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weakened {
    /// The store of `sq.tail` is relaxed.
    SqTailRelease,
    /// The load of `sq.head` is relaxed.
    SqHeadAcquire,
    /// The load of `cq.tail` is relaxed.
    CqTailAcquire,
    /// The store of `cq.head` is relaxed.
    CqHeadRelease,
    /// No fence between the store of `sq.tail` and the load of `sq.flags`.
    FenceAfterSqTail,
    /// No fence between the store of `cq.flags` and the load of `cq.tail`.
    FenceAfterCqFlags,
}

/// The driver's access to the ring.
pub(crate) struct DriverMemory {
    shared: Arc<SharedRing>,
    weakened: Option<Weakened>,
    /// The offset of the driver's last store, to distinguish the two fences.
    last_stored: Cell<Option<u32>>,
}

impl DriverMemory {
    pub(crate) fn new(shared: Arc<SharedRing>, weakened: Option<Weakened>) -> Self {
        Self { shared, weakened, last_stored: Cell::new(None) }
    }

    fn store(&self, offset_bytes: u32, value: u32, ordering: Ordering) {
        self.last_stored.set(Some(offset_bytes));
        self.shared.word(offset_bytes).store(value, ordering);
    }
}

impl RingMemory for DriverMemory {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.shared.word(offset_bytes).load(Ordering::Relaxed)
    }

    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        let weak = match offset_bytes {
            SQ_HEAD => self.weakened == Some(Weakened::SqHeadAcquire),
            CQ_TAIL => self.weakened == Some(Weakened::CqTailAcquire),
            other => panic!("acquire of the word at offset {other} is not in the table"),
        };
        self.shared.word(offset_bytes).load(if weak { Ordering::Relaxed } else { Ordering::Acquire })
    }

    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.store(offset_bytes, value, Ordering::Relaxed);
    }

    fn store_release(&self, offset_bytes: u32, value: u32) {
        let weak = match offset_bytes {
            SQ_TAIL => self.weakened == Some(Weakened::SqTailRelease),
            CQ_HEAD => self.weakened == Some(Weakened::CqHeadRelease),
            other => panic!("release of the word at offset {other} is not in the table"),
        };
        self.store(offset_bytes, value, if weak { Ordering::Relaxed } else { Ordering::Release });
    }

    fn full_fence(&self) {
        let weak = match self.last_stored.get() {
            Some(SQ_TAIL) => self.weakened == Some(Weakened::FenceAfterSqTail),
            Some(CQ_FLAGS) => self.weakened == Some(Weakened::FenceAfterCqFlags),
            other => panic!("a fence after a store at offset {other:?} is not in the table"),
        };
        if !weak {
            fence(Ordering::SeqCst);
        }
    }

    fn write_sqe(&self, slot: u32, sqe: &Sqe) {
        // SAFETY: loom has checked that no other access is concurrent, and no code keeps the pointer.
        self.shared.sqes[slot as usize].with_mut(|cell| unsafe { *cell = *sqe });
    }

    fn read_cqe(&self, offset_bytes: u32) -> Cqe {
        let index = (offset_bytes - CQES) as usize / size_of::<Cqe>();
        // SAFETY: loom has checked that no write is concurrent, and no code keeps the pointer.
        self.shared.cqes[index].with(|cell| unsafe { *cell })
    }
}
