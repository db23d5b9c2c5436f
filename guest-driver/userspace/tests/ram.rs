//! Guest RAM and its allocator.

mod support;

use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use ringpass_guest::{AllocateError, RamArea, RamRing, RingError};
use ringpass_guest_abi::{Cqe, DriverRing, FixedAddressing, RingLayout, Sqe};
use support::{layout, map, memfd, ram, region};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn guest_and_file_show_each_others_writes() {
    let file = memfd(4 * MIB);
    // Like a PC: low memory, a hole, and the other memory, which starts elsewhere in the file.
    let regions = [region(MIB, MIB, &file, 2 * MIB), region(0, 0xa_0000, &file, 4096)];
    let ram = map(&regions).unwrap();
    assert_eq!(ram.regions().collect::<Vec<_>>(), [(0, 0xa_0000), (MIB, MIB)]);
    let mut allocator = ram.allocator().unwrap();
    let mut low = allocator.reserve(0x9_f000, 4096).unwrap();
    let mut high = allocator.reserve(MIB + 4096, 8192).unwrap();

    assert!(low.write(4090, b"end of"));
    assert!(high.write(1, b"high"));
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 4096 + 0xa_0000 - 6).unwrap();
    assert_eq!(&bytes, b"end of");
    file.read_exact_at(&mut bytes[..4], 2 * MIB + 4097).unwrap();
    assert_eq!(&bytes[..4], b"high");

    file.write_all_at(b"back", 2 * MIB + 8192).unwrap();
    assert!(high.read(4096, &mut bytes[..4]));
    assert_eq!(&bytes[..4], b"back");
    assert_eq!(high.bytes_mut(4096, 4).unwrap(), b"back");
}

#[test]
fn accesses_outside_an_area_or_a_region_are_refused() {
    let (_file, mut allocator) = ram(MIB);
    let mut area = allocator.reserve(4096, 8192).unwrap();
    assert!(area.bytes_mut(0, 8192).is_some());
    assert!(area.bytes_mut(8192, 0).is_some_and(|bytes| bytes.is_empty()));
    for (offset_bytes, len_bytes) in [(1, 8192), (8192, 1), (u64::MAX, 1), (0, u64::MAX)] {
        assert!(area.bytes_mut(offset_bytes, len_bytes).is_none(), "{offset_bytes} {len_bytes}");
    }
    assert!(!area.read(8189, &mut [0; 4]));
    assert!(!area.write(8189, &[0; 4]));
    let ram = allocator.ram();
    assert!(ram.pointer(0, MIB).is_some());
    for (gpa, len_bytes) in [(0, MIB + 1), (MIB, 1), (MIB, 0), (u64::MAX, 1), (1, u64::MAX)] {
        assert!(ram.pointer(gpa, len_bytes).is_none(), "{gpa} {len_bytes}");
    }
}

#[test]
fn invalid_regions_are_refused_with_the_reason() {
    let file = memfd(MIB);
    let read_only = std::fs::File::open("/dev/zero").unwrap();
    let cases = [
        (vec![], "at least one region"),
        (vec![region(0, 0, &file, 0)], "whole 4096-byte pages, at least one"),
        (vec![region(0, 4095, &file, 0)], "(0xfff bytes"),
        (vec![region(512, 4096, &file, 0)], "guest-physical 0x200"),
        (vec![region(0, 4096, &file, 1)], "file offset 0x1"),
        (vec![region((16 << 40) - 4096, 8192, &file, 0)], "does not end below 16 TiB"),
        (vec![region(!4095, 8192, &file, 0)], "does not end below 16 TiB"),
        (vec![region(8192, 4096, &file, 0), region(0, 12288, &file, 0)], "0x0 (0x3000 bytes) and 0x2000 overlap"),
        (vec![region(0, MIB, &file, 4096)], "ends at byte 0x101000 of its file, which has 0x100000 bytes"),
        (vec![region(0, 4096, &file, !4095)], "of its file, which has 0x100000 bytes"),
        (vec![region(0, 4096, &read_only, 0)], "of its file, which has 0x0 bytes"),
    ];
    for (regions, message) in cases {
        let error = map(&regions).unwrap_err().to_string();
        assert!(error.contains(message), "{error} should contain {message}");
    }
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(4096).unwrap();
    let read_only = std::fs::File::open(path.path()).unwrap();
    let error = map(&[region(0, 4096, &read_only, 0)]).unwrap_err().to_string();
    assert!(
        error.contains("cannot map the region of 0x1000 bytes at guest-physical 0x0: Permission denied"),
        "{error}"
    );
}

