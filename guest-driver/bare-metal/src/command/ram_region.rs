//! Regions of guest RAM in a command.

use crate::words::{Reader, Writer};

/// A region of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

pub(super) fn put_regions(words: &mut Writer, regions: &[RamRegion]) {
    for region in regions {
        words.put(region.gpa);
        words.put(region.len_bytes);
    }
}

pub(super) fn take_regions<const N: usize>(words: &mut Reader<'_>) -> [RamRegion; N] {
    core::array::from_fn(|_| RamRegion { gpa: words.take(), len_bytes: words.take() })
}
