//! The bodies of the fuzz targets: each takes bytes and panics if an invariant does not hold.
//!
//! A fuzzer (`fuzz/`) runs them, and so do property tests, and the tests that save inputs as seeds.

mod model;
#[cfg(test)]
mod tests;

use crate::{
    Attributes, CompiledPolicy, FieldRules, IoPrioClasses, KernelRules, KernelSupport, LengthRange, LinuxVersion,
    OffsetWindow, Operation, Policy, PolicyFile, RegisterOperation, RingMemory, RwFlags, Slots, Sqe, SqeFlags, Verdict,
};

/// Parses the bytes as a policy file.
///
/// # Panics
///
/// If writing and reading a parsed policy changes it, or if an error has no position in the text.
pub fn policy_file(bytes: &[u8]) {
    parse(bytes);
}

/// Whether the bytes are a policy file.
fn parse(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    match PolicyFile::parse(&text) {
        Ok(file) => {
            let written = file.to_toml();
            assert_eq!(PolicyFile::parse(&written).as_ref(), Ok(&file), "written as\n{written}");
            true
        }
        Err(error) => {
            let lines = text.matches('\n').count() + 1;
            assert!((1..=lines).contains(&error.line) && error.column >= 1, "{error} of {lines} lines");
            assert!(!error.message.is_empty());
            false
        }
    }
}

/// Creates a policy, a kernel and SQEs from the bytes. Compares the decisions of the checker, of the rules of the
/// compiled table, and of a second, simple model.
///
/// # Panics
///
/// If the decisions differ.
pub fn policy_check(bytes: &[u8]) {
    run(bytes);
}

/// Counts of the decisions about the SQEs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcome {
    allowed: u32,
    refused_by_kernel: u32,
    refused_by_fields: u32,
    compiled: bool,
}

fn run(bytes: &[u8]) -> Outcome {
    let mut choices = Choices { bytes };
    let minor = choices.below(20);
    let version = if minor == 0 { LinuxVersion { major: 7, minor: 0 } } else { LinuxVersion { major: 6, minor } };
    let kernel = KernelSupport::upstream(version);
    let policy = arbitrary_policy(&mut choices);
    let checker = policy.checker(&kernel);
    let table = policy.with_fields(FieldRules::default()).compile(&kernel).ok();
    let rules: Option<KernelRules> = table.as_ref().map(|table: &CompiledPolicy| table.kernel_rules(&kernel));

    let mut outcome = Outcome { compiled: rules.is_some(), ..Outcome::default() };
    let (mut memory, mut table_memory) = (RingMemory::default(), RingMemory::default());
    let mut has_skipped = false;
    while !choices.bytes.is_empty() {
        let sqe = arbitrary_sqe(&mut choices, &policy);
        let verdict = checker.check_next(&sqe, &mut memory);
        let kernels = model::kernel(&policy, &kernel, &sqe, &mut has_skipped);
        let expected = kernels.and_then(|()| model::fields(&policy.fields(), &sqe));
        let is_allowed = verdict == Verdict::Allowed;
        assert_eq!(verdict, expected.map_or_else(Verdict::Refused, |()| Verdict::Allowed), "{sqe:?}\n{policy:#?}");
        if let Some(rules) = &rules {
            let of_table = rules.check_next(&sqe, &mut table_memory);
            assert_eq!(of_table, kernels.map_or_else(Verdict::Refused, |()| Verdict::Allowed), "{sqe:?}\n{policy:#?}");
        }
        match kernels {
            _ if is_allowed => outcome.allowed += 1,
            Ok(()) => outcome.refused_by_fields += 1,
            Err(_) => outcome.refused_by_kernel += 1,
        }
    }
    outcome
}

