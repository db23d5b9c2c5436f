use super::*;
use crate::attach::Lengths;
use crate::epoch::{Epoch, Phase};
use crate::layout::tests::kernel_like;
use crate::test_memory::TestMemory;

const SEGMENTS: SegmentLimits = SegmentLimits { address_align_bytes: 4, length_align_bytes: 512, bytes_max: 1 << 20 };

fn addressing() -> FixedAddressing {
    FixedAddressing::new(1 << 45, 26).expect("in range")
}

#[test]
fn the_two_sides_write_different_cache_lines() {
    let device = [ANNOUNCED_OFFSET_BYTES, END_REASON_OFFSET_BYTES, RING_OFFSET_BYTES];
    let driver = [ACKNOWLEDGED_OFFSET_BYTES, DETACH_OFFSET_BYTES];
    assert!(device.iter().all(|offset_bytes| offset_bytes / 256 == 0));
    assert!(driver.iter().all(|offset_bytes| offset_bytes / 256 == 1));
    assert!((RING_OFFSET_BYTES as usize + RingRecord::BYTES) <= 256);
}

#[test]
fn each_side_reads_what_the_other_wrote() {
    let layout = kernel_like(8, 16, Doorbell::WhenAsleep);
    let memory = TestMemory::new(&layout);
    let control = DriverControl::new(memory.clone());
    control.clear();
    assert_eq!((control.announced(), control.end_reason()), (0, Some(ErrorCode::None)));
    let record = RingRecord::new(&layout, addressing(), &SEGMENTS, MODE_DIRECT);
    for (offset_bytes, word) in (RING_OFFSET_BYTES..).step_by(4).zip(record.to_bytes().chunks_exact(4)) {
        memory.store_relaxed(offset_bytes, u32::from_ne_bytes(word.try_into().expect("four bytes")));
    }
    let open = Announcement { epoch: Epoch::new(1), phase: Phase::Open };
    memory.store_release(ANNOUNCED_OFFSET_BYTES, open.to_word().to_le());
    assert_eq!(control.announced(), open.to_word());
    let lengths = Lengths { control_bytes: 4096, rings_bytes: layout.rings_bytes, sqes_bytes: layout.sqes_bytes };
    assert_eq!(control.ring().layout(8, 16, &lengths), Ok(layout));
    assert_eq!(control.ring().addressing(), Ok(addressing()));
    assert_eq!(control.ring().segments(), Ok(SEGMENTS));

    control.acknowledge(Announcement { phase: Phase::Drain, ..open });
    control.set_detach();
    let words = [ACKNOWLEDGED_OFFSET_BYTES, DETACH_OFFSET_BYTES].map(|at| u32::from_le(memory.load_relaxed(at)));
    assert_eq!(words, [1 << 2 | 2, 1]);
}

#[test]
fn an_impossible_record_is_refused() {
    let layout = kernel_like(8, 16, Doorbell::WhenAsleep);
    let lengths = Lengths { control_bytes: 4096, rings_bytes: layout.rings_bytes, sqes_bytes: layout.sqes_bytes };
    let record = RingRecord::new(&layout, addressing(), &SEGMENTS, MODE_DIRECT);
    let doorbell = RingRecord { doorbell: 3.into(), ..record };
    assert_eq!(doorbell.layout(8, 16, &lengths), Err(RecordError::Doorbell(3)));
    let outside = RingRecord { cq_tail_offset_bytes: (layout.rings_bytes as u32).into(), ..record };
    assert!(matches!(outside.layout(8, 16, &lengths), Err(RecordError::Layout(LayoutError::Misplaced { .. }))));
    let small_slots = RingRecord { slot_shift: 12.into(), ..record };
    assert_eq!(small_slots.addressing(), Err(RecordError::Addressing(AddressingError::Shift(12))));
    let no_base = RingRecord { iova_base: 0.into(), ..record };
    assert_eq!(no_base.addressing(), Err(RecordError::Addressing(AddressingError::Base(0))));
    let too_high = 1u64.wrapping_neg() << 30;
    let high_base = RingRecord { iova_base: too_high.into(), ..record };
    assert_eq!(high_base.addressing(), Err(RecordError::Addressing(AddressingError::Base(too_high))));
    let unit = RingRecord { length_align_bytes: 0.into(), ..record };
    assert_eq!(unit.segments(), Err(RecordError::Segments { field: "length_align_bytes", value: 0 }));
}
