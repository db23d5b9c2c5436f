//! The numbers in the hand-written tables of `docs/abi.md`.

use std::mem::offset_of;

use ringpass_guest_abi::attach::AttachPayload;
use ringpass_guest_abi::completion::{Completed, RES_EAGAIN, RES_ECANCELED, RES_EFAULT, RES_EINTR, RES_ENOMEM};
use ringpass_guest_abi::control::{
    ACKNOWLEDGED_OFFSET_BYTES, ANNOUNCED_OFFSET_BYTES, DETACH_OFFSET_BYTES, END_REASON_OFFSET_BYTES, RING_OFFSET_BYTES,
    RingRecord,
};
use ringpass_guest_abi::probe::{self, ProbeAnswer, VERSION};
use ringpass_guest_abi::request::{ErrorCode, RequestType, Retry};

use crate::in_repository;

/// `| offset | `field` |` for fields of a structure that starts at some offset of the table.
macro_rules! rows {
    ($start:expr, $prefix:literal, $type:ident { $($field:ident),* $(,)? }) => {
        [$(($start as usize + offset_of!($type, $field), concat!($prefix, stringify!($field)))),*]
    };
}

#[test]
fn the_numbers_in_the_specification_match_the_crate() {
    let document = std::fs::read_to_string(in_repository("docs/abi.md")).expect("docs/abi.md");
    let lines: Vec<&str> = document.lines().collect();
    let has_line = |start: &str| assert!(lines.iter().any(|line| line.starts_with(start)), "no line {start:?}");

    for code in ErrorCode::ALL {
        let again = match code.retry() {
            Retry::No if code.is_ok() => "-",
            Retry::No => "no",
            Retry::Probe => "PROBE",
            Retry::Event => "EVENT",
            Retry::Later => "later",
        };
        has_line(&format!("| {} | {} | {again} |", code as u32, format!("{code:?}").to_uppercase()));
    }
    has_line(&format!("# The ringpass guest ABI, version {VERSION}"));
    has_line(&format!("| 0 | `le16 version` | {VERSION} |"));
    for (bit, name, feature) in [
        (0, "F_DSYNC", probe::F_DSYNC),
        (1, "F_IOPRIO", probe::F_IOPRIO),
        (2, "F_WRITE_STREAM", probe::F_WRITE_STREAM),
        (3, "F_DONTCACHE", probe::F_DONTCACHE),
        (4, "F_MODERATION", probe::F_MODERATION),
    ] {
        assert_eq!(feature, 1 << bit);
        has_line(&format!("| {bit} | {name} |"));
    }
    let again = [RES_EINTR, RES_EAGAIN, RES_ENOMEM, RES_EFAULT, RES_ECANCELED];
    let names = ["EINTR", "EAGAIN", "ENOMEM", "EFAULT", "ECANCELED"];
    let results: Vec<_> = again.into_iter().zip(names).map(|(res, name)| format!("{res} ({name})")).collect();
    has_line(&format!("| {} | again |", results.join(", ")));
    assert!(again.into_iter().all(|res| Completed::of(res, 512) == Completed::Again { done_bytes: 0 }));
    for request in RequestType::ALL {
        let number = format!("{:08x}", request.number());
        let name = format!("{request:?}").to_uppercase();
        let start = format!("| {name} | 0x{}_{} |", &number[..4], &number[4..]);
        has_line(&start);
        let line = lines.iter().find(|line| line.starts_with(&start)).expect("just found");
        let bytes = [request.payload_bytes(), request.answer_bytes()];
        let cells: Vec<&str> = line.split('|').skip(4).collect();
        for (cell, bytes) in cells.into_iter().zip(bytes) {
            let says_bytes = cell.contains(&format!("{bytes} bytes"));
            assert!(says_bytes || cell.trim() == "-" && bytes == 0 || cell.trim() == "`ringpass_outcome`", "{line}");
        }
    }
    let fields = rows!(
        0,
        "",
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
    )
    .into_iter()
    .chain(rows!(0, "", AttachPayload { version, reserved, features, sq_entries, cq_entries, control_gpa, areas }));
    for (offset_bytes, field) in fields {
        let is_row = |line: &&&str| {
            let rest = line.strip_prefix(&format!("| {offset_bytes} | `le"));
            rest.and_then(|rest| rest.split_once(' ')).is_some_and(|(_, name)| name.starts_with(field))
        };
        assert!(lines.iter().find(is_row).is_some(), "no line for {field} at {offset_bytes}");
    }
    let words = rows!(
        RING_OFFSET_BYTES,
        "ring.",
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
        }
    );
    for (offset_bytes, word) in words.into_iter().chain([
        (ANNOUNCED_OFFSET_BYTES as usize, "announced"),
        (END_REASON_OFFSET_BYTES as usize, "end_reason"),
        (ACKNOWLEDGED_OFFSET_BYTES as usize, "acknowledged"),
        (DETACH_OFFSET_BYTES as usize, "detach"),
    ]) {
        has_line(&format!("| {offset_bytes} | `{word}` |"));
    }
}
