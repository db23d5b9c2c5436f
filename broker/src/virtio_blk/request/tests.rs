//! The rules of VIRTIO 1.2, 2.7.4, 2.7.5 and 5.2.6, one by one.

mod arrangement;
mod buffers;
mod case;
mod ranges;
mod sectors;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};
use vm_memory::GuestAddress;

use self::case::{Case, DATA_GPA, READABLE, STATUS, STATUS_GPA, WRITABLE};
use super::*;
use crate::virtio_blk::BlkParameters;

#[test]
fn a_read_has_an_offset_in_bytes_and_writable_data() {
    let (parsed, data) = Case::read(8, 4096).parse();
    let expected = Request {
        operation: Operation::Read { offset_bytes: 4096 },
        data_bytes: 4096,
        status_gpa: GuestAddress(STATUS_GPA),
        writable_bytes: 4096,
    };
    assert_eq!(parsed, Parsed::Request(expected));
    assert_eq!(data, [(DATA_GPA, 4096)]);
}

#[test]
fn a_write_has_readable_data_and_room_for_the_status_only() {
    let (parsed, data) = Case::write(2, 512).parse();
    let expected = Request {
        operation: Operation::Write { offset_bytes: 1024 },
        data_bytes: 512,
        status_gpa: GuestAddress(STATUS_GPA),
        writable_bytes: 0,
    };
    assert_eq!(parsed, Parsed::Request(expected));
    assert_eq!(data, [(DATA_GPA, 512)]);
}

#[test]
fn a_flush_ignores_its_data() {
    for data in [&[][..], &[(DATA_GPA, 512, WRITABLE)], &[(DATA_GPA, 7, READABLE)]] {
        let (parsed, segments) = Case::new(VIRTIO_BLK_T_FLUSH, 0, data).parse();
        let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
        assert_eq!((request.operation, request.data_bytes), (Operation::Flush, 0));
        assert!(segments.is_empty());
    }
}

#[test]
fn the_id_goes_into_the_first_twenty_bytes() {
    for len_bytes in [20, 21, 4096] {
        let (parsed, data) = Case::new(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_GPA, len_bytes, WRITABLE)]).parse();
        let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
        assert_eq!((request.operation, request.data_bytes), (Operation::GetId, 20));
        assert_eq!(request.writable_bytes, len_bytes);
        assert_eq!(data, [(DATA_GPA, 20)]);
    }
}

#[test]
fn a_buffer_too_short_for_the_id_is_refused() {
    let refusal = Case::new(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_GPA, 19, WRITABLE)]).refusal();
    assert_eq!(refusal.to_string(), "a request of type 8 cannot have 19 bytes of data");
    assert_eq!(refusal.status(), Status::IoError);
}

#[test]
fn a_request_without_sectors_is_answered_at_once() {
    for case in [Case::read(0, 0), Case::write(2048, 0), Case::discard(3, 0, 0), Case::write_zeroes(2048, 0, 1)] {
        let Parsed::Answer(answer) = case.parse().0 else { panic!("{:?}", case.parse()) };
        assert_eq!((answer.status, answer.refusal), (Status::Ok, None));
        assert_eq!((answer.status_gpa.0, answer.used_bytes()), (STATUS_GPA, 1));
    }
}

#[test]
fn unknown_types_are_unsupported() {
    for request_type in [2, 3, 5, 10, 14, 15, 16, 26, 0x8000_0000, 0x8000_0001, u32::MAX] {
        let refusal = Case::new(request_type, 0, &[(DATA_GPA, 512, WRITABLE)]).refusal();
        assert_eq!(refusal, Refusal::UnknownType { request_type });
        assert_eq!(refusal.status(), Status::Unsupported);
    }
}

#[test]
fn unoffered_operations_are_unsupported() {
    for case in [Case::discard(0, 1, 0), Case::write_zeroes(0, 1, 0)] {
        let refusal = case.limits(|parameters| (parameters.discard, parameters.write_zeroes) = (None, None)).refusal();
        assert!(matches!(refusal, Refusal::NotNegotiated { .. }), "{refusal}");
        assert_eq!(refusal.status(), Status::Unsupported);
    }
}

