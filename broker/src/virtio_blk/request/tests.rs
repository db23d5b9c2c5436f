//! The rules of VIRTIO 1.2, 2.7.4, 2.7.5 and 5.2.6, one by one.

mod arrangement;
mod case;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use self::case::{Case, DATA_GPA, HEADER, RANGE_GPA, READABLE, STATUS, STATUS_GPA, WRITABLE, limits};
use super::*;
use crate::virtio_blk::fuzzing::{HEADER_GPA, Scene, check};
use crate::virtio_blk::{BlkParameters, WriteZeroesLimits};
use crate::virtqueue::ChainError;

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
fn the_last_writable_byte_is_the_status_even_in_a_data_buffer() {
    let (parsed, data) = Case::read(0, 0).buffers(&[HEADER, (DATA_GPA, 513, WRITABLE)]).parse();
    let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.status_gpa, GuestAddress(DATA_GPA + 512));
    assert_eq!(request.writable_bytes, 512);
    assert_eq!(data, [(DATA_GPA, 512)]);
}

#[test]
fn the_header_may_span_descriptors_and_share_one_with_data() {
    let scene_header = [(HEADER_GPA, 3, READABLE), (HEADER_GPA + 3, 1, READABLE), (HEADER_GPA + 4, 12 + 512, READABLE)];
    let (parsed, data) = Case::write(5, 0).buffers(&[&scene_header[..], &[STATUS]].concat()).parse();
    let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.operation, Operation::Write { offset_bytes: 5 * 512 });
    assert_eq!(data, [(HEADER_GPA + 16, 512)]);
}

#[test]
fn descriptors_without_bytes_are_skipped() {
    let nowhere = |is_writable| (0xdead_0000, 0, is_writable);
    let buffers = [
        nowhere(WRITABLE),
        nowhere(READABLE),
        HEADER,
        nowhere(READABLE),
        (DATA_GPA, 512, WRITABLE),
        STATUS,
        nowhere(READABLE),
    ];
    let (parsed, data) = Case::read(1, 0).buffers(&buffers).parse();
    let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.operation, Operation::Read { offset_bytes: 512 });
    assert_eq!(request.status_gpa, GuestAddress(STATUS_GPA));
    assert_eq!(data, [(DATA_GPA, 512)]);
}

#[test]
fn a_buffer_across_two_regions_is_two_segments() {
    let (parsed, data) = Case::read(0, 0).buffers(&[HEADER, (0x1_3f00, 512, WRITABLE), STATUS]).parse();
    assert!(matches!(parsed, Parsed::Request(_)), "{parsed:?}");
    // Two mappings may happen to be adjacent; then they make one segment.
    assert_eq!(data.iter().map(|(_, len_bytes)| len_bytes).sum::<usize>(), 512);
    assert!(data == [(0x1_3f00, 256), (0x1_4000, 256)] || data == [(0x1_3f00, 512)], "{data:x?}");
}

#[test]
fn a_header_may_lie_across_two_regions() {
    let scene = Scene::new();
    scene.put_header(GuestAddress(0x1_3ff5), VIRTIO_BLK_T_IN, 0x1234);
    let buffers = [(0x1_3ff5, 16, READABLE), (DATA_GPA, 512, WRITABLE), STATUS];
    let (parsed, _) =
        Case::read(0, 0).limits(|parameters| parameters.size_bytes = 1 << 30).buffers(&buffers).parse_in(scene);
    let Parsed::Request(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.operation, Operation::Read { offset_bytes: 0x1234 * 512 });
}

#[test]
fn any_part_of_a_chain_may_lie_in_an_indirect_table() {
    for direct in 0..3 {
        assert_eq!(Case::read(8, 4096).parse_with_direct(direct), Case::read(8, 4096).parse(), "{direct}");
    }
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

#[test]
fn the_last_sector_can_be_reached_and_the_next_cannot() {
    assert_eq!(Case::read(2047, 512).request().operation, Operation::Read { offset_bytes: 2047 * 512 });
    for case in
        [Case::read(2047, 1024), Case::write(2048, 512), Case::discard(2048, 1, 0), Case::write_zeroes(2040, 9, 0)]
    {
        let refusal = case.refusal();
        assert!(matches!(refusal, Refusal::BeyondCapacity { .. }), "{refusal}");
        assert_eq!(refusal.status(), Status::IoError);
    }
    assert_eq!(
        Case::read(2048, 512).refusal().to_string(),
        "the 1 sectors from sector 2048 end beyond the capacity of the disk"
    );
}

#[test]
fn a_request_longer_than_the_whole_disk_is_beyond_its_capacity() {
    let one_block = |parameters: &mut BlkParameters| parameters.size_bytes = 512;
    for case in [Case::read(0, 1024), Case::write(1, 1024), Case::discard(0, 2, 0)] {
        let refusal = case.limits(one_block).refusal();
        assert!(matches!(refusal, Refusal::BeyondCapacity { .. }), "{refusal}");
    }
}

#[test]
fn a_sector_number_that_would_overflow_is_beyond_the_capacity() {
    for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55, 1 << 63] {
        assert!(matches!(Case::read(sector, 512).refusal(), Refusal::BeyondCapacity { .. }), "{sector:#x}");
    }
}

#[test]
fn a_partial_sector_is_refused() {
    for len_bytes in [1, 511, 513] {
        assert!(matches!(Case::read(0, len_bytes).refusal(), Refusal::DataLength { .. }), "{len_bytes}");
        assert!(matches!(Case::write(0, len_bytes).refusal(), Refusal::DataLength { .. }), "{len_bytes}");
    }
}

