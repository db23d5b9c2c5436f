//! Which sectors a request may name.

use super::super::*;
use super::case::Case;
use crate::virtio_blk::BlkParameters;

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