#[test]
fn a_second_allocator_is_refused() {
    let (_file, allocator) = ram(MIB);
    let error = allocator.ram().allocator().unwrap_err().to_string();
    assert!(error.contains("already been taken"), "{error}");
}

#[test]
fn a_short_area_crosses_no_boundary_and_no_area_crosses_a_hole() {
    let file = memfd(13 * MIB);
    let regions = [region(0, MIB, &file, 0), region(2 * MIB, 12 * MIB, &file, MIB)];
    let mut allocator = map(&regions).unwrap().allocator().unwrap();
    // Too long for the low region and for the rest of the first 4 MiB.
    let short = allocator.allocate(3 * MIB).unwrap();
    // Longer than what one request can name.
    let long = allocator.allocate(6 * MIB).unwrap();
    assert_eq!((short.gpa(), long.gpa()), (4 * MIB, 7 * MIB));
    let error = allocator.allocate(3 * MIB).unwrap_err();
    let (len_bytes, free_bytes) = (3 * MIB, MIB + 2 * MIB + MIB);
    let expected = AllocateError::NoRoom { len_bytes, align_bytes: 4096, free_bytes, longest_bytes: 2 * MIB };
    assert_eq!(error, expected);
    assert!(error.to_string().contains("4194304 bytes are free, the longest piece has 2097152"), "{error}");
    assert!(allocator.reserve(13 * MIB, 2 * MIB).is_err(), "the region ends at 14 MiB");
    assert_eq!(allocator.allocate(2 * MIB).unwrap().gpa(), 2 * MIB);
    drop((short, long));
    let again = allocator.allocate(8 * MIB).unwrap();
    assert_eq!(again.gpa(), 2 * MIB, "the allocator hands out a dropped area again");
}

#[test]
fn an_area_has_the_requested_alignment() {
    let (_file, mut allocator) = ram(MIB);
    let first = allocator.allocate(4096).unwrap();
    let aligned = allocator.allocate_aligned(4096, 65536).unwrap();
    assert_eq!((first.gpa(), aligned.gpa()), (0, 65536));
    for align_bytes in [0, 2048, 12288] {
        let error = allocator.allocate_aligned(4096, align_bytes).unwrap_err();
        assert_eq!(error, AllocateError::Alignment { align_bytes });
    }
    let error = allocator.allocate_aligned(4096, 4 * MIB).unwrap_err();
    assert!(error.to_string().contains("holds 4096 bytes at a multiple of 4194304: 1040384 bytes are free"), "{error}");
}

#[test]
fn the_areas_of_a_ring_are_free_only_after_its_end() {
    let (_file, mut allocator) = ram(MIB);
    drop(allocator.ring(0, &layout(), 4096).unwrap());
    assert_eq!(allocator.free_bytes(), MIB - 8192, "the kernel may still write to them");
    let (rings, sqes) = allocator.ring(8192, &layout(), 12288).unwrap().into_areas();
    assert_eq!((rings.gpa(), sqes.gpa(), allocator.free_bytes()), (8192, 12288, MIB - 16384));
    drop((rings, sqes));
    assert_eq!(allocator.free_bytes(), MIB - 8192);
}

#[test]
fn a_place_that_is_not_free_is_refused() {
    let (_file, mut allocator) = ram(MIB);
    let taken = allocator.reserve(8192, 100).unwrap();
    assert_eq!(taken.len_bytes(), 4096);
    for (gpa, len_bytes) in
        [(8192, 1), (0x8_0001, 1), (4096, 8192), (12287, 1), (MIB, 1), (MIB - 4096, 8192), (u64::MAX, 2)]
    {
        let error = allocator.reserve(gpa, len_bytes).unwrap_err();
        assert_eq!(error, AllocateError::NotFree { gpa, len_bytes });
        assert!(error.to_string().contains("cannot be reserved"), "{error}");
    }
    assert_eq!(allocator.allocate(0).unwrap_err(), AllocateError::Empty);
    assert_eq!(allocator.reserve(0, 0).unwrap_err(), AllocateError::Empty);
    assert!(allocator.allocate(u64::MAX).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(prop_file())),
        cases: 64,
        ..ProptestConfig::default()
    })]

    #[test]
    fn areas_are_ram_and_do_not_overlap(
        requests in prop::collection::vec((any::<bool>(), 0u64..900, 1u64..200_000_000), 1..60),
    ) {
        let file = memfd(4 * GIB);
        let regions = [(0, 640 << 10), (MIB, GIB), (2 * GIB, GIB + 300 * MIB)];
        let mapped: Vec<_> = regions.iter().map(|&(gpa, len_bytes)| region(gpa, len_bytes, &file, 0)).collect();
        let mut allocator = map(&mapped).unwrap().allocator().unwrap();
        let mut areas: Vec<RamArea> = Vec::new();
        for (choose_place, place, len_bytes) in requests {
            let area = if choose_place {
                allocator.reserve(place * 4 * MIB, len_bytes)
            } else {
                allocator.allocate(len_bytes)
            };
            let Ok(area) = area else { continue };
            let (first, last) = (area.gpa(), area.gpa() + area.len_bytes() - 1);
            prop_assert!(area.len_bytes() >= len_bytes && area.gpa() % 4096 == 0);
            if !choose_place && area.len_bytes() <= 4 * MIB {
                prop_assert_eq!(first / (4 * MIB), last / (4 * MIB));
            }
            prop_assert!(regions.iter().any(|&(gpa, len_bytes)| gpa <= first && last < gpa + len_bytes));
            for other in &areas {
                prop_assert!(last < other.gpa() || other.gpa() + other.len_bytes() <= first);
            }
            areas.push(area);
        }
    }
}

