//! The range of a discard and of a write-zeroes.

use vm_memory::GuestAddress;

use super::super::*;
use super::case::{Case, DATA_GPA, HEADER, RANGE_GPA, READABLE, STATUS, WRITABLE};
use crate::virtio_blk::WriteZeroesLimits;
use crate::virtio_blk::fuzzing::Scene;

#[test]
fn a_discard_has_its_range_in_bytes_and_no_data() {
    let (parsed, data) = Case::discard(64, 64, 0).parse();
    let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.operation, Operation::Discard(ByteRange { offset_bytes: 32768, len_bytes: 32768 }));
    assert_eq!((request.data_bytes, request.writable_bytes), (0, 0));
    assert!(data.is_empty());
}

#[test]
fn write_zeroes_unmaps_only_if_the_driver_asks_and_the_device_can() {
    for (flags, may_unmap, unmap) in [(0, true, false), (1, true, true), (1, false, false)] {
        let case = Case::write_zeroes(1, 2, flags).limits(|parameters| {
            parameters.write_zeroes = Some(WriteZeroesLimits { max_sectors: 32, may_unmap });
        });
        let range = ByteRange { offset_bytes: 512, len_bytes: 1024 };
        assert_eq!(case.request().operation, Operation::WriteZeroes { range, unmap });
    }
}

#[test]
fn invalid_flags_are_unsupported_regardless_of_other_errors() {
    for case in [
        Case::discard(0, 1, 1),
        Case::discard(0, 1, 2),
        Case::write_zeroes(0, 1, 2),
        Case::write_zeroes(0, 1, 0x8000_0001),
        Case::discard(u64::MAX, u32::MAX, 1),
        Case::discard(0, 1, 1).buffers(&[HEADER, (RANGE_GPA, 16, READABLE), (DATA_GPA, 1, WRITABLE), STATUS]),
        // The same with range and wrong data in one piece of memory.
        Case::write_zeroes(0, 1, 4).buffers(&[
            HEADER,
            (RANGE_GPA, 16, READABLE),
            (RANGE_GPA + 16, 8, WRITABLE),
            STATUS,
        ]),
    ] {
        let refusal = case.refusal();
        assert!(matches!(refusal, Refusal::Flags { .. }), "{refusal}");
        assert_eq!(refusal.status(), Status::Unsupported);
    }
}

#[test]
fn a_second_range_is_unsupported() {
    let case = Case::discard(0, 1, 0);
    let refusal = case.buffers(&[HEADER, (RANGE_GPA, 32, READABLE), STATUS]).refusal();
    assert_eq!(refusal, Refusal::TooManyRanges { request_type: VIRTIO_BLK_T_DISCARD, ranges: 2 });
    assert_eq!(refusal.status(), Status::Unsupported);
}

#[test]
fn a_partial_range_is_refused() {
    for len_bytes in [0, 1, 15, 17] {
        let refusal = Case::discard(0, 1, 0).buffers(&[HEADER, (RANGE_GPA, len_bytes, READABLE), STATUS]).refusal();
        let expected = Refusal::DataLength { request_type: VIRTIO_BLK_T_DISCARD, len_bytes };
        assert_eq!(refusal, expected);
    }
}

#[test]
fn a_range_may_be_scattered() {
    let scene = Scene::new();
    let range = [&7_u64.to_le_bytes()[..], &9_u32.to_le_bytes(), &[0; 4]].concat();
    let mut buffers = vec![HEADER];
    for (gpa, part) in [(DATA_GPA + 64, &range[..5]), (DATA_GPA, &range[5..11]), (0x1_3ffd, &range[11..])] {
        scene.put(GuestAddress(gpa), part);
        buffers.push((gpa, part.len() as u32, READABLE));
    }
    buffers.push(STATUS);
    let (parsed, _) = Case::discard(0, 0, 0).buffers(&buffers).parse_in(scene);
    let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.operation, Operation::Discard(ByteRange { offset_bytes: 7 * 512, len_bytes: 9 * 512 }));
}

#[test]
fn a_range_longer_than_offered_is_refused() {
    assert!(matches!(Case::discard(0, 64, 0).parse().0, Parsed::Request(_)));
    assert!(matches!(Case::write_zeroes(0, 32, 0).parse().0, Parsed::Request(_)));
    let refusal = Case::discard(0, 65, 0).refusal();
    assert_eq!(refusal.to_string(), "a range of 65 sectors is longer than a request of type 11 may have");
    assert!(matches!(Case::write_zeroes(0, 33, 0).refusal(), Refusal::RangeTooLong { sectors: 33, .. }));
}
