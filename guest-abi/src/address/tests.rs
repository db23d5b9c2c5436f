//! [`FixedAddressing::resolve`] against its definition, byte by byte in 128-bit arithmetic.

use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;
/// The highest base.
const BASE_MAX: u64 = u64::MAX - (GPA_LIMIT - 1);

/// Addresses of every size, most of them close to where a slot, the address space or the integers end.
fn gpa() -> impl Strategy<Value = u64> {
    let near = |edge: u64| (0..=4096u64).prop_map(move |below| edge.wrapping_add(2048).wrapping_sub(below));
    let slot_edge = (SLOT_SHIFT_MIN..=SLOT_SHIFT_MAX, 0..=u64::from(SLOT_COUNT_MAX))
        .prop_flat_map(move |(shift, slot)| near(slot << shift));
    prop_oneof![any::<u64>(), 0..GPA_LIMIT, slot_edge, near(GPA_LIMIT), near(0)]
}

fn len_bytes() -> impl Strategy<Value = u32> {
    let boundary = SEGMENT_BOUNDARY_BYTES as u32;
    prop_oneof![any::<u32>(), 0..=4096u32, (boundary - 2048)..=(boundary + 2048)]
}

/// Rules that a device gives.
fn addressing() -> impl Strategy<Value = FixedAddressing> {
    let max = BASE_MAX / GIB;
    let base = prop_oneof![3 => 1..=1u64 << 17, 1 => (max - 1024)..=max];
    (base, SLOT_SHIFT_MIN..=SLOT_SHIFT_MAX)
        .prop_map(|(gibibytes, shift)| FixedAddressing::new(gibibytes * GIB, shift).expect("in range"))
}

fn with_shift(shift: u32) -> FixedAddressing {
    FixedAddressing::new(GIB, shift).expect("in range")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn a_segment_is_resolved_exactly_when_no_boundary_cuts_it_and_a_slot_holds_it(
        gpa in gpa(), len_bytes in len_bytes(), addressing in addressing(),
    ) {
        let (first, end) = (u128::from(gpa), u128::from(gpa) + u128::from(len_bytes));
        let boundary = u128::from(SEGMENT_BOUNDARY_BYTES);
        let limit_gpa = u64::from(SLOT_COUNT_MAX) << addressing.slot_shift();
        let expected = if len_bytes == 0 {
            Err(AddressError::Empty)
        } else if end > u128::from(limit_gpa) {
            Err(AddressError::TooHigh { gpa, limit_gpa })
        } else if end > (first / boundary + 1) * boundary {
            Err(AddressError::CrossesBoundary { gpa, len_bytes })
        } else {
            let slot = gpa / addressing.slot_bytes();
            Ok(FixedAddress { buf_index: slot as u16, addr: addressing.iova_base() + gpa })
        };
        prop_assert_eq!(addressing.resolve(gpa, len_bytes), expected);
    }

    #[test]
    fn the_kernel_finds_a_resolved_segment_inside_its_buffer(
        gpa in gpa(), len_bytes in len_bytes(), addressing in addressing(),
    ) {
        if let Ok(FixedAddress { buf_index, addr }) = addressing.resolve(gpa, len_bytes) {
            // In 128 bits: the last slot may end where the 64-bit address space does.
            let slot_bytes = u128::from(addressing.slot_bytes());
            let buffer_start = u128::from(addressing.iova_base()) + u128::from(buf_index) * slot_bytes;
            let segment_end = u128::from(addr) + u128::from(len_bytes);
            prop_assert!(u128::from(addr) >= buffer_start);
            prop_assert!(segment_end <= buffer_start + slot_bytes);
            prop_assert!(segment_end <= 1 << 64);
        }
    }

    /// So a driver cuts its requests once, and sends them on any later ring.
    #[test]
    fn a_segment_that_fits_slots_of_one_size_fits_larger_slots(
        gpa in gpa(), len_bytes in len_bytes(), shift in SLOT_SHIFT_MIN..SLOT_SHIFT_MAX,
    ) {
        if with_shift(shift).resolve(gpa, len_bytes).is_ok() {
            prop_assert!(with_shift(shift + 1).resolve(gpa, len_bytes).is_ok());
        }
    }
}

