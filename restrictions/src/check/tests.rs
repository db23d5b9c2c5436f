use proptest::prelude::*;

use super::*;
use crate::{
    Access, Attributes, IoPrioClasses, LengthRange, LinuxVersion, OffsetWindow, RegisterOperation, RwFlags, Slots,
};

fn linux(major: u8, minor: u8) -> KernelSupport {
    KernelSupport::upstream(LinuxVersion { major, minor })
}

fn sqe(operation: Operation, flags: SqeFlags) -> Sqe {
    Sqe { opcode: operation.code(), flags: flags.bits(), ..Sqe::default() }
}

fn refused(refusal: Refusal) -> Verdict {
    Verdict::Refused(refusal)
}

#[test]
fn the_kernel_checks_number_flags_and_buffers_before_the_restrictions() {
    let rules = Policy::direct(Access::ReadWrite).compile(&linux(6, 18)).unwrap().kernel_rules(&linux(6, 18));
    for (operation, flags, expected, errno) in [
        (Operation::new(63), SqeFlags::from_bits_retain(0xff), Refusal::UnknownOperation, 22),
        (Operation::OPENAT, SqeFlags::from_bits_retain(0x80), Refusal::UndefinedFlag, 22),
        (Operation::OPENAT, SqeFlags::BUFFER_SELECT, Refusal::NoBufferSelect, 95),
        (Operation::READ, SqeFlags::BUFFER_SELECT, Refusal::Operation, 13),
        (Operation::OPENAT, SqeFlags::CQE_SKIP_SUCCESS | SqeFlags::IO_DRAIN, Refusal::DrainAfterSkip, 95),
        (Operation::OPENAT, SqeFlags::FIXED_FILE, Refusal::Operation, 13),
        (Operation::READ_FIXED, SqeFlags::empty(), Refusal::MissingFlag, 13),
        (Operation::READ_FIXED, SqeFlags::FIXED_FILE | SqeFlags::ASYNC, Refusal::ForbiddenFlag, 13),
    ] {
        assert_eq!(rules.check(&sqe(operation, flags)), refused(expected), "{operation} {flags}");
        assert_eq!(expected.errno(), errno, "{expected}");
    }
    assert_eq!(rules.check(&sqe(Operation::READ_FIXED, SqeFlags::FIXED_FILE)), Verdict::Allowed);
    let newer = Policy::direct(Access::ReadWrite).compile(&linux(7, 0)).unwrap().kernel_rules(&linux(7, 0));
    assert_eq!(newer.check(&sqe(Operation::NOP128, SqeFlags::empty())), refused(Refusal::WideOperation));
}

#[test]
fn a_refused_sqe_still_disables_draining_for_the_ring() {
    let policy = Policy::direct(Access::ReadWrite).with_flags_allowed(SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN);
    let checker = policy.checker(&linux(6, 18));
    let drain = sqe(Operation::READ_FIXED, SqeFlags::FIXED_FILE | SqeFlags::IO_DRAIN);
    let mut memory = RingMemory::default();
    assert_eq!(checker.check_next(&drain, &mut memory), Verdict::Allowed);
    let skip = sqe(Operation::OPENAT, SqeFlags::CQE_SKIP_SUCCESS);
    assert_eq!(checker.check_next(&skip, &mut memory), refused(Refusal::Operation));
    assert_eq!(checker.check_next(&drain, &mut memory), refused(Refusal::DrainAfterSkip));
    assert_eq!(checker.check(&drain), Verdict::Allowed, "on another ring");
}

#[test]
fn a_class_without_a_rule_is_denied_before_linux_7_and_unrestricted_since() {
    let register_only = [Restriction::new(RestrictionKind::RegisterOperation(RegisterOperation::REGISTER_PROBE))];
    let any = sqe(Operation::OPENAT, SqeFlags::empty());
    assert_eq!(KernelRules::of_table(&register_only, &linux(6, 19)).check(&any), refused(Refusal::Operation));
    assert_eq!(KernelRules::of_table(&register_only, &linux(7, 0)).check(&any), Verdict::Allowed);
    for kernel in [linux(6, 19), linux(7, 0)] {
        assert_eq!(KernelRules::of_table(&[], &kernel).check(&any), refused(Refusal::Operation));
        let flags_only = [Restriction::new(RestrictionKind::FlagsAllowed(SqeFlags::empty()))];
        assert_eq!(KernelRules::of_table(&flags_only, &kernel).check(&any), refused(Refusal::Operation));
    }
}

