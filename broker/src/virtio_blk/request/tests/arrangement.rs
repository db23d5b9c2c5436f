//! VIRTIO 1.2, 2.7.4.1: a device makes no assumptions about the arrangement of descriptors.

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::super::*;
use super::case::{DATA_GPA, limits};
use crate::virtio_blk::fuzzing::{Scene, check, place};

/// A request in an arbitrary arrangement: any cuts, in any number of descriptors, partly in an indirect table.
#[derive(Clone, Debug)]
struct Arrangement {
    is_write: bool,
    first_block: u64,
    blocks: u64,
    cuts: Vec<usize>,
    direct: usize,
}

fn arrangement() -> impl Strategy<Value = Arrangement> {
    (any::<bool>(), 0..200_u64, 1..8_u64, proptest::collection::vec(0..4200_usize, 0..10), 0..20_usize).prop_map(
        |(is_write, first_block, blocks, cuts, direct)| Arrangement { is_write, first_block, blocks, cuts, direct },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_arrangement_of_a_request_does_not_change_its_meaning(arrangement in arrangement()) {
        let Arrangement { is_write, first_block, blocks, cuts, direct } = arrangement;
        let data_bytes = 512 * blocks as usize;
        // The request as one string of bytes, cut anywhere; a gap precedes each piece.
        let total_bytes = 16 + data_bytes + 1;
        let writable_from = if is_write { total_bytes - 1 } else { 16 };
        let mut ends: Vec<_> = cuts.into_iter().map(|cut| cut % total_bytes).chain([writable_from, total_bytes]).collect();
        ends.sort_unstable();
        let mut header = [0; 16];
        header[0] = u8::from(is_write);
        header[8..].copy_from_slice(&first_block.to_le_bytes());

        let mut scene = Scene::new();
        let mut start = 0;
        let mut buffers = Vec::new();
        let mut expected_data = Vec::new();
        let gpa_of = |byte: usize, piece: usize| DATA_GPA + (byte + 7 * piece) as u64;
        for (piece, &end) in ends.iter().enumerate() {
            buffers.push((gpa_of(start, piece), (end - start) as u32, start >= writable_from));
            for byte in start..end {
                if let Some(&value) = header.get(byte) {
                    scene.put(GuestAddress(gpa_of(byte, piece)), &[value]);
                } else if byte < 16 + data_bytes {
                    expected_data.push(gpa_of(byte, piece));
                }
            }
            start = end;
        }
        place(&scene, 0, &buffers, direct);
        let mut segments = SegmentList::with_capacity(16);
        let parsed = check(&mut scene, 0, &limits(|_| ()), 0, &mut segments);

        let offset_bytes = 512 * first_block;
        let expected = Request {
            operation: if is_write { Operation::Write { offset_bytes } } else { Operation::Read { offset_bytes } },
            data_bytes: data_bytes as u32,
            status_gpa: GuestAddress(gpa_of(total_bytes - 1, ends.len() - 1)),
            writable_bytes: (total_bytes - writable_from - 1) as u32,
        };
        prop_assert_eq!(parsed, Parsed::Request(expected));
        let data: Vec<_> = segments
            .iter()
            .flat_map(|segment| (0..segment.len_bytes as u64).map(move |n| segment.gpa.0 + n))
            .collect();
        prop_assert_eq!(data, expected_data);
    }
}
