//! Where the header, the data and the status of a request may lie.

use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::super::*;
use super::case::{Case, DATA_GPA, HEADER, RANGE_GPA, READABLE, STATUS, STATUS_GPA, WRITABLE, limits};
use crate::virtio_blk::fuzzing::{HEADER_GPA, Scene, check};
use crate::virtqueue::ChainError;

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