fn prop_file() -> proptest::test_runner::FileFailurePersistence {
    proptest::test_runner::FileFailurePersistence::WithSource("regressions")
}

#[test]
fn driver_and_device_share_a_ring_through_the_file() {
    let (file, mut allocator) = ram(MIB);
    let ring = allocator.ring(0x1_0000, &layout(), 0x2_0000).unwrap();
    assert_eq!((ring.rings().gpa(), ring.sqes().gpa()), (0x1_0000, 0x2_0000));
    assert!(allocator.reserve(0x1_0000, 1).is_err(), "the allocator must not hand out the memory of the ring");
    let mut driver = DriverRing::new(ring, layout()).unwrap();
    let address = FixedAddressing::new(1 << 40, 22).unwrap().resolve(0x3000, 4096).unwrap();
    let sqe = Sqe::read_fixed(address, 4096, 0x7000, 42);
    driver.push(&sqe).unwrap();
    let mut tail = [0; 4];
    file.read_exact_at(&mut tail, 0x1_0004).unwrap();
    assert_eq!(u32::from_ne_bytes(tail), 0);
    assert!(driver.publish());
    file.read_exact_at(&mut tail, 0x1_0004).unwrap();
    assert_eq!(u32::from_ne_bytes(tail), 1);
    let mut entry = [0; 64];
    file.read_exact_at(&mut entry, 0x2_0000).unwrap();
    let words = entry.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
    assert!(words.eq(sqe.to_words()));

    assert_eq!(driver.reap(), None);
    file.write_all_at(&42u64.to_ne_bytes(), 0x1_0000 + 128).unwrap();
    file.write_all_at(&4096i32.to_ne_bytes(), 0x1_0000 + 136).unwrap();
    file.write_all_at(&1u32.to_ne_bytes(), 0x1_0000 + 68).unwrap();
    assert_eq!(driver.reap(), Some(Cqe { user_data: 42, res: 4096, flags: 0 }));
    file.read_exact_at(&mut tail, 0x1_0000 + 64).unwrap();
    assert_eq!(u32::from_ne_bytes(tail), 1, "the CQ head");
}

#[test]
fn a_ring_with_an_invalid_layout_or_place_is_refused() {
    let (_file, mut allocator) = ram(MIB);
    let broken = RingLayout { cq_entries: 3, ..layout() };
    let error = allocator.ring(0, &broken, 4096).unwrap_err().to_string();
    assert!(error.contains("cq_entries is 3"), "{error}");
    let error = allocator.ring(MIB, &layout(), 0).unwrap_err().to_string();
    assert!(
        error.contains("the ring's rings area cannot be at its place: the 4096 bytes at guest-physical 0x100000"),
        "{error}"
    );
    let error = allocator.ring(0, &layout(), 0).unwrap_err().to_string();
    assert!(error.contains("the ring's SQE area cannot be at its place"), "{error}");
    let (rings, sqes) = (allocator.allocate(4096).unwrap(), allocator.allocate(4096).unwrap());
    let long = RingLayout { sqes_bytes: 8192, ..layout() };
    let error = RamRing::new(rings, sqes, &long).unwrap_err();
    assert_eq!(error, RingError::TooShort { what: "SQE", area_bytes: 4096, needed_bytes: 8192 });
    assert!(error.to_string().contains("SQE area of 4096 bytes is shorter than the 8192 bytes"), "{error}");
}
