//! The C header, and a C program that prints the layout that a compiler gives it.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use cbindgen::{Builder, Config, EnumConfig, ExportConfig, Language, RenameRule, Style};
use ringpass_guest_abi::attach::{AreaAddress, AttachPayload};
use ringpass_guest_abi::control::{ControlPage, RingRecord};
use ringpass_guest_abi::epoch::{Announcement, Epoch, Phase};
use ringpass_guest_abi::probe::ProbeAnswer;
use ringpass_guest_abi::request::{ErrorCode, EventAnswer, Outcome, RequestType};
use ringpass_guest_abi::{completion, control, epoch, probe, request};

use crate::{compare, in_repository};

const SOURCES: [&str; 10] = [
    "src/request.rs",
    "src/error_code.rs",
    "src/version.rs",
    "src/probe.rs",
    "src/attach.rs",
    "src/control.rs",
    "src/epoch/mod.rs",
    "src/completion.rs",
    "src/address.rs",
    "src/layout.rs",
];

/// Structures and their names in C.
const STRUCTURES: [(&str, &str); 7] = [
    ("ProbeAnswer", "ringpass_probe_answer"),
    ("AreaAddress", "ringpass_area_address"),
    ("AttachPayload", "ringpass_attach_payload"),
    ("Outcome", "ringpass_outcome"),
    ("EventAnswer", "ringpass_event_answer"),
    ("RingRecord", "ringpass_ring_record"),
    ("ControlPage", "ringpass_control_page"),
];

/// Types of the Rust crate that are none in C.
const RUST_ONLY: [&str; 5] = ["Area", "Epoch", "RequestType", "FixedAddressing", "RingLayout"];

/// A constant of the header: its name in the crate, and its value as C writes it.
struct Constant {
    name: &'static str,
    value: i128,
    c_value: String,
}

/// Types of constants.
trait CValue: Copy + Into<i128> {
    /// The suffix that gives a number this type in C.
    const SUFFIX: &str;

    fn c_value(self) -> String {
        match self.into() {
            // A negative number is an expression.
            value @ ..0 => format!("({value})"),
            value if value <= 65536 => format!("{value}{}", Self::SUFFIX),
            value => format!("{value:#x}{}", Self::SUFFIX),
        }
    }
}

impl CValue for u16 {
    const SUFFIX: &str = "";
}

impl CValue for i32 {
    const SUFFIX: &str = "";
}

impl CValue for u32 {
    const SUFFIX: &str = "U";
}

impl CValue for u64 {
    const SUFFIX: &str = "ULL";
}

/// Constants that have their name in C behind `RINGPASS_`.
fn constants() -> Vec<Constant> {
    macro_rules! constants {
        ($($module:ident :: { $($name:ident),* $(,)? }),* $(,)?) => {
            vec![$($(Constant {
                name: stringify!($name),
                value: $module::$name.into(),
                c_value: $module::$name.c_value(),
            }),*),*]
        };
    }
    constants! {
        request::{T_PROBE, T_ARM, T_ATTACH, T_EVENT, EVENT_QUEUES, PAYLOAD_BYTES_MAX, NO_FIELD},
        probe::{
            VERSION, MAGIC, F_DSYNC, F_IOPRIO, F_WRITE_STREAM, F_DONTCACHE, F_MODERATION, FEATURES_KNOWN,
        },
        control::{DOORBELL_WHEN_ASLEEP, DOORBELL_ALWAYS, MODE_DIRECT, MODE_MEDIATED, CONTROL_PAGE_BYTES},
        epoch::{PHASE_BITS, PHASE_MASK, PHASE_OPEN, PHASE_DRAIN, PHASE_ENDED},
        completion::{RES_EINTR, RES_EAGAIN, RES_ENOMEM, RES_EFAULT, RES_ECANCELED},
        ringpass_guest_abi::{
            SLOT_SHIFT_MIN, SLOT_SHIFT_MAX, SLOT_COUNT_MAX, SEGMENT_BOUNDARY_BYTES, GPA_LIMIT, SQ_ENTRIES_MAX,
            CQ_ENTRIES_MAX, RINGS_HEADER_BYTES, SQE_BYTES, CQE_BYTES, SQ_NEED_WAKEUP, SQ_CQ_OVERFLOW,
            CQ_EVENTFD_DISABLED,
        },
    }
}

