//! Which parts of a guest's RAM are free.

use std::ops::Range;

use rangemap::RangeSet;
use ringpass_guest_abi::SEGMENT_BOUNDARY_BYTES;

/// The free RAM of a guest.
#[derive(Debug)]
pub(super) struct FreeRam {
    /// By ascending address.
    pieces: Vec<Piece>,
}

/// One region. No area crosses its ends, so free ranges of two regions are never merged.
#[derive(Debug)]
struct Piece {
    whole: Range<u64>,
    free: RangeSet<u64>,
}

impl FreeRam {
    /// Everything is free in these regions, each of which has a guest-physical address and a length.
    pub(super) fn new(regions: impl Iterator<Item = (u64, u64)>) -> Self {
        let piece = |(gpa, len_bytes)| {
            let whole = gpa..gpa + len_bytes;
            Piece { free: RangeSet::from_iter([whole.clone()]), whole }
        };
        Self { pieces: regions.map(piece).collect() }
    }

    fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        self.pieces.iter().flat_map(|piece| piece.free.iter())
    }

    pub(super) fn free_bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    pub(super) fn longest_bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).max().unwrap_or(0)
    }

    /// Takes the lowest free range of this length that starts at a multiple of `align_bytes`, a power of two. A range that
    /// fits between two multiples of [`SEGMENT_BOUNDARY_BYTES`] crosses none, so that one request can name all of it.
    pub(super) fn take_first(&mut self, len_bytes: u64, align_bytes: u64) -> Option<u64> {
        let is_cut = |gpa: u64| {
            len_bytes <= SEGMENT_BOUNDARY_BYTES && gpa % SEGMENT_BOUNDARY_BYTES + len_bytes > SEGMENT_BOUNDARY_BYTES
        };
        let fit = |range: &Range<u64>| {
            let mut gpa = range.start.checked_next_multiple_of(align_bytes)?;
            if is_cut(gpa) {
                gpa = gpa.checked_next_multiple_of(SEGMENT_BOUNDARY_BYTES.max(align_bytes))?;
            }
            (gpa.checked_add(len_bytes)? <= range.end).then_some(gpa)
        };
        let (piece, gpa) =
            self.pieces.iter_mut().find_map(|piece| piece.free.iter().find_map(fit).map(|gpa| (piece, gpa)))?;
        piece.free.remove(gpa..gpa + len_bytes);
        Some(gpa)
    }

    /// Takes a range. Returns false, and takes nothing, if the range is not free.
    pub(super) fn take_at(&mut self, gpa: u64, len_bytes: u64) -> bool {
        let Some(end) = gpa.checked_add(len_bytes) else { return false };
        let Some(piece) = self.pieces.iter_mut().find(|piece| piece.whole.contains(&gpa)) else { return false };
        let is_free = piece.free.get(&gpa).is_some_and(|range| end <= range.end);
        if is_free {
            piece.free.remove(gpa..end);
        }
        is_free
    }

    /// Returns a range that was taken.
    pub(super) fn give_back(&mut self, gpa: u64, len_bytes: u64) {
        if let Some(piece) = self.pieces.iter_mut().find(|piece| piece.whole.contains(&gpa)) {
            piece.free.insert(gpa..gpa + len_bytes);
        }
    }
}

#[cfg(test)]
mod tests;
