//! The hostile script on a model of the kernel: a correct kernel passes, and the script detects each flaw that lets a
//! guest escape.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ringpass_guest_abi::{Cqe, Doorbell, DriverRing, FixedAddressing, RingLayout, RingMemory, SLOT_BYTES, Sqe};
use ringpass_workload::hostile::{Expect, Extent, HostileReport, Reach, Step, Target, TargetError, Violation};
use ringpass_workload::hostile::{run_hostile, script};
use ringpass_workload::{Environment, Wakeup};

const IOVA_BASE: u64 = 1 << 40;
const DISK_BYTES: u64 = 1 << 20;
const HOST_ADDRESS: u64 = 0x7f12_3456_7000;

/// Memory like that of a PC: low memory, the VGA hole, memory up to 3 GiB, and some above 4 GiB.
const RAM: [Extent; 3] = [
    Extent { gpa: 0, len_bytes: 0xa_0000 },
    Extent { gpa: 0x10_0000, len_bytes: (3 << 30) - 0x10_0000 },
    Extent { gpa: 4 << 30, len_bytes: 64 << 20 },
];
const FILLED: [Extent; 1] = [Extent { gpa: 0xa_0000, len_bytes: 0x6_0000 }];
const EMPTY: [Extent; 2] =
    [Extent { gpa: 3 << 30, len_bytes: 1 << 30 }, Extent { gpa: (4 << 30) + (64 << 20), len_bytes: 1 << 20 }];

fn target() -> Target<'static> {
    Target {
        ram: &RAM,
        filled_holes: &FILLED,
        empty_holes: &EMPTY,
        addressing: FixedAddressing { iova_base: IOVA_BASE },
        buffer_gpa: 0x20_0000,
        buffer_bytes: 4096,
        disk_bytes: DISK_BYTES,
        disk_offset_bytes: 0,
        read_only: false,
        host_addresses: &[HOST_ADDRESS],
        zero_length: true,
    }
}

/// A flaw of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
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

struct Memory(Rc<Kernel>);

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

struct Polling(Rc<Kernel>);

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

