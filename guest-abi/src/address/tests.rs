//! [`FixedAddressing::resolve`] against its definition, byte by byte in 128-bit arithmetic.

use proptest::prelude::*;

use super::*;

const SPACE_BYTES: u64 = SLOT_BYTES * SLOT_COUNT_MAX as u64;

/// Addresses of every size, most of them close to where a slot, the address space or the integers end.
fn gpa() -> impl Strategy<Value = u64> {
    let near = |edge: u64| (0..=4096u64).prop_map(move |below| edge.wrapping_add(2048).wrapping_sub(below));
    let slot_edge = (0..=u64::from(SLOT_COUNT_MAX)).prop_flat_map(move |slot| near(slot * SLOT_BYTES));
    prop_oneof![any::<u64>(), 0..SPACE_BYTES, slot_edge, near(SPACE_BYTES), near(0)]
}

fn len_bytes() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0..=4096u32, (SLOT_BYTES as u32 - 2048)..=(SLOT_BYTES as u32 + 2048)]
}

/// Bases that a device gives, and ones that it must not.
fn iova_base() -> impl Strategy<Value = u64> {
    let near_top = (0..2 * SPACE_BYTES).prop_map(|below| u64::MAX - below);
    prop_oneof![2 => (1..=1u64 << 17).prop_map(|slots| slots * SLOT_BYTES), 1 => near_top, 1 => any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn a_segment_is_resolved_exactly_when_one_slot_holds_it(
        gpa in gpa(), len_bytes in len_bytes(), iova_base in iova_base(),
    ) {
        let (first, end) = (u128::from(gpa), u128::from(gpa) + u128::from(len_bytes));
        let slot = first / u128::from(SLOT_BYTES);
        let slot_end = (slot + 1) * u128::from(SLOT_BYTES);
        let fits_iova = u128::from(iova_base) + end <= 1 << 64;
        let expected = if len_bytes == 0 {
            Err(AddressError::Empty)
        } else if end > u128::from(SPACE_BYTES) {
            Err(AddressError::TooHigh { gpa })
        } else if end > slot_end {
            Err(AddressError::CrossesSlot { gpa, len_bytes })
        } else if !fits_iova {
            Err(AddressError::TooHigh { gpa })
        } else {
            Ok(FixedAddress { buf_index: slot as u16, addr: iova_base + gpa })
        };
        prop_assert_eq!(FixedAddressing { iova_base }.resolve(gpa, len_bytes), expected);
    }

    #[test]
    fn the_kernel_finds_a_resolved_segment_inside_its_buffer(
        gpa in 0..SPACE_BYTES, len_bytes in len_bytes(), iova_base in 1..=1u64 << 17,
    ) {
        let iova_base = iova_base * SLOT_BYTES;
        if let Ok(FixedAddress { buf_index, addr }) = (FixedAddressing { iova_base }).resolve(gpa, len_bytes) {
            let buffer_start = iova_base + u64::from(buf_index) * SLOT_BYTES;
            prop_assert!(addr >= buffer_start);
            prop_assert!(addr + u64::from(len_bytes) <= buffer_start + SLOT_BYTES);
        }
    }
}

#[test]
fn the_last_byte_of_the_address_space_is_in_the_last_slot() {
    let addressing = FixedAddressing { iova_base: SLOT_BYTES };
    let last = FixedAddress { buf_index: 16383, addr: SPACE_BYTES + SLOT_BYTES - 1 };
    assert_eq!(addressing.resolve(SPACE_BYTES - 1, 1), Ok(last));
    assert_eq!(addressing.resolve(SPACE_BYTES - 1, 2), Err(AddressError::TooHigh { gpa: SPACE_BYTES - 1 }));
    assert_eq!(addressing.resolve(SPACE_BYTES, 1), Err(AddressError::TooHigh { gpa: SPACE_BYTES }));
    assert_eq!(addressing.resolve(u64::MAX, u32::MAX), Err(AddressError::TooHigh { gpa: u64::MAX }));
}

#[test]
fn a_whole_slot_is_one_segment_and_one_byte_more_is_not() {
    let addressing = FixedAddressing { iova_base: SLOT_BYTES };
    let slot = SLOT_BYTES as u32;
    let second = FixedAddress { buf_index: 1, addr: 2 * SLOT_BYTES };
    assert_eq!(addressing.resolve(SLOT_BYTES, slot), Ok(second));
    let crossing = AddressError::CrossesSlot { gpa: SLOT_BYTES, len_bytes: slot + 1 };
    assert_eq!(addressing.resolve(SLOT_BYTES, slot + 1), Err(crossing));
}

#[test]
fn a_refusal_names_the_segment() {
    let addressing = FixedAddressing { iova_base: SLOT_BYTES };
    let message = |gpa, len_bytes| std::format!("{}", addressing.resolve(gpa, len_bytes).unwrap_err());
    assert_eq!(message(0, 0), "the segment has no bytes");
    assert_eq!(
        message(SLOT_BYTES - 512, 4096),
        "the segment of 4096 bytes at guest-physical 0x3ffffe00 crosses a 1 GiB boundary"
    );
    assert_eq!(message(1 << 44, 512), "the segment at guest-physical 0x100000000000 does not end below 16 TiB");
}

#[test]
fn a_segment_that_does_not_end_below_the_top_of_the_iova_space_is_refused() {
    let addressing = FixedAddressing { iova_base: u64::MAX - 4095 };
    assert_eq!(addressing.resolve(0, 4096), Ok(FixedAddress { buf_index: 0, addr: u64::MAX - 4095 }));
    assert_eq!(addressing.resolve(512, 4096), Err(AddressError::TooHigh { gpa: 512 }));
}