#[test]
fn partial_logical_blocks_are_refused() {
    let large_blocks = |parameters: &mut BlkParameters| parameters.logical_block_bytes = 4096;
    for case in [
        Case::read(1, 4096),
        Case::read(8, 512),
        Case::write(4, 4096),
        Case::discard(0, 4, 0),
        Case::write_zeroes(7, 8, 0),
    ] {
        let refusal = case.limits(large_blocks).refusal();
        assert!(matches!(refusal, Refusal::Unaligned { .. }), "{refusal}");
        assert_eq!(refusal.status(), Status::IoError);
    }
    let request = Case::read(8, 4096).limits(large_blocks).request();
    assert_eq!(request.operation, Operation::Read { offset_bytes: 4096 });
}

#[test]
fn data_in_the_wrong_direction_is_refused() {
    for case in [
        Case::new(VIRTIO_BLK_T_IN, 0, &[(DATA_GPA, 512, READABLE)]),
        Case::new(VIRTIO_BLK_T_OUT, 0, &[(DATA_GPA, 512, WRITABLE)]),
        Case::new(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_GPA, 20, READABLE)]),
        Case::new(VIRTIO_BLK_T_DISCARD, 0, &[(RANGE_GPA, 16, READABLE), (DATA_GPA, 16, WRITABLE)]),
        Case::new(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(RANGE_GPA, 16, READABLE), (DATA_GPA, 1, WRITABLE)]),
    ] {
        let refusal = case.refusal();
        assert!(matches!(refusal, Refusal::WrongDirection { .. }), "{refusal}");
        assert_eq!(refusal.status(), Status::IoError);
    }
}

#[test]
fn a_readable_descriptor_after_a_writable_one_is_refused() {
    let buffers = [HEADER, (DATA_GPA, 512, WRITABLE), (DATA_GPA, 512, READABLE), STATUS];
    assert_eq!(Case::read(0, 0).buffers(&buffers).refusal(), Refusal::ReadableAfterWritable);
    let buffers = [STATUS, HEADER];
    assert_eq!(Case::new(VIRTIO_BLK_T_FLUSH, 0, &[]).buffers(&buffers).refusal(), Refusal::ReadableAfterWritable);
}

#[test]
fn a_short_header_is_refused() {
    for len_bytes in [0, 1, 15] {
        let refusal = Case::read(0, 512).buffers(&[(HEADER_GPA, len_bytes, READABLE), STATUS]).refusal();
        assert_eq!(refusal, Refusal::ShortHeader { len_bytes });
        assert_eq!(refusal.status(), Status::IoError);
    }
}

#[test]
fn a_buffer_partly_outside_memory_is_refused() {
    // In the hole, into the hole, across the end of the address space, and over all of memory.
    for (gpa, len_bytes) in [(0x5000, 512), (0x1_5100, 512), (u64::MAX - 255, 512), (0x1_1000, u32::MAX - 1000)] {
        let buffers = [HEADER, (DATA_GPA, 512, WRITABLE), (gpa, len_bytes, WRITABLE), STATUS];
        let refusal = Case::read(0, 0).buffers(&buffers).refusal();
        assert_eq!(refusal, Refusal::OutsideMemory { gpa: GuestAddress(gpa), len_bytes });
        assert_eq!(refusal.status(), Status::IoError);
    }
}

#[test]
fn a_header_outside_memory_is_refused() {
    let refusal = Case::read(0, 0).buffers(&[(0x5000, 16, READABLE), (DATA_GPA, 512, WRITABLE), STATUS]).refusal();
    assert_eq!(refusal.to_string(), "the buffer of 16 bytes at guest-physical 0x5000 is not in the guest's memory");
}

#[test]
fn too_many_segments_are_refused() {
    let pieces: Vec<_> = (0..3).map(|n| (DATA_GPA + 0x400 * n, 512, WRITABLE)).collect();
    let case = |room| Case { room, ..Case::new(VIRTIO_BLK_T_IN, 0, &pieces) };
    assert_eq!(case(3).request().data_bytes, 3 * 512);
    assert_eq!(case(2).refusal(), Refusal::TooManySegments);
    assert_eq!(case(2).refusal().status(), Status::IoError);
}

#[test]
fn a_chain_without_a_writable_byte_cannot_be_answered() {
    let buffers = [HEADER, (DATA_GPA, 512, READABLE), (STATUS_GPA, 0, WRITABLE)];
    let error = Case::write(0, 0).buffers(&buffers).unanswerable();
    assert_eq!(error, Unanswerable::NoStatus);
    assert_eq!(error.to_string(), "the descriptor chain has no device-writable byte, and so no place for a status");
}

#[test]
fn a_status_outside_memory_cannot_be_written() {
    let error =
        Case::write(0, 512).buffers(&[HEADER, (DATA_GPA, 512, READABLE), (0x1_51ff, 2, WRITABLE)]).unanswerable();
    assert_eq!(error, Unanswerable::StatusOutsideMemory { gpa: GuestAddress(0x1_5200) });
    assert_eq!(error.to_string(), "the status byte at guest-physical 0x15200 is not in the guest's memory");
}

#[test]
fn a_chain_that_breaks_the_rules_of_chains_cannot_be_answered() {
    let mut scene = Scene::new();
    scene.put_header(GuestAddress(HEADER_GPA), VIRTIO_BLK_T_FLUSH, 0);
    scene.put_descriptor(scene.table_gpa(), 0, Descriptor::new(HEADER_GPA, 16, 1, 1));
    scene.put_descriptor(scene.table_gpa(), 1, Descriptor::new(STATUS_GPA, 1, 3, 0));
    let parsed = check(&mut scene, 0, &limits(|_| ()), 0, &mut SegmentList::with_capacity(4));
    assert_eq!(parsed, Parsed::Malformed(Unanswerable::Chain(ChainError::Loop { table_entries: 16 })));
}
