//! A model of the kernel, as far as a ring of the script meets it, with one flaw or none.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ringpass_guest_abi::{Cqe, Doorbell, DriverRing, RingLayout, RingMemory, Sqe};
use ringpass_workload::hostile::Target;
use ringpass_workload::{Environment, Wakeup};

pub(super) const IOVA_BASE: u64 = 1 << 40;
/// The largest slots, so that few buffers cover the RAM.
pub(super) const SLOT_BYTES: u64 = 1 << 30;
pub(super) const DISK_BYTES: u64 = 1 << 20;
pub(super) const HOST_ADDRESS: u64 = 0x7f12_3456_7000;

/// A flaw of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    None,
    Allows { opcode: u8 },
    Ignores { flag: u8 },
    NeedsNoFixedFile,
    SecondFile { slot: i32 },
    BufferOneByteTooLong,
    BufferStartsOnePageEarly,
    ForgetsTheScratchHole,
    IgnoresBufferIndex,
    ReachesTheHost,
    TakesAnyPersonality,
    DiskGrows,
    AppendGrows,
    WritesToReadOnly,
    NeverAnswers { opcode: u8 },
    AnswersTwice { opcode: u8 },
    RefusesEverything,
    AnswersTooMuch,
}

struct Kernel {
    flaw: Flaw,
    read_only: bool,
    words: RefCell<[u32; 8]>,
    sqes: RefCell<[Sqe; 4]>,
    cqes: RefCell<[Cqe; 8]>,
    clock_ns: Cell<u64>,
}

const SQ_HEAD: usize = 0;
const SQ_TAIL: usize = 1;
const CQ_TAIL: usize = 4;

fn layout() -> RingLayout {
    RingLayout {
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
        doorbell: Doorbell::Always,
    }
}

pub(super) struct Memory(Rc<Kernel>);

impl RingMemory for Memory {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.0.words.borrow()[offset_bytes as usize / 4]
    }
    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.load_relaxed(offset_bytes)
    }
    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.0.words.borrow_mut()[offset_bytes as usize / 4] = value;
    }
    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.store_relaxed(offset_bytes, value);
    }
    fn full_fence(&self) {}
    fn write_sqe(&self, slot: u32, sqe: &Sqe) {
        self.0.sqes.borrow_mut()[slot as usize] = *sqe;
    }
    fn read_cqe(&self, offset_bytes: u32) -> Cqe {
        self.0.cqes.borrow()[(offset_bytes as usize - 32) / 16]
    }
}

impl Kernel {
    fn post(&self, cqe: Cqe) {
        let mut words = self.words.borrow_mut();
        self.cqes.borrow_mut()[words[CQ_TAIL] as usize % 8] = cqe;
        words[CQ_TAIL] = words[CQ_TAIL].wrapping_add(1);
    }

    fn step(&self) {
        let sqe = {
            let mut words = self.words.borrow_mut();
            if words[SQ_HEAD] == words[SQ_TAIL] {
                return;
            }
            let sqe = self.sqes.borrow()[words[SQ_HEAD] as usize % 4];
            words[SQ_HEAD] = words[SQ_HEAD].wrapping_add(1);
            sqe
        };
        let cqe = Cqe { user_data: sqe.user_data, res: self.execute(&sqe).unwrap_or_else(|errno| -errno), flags: 0 };
        match self.flaw {
            Flaw::NeverAnswers { opcode } if opcode == sqe.opcode => return,
            Flaw::AnswersTwice { opcode } if opcode == sqe.opcode => self.post(cqe),
            _ => {}
        }
        self.post(cqe);
    }