fn ring(target: &Target, flaw: Flaw) -> (DriverRing<Memory>, Polling) {
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

fn try_all(target: &Target, flaw: Flaw) -> HostileReport {
    let (mut ring, mut env) = ring(target, flaw);
    run_hostile(&mut ring, &mut env, script(target).unwrap(), 10_000)
}

/// The names of all steps that detect the flaw.
fn all_names(target: &Target, flaw: Flaw) -> Vec<String> {
    let alone = |step: &Step| {
        let (mut ring, mut env) = ring(target, flaw);
        !run_hostile(&mut ring, &mut env, std::iter::once(*step), 10_000).is_clean()
    };
    script(target).unwrap().filter(alone).map(|step| step.name.to_string()).collect()
}

fn names(report: &HostileReport, target: &Target) -> Vec<String> {
    let named = report.named(target).unwrap();
    named.map(|(step, violation)| format!("{}: {} {:?}", step.name, violation.res, step.expect)).collect()
}

#[test]
fn a_correct_kernel_passes() {
    for read_only in [false, true] {
        let target = Target { read_only, ..target() };
        let report = try_all(&target, Flaw::None);
        assert!(report.is_clean(), "read_only {read_only}: {:#?}", names(&report, &target));
        assert_eq!(report.steps, script(&target).unwrap().count() as u64);
        assert!(report.steps > 5000 && report.refused > 4800, "{report:?}");
    }
}

#[test]
fn the_report_names_a_step_for_every_flaw() {
    let any_opcode =
        (0..64).filter(|opcode| ![4, 5].contains(opcode)).map(|opcode| (Flaw::Allows { opcode }, "operation"));
    let any_flag = (1..8).map(|bit| (Flaw::Ignores { flag: 1 << bit }, "flags"));
    let flaws = [
        (Flaw::NeedsNoFixedFile, "plain descriptor"),
        (Flaw::SecondFile { slot: 1 }, "token file 0x1"),
        (Flaw::SecondFile { slot: 2 }, "file slot 0x2"),
        (Flaw::SecondFile { slot: -1 }, "file slot 0xffffffff"),
        (Flaw::SecondFile { slot: i32::MAX }, "file slot 0x7fffffff"),
        (Flaw::BufferOneByteTooLong, "one byte beyond the end"),
        (Flaw::BufferStartsOnePageEarly, "the page before the start"),
        (Flaw::IgnoresBufferIndex, "buffer 0x1"),
        (Flaw::ReachesTheHost, "host address 0x7f1234567000"),
        (Flaw::TakesAnyPersonality, "personality 0x1"),
        (Flaw::DiskGrows, "disk offset"),
        (Flaw::AppendGrows, "rw_flags 0x10 (opcode 5)"),
        (Flaw::NeverAnswers { opcode: 22 }, "(opcode 22)"),
        (Flaw::RefusesEverything, "honest request"),
        (Flaw::AnswersTooMuch, "honest request"),
    ];
    for (flaw, name) in any_opcode.chain(any_flag).chain(flaws) {
        let report = try_all(&target(), flaw);
        assert!(!report.is_clean(), "{flaw:?} was not found");
        let names = all_names(&target(), flaw);
        let found = names.iter().any(|found| found.contains(name));
        assert!(found, "{flaw:?}: no violation is named {name}: {names:#?}");
    }
}

#[test]
fn a_write_to_a_read_only_disk_is_reported() {
    let target = Target { read_only: true, ..target() };
    let report = try_all(&target, Flaw::WritesToReadOnly);
    assert!(names(&report, &target)[0].starts_with("honest request of bytes 0x1000 (opcode 5): 4096"), "{report:?}");
}

#[test]
fn a_doubled_answer_is_reported() {
    let report = try_all(&target(), Flaw::AnswersTwice { opcode: 0 });
    assert!(!report.is_clean());
    assert_eq!((report.unexpected, report.violations), (16, 0));
}

#[test]
fn the_runner_gives_up_a_ring_without_answers_soon() {
    let report = try_all(&target(), Flaw::NeverAnswers { opcode: 4 });
    assert_eq!((report.lost, report.violations), (3, 3));
    assert_eq!(report.first[0], Violation { step: 0, res: Violation::NO_ANSWER });
    assert!(report.steps < 10);
}

#[test]
fn a_scratch_hole_may_also_be_refused() {
    // The broker decides whether a hole is filled; only the reached memory counts.
    let report = try_all(&target(), Flaw::ForgetsTheScratchHole);
    let others = names(&report, &target());
    assert!(others.iter().all(|name| name.contains("honest request")), "{others:?}");
}

#[test]
fn the_script_has_the_documented_steps() {
    let target = target();
    let steps: Vec<_> = script(&target).unwrap().collect();
    let has = |what: &dyn Fn(&Sqe) -> bool| steps.iter().any(|step| what(&step.sqe));
    for opcode in 0..=255u8 {
        assert!(has(&|sqe| sqe.opcode == opcode && sqe.flags == if [4, 5].contains(&opcode) { 0 } else { 1 }));
        for bit in 1..8 {
            assert!(has(&|sqe| sqe.opcode == opcode && sqe.flags == 1 << bit), "opcode {opcode}, bit {bit}");
            assert!(has(&|sqe| sqe.opcode == opcode && sqe.flags == 1 << bit | 1), "opcode {opcode}, bit {bit}");
        }
    }
    for flags in 0..=255u8 {
        assert!(has(&|sqe| sqe.opcode == 4 && sqe.flags == flags));
    }
    let refused = |sqe: &Sqe| steps.iter().any(|step| step.sqe == *sqe && matches!(step.expect, Expect::Refused(_)));
    let honest = steps[0].sqe;
    assert!(refused(&Sqe { addr: HOST_ADDRESS, ..honest }));
    let end = IOVA_BASE + (4 << 30) + (64 << 20);
    assert!(refused(&Sqe { addr: end - 4095, buf_index: 4, ..honest }), "one byte beyond RAM");
    let scratch = steps.iter().find(|step| step.sqe.addr == IOVA_BASE + 0xa_0000 && step.sqe.opcode == 4).unwrap();
    assert_eq!(scratch.expect, Expect::ScratchOnly(4096));
}

#[test]
fn no_read_can_land_in_ram_outside_the_buffer() {
    let target = target();
    let buffer = IOVA_BASE + target.buffer_gpa;
    for step in script(&target).unwrap().filter(|step| step.sqe.opcode == 4) {
        let Sqe { buf_index, addr, len_bytes, .. } = step.sqe;
        if target.reach(buf_index, addr, len_bytes) == Reach::Ram {
            let end = addr + u64::from(len_bytes);
            assert!(addr >= buffer && end <= buffer + 4096, "{}", step.name);
        }
    }
}

#[test]
fn reach_follows_regions_holes_and_slots() {
    let target = target();
    let reach = |slot, gpa: u64, len| target.reach(slot, IOVA_BASE.wrapping_add(gpa), len);
    assert_eq!(reach(0, 0, 4096), Reach::Ram);
    assert_eq!(reach(0, 0x9_f000, 4096), Reach::Ram);
    assert_eq!(reach(0, 0x9_f800, 4096), Reach::Ram);
    assert_eq!(reach(0, 0xa_0000, 0x6_0000), Reach::Scratch);
    assert_eq!(reach(0, 0xa_0000, 0x6_0001), Reach::Ram);
    assert_eq!(reach(1, 0, 4096), Reach::Nothing);
    assert_eq!(reach(0, SLOT_BYTES - 1, 2), Reach::Nothing);
    assert_eq!(reach(2, 3 * SLOT_BYTES - 1, 1), Reach::Ram);
    assert_eq!(reach(3, 3 * SLOT_BYTES, 1), Reach::Nothing);
    assert_eq!(reach(0, u64::MAX, 1), Reach::Nothing);
    assert_eq!(target.reach(0, 0, 1), Reach::Nothing);
    assert_eq!(target.reach(0, u64::MAX, u32::MAX), Reach::Nothing);
}

#[test]
fn an_invalid_target_is_refused() {
    let refusal = |target: Target| script(&target).err().map(|error| error.to_string());
    let cases = [
        (Target { buffer_gpa: 0xa_0000, ..target() }, "whole 4 KiB pages of RAM"),
        (Target { buffer_gpa: 0x20_0800, ..target() }, "whole 4 KiB pages of RAM"),
        (Target { buffer_bytes: 0, ..target() }, "whole 4 KiB pages of RAM"),
        (Target { buffer_gpa: SLOT_BYTES - 4096, buffer_bytes: 8192, ..target() }, "1 GiB slot"),
        (Target { disk_offset_bytes: DISK_BYTES - 2048, ..target() }, "inside its 1048576 bytes"),
        (Target { empty_holes: &[Extent { gpa: 0, len_bytes: 0 }], ..target() }, "is empty or wraps"),
    ];
    for (target, message) in cases {
        assert!(refusal(target).is_some_and(|error| error.contains(message)), "{message}");
    }
    let disk = TargetError::DiskOffset { offset_bytes: u64::MAX, disk_bytes: DISK_BYTES };
    assert_eq!(script(&Target { disk_offset_bytes: u64::MAX, ..target() }).err(), Some(disk));
}