const HEAD: &str = "\
/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The ABI of ringpass, version 1: docs/abi.md is its specification. Generated from the Rust source; do not edit.
 *
 * All fields are little-endian. Names in brackets in the comments are names of the Rust crate.
 *
 * The version is frozen; section 10 of the specification says what may be added.
 */";

fn header() -> String {
    let mut rename: std::collections::HashMap<String, String> =
        STRUCTURES.iter().map(|(rust, c)| ((*rust).to_owned(), (*c).to_owned())).collect();
    let constants = constants();
    rename.extend(constants.iter().map(|constant| (constant.name.to_owned(), c_name(constant))));
    rename.insert("ErrorCode".into(), "ringpass_error".into());
    rename.extend(["16", "32", "64"].map(|bits| (format!("Le{bits}"), format!("__le{bits}"))));
    let include = STRUCTURES.iter().map(|(rust, _)| (*rust).to_owned()).chain(["ErrorCode".to_owned()]).collect();
    let config = Config {
        language: Language::C,
        header: Some(HEAD.into()),
        include_guard: Some("RINGPASS_ABI_H".into()),
        no_includes: true,
        sys_includes: vec!["linux/types.h".into()],
        style: Style::Tag,
        cpp_compat: false,
        export: ExportConfig {
            include,
            exclude: RUST_ONLY.map(str::to_owned).into(),
            rename,
            ..ExportConfig::default()
        },
        enumeration: EnumConfig {
            rename_variants: RenameRule::ScreamingSnakeCase,
            prefix_with_name: true,
            ..EnumConfig::default()
        },
        ..Config::default()
    };
    let builder = SOURCES.iter().fold(Builder::new().with_config(config), |builder, source| {
        builder.with_src(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
    });
    let mut bytes = Vec::new();
    builder.generate().expect("the sources parse").write(&mut bytes);
    tidy(&String::from_utf8(bytes).expect("a header is text"), &constants)
}

fn c_name(constant: &Constant) -> String {
    format!("RINGPASS_{}", constant.name)
}

/// Gives each constant its value as a number of its type, and leaves out what C has no use for: definitions for Rust's
/// associated constants and forward declarations of types that only Rust has.
fn tidy(header: &str, constants: &[Constant]) -> String {
    let mut blocks = Vec::new();
    for block in header.split("\n\n").map(str::trim) {
        let definition = block.lines().find_map(|line| line.strip_prefix("#define "));
        let named = definition.and_then(|definition| definition.split_once(' '));
        let is_forward_declaration = block.lines().last().is_some_and(is_forward_declaration);
        match named {
            Some((name, _)) if name.starts_with("ringpass_") => {}
            Some((name, _)) => {
                let constant = constants.iter().find(|constant| c_name(constant) == name);
                let constant = constant.unwrap_or_else(|| panic!("{name} is missing in `constants`"));
                let comment = block.lines().take_while(|line| !line.starts_with("#define"));
                let definition = format!("#define {name} {}", constant.c_value);
                blocks.push(comment.chain([&*definition]).collect::<Vec<_>>().join("\n"));
            }
            None if block.is_empty() || is_forward_declaration => {}
            None => blocks.push(block.to_owned()),
        }
    }
    blocks.join("\n\n") + "\n"
}

fn is_forward_declaration(line: &str) -> bool {
    line.starts_with("struct ") && line.ends_with(';')
}

#[test]
fn the_header_has_every_constant_and_no_type_that_is_never_defined() {
    let header = header();
    for constant in constants() {
        assert!(header.contains(&format!("#define {} {}\n", c_name(&constant), constant.c_value)), "{}", constant.name);
    }
    let stray: Vec<_> = header.lines().filter(|line| is_forward_declaration(line) || line.contains("_ALL ")).collect();
    assert!(stray.is_empty(), "{stray:?}");
    for type_name in RUST_ONLY {
        assert!(!header.contains(&format!("struct {type_name}")), "{type_name}");
    }
}

#[test]
fn the_committed_header_matches_the_crate() {
    compare(&in_repository("guest-abi/include/ringpass_abi.h"), &header());
}

/// C expressions, each with the value in the crate.
fn facts() -> Vec<(String, i128)> {
    let mut facts = Vec::new();
    macro_rules! structure {
        ($c_name:literal, $type:ident { $($field:ident),* $(,)? }) => {{
            // A field that is missing here does not compile.
            let _ = |$type { $($field: _),* }: $type| ();
            facts.push((format!("sizeof(struct {})", $c_name), size_of::<$type>() as i128));
            facts.push((format!("_Alignof(struct {})", $c_name), align_of::<$type>() as i128));
            $(facts.push((
                format!("offsetof(struct {}, {})", $c_name, stringify!($field)), offset_of!($type, $field) as i128,
            ));)*
        }};
    }
    structure!(
        "ringpass_probe_answer",
        ProbeAnswer {
            magic,
            answer_bytes,
            version_min,
            version_max,
            features,
            sq_entries_max,
            cq_entries_max,
            page_bytes,
            address_align_bytes,
            length_align_bytes,
            segment_bytes_max,
            queue_count,
            refusal,
            reserved,
        }
    );
    structure!("ringpass_area_address", AreaAddress { rings_gpa, sqes_gpa });
    structure!(
        "ringpass_attach_payload",
        AttachPayload { version, reserved, features, sq_entries, cq_entries, control_gpa, areas }
    );
    structure!("ringpass_outcome", Outcome { error, field_offset_bytes, value });
    structure!("ringpass_event_answer", EventAnswer { events, reserved });
    structure!(
        "ringpass_ring_record",
        RingRecord {
            sq_head_offset_bytes,
            sq_tail_offset_bytes,
            sq_flags_offset_bytes,
            cq_head_offset_bytes,
            cq_tail_offset_bytes,
            cq_flags_offset_bytes,
            cqes_offset_bytes,
            doorbell,
            mode,
            slot_shift,
            iova_base,
            address_align_bytes,
            length_align_bytes,
            segment_bytes_max,
            reserved,
        }
    );
    structure!(
        "ringpass_control_page",
        ControlPage { announced, end_reason, ring, device_reserved, acknowledged, detach, driver_reserved, reserved }
    );
    let types = ["PROBE", "ARM", "ATTACH", "EVENT"].into_iter().zip(RequestType::ALL);
    facts.extend(types.map(|(name, request)| (format!("RINGPASS_T_{name}"), request.number().into())));
    let phases = [("OPEN", Phase::Open), ("DRAIN", Phase::Drain), ("ENDED", Phase::Ended)];
    facts.extend(phases.map(|(name, phase)| {
        let word = Announcement { epoch: Epoch::new(0), phase }.to_word();
        (format!("RINGPASS_PHASE_{name}"), word.into())
    }));
    facts.extend(constants().into_iter().map(|constant| (c_name(&constant), constant.value)));
    // The suffix makes the type: an unsigned number of 64 bits does not become negative when it is inverted.
    facts.push(("~RINGPASS_F_DSYNC".into(), (!probe::F_DSYNC).into()));
    facts.push(("~RINGPASS_NO_FIELD".into(), 0));
    facts.extend(ErrorCode::ALL.map(|code| {
        let name = format!("{code:?}").to_uppercase();
        (format!("RINGPASS_ERROR_{name}"), code as i128)
    }));
    facts
}

#[test]
fn a_c_compiler_sees_the_layout_and_the_numbers_of_the_crate() {
    let facts = facts();
    let prints: String = facts
        .iter()
        .map(|(expression, value)| {
            let (format, c_type) = if *value < 0 { ("%lld", "long long") } else { ("%llu", "unsigned long long") };
            format!("\tprintf(\"{expression}={format}\\n\", ({c_type})({expression}));\n")
        })
        .collect();
    let source = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"ringpass_abi.h\"\n\nint main(void)\n{{\n{prints}\treturn 0;\n}}\n"
    );
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source_file, program) = (directory.join("abi_layout.c"), directory.join("abi_layout"));
    std::fs::write(&source_file, source).expect("the directory of the tests can be written to");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(&compiler)
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(in_repository("guest-abi/include"))
        .arg("-o")
        .args([&program, &source_file])
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run the C compiler {compiler:?} ({error}): install the Debian packages gcc and libc6-dev")
        });
    assert!(
        output.status.success(),
        "{compiler:?} cannot compile the header (Debian: libc6-dev, linux-libc-dev):\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = Command::new(&program).output().expect("the program was just compiled");
    assert!(output.status.success(), "{} ended with {}", program.display(), output.status);
    let text = String::from_utf8(output.stdout).expect("the program prints ASCII");
    let c_facts: BTreeMap<&str, i128> = text
        .lines()
        .map(|line| line.split_once('=').expect("name=number"))
        .map(|(name, number)| (name, number.parse().expect("a number")))
        .collect();
    let our_facts: BTreeMap<&str, i128> = facts.iter().map(|(name, number)| (name.as_str(), *number)).collect();
    assert_eq!(our_facts, c_facts);
}
