//! Guest RAM as fixed buffers: which piece of which file lies at which address of which slot.

use ringpass_guest_abi::SLOT_BYTES;

/// Bytes of the scratch file. Holes longer than this reuse it.
pub(super) const SCRATCH_BYTES: u64 = 2 << 20;

/// Guest RAM cut into 1 GiB slots, one fixed buffer each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaLayout {
    slots: Vec<Slot>,
}

/// One fixed buffer: from the first byte of RAM in its gibibyte to the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Fixed buffer number, `gpa >> 30`.
    pub index: u32,
    /// First guest-physical address of the buffer.
    pub gpa: u64,
    /// Bytes of the buffer, at most 1 GiB.
    pub len_bytes: u64,
    /// The pieces of the buffer, in ascending order and without gaps.
    pub pieces: Vec<Piece>,
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

impl IovaLayout {
    /// The layout of RAM regions given as `(gpa, len_bytes)`, ascending and not overlapping.
    pub(crate) fn new(regions: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut slots: Vec<Slot> = Vec::new();
        for (region, (start, len_bytes)) in regions.into_iter().enumerate() {
            let end = start + len_bytes;
            let mut gpa = start;
            while gpa < end {
                let piece_end = end.min((gpa / SLOT_BYTES + 1) * SLOT_BYTES);
                let source = Source::Region { region, offset_bytes: gpa - start };
                place(&mut slots, Piece { gpa, len_bytes: piece_end - gpa, source });
                gpa = piece_end;
            }
        }
        Self { slots }
    }

    /// The slots that have RAM, ascending.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Number of entries that a buffer table needs: up to the last slot with RAM.
    pub fn table_slots(&self) -> u32 {
        self.slots.last().map_or(0, |slot| slot.index + 1)
    }

    /// Bytes of all buffers, including holes that are filled with scratch memory.
    pub fn len_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.len_bytes).sum()
    }
}

/// Adds `piece`, which lies above all earlier pieces and inside one slot.
fn place(slots: &mut Vec<Slot>, piece: Piece) {
    let index = u32::try_from(piece.gpa / SLOT_BYTES).expect("regions end at or below 16 TiB");
    if let Some(slot) = slots.last_mut().filter(|slot| slot.index == index) {
        // A long hole becomes several pieces, so that each can be a mapping of the one scratch file.
        let mut hole = slot.gpa + slot.len_bytes;
        while hole < piece.gpa {
            let len_bytes = (piece.gpa - hole).min(SCRATCH_BYTES);
            slot.pieces.push(Piece { gpa: hole, len_bytes, source: Source::Scratch });
            hole += len_bytes;
        }
        slot.pieces.push(piece);
        slot.len_bytes = piece.gpa + piece.len_bytes - slot.gpa;
    } else {
        slots.push(Slot { index, gpa: piece.gpa, len_bytes: piece.len_bytes, pieces: vec![piece] });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_of_a_pc_becomes_one_buffer_per_gibibyte_with_its_holes_filled() {
        let layout = IovaLayout::new([(0, 640 << 10), (768 << 10, 3 * GIB - (768 << 10)), (4 * GIB, GIB / 2)]);
        let slots: Vec<_> = layout.slots().iter().map(|s| (s.index, s.gpa, s.len_bytes, s.pieces.len())).collect();
        assert_eq!(slots, [(0, 0, GIB, 3), (1, GIB, GIB, 1), (2, 2 * GIB, GIB, 1), (4, 4 * GIB, GIB / 2, 1),]);
        let vga_hole = Piece { gpa: 640 << 10, len_bytes: 128 << 10, source: Source::Scratch };
        assert_eq!(layout.slots()[0].pieces[1], vga_hole);
        assert_eq!(layout.table_slots(), 5);
    }

    #[test]
    fn a_long_hole_inside_a_slot_reuses_the_scratch_file() {
        let layout = IovaLayout::new([(0, MIB), (8 * MIB, MIB)]);
        let lens: Vec<_> = layout.slots()[0].pieces.iter().map(|piece| piece.len_bytes / MIB).collect();
        assert_eq!(lens, [1, 2, 2, 2, 1, 1]);
    }

    /// Ascending regions that do not overlap, in pages, with small and large gaps.
    fn regions() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let gap = prop_oneof![Just(0u64), 1..1024u64, 1..1_000_000u64];
        prop::collection::vec((gap, 1..600_000u64), 1..6).prop_map(|steps| {
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
        fn every_byte_of_ram_lies_at_its_own_address_in_its_own_slot(regions in regions()) {
            let layout = IovaLayout::new(regions.iter().copied());
            let mut seen = vec![0u64; regions.len()];
            for slot in layout.slots() {
                let mut at = slot.gpa;
                for piece in &slot.pieces {
                    prop_assert_eq!(piece.gpa, at, "pieces follow each other without a gap");
                    prop_assert!(piece.len_bytes > 0);
                    match piece.source {
                        Source::Region { region, offset_bytes } => {
                            prop_assert_eq!(regions[region].0 + offset_bytes, piece.gpa);
                            prop_assert_eq!(seen[region], offset_bytes, "each byte of a region once and in order");
                            seen[region] += piece.len_bytes;
                        }
                        Source::Scratch => {
                            prop_assert!(piece.len_bytes <= SCRATCH_BYTES);
                            let end = piece.gpa + piece.len_bytes;
                            prop_assert!(regions.iter().all(|&(gpa, len)| end <= gpa || gpa + len <= piece.gpa));
                        }
                    }
                    at += piece.len_bytes;
                }
                prop_assert_eq!(at, slot.gpa + slot.len_bytes);
                prop_assert!(slot.len_bytes <= SLOT_BYTES);
                prop_assert_eq!(slot.gpa / SLOT_BYTES, u64::from(slot.index));
                prop_assert_eq!((at - 1) / SLOT_BYTES, u64::from(slot.index));
                let is_ram = |piece: Option<&Piece>| matches!(piece.unwrap().source, Source::Region { .. });
                prop_assert!(is_ram(slot.pieces.first()) && is_ram(slot.pieces.last()), "a buffer begins and ends with RAM");
            }
            let covered: Vec<u64> = regions.iter().map(|&(_, len)| len).collect();
            prop_assert_eq!(seen, covered);
            prop_assert_eq!(layout.table_slots(), layout.slots().last().unwrap().index + 1);
        }
    }
}
