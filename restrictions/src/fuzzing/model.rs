//! A second model of the decision about an SQE: simple, with wide numbers and without regard to speed.

use crate::{
    FieldRule, FieldRules, KernelSupport, OffsetWindow, Operation, OperationSet, Policy, Refusal, RwFlags, Slots, Sqe,
    SqeFlags,
};

/// The kernel's part: `io_init_req` and `io_check_restriction` of Linux 5.17 and later. `has_skipped` states whether
/// the ring has seen `IOSQE_CQE_SKIP_SUCCESS`.
pub(super) fn kernel(
    policy: &Policy,
    kernel: &KernelSupport,
    sqe: &Sqe,
    has_skipped: &mut bool,
) -> Result<(), Refusal> {
    const UNDEFINED: u8 = 0x80;
    let has = |flag: SqeFlags| sqe.flags & flag.bits() != 0;
    let is = |set: OperationSet| set.iter().any(|operation| operation.code() == sqe.opcode);
    if !is(kernel.numbered) {
        return Err(Refusal::UnknownOperation);
    }
    if is([Operation::NOP128, Operation::URING_CMD128].into_iter().collect()) {
        return Err(Refusal::WideOperation);
    }
    if sqe.flags & UNDEFINED != 0 {
        return Err(Refusal::UndefinedFlag);
    }
    if has(SqeFlags::BUFFER_SELECT) && !is(kernel.buffer_select) {
        return Err(Refusal::NoBufferSelect);
    }
    *has_skipped |= has(SqeFlags::CQE_SKIP_SUCCESS);
    if has(SqeFlags::IO_DRAIN) && *has_skipped {
        return Err(Refusal::DrainAfterSkip);
    }
    if !is(policy.operations()) {
        return Err(Refusal::Operation);
    }
    let bits = (0..8).map(|bit| 1u8 << bit);
    if bits.clone().any(|bit| policy.flags_required().bits() & bit != 0 && sqe.flags & bit == 0) {
        return Err(Refusal::MissingFlag);
    }
    let is_known = |bit| (policy.flags_allowed().bits() | policy.flags_required().bits()) & bit != 0;
    if bits.clone().any(|bit| sqe.flags & bit != 0 && !is_known(bit)) {
        return Err(Refusal::ForbiddenFlag);
    }
    Ok(())
}

/// The rules on fields.
pub(super) fn fields(rules: &FieldRules, sqe: &Sqe) -> Result<(), Refusal> {
    if rules.rules().next().is_none() {
        return Ok(());
    }
    let operation = Operation::new(sqe.opcode);
    let (is_fixed, is_transfer, is_allocation) = match operation {
        Operation::READ_FIXED | Operation::WRITE_FIXED => (true, true, false),
        Operation::READ | Operation::WRITE => (false, true, false),
        Operation::FALLOCATE => (false, false, true),
        Operation::FSYNC => (false, false, false),
        Operation::NOP => return Ok(()),
        _ => return Err(Refusal::UnreadableFields),
    };
    if let Some(Slots { first, last }) = rules.file_slots {
        let slot = i64::from(sqe.fd);
        let is_slot = sqe.flags & SqeFlags::FIXED_FILE.bits() != 0;
        refuse_unless(is_slot && slot >= first.into() && slot <= last.into(), FieldRule::FileSlots)?;
    }
    if let (true, Some(Slots { first, last })) = (is_fixed, rules.buffer_slots) {
        let slot = u32::from(sqe.buf_index);
        refuse_unless(slot >= first && slot <= last, FieldRule::BufferSlots)?;
    }
    if let (true, Some(range)) = (is_transfer, rules.length_bytes) {
        refuse_unless(sqe.len >= range.min && sqe.len <= range.max, FieldRule::LengthBytes)?;
    }
    // Allocate, zero (0x10) and punch (0x2) without growing the file (0x1); allocate and zero also with growing the
    // file.
    if is_allocation && ![0, 1, 2 | 1, 0x10, 0x10 | 1].contains(&sqe.len) {
        return Err(Refusal::FallocateMode);
    }
    if !is_transfer && !is_allocation {
        return Ok(());
    }
    let len_bytes = if is_allocation { sqe.addr } else { sqe.len.into() };
    range(rules, sqe.off.into(), len_bytes.into())?;
    if is_allocation {
        return Ok(());
    }
    if let Some(allowed) = rules.rw_flags {
        refuse_unless(sqe.rw_flags | allowed.bits() == allowed.bits(), FieldRule::RwFlags)?;
    }
    let appends = RwFlags::from_bits_retain(sqe.rw_flags).contains(RwFlags::APPEND);
    refuse_unless(!(appends && rules.offset_window.is_some()), FieldRule::OffsetWindow)?;
    if let Some(classes) = rules.ioprio_classes {
        let class = sqe.ioprio / 0x2000;
        refuse_unless((classes.bits() / 2u8.pow(class.into())) % 2 == 1, FieldRule::IoPrioClasses)?;
    }
    if let Some(allowed) = rules.attributes {
        refuse_unless(sqe.attr_type_mask | allowed.bits() == allowed.bits(), FieldRule::Attributes)?;
    }
    Ok(())
}

fn range(rules: &FieldRules, offset: u128, len_bytes: u128) -> Result<(), Refusal> {
    if let Some(OffsetWindow { start_bytes, len_bytes: window_bytes }) = rules.offset_window {
        let window_end = u128::from(start_bytes) + u128::from(window_bytes);
        refuse_unless(offset >= start_bytes.into() && offset + len_bytes <= window_end, FieldRule::OffsetWindow)?;
    }
    if let Some(alignment) = rules.alignment_bytes.map(u128::from) {
        refuse_unless(offset % alignment == 0 && len_bytes % alignment == 0, FieldRule::AlignmentBytes)?;
    }
    Ok(())
}

fn refuse_unless(holds: bool, rule: FieldRule) -> Result<(), Refusal> {
    if holds { Ok(()) } else { Err(Refusal::Field(rule)) }
}