#[test]
fn the_last_byte_of_the_address_space_is_in_the_last_slot() {
    for shift in [SLOT_SHIFT_MIN, SLOT_SHIFT_MAX] {
        let addressing = with_shift(shift);
        let limit_gpa = addressing.limit_gpa();
        let last = FixedAddress { buf_index: 16383, addr: GIB + limit_gpa - 1 };
        assert_eq!(addressing.resolve(limit_gpa - 1, 1), Ok(last));
        let too_high = |gpa| Err(AddressError::TooHigh { gpa, limit_gpa });
        assert_eq!(addressing.resolve(limit_gpa - 1, 2), too_high(limit_gpa - 1));
        assert_eq!(addressing.resolve(limit_gpa, 1), too_high(limit_gpa));
        assert_eq!(addressing.resolve(u64::MAX, u32::MAX), too_high(u64::MAX));
    }
    assert_eq!(with_shift(SLOT_SHIFT_MIN).limit_gpa(), 64 * GIB);
    assert_eq!(with_shift(SLOT_SHIFT_MAX).limit_gpa(), GPA_LIMIT);
}

#[test]
fn a_whole_slot_of_the_smallest_size_is_one_segment_and_one_byte_more_is_not() {
    let addressing = with_shift(SLOT_SHIFT_MIN);
    let slot = SEGMENT_BOUNDARY_BYTES;
    let second = FixedAddress { buf_index: 1, addr: GIB + slot };
    assert_eq!(addressing.resolve(slot, slot as u32), Ok(second));
    let crossing = AddressError::CrossesBoundary { gpa: slot, len_bytes: slot as u32 + 1 };
    assert_eq!(addressing.resolve(slot, slot as u32 + 1), Err(crossing));
    assert_eq!(with_shift(SLOT_SHIFT_MAX).resolve(slot, slot as u32 + 1), Err(crossing));
}

#[test]
fn a_rule_that_the_kernel_could_not_follow_is_refused() {
    for base in [0, 4096, GIB + 4096, u64::MAX, BASE_MAX + GIB] {
        assert_eq!(FixedAddressing::new(base, 22), Err(AddressingError::Base(base)));
    }
    for shift in [0, 21, 31, 64, u32::MAX] {
        assert_eq!(FixedAddressing::new(GIB, shift), Err(AddressingError::Shift(shift)));
    }
    let message = |base, shift| std::format!("{}", FixedAddressing::new(base, shift).unwrap_err());
    assert_eq!(
        message(4096, 22),
        "the base of addresses is 0x1000, not a multiple of 1 GiB from 1 GiB to 2^64 - 16 TiB"
    );
    assert_eq!(message(GIB, 12), "the shift of slots is 12, not 22 to 30");
}

#[test]
fn a_refusal_names_the_segment() {
    let addressing = with_shift(SLOT_SHIFT_MIN);
    let message = |gpa, len_bytes| std::format!("{}", addressing.resolve(gpa, len_bytes).unwrap_err());
    assert_eq!(message(0, 0), "the segment has no bytes");
    assert_eq!(
        message(SEGMENT_BOUNDARY_BYTES - 512, 4096),
        "the segment of 4096 bytes at guest-physical 0x3ffe00 crosses a 4 MiB boundary"
    );
    assert_eq!(message(64 * GIB, 512), "the segment at guest-physical 0x1000000000 does not end below 64 GiB");
}

#[test]
fn the_highest_base_has_room_for_the_last_slot() {
    let addressing = FixedAddressing::new(BASE_MAX, SLOT_SHIFT_MAX).expect("in range");
    let gpa = GPA_LIMIT - 4096;
    let last = u16::try_from(SLOT_COUNT_MAX - 1).expect("16384 slots");
    assert_eq!(addressing.resolve(gpa, 4096), Ok(FixedAddress { buf_index: last, addr: u64::MAX - 4095 }));
    let limit_gpa = addressing.limit_gpa();
    assert_eq!(addressing.resolve(gpa, 4097), Err(AddressError::TooHigh { gpa, limit_gpa }));
}
