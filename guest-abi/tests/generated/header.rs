//! The C header, and a C program that prints the layout that a compiler gives it.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use cbindgen::{Builder, Config, EnumConfig, ExportConfig, Language, RenameRule, Style};
use ringpass_guest_abi::attach::{AreaAddress, AttachPayload};
use ringpass_guest_abi::control::{ControlPage, RingRecord};
use ringpass_guest_abi::epoch::{Announcement, Epoch, Phase};
use ringpass_guest_abi::probe::{MAGIC, ProbeAnswer};
use ringpass_guest_abi::request::{DetachPayload, ErrorCode, EventAnswer, Outcome, RequestType};

use crate::{compare, in_repository};

const SOURCES: [&str; 6] =
    ["src/request.rs", "src/version.rs", "src/probe.rs", "src/attach.rs", "src/control.rs", "src/epoch/mod.rs"];

/// Structures and their names in C.
const STRUCTURES: [(&str, &str); 8] = [
    ("ProbeAnswer", "ringpass_probe_answer"),
    ("AreaAddress", "ringpass_area_address"),
    ("AttachPayload", "ringpass_attach_payload"),
    ("Outcome", "ringpass_outcome"),
    ("EventAnswer", "ringpass_event_answer"),
    ("DetachPayload", "ringpass_detach_payload"),
    ("RingRecord", "ringpass_ring_record"),
    ("ControlPage", "ringpass_control_page"),
];

/// Constants that keep their name behind `RINGPASS_`.
const CONSTANTS: [&str; 19] = [
    "T_PROBE",
    "T_ARM",
    "T_ATTACH",
    "T_EVENT",
    "T_DETACH",
    "EVENT_QUEUES",
    "PAYLOAD_BYTES_MAX",
    "NO_FIELD",
    "MAGIC",
    "VERSION",
    "F_DSYNC",
    "FEATURES_KNOWN",
    "DOORBELL_WHEN_ASLEEP",
    "DOORBELL_ALWAYS",
    "MODE_DIRECT",
    "MODE_MEDIATED",
    "PHASE_OPEN",
    "PHASE_DRAIN",
    "PHASE_ENDED",
];

const HEAD: &str = "\
/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The ABI of ringpass, version 0: docs/abi.md is its specification. Generated from the Rust source; do not edit.
 *
 * All fields are little-endian. Names in brackets in the comments are names of the Rust crate.
 */";

fn header() -> String {
    let mut rename: std::collections::HashMap<String, String> =
        STRUCTURES.iter().map(|(rust, c)| ((*rust).to_owned(), (*c).to_owned())).collect();
    rename.extend(CONSTANTS.iter().map(|name| ((*name).to_owned(), format!("RINGPASS_{name}"))));
    rename.insert("CONTROL_PAGE_BYTES".into(), "RINGPASS_CONTROL_PAGE_BYTES".into());
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
        export: ExportConfig { include, rename, ..ExportConfig::default() },
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
    String::from_utf8(bytes).expect("a header is text")
}

#[test]
fn the_committed_header_matches_the_crate() {
    compare(&in_repository("guest-abi/include/ringpass_abi.h"), &header());
}

/// C expressions, each with the value in the crate.
fn facts() -> Vec<(String, u64)> {
    let mut facts = Vec::new();
    macro_rules! structure {
        ($c_name:literal, $type:ident { $($field:ident),* $(,)? }) => {{
            // A field that is missing here does not compile.
            let _ = |$type { $($field: _),* }: $type| ();
            facts.push((format!("sizeof(struct {})", $c_name), size_of::<$type>() as u64));
            facts.push((format!("_Alignof(struct {})", $c_name), align_of::<$type>() as u64));
            $(facts.push((
                format!("offsetof(struct {}, {})", $c_name, stringify!($field)), offset_of!($type, $field) as u64,
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
            segment_align_bytes,
            segment_bytes_max,
            queue_count,
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
    structure!("ringpass_detach_payload", DetachPayload { queue, reserved });
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
        }
    );
    structure!(
        "ringpass_control_page",
        ControlPage { announced, end_reason, ring, device_reserved, acknowledged, detach, driver_reserved, reserved }
    );
    let types = ["PROBE", "ARM", "ATTACH", "EVENT", "DETACH"].into_iter().zip(RequestType::ALL);
    facts.extend(types.map(|(name, request)| (format!("RINGPASS_T_{name}"), request.number().into())));
    let phases = [("OPEN", Phase::Open), ("DRAIN", Phase::Drain), ("ENDED", Phase::Ended)];
    facts.extend(phases.map(|(name, phase)| {
        let word = Announcement { epoch: Epoch::new(0), phase }.to_word();
        (format!("RINGPASS_PHASE_{name}"), word.into())
    }));
    facts.push(("RINGPASS_MAGIC".into(), MAGIC));
    facts.extend(ErrorCode::ALL.map(|code| {
        let name = format!("{code:?}").to_uppercase();
        (format!("RINGPASS_ERROR_{name}"), code as u64)
    }));
    facts
}

#[test]
fn a_c_compiler_sees_the_layout_and_the_numbers_of_the_crate() {
    let facts = facts();
    let prints: String = facts
        .iter()
        .map(|(expression, _)| format!("\tprintf(\"{expression}=%llu\\n\", (unsigned long long)({expression}));\n"))
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
    let c_facts: BTreeMap<&str, u64> = text
        .lines()
        .map(|line| line.split_once('=').expect("name=number"))
        .map(|(name, number)| (name, number.parse().expect("a number")))
        .collect();
    let our_facts: BTreeMap<&str, u64> = facts.iter().map(|(name, number)| (name.as_str(), *number)).collect();
    assert_eq!(our_facts, c_facts);
}
