//! [`RingLayout::validate`]: what it accepts a driver can use, and what it refuses is wrong.

use proptest::prelude::*;

use super::*;
use crate::test_memory::TestMemory;
use crate::{DriverRing, FixedAddress, RingMemory};

/// A layout as the kernel makes it (`struct io_rings`, Linux 6.18, 64-byte cache lines).
pub(crate) fn kernel_like(sq_entries: u32, cq_entries: u32, doorbell: Doorbell) -> RingLayout {
    RingLayout {
        sq_entries,
        cq_entries,
        sq_head_offset: 0,
        sq_tail_offset: 64,
        cq_head_offset: 128,
        cq_tail_offset: 192,
        sq_flags_offset: 276,
        cq_flags_offset: 280,
        cqes_offset: 320,
        rings_bytes: rings_area_bytes(cq_entries),
        sqes_bytes: sqes_area_bytes(sq_entries),
        doorbell,
    }
}

fn entries() -> impl Strategy<Value = u32> {
    prop_oneof![6 => (0..17u32).prop_map(|shift| 1 << shift), 1 => any::<u32>(), 1 => 0..70_000u32]
}

/// Mostly small and aligned offsets: random ones alone would almost never make a valid layout.
fn offset() -> impl Strategy<Value = u32> {
    let near_end = (0..=64u32).prop_map(|below| (u32::MAX - below) & !7);
    prop_oneof![12 => (0..256u32).prop_map(|word| 8 * word), 1 => any::<u32>(), 1 => 0..2048u32, 1 => near_end]
}

fn area_bytes() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..=1u64 << 21, 1 => (1u64 << 32) - 64..=(1 << 32) + 64, 1 => any::<u64>()]
}

prop_compose! {
    fn layout()(
        sq_entries in entries(), cq_entries in entries(), offsets in prop::array::uniform7(offset()),
        areas in (area_bytes(), area_bytes()), slack in prop::option::of((-17..17i64, -17..17i64)),
    ) -> RingLayout {
        let [sq_head_offset, sq_tail_offset, sq_flags_offset, cq_head_offset, cq_tail_offset, cq_flags_offset, cqes_offset]
            = offsets;
        // Half of the layouts have areas that are about as long as they must be.
        let (rings_bytes, sqes_bytes) = slack.map_or(areas, |(rings_slack, sqes_slack)| {
            let cqes_end_bytes = u64::from(cqes_offset) + 16 * u64::from(cq_entries);
            let sqes_end_bytes = 64 * u64::from(sq_entries);
            (cqes_end_bytes.saturating_add_signed(rings_slack), sqes_end_bytes.saturating_add_signed(sqes_slack))
        });
        RingLayout {
            sq_entries, cq_entries, sq_head_offset, sq_tail_offset, sq_flags_offset, cq_head_offset, cq_tail_offset,
            cq_flags_offset, cqes_offset, rings_bytes, sqes_bytes, doorbell: Doorbell::WhenAsleep,
        }
    }
}

/// The rule, in words of arithmetic that cannot overflow.
fn is_usable(layout: &RingLayout) -> bool {
    let fits = |offset: u32, len_bytes: u128, align: u32| {
        let end = u128::from(offset) + len_bytes;
        offset % align == 0 && end <= u128::from(layout.rings_bytes) && end <= 1 << 32
    };
    let words = [
        layout.sq_head_offset,
        layout.sq_tail_offset,
        layout.sq_flags_offset,
        layout.cq_head_offset,
        layout.cq_tail_offset,
        layout.cq_flags_offset,
    ];
    [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768].contains(&layout.sq_entries)
        && (layout.cq_entries == 65536 || layout.cq_entries.count_ones() == 1 && layout.cq_entries < 65536)
        && words.into_iter().all(|offset| fits(offset, 4, 4))
        && fits(layout.cqes_offset, 16 * u128::from(layout.cq_entries), 8)
        && 64 * u128::from(layout.sq_entries) <= u128::from(layout.sqes_bytes)
}

