//! Guest RAM as fixed buffers: which piece of which file lies at which address of which slot.

use ringpass_guest_abi::{SLOT_COUNT_MAX, SLOT_SHIFT_MAX, SLOT_SHIFT_MIN};

/// Bytes of the scratch file. Holes longer than this reuse it.
pub(super) const SCRATCH_BYTES: u64 = 2 << 20;

/// Guest-physical bytes of a span: the largest slot.
const SPAN_BYTES: u64 = 1 << SLOT_SHIFT_MAX;

/// Guest RAM cut into slots, one fixed buffer each.
///
/// A *span* is the RAM in one gibibyte of guest-physical addresses, with all of its slots. It is mapped, pinned and
/// exchanged as a whole: a system call for each slot would make a guest with thousands of them wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaLayout {
    slot_shift: u32,
    spans: Vec<Span>,
}

/// The slots in one gibibyte of guest-physical addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The gibibyte: `gpa >> 30`.
    pub index: u32,
    /// The slots that have RAM, ascending.
    pub slots: Vec<Slot>,
    /// The pieces of all slots, ascending. The pieces of a slot follow each other without gaps. A piece of a region can
    /// continue into the next slots.
    pub pieces: Vec<Piece>,
}

/// One fixed buffer: from the first byte of RAM in its slot to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Fixed buffer number, `gpa >> slot_shift`.
    pub index: u32,
    /// First guest-physical address of the buffer.
    pub gpa: u64,
    /// Bytes of the buffer, at most the size of a slot.
    pub len_bytes: u64,
}

/// A run of guest-physical addresses with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len_bytes: u64,
    /// The source of its pages.
    pub source: Source,
}

/// The source of the pages of a [`Piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A region of the guest's RAM.
    Region {
        /// Index of the region, in ascending order of address.
        region: usize,
        /// Where the piece begins, in bytes from the start of the region.
        offset_bytes: u64,
    },
    /// A hole between two regions, filled with this guest's scratch memory so that the slot is a single buffer.
    Scratch,
}

/// The smallest shift with which the slots reach up to `end_gpa`. `None`: above 16 TiB.
pub(crate) fn slot_shift_for(end_gpa: u64) -> Option<u32> {
    (SLOT_SHIFT_MIN..=SLOT_SHIFT_MAX).find(|&shift| end_gpa <= limit_gpa(shift))
}

/// The end of the last possible slot.
pub(super) fn limit_gpa(slot_shift: u32) -> u64 {
    u64::from(SLOT_COUNT_MAX) << slot_shift
}

impl IovaLayout {
    /// The layout of RAM regions given as `(gpa, len_bytes)`, ascending, not overlapping, and not above the
    /// [`limit_gpa`] of these slots.
    pub(super) fn new(slot_shift: u32, regions: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut layout = Self { slot_shift, spans: Vec::new() };
        for (region, (start, len_bytes)) in regions.into_iter().enumerate() {
            let end = start + len_bytes;
            let mut gpa = start;
            while gpa < end {
                let piece_end = end.min((gpa / SPAN_BYTES + 1) * SPAN_BYTES);
                let source = Source::Region { region, offset_bytes: gpa - start };
                layout.place(Piece { gpa, len_bytes: piece_end - gpa, source });
                gpa = piece_end;
            }
        }
        layout
    }

    /// Guest-physical bytes that one slot covers, as a power of two: 22 (4 MiB) to 30 (1 GiB).
    pub fn slot_shift(&self) -> u32 {
        self.slot_shift
    }

    /// The spans that have RAM, ascending.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Number of entries that a buffer table needs: up to the last slot with RAM.
    pub fn table_slots(&self) -> u32 {
        self.spans.last().and_then(|span| span.slots.last()).map_or(0, |slot| slot.index + 1)
    }

