//! The hostile script on a model of the kernel: a correct kernel passes, and the script detects each flaw that lets a
//! guest escape.

mod kernel;

use ringpass_guest_abi::{FixedAddressing, Sqe};
use ringpass_workload::hostile::{Expect, Extent, HostileReport, Reach, Step, Target, TargetError, Violation};
use ringpass_workload::hostile::{run_hostile, script};

use self::kernel::{DISK_BYTES, Flaw, HOST_ADDRESS, IOVA_BASE, SLOT_BYTES, ring};

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
        addressing: FixedAddressing::new(IOVA_BASE, SLOT_BYTES.ilog2()).unwrap(),
        buffer_gpa: 0x20_0000,
        buffer_bytes: 4096,
        disk_bytes: DISK_BYTES,
        disk_offset_bytes: 0,
        read_only: false,
        host_addresses: &[HOST_ADDRESS],
        zero_length: true,
    }
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
        (Target { buffer_gpa: SLOT_BYTES - 4096, buffer_bytes: 8192, ..target() }, "without a 4 MiB boundary"),
        (Target { disk_offset_bytes: DISK_BYTES - 2048, ..target() }, "inside its 1048576 bytes"),
        (Target { empty_holes: &[Extent { gpa: 0, len_bytes: 0 }], ..target() }, "is empty or wraps"),
    ];
    for (target, message) in cases {
        assert!(refusal(target).is_some_and(|error| error.contains(message)), "{message}");
    }
    let disk = TargetError::DiskOffset { offset_bytes: u64::MAX, disk_bytes: DISK_BYTES };
    assert_eq!(script(&Target { disk_offset_bytes: u64::MAX, ..target() }).err(), Some(disk));
}