/// Pushes into every slot of the SQ and reaps from every slot of the CQ; [`TestMemory`] panics on a wrong access.
fn drive(layout: RingLayout) {
    let memory = TestMemory::new(&layout);
    let mut ring = DriverRing::new(memory.clone(), layout).expect("accepted before");
    let sqe = Sqe::read_fixed(FixedAddress { buf_index: 0, addr: 0 }, 512, 0, 0);
    for _ in 0..=layout.sq_entries {
        if ring.push(&sqe).is_err() {
            break;
        }
    }
    let _ = ring.publish();
    ring.mute_interrupts();
    let _ = ring.unmute_interrupts();
    ring.has_overflowed();
    for _ in 0..=layout.cq_entries {
        // One completion after the other, whatever else lies at this offset.
        let tail = memory.load_relaxed(layout.cq_tail_offset);
        memory.store_relaxed(layout.cq_tail_offset, tail.wrapping_add(1));
        ring.reap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_layout_is_accepted_exactly_when_every_access_stays_inside(layout in layout()) {
        prop_assert_eq!(layout.validate().is_ok(), is_usable(&layout));
        if layout.validate().is_ok() {
            drive(layout);
        }
    }

    #[test]
    fn the_error_for_a_bad_offset_names_the_field(
        which in 0..7usize, offset in offset(), sq_shift in 0..16u32, cq_shift in 0..17u32,
    ) {
        let mut layout = kernel_like(1 << sq_shift, 1 << cq_shift, Doorbell::Always);
        let (name, field) = match which {
            0 => ("sq_head", &mut layout.sq_head_offset),
            1 => ("sq_tail", &mut layout.sq_tail_offset),
            2 => ("sq_flags", &mut layout.sq_flags_offset),
            3 => ("cq_head", &mut layout.cq_head_offset),
            4 => ("cq_tail", &mut layout.cq_tail_offset),
            5 => ("cq_flags", &mut layout.cq_flags_offset),
            _ => ("cqes", &mut layout.cqes_offset),
        };
        *field = offset;
        let expected = if is_usable(&layout) { Ok(()) } else { Err(LayoutError::Misplaced { field: name, offset_bytes: offset }) };
        prop_assert_eq!(layout.validate(), expected);
    }
}

#[test]
fn a_layout_of_the_kernel_is_accepted_in_every_size() {
    for (sq_shift, cq_shift) in (0..16).flat_map(|sq| (0..17).map(move |cq| (sq, cq))) {
        let layout = kernel_like(1 << sq_shift, 1 << cq_shift, Doorbell::WhenAsleep);
        assert_eq!(layout.validate(), Ok(()));
    }
    drive(kernel_like(32768, 65536, Doorbell::WhenAsleep));
}

#[test]
fn cqes_beyond_32_bit_offsets_are_refused() {
    let mut layout = kernel_like(8, 16, Doorbell::Always);
    layout.rings_bytes = 1 << 40;
    layout.cqes_offset = u32::MAX - 255;
    assert_eq!(layout.validate(), Ok(()));
    layout.cqes_offset += 8;
    let refused = LayoutError::Misplaced { field: "cqes", offset_bytes: u32::MAX - 247 };
    assert_eq!(layout.validate(), Err(refused));
}

#[test]
fn a_refusal_names_the_field_and_the_value() {
    let good = kernel_like(8, 16, Doorbell::Always);
    let message = |layout: RingLayout| std::format!("{}", layout.validate().unwrap_err());
    assert_eq!(
        message(RingLayout { sq_entries: 65536, ..good }),
        "sq_entries is 65536: it must be a power of two, at most 32768 (SQ) or 65536 (CQ)"
    );
    assert_eq!(
        message(RingLayout { cq_entries: 0, ..good }),
        "cq_entries is 0: it must be a power of two, at most 32768 (SQ) or 65536 (CQ)"
    );
    assert_eq!(
        message(RingLayout { cq_tail_offset: 4094, ..good }),
        "cq_tail at offset 4094 is not aligned or not inside the rings area"
    );
    assert_eq!(message(RingLayout { sqes_bytes: 511, ..good }), "the SQE area has 511 bytes, but its entries need 512");
}

#[test]
fn areas_are_whole_pages_that_hold_the_entries() {
    assert_eq!([1, 192, 193, 65536].map(rings_area_bytes), [4096, 4096, 8192, (1 << 20) + 4096]);
    assert_eq!([1, 64, 128, 32768].map(sqes_area_bytes), [4096, 4096, 8192, 1 << 21]);
}