    /// Adds `piece`, which lies above all earlier pieces and inside one span.
    fn place(&mut self, piece: Piece) {
        let index = (piece.gpa / SPAN_BYTES) as u32;
        if self.spans.last().is_none_or(|span| span.index != index) {
            self.spans.push(Span { index, slots: Vec::new(), pieces: Vec::new() });
        }
        let span = self.spans.last_mut().expect("pushed if there was none");
        span.place(piece, self.slot_shift);
    }
}

impl Span {
    /// Bytes of its fixed buffers, including holes that are filled with scratch memory.
    pub fn len_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.len_bytes).sum()
    }

    fn place(&mut self, piece: Piece, slot_shift: u32) {
        let (start, end) = (piece.gpa, piece.gpa + piece.len_bytes);
        for index in start >> slot_shift..=(end - 1) >> slot_shift {
            let slot_end = end.min((index + 1) << slot_shift);
            match self.slots.last_mut().filter(|slot| u64::from(slot.index) == index) {
                // Only the first slot of a piece can have earlier pieces.
                Some(slot) => {
                    let hole = slot.gpa + slot.len_bytes;
                    slot.len_bytes = slot_end - slot.gpa;
                    self.fill(hole, start);
                }
                None => {
                    let gpa = start.max(index << slot_shift);
                    self.slots.push(Slot { index: index as u32, gpa, len_bytes: slot_end - gpa });
                }
            }
        }
        self.pieces.push(piece);
    }

    /// Fills a hole with scratch memory: in several pieces, so that each can be a mapping of the one scratch file.
    fn fill(&mut self, mut hole: u64, end: u64) {
        while hole < end {
            let len_bytes = (end - hole).min(SCRATCH_BYTES);
            self.pieces.push(Piece { gpa: hole, len_bytes, source: Source::Scratch });
            hole += len_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn slots(layout: &IovaLayout) -> impl Iterator<Item = &Slot> {
        layout.spans().iter().flat_map(|span| &span.slots)
    }

    #[test]
    fn ram_of_a_pc_becomes_slots_of_4_mib_with_the_vga_hole_filled() {
        let layout = IovaLayout::new(22, [(0, 640 << 10), (768 << 10, 3 * GIB - (768 << 10)), (4 * GIB, GIB / 2)]);
        assert_eq!(layout.spans().iter().map(|span| span.index).collect::<Vec<_>>(), [0, 1, 2, 4]);
        assert!(slots(&layout).all(|slot| slot.len_bytes == 4 * MIB && slot.gpa == u64::from(slot.index) * 4 * MIB));
        assert_eq!(slots(&layout).count(), 3 * 256 + 128);
        let vga_hole = Piece { gpa: 640 << 10, len_bytes: 128 << 10, source: Source::Scratch };
        assert_eq!((layout.spans()[0].pieces.len(), layout.spans()[0].pieces[1]), (3, vga_hole));
        assert_eq!(layout.table_slots(), 4 * 256 + 128);
    }

    #[test]
    fn a_hole_is_filled_inside_a_slot_and_left_between_slots() {
        let regions = [(0, MIB), (7 * MIB, 2 * MIB), (31 * MIB, MIB)];
        let small = IovaLayout::new(22, regions);
        assert!(small.spans()[0].pieces.iter().all(|piece| piece.source != Source::Scratch));
        let indexes: Vec<_> = slots(&small).map(|slot| (slot.index, slot.gpa / MIB, slot.len_bytes / MIB)).collect();
        assert_eq!(indexes, [(0, 0, 1), (1, 7, 1), (2, 8, 1), (7, 31, 1)]);
        // One slot: the scratch file is used again and again.
        let large = IovaLayout::new(30, regions);
        let lens: Vec<_> = large.spans()[0].pieces.iter().map(|piece| piece.len_bytes / MIB).collect();
        assert_eq!((lens.len(), lens.iter().sum::<u64>(), lens.iter().max()), (17, 32, Some(&2)));
    }

    #[test]
    fn slots_are_as_small_as_the_table_allows() {
        assert_eq!(slot_shift_for(MIB), Some(22));
        assert_eq!(slot_shift_for(64 * GIB), Some(22));
        assert_eq!(slot_shift_for(64 * GIB + 4096), Some(23));
        assert_eq!(slot_shift_for(16 << 40), Some(30));
        assert_eq!(slot_shift_for((16 << 40) + 4096), None);
    }

    /// Ascending regions that do not overlap, in pages, with small and large gaps.
    fn regions() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let gap = prop_oneof![Just(0u64), 1..1024u64, 1..1_000_000u64];
        let len = prop_oneof![1..2048u64, 1..600_000u64];
        prop::collection::vec((gap, len), 1..6).prop_map(|steps| {
            let mut at = 0;
            let mut regions = Vec::new();
            for (gap, len) in steps {
                at += gap;
                regions.push((at * 4096, len * 4096));
                at += len;
            }
            regions
        })
    }

    proptest! {
        #[test]
        fn every_byte_of_ram_lies_at_its_own_address_in_its_own_slot(
            regions in regions(), shift in prop_oneof![Just(22u32), Just(25), Just(30)],
        ) {
            let layout = IovaLayout::new(shift, regions.iter().copied());
            let mut seen = vec![0u64; regions.len()];
            for span in layout.spans() {
                let mut pieces = span.pieces.iter().copied().peekable();
                for slot in &span.slots {
                    let end = slot.gpa + slot.len_bytes;
                    prop_assert_eq!((slot.gpa >> shift, (end - 1) >> shift), (slot.index.into(), slot.index.into()));
                    prop_assert_eq!(slot.gpa >> 30, u64::from(span.index));
                    let is_ram = |gpa: u64| regions.iter().any(|&(start, len)| (start..start + len).contains(&gpa));
                    prop_assert!(is_ram(slot.gpa) && is_ram(end - 1), "a buffer begins and ends with RAM");
                    // The pieces cover exactly the buffer; a piece of RAM may go on into the next slot.
                    let mut at = slot.gpa;
                    while at < end {
                        let piece = pieces.peek_mut().expect("a piece for each byte of a buffer");
                        prop_assert_eq!(piece.gpa, at, "pieces follow each other without a gap");
                        prop_assert!(piece.len_bytes > 0);
                        let len_bytes = piece.len_bytes.min(end - at);
                        match &mut piece.source {
                            Source::Region { region, offset_bytes } => {
                                prop_assert_eq!(regions[*region].0 + *offset_bytes, at);
                                prop_assert_eq!(seen[*region], *offset_bytes, "each byte of a region once and in order");
                                seen[*region] += len_bytes;
                                *offset_bytes += len_bytes;
                            }
                            Source::Scratch => {
                                prop_assert!(piece.len_bytes <= SCRATCH_BYTES && len_bytes == piece.len_bytes);
                                let end = at + len_bytes;
                                prop_assert!(regions.iter().all(|&(gpa, len)| end <= gpa || gpa + len <= at));
                            }
                        }
                        piece.gpa += len_bytes;
                        piece.len_bytes -= len_bytes;
                        if piece.len_bytes == 0 {
                            pieces.next();
                        }
                        at += len_bytes;
                    }
                }
                prop_assert_eq!(pieces.next(), None, "no piece outside the buffers");
            }
            let covered: Vec<u64> = regions.iter().map(|&(_, len)| len).collect();
            prop_assert_eq!(seen, covered);
            let indexes: Vec<u32> = slots(&layout).map(|slot| slot.index).collect();
            let in_order: Vec<u32> = BTreeSet::from_iter(indexes.iter().copied()).into_iter().collect();
            prop_assert_eq!(&indexes, &in_order, "each slot once, ascending");
            prop_assert_eq!(layout.table_slots(), indexes.last().unwrap() + 1);
        }
    }
}