#[test]
fn a_later_entry_for_flags_replaces_the_earlier_one() {
    let table = [
        Restriction::new(RestrictionKind::Operation(Operation::NOP)),
        Restriction::new(RestrictionKind::FlagsAllowed(SqeFlags::ASYNC)),
        Restriction::new(RestrictionKind::FlagsAllowed(SqeFlags::IO_LINK)),
    ];
    let rules = KernelRules::of_table(&table, &linux(6, 18));
    assert_eq!(rules.check(&sqe(Operation::NOP, SqeFlags::ASYNC)), refused(Refusal::ForbiddenFlag));
    assert_eq!(rules.check(&sqe(Operation::NOP, SqeFlags::IO_LINK)), Verdict::Allowed);
}

/// A read that every rule of [`strict`] allows.
const GOOD: Sqe = Sqe {
    opcode: Operation::READ_FIXED.code(),
    flags: SqeFlags::FIXED_FILE.bits(),
    ioprio: 2 << 13,
    fd: 3,
    off: 1 << 20,
    addr: 0xdead_0000,
    len: 4096,
    rw_flags: RwFlags::DSYNC.bits(),
    user_data: u64::MAX,
    buf_index: 7,
    personality: 0,
    file_index: 0,
    addr3: 0,
    attr_type_mask: 0,
};

fn strict() -> Policy {
    Policy::direct(Access::ReadWrite).allow(Operation::FSYNC).allow(Operation::FALLOCATE).with_fields(FieldRules {
        file_slots: Some(Slots { first: 3, last: 4 }),
        buffer_slots: Some(Slots { first: 7, last: 7 }),
        offset_window: Some(OffsetWindow { start_bytes: 1 << 20, len_bytes: 1 << 20 }),
        length_bytes: Some(LengthRange { min: 512, max: 8192 }),
        alignment_bytes: Some(512),
        rw_flags: Some(RwFlags::DSYNC | RwFlags::APPEND),
        ioprio_classes: Some(IoPrioClasses::BEST_EFFORT),
        attributes: Some(Attributes::empty()),
        max_outstanding: Some(2),
    })
}

#[test]
fn each_field_rule_refuses_values_just_beyond_its_limit() {
    let policy = strict();
    let checker = policy.checker(&linux(6, 18));
    let check = |sqe: Sqe| {
        assert_eq!(policy.check(&sqe), checker.check(&sqe), "{sqe:?}");
        checker.check(&sqe)
    };
    for good in [
        GOOD,
        Sqe { fd: 4, ..GOOD },
        Sqe { off: (2 << 20) - 4096, ..GOOD },
        Sqe { len: 512, ..GOOD },
        Sqe { len: 8192, ..GOOD },
        Sqe { rw_flags: 0, ..GOOD },
        Sqe { ioprio: (2 << 13) | 7, ..GOOD },
        Sqe { user_data: 0, addr: u64::MAX, ..GOOD },
    ] {
        assert_eq!(check(good), Verdict::Allowed, "{good:?}");
    }
    for (rule, errno, bad) in [
        (FieldRule::FileSlots, 9, Sqe { fd: 2, ..GOOD }),
        (FieldRule::FileSlots, 9, Sqe { fd: 5, ..GOOD }),
        (FieldRule::FileSlots, 9, Sqe { fd: -1, ..GOOD }),
        (FieldRule::BufferSlots, 14, Sqe { buf_index: 6, ..GOOD }),
        (FieldRule::BufferSlots, 14, Sqe { buf_index: 8, ..GOOD }),
        (FieldRule::OffsetWindow, 22, Sqe { off: (1 << 20) - 512, ..GOOD }),
        (FieldRule::OffsetWindow, 22, Sqe { off: (2 << 20) - 3584, ..GOOD }),
        (FieldRule::OffsetWindow, 22, Sqe { off: u64::MAX, ..GOOD }),
        (FieldRule::OffsetWindow, 22, Sqe { off: u64::MAX - 4095, ..GOOD }),
        (FieldRule::OffsetWindow, 22, Sqe { rw_flags: RwFlags::APPEND.bits(), ..GOOD }),
        (FieldRule::LengthBytes, 22, Sqe { len: 511, ..GOOD }),
        (FieldRule::LengthBytes, 22, Sqe { len: 0, ..GOOD }),
        (FieldRule::LengthBytes, 22, Sqe { len: 8193, ..GOOD }),
        (FieldRule::AlignmentBytes, 22, Sqe { len: 4097, ..GOOD }),
        (FieldRule::AlignmentBytes, 22, Sqe { off: (1 << 20) + 1, ..GOOD }),
        (FieldRule::RwFlags, 22, Sqe { rw_flags: RwFlags::NOWAIT.bits(), ..GOOD }),
        (FieldRule::RwFlags, 22, Sqe { rw_flags: 1 << 31, ..GOOD }),
        (FieldRule::IoPrioClasses, 22, Sqe { ioprio: 0, ..GOOD }),
        (FieldRule::IoPrioClasses, 22, Sqe { ioprio: 1 << 13, ..GOOD }),
        (FieldRule::IoPrioClasses, 22, Sqe { ioprio: 7 << 13, ..GOOD }),
        (FieldRule::Attributes, 22, Sqe { attr_type_mask: 1, ..GOOD }),
        (FieldRule::Attributes, 22, Sqe { attr_type_mask: 1 << 63, ..GOOD }),
    ] {
        assert_eq!(check(bad), refused(Refusal::Field(rule)), "{bad:?}");
        assert_eq!(Refusal::Field(rule).errno(), errno);
    }
    assert!(checker.may_start(1) && !checker.may_start(2));
}