    /// The order of checks is the kernel's: form, restrictions, credentials, file, buffer, file system.
    fn execute(&self, sqe: &Sqe) -> Result<i32, i32> {
        let (eperm, ebadf, eacces, efault, einval, efbig, eopnotsupp) = (1, 9, 13, 14, 22, 27, 95);
        let flaw = self.flaw;
        let mut flags = sqe.flags;
        if let Flaw::Ignores { flag } = flaw {
            flags &= !flag;
        }
        if sqe.opcode >= 64 || flags & 0x80 != 0 {
            return Err(einval);
        }
        if flags & 0x20 != 0 && sqe.opcode != 4 {
            return Err(eopnotsupp);
        }
        let write = sqe.opcode == 5;
        let may_write = !self.read_only || flaw == Flaw::WritesToReadOnly;
        let extra = flaw == Flaw::Allows { opcode: sqe.opcode };
        if !(sqe.opcode == 4 || write && may_write || extra)
            || flags & !1 != 0
            || flags != 1 && flaw != Flaw::NeedsNoFixedFile
        {
            return Err(eacces);
        }
        if extra {
            return Ok(0);
        }
        if sqe.personality != 0 && flaw != Flaw::TakesAnyPersonality {
            return Err(einval);
        }
        if sqe.fd != 0 && flaw != (Flaw::SecondFile { slot: sqe.fd }) {
            return Err(ebadf);
        }
        match sqe.ioprio >> 13 {
            0 | 2 | 3 => {}
            1 => return Err(eperm),
            _ => return Err(einval),
        }
        let reaches_host = flaw == Flaw::ReachesTheHost && sqe.addr == HOST_ADDRESS;
        if !reaches_host && !self.buffer_covers(sqe) {
            return Err(efault);
        }
        if flaw == Flaw::RefusesEverything || sqe.off_bytes > i64::MAX as u64 && sqe.off_bytes != u64::MAX {
            return Err(einval);
        }
        let offset = if sqe.off_bytes == u64::MAX { 0 } else { sqe.off_bytes };
        let offset = if write && sqe.rw_flags & 0x10 != 0 { DISK_BYTES } else { offset };
        if write && sqe.rw_flags & 0x10 != 0 && flaw == Flaw::AppendGrows {
            return Ok(sqe.len_bytes as i32);
        }
        let space = if write && flaw == Flaw::DiskGrows { u64::MAX } else { DISK_BYTES };
        if write && offset >= space {
            return Err(efbig);
        }
        let moved = space.saturating_sub(offset).min(u64::from(sqe.len_bytes)) as i32;
        Ok(if flaw == Flaw::AnswersTooMuch { moved + 1 } else { moved })
    }

    fn buffer_covers(&self, sqe: &Sqe) -> bool {
        // The registered buffers, written out: [start, end) by slot.
        let mib = 1 << 20;
        let buffers = [
            (0, SLOT_BYTES),
            (SLOT_BYTES, 2 * SLOT_BYTES),
            (2 * SLOT_BYTES, 3 * SLOT_BYTES),
            (0, 0),
            (4 * SLOT_BYTES, 4 * SLOT_BYTES + 64 * mib),
        ];
        let slot = match self.flaw {
            Flaw::IgnoresBufferIndex => sqe.addr.wrapping_sub(IOVA_BASE) / SLOT_BYTES,
            _ => u64::from(sqe.buf_index),
        };
        let Some(&(mut start, mut end)) = usize::try_from(slot).ok().and_then(|slot| buffers.get(slot)) else {
            return false;
        };
        if start == end {
            return false;
        }
        match self.flaw {
            Flaw::BufferOneByteTooLong => end += 1,
            Flaw::BufferStartsOnePageEarly if start != 0 => start -= 4096,
            Flaw::ForgetsTheScratchHole if slot == 0 => end = 0xa_0000,
            _ => {}
        }
        let (first, len) = (sqe.addr, u64::from(sqe.len_bytes));
        first >= IOVA_BASE + start && first.checked_add(len).is_some_and(|last| last <= IOVA_BASE + end)
    }
}

pub(super) struct Polling(Rc<Kernel>);

impl Environment for Polling {
    fn now_ns(&self) -> u64 {
        self.0.clock_ns.set(self.0.clock_ns.get() + 10);
        self.0.clock_ns.get()
    }
    fn ring_doorbell(&mut self) {
        self.0.step();
    }
    fn relax(&mut self, _empty_polls: u32) {}
    fn wait_for_interrupt(&mut self, _timeout_ns: u64) -> Wakeup {
        unreachable!("the script polls")
    }
    fn with_buffer<R>(&mut self, _gpa: u64, _len: u32, _access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        unreachable!("the script does not look at buffers")
    }
    fn record_latency(&mut self, _latency_ns: u64) {}
}

pub(super) fn ring(target: &Target, flaw: Flaw) -> (DriverRing<Memory>, Polling) {
    let kernel = Rc::new(Kernel {
        flaw,
        read_only: target.read_only,
        words: RefCell::default(),
        sqes: RefCell::default(),
        cqes: RefCell::default(),
        clock_ns: Cell::new(0),
    });
    (DriverRing::new(Memory(kernel.clone()), layout()).unwrap(), Polling(kernel))
}