#[test]
fn operations_without_their_feature_are_unsupported_and_others_work() {
    let [discard, write_zeroes] = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES].map(|bit| 1_u64 << bit);
    let refused = |case: Case, features| case.features(features).refusal();
    let refusal = refused(Case::discard(0, 1, 0), !discard);
    assert_eq!(refusal.to_string(), "a request of type 11 needs VIRTIO_BLK_F_DISCARD, which was not negotiated");
    assert_eq!(refusal.status(), Status::Unsupported);
    let refusal = refused(Case::write_zeroes(0, 1, 1), !write_zeroes);
    assert_eq!(refusal.to_string(), "a request of type 13 needs VIRTIO_BLK_F_WRITE_ZEROES, which was not negotiated");
    assert_eq!(refusal.status(), Status::Unsupported);
    Case::discard(0, 1, 0).features(discard).request();
    Case::write_zeroes(0, 1, 1).features(write_zeroes).request();
    for case in [
        Case::read(0, 512),
        Case::write(0, 512),
        Case::new(VIRTIO_BLK_T_FLUSH, 0, &[]),
        Case::new(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_GPA, 20, WRITABLE)]),
    ] {
        case.features(0).request();
    }
}

#[test]
fn on_a_read_only_disk_writes_fail_and_other_changes_are_unsupported() {
    let read_only = |parameters: &mut BlkParameters| parameters.read_only = true;
    for case in [Case::write(0, 512), Case::write(0, 0), Case::write(0, 512).features(0)] {
        let refusal = case.limits(read_only).refusal();
        assert_eq!(refusal, Refusal::ReadOnly { request_type: VIRTIO_BLK_T_OUT });
        assert_eq!(refusal.status(), Status::IoError);
    }
    // The disk does not offer them, and with an unknown flag VIRTIO allows no other status (VIRTIO 1.2, 5.2.6.2).
    for case in
        [Case::discard(0, 1, 0), Case::discard(0, 1, 1), Case::write_zeroes(0, 1, 0), Case::write_zeroes(0, 1, 2)]
    {
        assert_eq!(case.limits(read_only).refusal().status(), Status::Unsupported);
    }
    assert!(matches!(Case::read(0, 512).limits(read_only).parse().0, Parsed::Request(_)));
    assert!(matches!(Case::new(VIRTIO_BLK_T_FLUSH, 0, &[]).limits(read_only).parse().0, Parsed::Request(_)));
}

/// VIRTIO 1.2, 2.7.8.2.
#[test]
fn the_used_length_includes_the_status_only_after_complete_data() {
    for (writable_bytes, written_bytes, used_bytes) in
        [(0, 0, 1), (512, 0, 0), (512, 1, 1), (512, 511, 511), (512, 512, 513), (u32::MAX, u32::MAX, u32::MAX)]
    {
        let status_gpa = GuestAddress(STATUS_GPA);
        let answer = Answer { status: Status::Ok, status_gpa, writable_bytes, written_bytes, refusal: None };
        assert_eq!(answer.used_bytes(), used_bytes, "{written_bytes} of {writable_bytes}");
    }
}

#[test]
fn a_refused_request_writes_only_its_status() {
    for (case, used_bytes) in [
        (Case::read(u64::MAX, 512), 0),
        (Case::new(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_GPA, 19, WRITABLE)]), 0),
        (Case::new(VIRTIO_BLK_T_GET_ID, 0, &[]), 1),
        (Case::new(77, 0, &[(DATA_GPA, 512, WRITABLE)]), 0),
        (Case::write(u64::MAX, 512), 1),
        (Case::discard(0, 1, 0).features(0), 1),
        // Descriptors behind the error count as well.
        (Case::read(0, 0).buffers(&[(0x5000, 16, READABLE), (DATA_GPA, 512, WRITABLE), STATUS]), 0),
    ] {
        let Parsed::Answer(answer) = case.parse().0 else { panic!("{:?}", case.parse()) };
        assert!(answer.refusal.is_some());
        assert_eq!(answer.used_bytes(), used_bytes, "{:?}", answer.refusal);
    }
}
