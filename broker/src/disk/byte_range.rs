//! Ranges of bytes of a storage, and how they look through a device that shows a part of it.

/// Bytes from `start` up to `end`, which is not included; [`u64::MAX`] as the end means: however long the storage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl ByteRange {
    /// The whole storage, also after it has grown.
    pub(super) const ALL: Self = Self { start: 0, end: u64::MAX };

    /// `length` bytes from `start`; without a length to the end of the storage.
    pub(super) fn new(start: u64, length: Option<u64>) -> Self {
        Self { start, end: length.map_or(u64::MAX, |length| start.saturating_add(length)) }
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.start.max(other.start) < self.end.min(other.end)
    }

    /// For a range of a device that shows the part `window` of a storage: that range of the storage.
    pub(super) fn in_storage(self, window: Self) -> Self {
        let at = |offset: u64| window.start.saturating_add(offset).min(window.end);
        Self { start: at(self.start), end: at(self.end) }
    }

    /// For a range of a storage: what a device that shows the part `window` of it has of the range, as a range of that
    /// device.
    pub(super) fn seen_through(self, window: Self) -> Option<Self> {
        let (start, end) = (self.start.max(window.start), self.end.min(window.end));
        let end = if end == u64::MAX { end } else { end.saturating_sub(window.start) };
        self.overlaps(window).then(|| Self { start: start - window.start, end })
    }

    /// The range except `hole`.
    pub(super) fn without(self, hole: Self) -> impl Iterator<Item = Self> {
        let before = Self { start: self.start, end: self.end.min(hole.start) };
        let after = Self { start: self.start.max(hole.end), end: self.end };
        [before, after].into_iter().filter(|part| part.start < part.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn range(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    #[test]
    fn a_range_without_a_length_has_no_end() {
        assert_eq!(ByteRange::new(512, None), range(512, u64::MAX));
        assert_eq!(ByteRange::new(512, Some(512)), range(512, 1024));
    }

    #[test]
    fn neighbours_do_not_overlap() {
        assert!(!range(0, 512).overlaps(range(512, 1024)) && !range(512, 1024).overlaps(range(0, 512)));
        assert!(range(0, 513).overlaps(range(512, 1024)) && ByteRange::ALL.overlaps(range(0, 1)));
    }

    #[test]
    fn a_range_of_a_device_is_found_in_its_storage_and_back() {
        let window = range(1000, 2000);
        assert_eq!(ByteRange::ALL.in_storage(window), window);
        assert_eq!(range(100, 200).in_storage(window), range(1100, 1200));
        assert_eq!(range(900, 1500).in_storage(window), range(1900, 2000));
        assert_eq!(range(1100, 1200).seen_through(window), Some(range(100, 200)));
        assert_eq!(ByteRange::ALL.seen_through(window), Some(range(0, 1000)));
        assert_eq!(range(0, 1001).seen_through(window), Some(range(0, 1)));
        assert_eq!(range(0, 1000).seen_through(window), None);
        assert_eq!(ByteRange::ALL.seen_through(ByteRange::new(512, None)), Some(ByteRange::ALL));
    }

    #[test]
    fn a_hole_leaves_what_is_before_and_behind_it() {
        let parts = |whole: ByteRange| whole.without(range(100, 204)).collect::<Vec<_>>();
        assert_eq!(parts(ByteRange::ALL), [range(0, 100), range(204, u64::MAX)]);
        assert_eq!(parts(range(512, 1024)), [range(512, 1024)]);
        assert_eq!(parts(range(0, 50)), [range(0, 50)]);
        assert_eq!(parts(range(120, 180)), []);
    }
}