/// A source of choices, made by bytes. When the bytes are used up, it always makes the first choice.
struct Choices<'a> {
    bytes: &'a [u8],
}

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        first
    }

    fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    fn one_in_two(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// Any number; small numbers and numbers near powers of two come more often.
    fn number(&mut self) -> u64 {
        match self.below(4) {
            0 => self.byte().into(),
            1 => 512 * u64::from(self.byte()),
            2 => (1u64 << self.below(64)).wrapping_add_signed(i64::from(self.byte() as i8)),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    fn small(&mut self) -> u32 {
        self.number() as u32
    }
}

fn arbitrary_policy(choices: &mut Choices<'_>) -> Policy {
    let mut policy = Policy::new().allow_register(RegisterOperation::REGISTER_EVENTFD);
    for _ in 0..choices.below(6) {
        policy = policy.allow(Operation::new(operation(choices)));
    }
    let required = SqeFlags::from_bits_retain(choices.byte() & choices.byte());
    let allowed = SqeFlags::from_bits_retain(choices.byte());
    let policy = policy.with_flags_required(required).with_flags_allowed(allowed | required);
    if choices.one_in_two() { policy } else { policy.with_fields(arbitrary_fields(choices)) }
}

/// An operation; operations that field rules can judge come more often.
fn operation(choices: &mut Choices<'_>) -> u8 {
    const JUDGED: [Operation; 7] = [
        Operation::READ_FIXED,
        Operation::WRITE_FIXED,
        Operation::READ,
        Operation::WRITE,
        Operation::FSYNC,
        Operation::FALLOCATE,
        Operation::NOP,
    ];
    let which = choices.below(10);
    JUDGED.get(usize::from(which)).map_or_else(|| choices.byte(), |operation| operation.code())
}

fn arbitrary_fields(choices: &mut Choices<'_>) -> FieldRules {
    let mut set = |rule: &mut dyn FnMut(&mut Choices<'_>)| {
        if choices.one_in_two() {
            rule(choices);
        }
    };
    let mut rules = FieldRules::default();
    let slots = |choices: &mut Choices<'_>| {
        let (a, b) = (choices.small(), choices.small());
        Some(Slots { first: a.min(b), last: a.max(b) })
    };
    set(&mut |choices| rules.file_slots = slots(choices));
    set(&mut |choices| rules.buffer_slots = slots(choices));
    set(&mut |choices| {
        let start_bytes = choices.number() >> 1;
        let len_bytes = choices.number().clamp(1, (1 << 63) - start_bytes);
        rules.offset_window = Some(OffsetWindow { start_bytes, len_bytes });
    });
    set(&mut |choices| {
        let (a, b) = (choices.small(), choices.small());
        rules.length_bytes = Some(LengthRange { min: a.min(b), max: a.max(b) });
    });
    set(&mut |choices| rules.alignment_bytes = Some(1 << choices.below(32)));
    set(&mut |choices| rules.rw_flags = Some(RwFlags::from_bits_retain(choices.small())));
    set(&mut |choices| rules.ioprio_classes = Some(IoPrioClasses::from_bits_retain(choices.byte())));
    set(&mut |choices| rules.attributes = Some(Attributes::from_bits_retain(choices.number())));
    assert_eq!(rules.fault(), None);
    rules
}

/// An SQE that the policy may well allow, with some arbitrary fields.
fn arbitrary_sqe(choices: &mut Choices<'_>, policy: &Policy) -> Sqe {
    let (operations, fields) = (policy.operations(), policy.fields());
    let nth = usize::from(choices.byte()) % operations.len().max(1);
    let mut sqe = Sqe {
        opcode: operations.iter().nth(nth).map_or(0, Operation::code),
        flags: policy.flags_required().bits(),
        fd: fields.file_slots.map_or(0, |slots| slots.first as i32),
        off: fields.offset_window.map_or(0, |window| window.start_bytes),
        len: fields.length_bytes.map_or(0, |range| range.min),
        buf_index: fields.buffer_slots.map_or(0, |slots| slots.first as u16),
        ..Sqe::default()
    };
    for _ in 0..choices.below(5) {
        match choices.below(12) {
            0 => sqe.opcode = operation(choices),
            1 => sqe.flags ^= 1 << choices.below(8),
            2 => sqe.flags = choices.byte(),
            3 => sqe.ioprio = choices.small() as u16 ^ (u16::from(choices.byte()) << 13),
            4 => sqe.fd = sqe.fd.wrapping_add(i32::from(choices.byte() as i8)),
            5 => sqe.off = sqe.off.wrapping_add(choices.number()),
            6 => sqe.addr = choices.number(),
            7 => sqe.len = sqe.len.wrapping_add(choices.small()),
            8 => sqe.rw_flags = choices.small(),
            9 => sqe.buf_index = choices.small() as u16,
            10 => sqe.attr_type_mask = choices.number(),
            _ => sqe.len = u32::from(choices.below(0x20)),
        }
    }
    sqe
}