#[test]
fn operations_with_unknown_fields_are_refused_if_there_is_a_field_rule() {
    let bare = Policy::direct(Access::ReadOnly).allow(Operation::OPENAT);
    let open = sqe(Operation::OPENAT, SqeFlags::FIXED_FILE);
    assert_eq!(bare.check(&open), Verdict::Allowed);
    let ruled = bare.with_fields(FieldRules { max_outstanding: Some(1), ..FieldRules::default() });
    assert_eq!(ruled.check(&open), refused(Refusal::UnreadableFields));
}

#[test]
fn fallocate_is_allowed_inside_the_window_and_never_moves_data() {
    let policy = strict();
    let punch =
        Sqe { opcode: Operation::FALLOCATE.code(), flags: 1, fd: 3, off: 1 << 20, addr: 512, len: 3, ..Sqe::default() };
    assert_eq!(policy.check(&punch), Verdict::Allowed);
    let beyond = Sqe { addr: (1 << 20) + 512, ..punch };
    assert_eq!(policy.check(&beyond), refused(Refusal::Field(FieldRule::OffsetWindow)));
    // Collapsing and inserting move the data behind the window.
    for mode in [0x2, 0x8, 0x20, 0x40, 0x80, u32::MAX] {
        assert_eq!(policy.check(&Sqe { len: mode, ..punch }), refused(Refusal::FallocateMode), "{mode:#x}");
    }
    let sync = Sqe { opcode: Operation::FSYNC.code(), flags: 1, fd: 3, ..Sqe::default() };
    assert_eq!(policy.check(&sync), Verdict::Allowed);
    assert_eq!(policy.check(&Sqe { fd: 0, ..sync }), refused(Refusal::Field(FieldRule::FileSlots)));
}

#[test]
fn a_descriptor_is_not_a_slot() {
    let policy = strict().with_flags_required(SqeFlags::empty());
    assert_eq!(policy.check(&Sqe { flags: 0, ..GOOD }), refused(Refusal::Field(FieldRule::FileSlots)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn an_sqe_that_the_strict_policy_allows_is_within_all_bounds(
        words in any::<[u64; 8]>(),
        how in prop::array::uniform8(0..4u8),
        step in -4096..4096i64,
    ) {
        // Purely random words never pass, so most words stay as in a good SQE, or near it.
        let mut mixed = GOOD.to_words();
        for ((word, random), how) in mixed.iter_mut().zip(words).zip(how) {
            *word = match how {
                0 => random,
                1 => word.wrapping_add_signed(step),
                _ => *word,
            };
        }
        let sqe = Sqe::from_words(mixed);
        if strict().check(&sqe) != Verdict::Allowed {
            return Ok(());
        }
        prop_assert!([4, 5, 3, 17].contains(&sqe.opcode) && sqe.flags == 1 && (3..=4).contains(&sqe.fd));
        if sqe.opcode == 4 || sqe.opcode == 5 {
            let end = sqe.off.checked_add(sqe.len.into());
            prop_assert!(sqe.off >= 1 << 20 && end.is_some_and(|end| end <= 2 << 20));
            prop_assert!(sqe.buf_index == 7 && sqe.len % 512 == 0 && sqe.off % 512 == 0);
            prop_assert!(sqe.rw_flags & !2 == 0 && sqe.ioprio >> 13 == 2 && sqe.attr_type_mask == 0);
        }
    }

    #[test]
    fn all_ways_to_check_agree_on_every_opcode_and_flag(opcode in any::<u8>(), flags in any::<u8>(), seven in any::<bool>()) {
        let kernel = if seven { linux(7, 0) } else { linux(6, 18) };
        for built_in in crate::BuiltIn::ALL {
            let policy = built_in.policy();
            let sqe = Sqe { opcode, flags, ..Sqe::default() };
            let checked = policy.checker(&kernel).kernel_rules().check(&sqe);
            let bare = policy.with_fields(FieldRules::default());
            prop_assert_eq!(bare.checker(&kernel).check(&sqe), checked);
            prop_assert_eq!(bare.compile(&kernel).unwrap().kernel_rules(&kernel).check(&sqe), checked);
            if seven {
                prop_assert_eq!(bare.check(&sqe), checked);
            }
        }
    }
}
