use proptest::prelude::*;

use super::*;
use crate::{Access, BuiltIn};

const SMALL: &str = "\
version = 1

[sqe]
operations = [\"IORING_OP_READ_FIXED\"]
flags_required = [\"IOSQE_FIXED_FILE\"]
flags_allowed = [\"IOSQE_FIXED_FILE\"]

[register]
operations = [\"IORING_REGISTER_EVENTFD\"]
";

fn with(line: &str) -> String {
    format!("{SMALL}{line}\n")
}

fn replaced(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from), "{from}");
    SMALL.replace(from, to)
}

#[test]
fn a_small_file_parses_to_its_policy() {
    let policy = Policy::new()
        .allow(Operation::READ_FIXED)
        .with_flags_required(SqeFlags::FIXED_FILE)
        .with_flags_allowed(SqeFlags::FIXED_FILE)
        .allow_register(RegisterOperation::REGISTER_EVENTFD);
    assert_eq!(PolicyFile::parse(SMALL), Ok(PolicyFile { name: None, description: None, policy }));
}

#[test]
fn the_example_of_this_modules_documentation_is_a_policy_file() {
    let documentation = include_str!("../file.rs");
    let example: String = documentation
        .lines()
        .skip_while(|line| *line != "//! ```toml")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| format!("{}\n", line.trim_start_matches("//!").trim_start()))
        .collect();
    let file = PolicyFile::parse(&example).unwrap();
    assert_eq!(file.policy.fields().rules().count(), 9);
    assert_eq!(file.name.as_deref(), Some("direct-read-write"));
}

#[test]
fn an_error_states_the_line_and_the_column() {
    for (text, expected) in [
        (with("[sqf]"), "line 10, column 2: unknown field `sqf`, expected one of"),
        (with("operation = []"), "line 10, column 1: unknown field `operation`, expected"),
        (with("[fields]\nfile_slot = 1"), "line 11, column 1: unknown field `file_slot`, expected one of"),
        (with("[fields]\nfile_slots = { first = 0, end = 1 }"), "line 11, column 27: unknown field `end`, expected"),
        (replaced("READ_FIXED", "READ_FIXD"), "line 4, column 15: \"IORING_OP_READ_FIXD\" is no known SQE operation"),
        (replaced("REGISTER_EVENTFD", "REGISTER_X"), "line 9, column 15: \"IORING_REGISTER_X\" is no known register"),
        (
            replaced("flags_allowed = [\"IOSQE_FIXED_FILE\"]", "flags_allowed = [\"IOSQE_FIXED_FILE\", \"IOSQE\"]"),
            "line 6, column 38: \"IOSQE\" is no known SQE flag",
        ),
        (replaced("\"IORING_OP_READ_FIXED\"", "256"), "line 4, column 15: 256 is not the number of an SQE operation"),
        (replaced("\"IORING_OP_READ_FIXED\"", "-1"), "line 4, column 15: -1 is not the number of an SQE operation"),
        (
            replaced("[\"IORING_OP_READ_FIXED\"]", "4"),
            "line 4, column 14: invalid type: integer `4`, expected a list of",
        ),
        (replaced("version = 1", "version = 2"), "line 1, column 11: unknown format version 2: use version 1"),
        (replaced("version = 1\n", ""), "line 1, column 1: missing field `version`"),
        (replaced("flags_allowed = [\"IOSQE_FIXED_FILE\"]\n", ""), "line 3, column 1: missing field `flags_allowed`"),
        (
            with("[fields]\nfile_slots = { first = 2, last = 1 }"),
            "line 11, column 14: the last slot is below the first",
        ),
        (with("[fields]\nalignment_bytes = 513"), "line 11, column 19: the alignment must be a power of two"),
        (with("[fields]\nmax_outstanding = 0"), "line 11, column 19: no request could ever start"),
        (with("[fields]\nlength_bytes = { min = 2, max = 1 }"), "line 11, column 16: max is below min"),
        (with("[fields]\noffset_window = { start_bytes = 1, len_bytes = 9223372036854775807 }"), ""),
        (
            with("[fields]\noffset_window = { start_bytes = 2, len_bytes = 9223372036854775807 }"),
            "line 11, column 17: the window must hold at least one byte and end at or below 2^63 bytes",
        ),
        (with("[fields]\nrw_flags = [\"RWF_FAST\"]"), "line 11, column 13: \"RWF_FAST\" is no known read/write flag"),
        (
            with("[lint]\naccept = [\"raw-addresses\"]"),
            "line 11, column 11: \"raw-addresses\" is no known acceptable lint error",
        ),
        (with("[lint]\naccept = [1]"), "line 11, column 11: 1 is not the number of an acceptable lint error"),
        (with("[lint]"), "line 10, column 1: missing field `accept`"),
        (with("kernels ="), "line 10, column 10:"),
        (replaced("[sqe]", "[sqe"), "line 3, column 5:"),
        (format!("kernels = \"new\"\n{SMALL}"), "line 1, column 11: unknown variant `new`, expected one of"),
        ("version = 1\nname = \"ä\u{1}\"".to_owned(), "line 2, column 10:"),
        (format!("{SMALL}{SMALL}"), "line 12, column 2: duplicate key"),
    ] {
        match PolicyFile::parse(&text) {
            Ok(_) => assert_eq!(expected, "", "{text}"),
            Err(error) => {
                assert!(!expected.is_empty() && error.to_string().starts_with(expected), "{text}\nis: {error}");
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
}

#[test]
fn an_operation_without_a_name_is_written_as_its_number() {
    let policy = Policy::direct(Access::ReadOnly).allow(Operation::new(200));
    let text = PolicyFile { name: None, description: None, policy }.to_toml();
    assert!(text.contains("200"), "{text}");
    assert_eq!(PolicyFile::parse(&text).unwrap().policy, policy);
}

#[test]
fn what_a_policy_accepts_is_read_and_written_by_name() {
    let file = PolicyFile::parse(&with("[lint]\naccept = [\"unbounded-work\", \"ordered-requests\"]")).unwrap();
    assert_eq!(file.policy.accepted(), Accepted::UNBOUNDED_WORK | Accepted::ORDERED_REQUESTS);
    assert!(
        file.to_toml().contains("[lint]\naccept = [\"ordered-requests\", \"unbounded-work\"]"),
        "{}",
        file.to_toml()
    );
    assert_eq!(PolicyFile::parse(&file.to_toml()), Ok(file));
    assert_eq!(PolicyFile::parse(SMALL).unwrap().policy.accepted(), Accepted::empty());
}

pub(crate) fn policies() -> impl Strategy<Value = Policy> {
    let codes = || prop::collection::vec(any::<u8>(), 0..8);
    let flags = || any::<u8>().prop_map(SqeFlags::from_bits_retain);
    let target = prop_oneof![
        Just(TargetSemantics::Auto),
        Just(TargetSemantics::Only(RestrictionSemantics::BeforeLinux7)),
        Just(TargetSemantics::Only(RestrictionSemantics::FromLinux7)),
    ];
    let accepted = any::<u8>().prop_map(Accepted::from_bits_retain);
    (codes(), codes(), codes(), flags(), flags(), target, fields(), accepted).prop_map(
        |(operations, register, optional, allowed, required, target, fields, accepted)| {
            let policy = Policy::new().with_flags_allowed(allowed).with_flags_required(required);
            let policy = policy.with_target(target).with_fields(fields).with_accepted(accepted);
            let policy = operations.into_iter().fold(policy, |policy, code| policy.allow(Operation::new(code)));
            let policy =
                (register.into_iter()).fold(policy, |policy, code| policy.allow_register(RegisterOperation::new(code)));
            optional
                .into_iter()
                .fold(policy, |policy, code| policy.allow_register_if_known(RegisterOperation::new(code)))
        },
    )
}

fn fields() -> impl Strategy<Value = FieldRules> {
    let slots = || any::<(u32, u32)>().prop_map(|(a, b)| Slots { first: a.min(b), last: a.max(b) });
    let window =
        (0..1u64 << 62, 1..1u64 << 62).prop_map(|(start_bytes, len_bytes)| OffsetWindow { start_bytes, len_bytes });
    let length = any::<(u32, u32)>().prop_map(|(a, b)| LengthRange { min: a.min(b), max: a.max(b) });
    (
        prop::option::of(slots()),
        prop::option::of(slots()),
        prop::option::of(window),
        prop::option::of(length),
        prop::option::of((0..32u32).prop_map(|shift| 1 << shift)),
        prop::option::of(any::<u32>().prop_map(RwFlags::from_bits_retain)),
        prop::option::of(any::<u8>().prop_map(IoPrioClasses::from_bits_retain)),
        prop::option::of((0..1u64 << 63).prop_map(Attributes::from_bits_retain)),
        prop::option::of(1..u32::MAX),
    )
        .prop_map(
            |(
                file_slots,
                buffer_slots,
                offset_window,
                length_bytes,
                alignment_bytes,
                rw_flags,
                ioprio_classes,
                attributes,
                max_outstanding,
            )| {
                FieldRules {
                    file_slots,
                    buffer_slots,
                    offset_window,
                    length_bytes,
                    alignment_bytes,
                    rw_flags,
                    ioprio_classes,
                    attributes,
                    max_outstanding,
                }
            },
        )
}

proptest! {
    #[test]
    fn a_written_policy_is_read_back_unchanged(policy in policies(), name in any::<Option<String>>()) {
        let file = PolicyFile { description: name.clone(), name, policy };
        let text = file.to_toml();
        match PolicyFile::parse(&text) {
            Ok(read) => prop_assert_eq!(read, file),
            Err(error) => prop_assert!(false, "{}\n{}", error, text),
        }
    }

    /// A small fuzz test of the parser: a built-in file with some changed bytes is a policy, or an error with a
    /// position in it.
    #[test]
    fn a_damaged_file_is_another_policy_or_an_error_with_a_position_in_the_file(
        which in 0..BuiltIn::ALL.len(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = BuiltIn::ALL[which].file().as_bytes().to_vec();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let text = String::from_utf8_lossy(&bytes);
        match PolicyFile::parse(&text) {
            Ok(file) => prop_assert_eq!(PolicyFile::parse(&file.to_toml()).map(|file| file.policy), Ok(file.policy)),
            Err(error) => {
                prop_assert!(error.line >= 1 && error.line <= text.lines().count() + 1, "{}", error);
                prop_assert!(error.column >= 1);
            }
        }
    }
}
