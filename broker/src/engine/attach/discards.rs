//! Noticing that the front-end discards memory while it is pinned.
//!
//! A balloon, free page reporting, virtio-mem and postcopy punch holes into the file of guest memory. The guest then
//! has new pages where a ring still uses the old ones, and neither of the two fails. The kernel tells nothing of this,
//! but the file has fewer blocks (`st_blocks`) afterwards. All pages exist when they are pinned, so there is a number
//! below which a file cannot be. Pins themselves never take a block away, so a number that falls means a discard.
//!
//! Pages that the kernel takes away by itself do not count: pinned pages are neither swapped out nor dropped. (A page
//! of tmpfs in swap still counts as a block. The kernel can drop a page that was never written, and that page then
//! counts no more.) A hole in a part of a huge page is filled with zeroes in place, and nothing is taken away, neither
//! from the guest nor from a ring.
//!
//! The blocks of a file are one number. What happens in parts of the file that are not, or no longer, memory of this
//! guest counts as well: the alarm may be false.
//!
//! Two discards are not noticed:
//! - a page that is discarded and comes back between two looks;
//! - pages that are discarded while as many others come between two looks. This can happen if the file has parts that
//!   are not memory of this guest and that are being filled: QEMU's hole below 1 MiB, a file for several guests.
//!
//! Neither lasts. A front-end that discards goes on, and leaves memory discarded, since that is the purpose of
//! discarding.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::Stat;

use crate::memory::RegionConfig;

/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// The files of pinned memory, and the number of blocks that each had.
#[derive(Debug, Default)]
pub(super) struct DiscardWatch {
    files: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    file: Arc<File>,
    /// The file behind the descriptor: device and inode. A front-end gives a separate descriptor for each region.
    identity: (u64, u64),
    /// The number of blocks of 512 bytes at the last look, or the number that must exist.
    blocks: u64,
    /// The number of blocks of the guest's memory in this file.
    memory_blocks: u64,
}

/// Memory that was discarded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Discarded {
    /// The least number of bytes that this can be.
    pub(super) bytes: u64,
}

impl DiscardWatch {
    /// Watches the files of memory that is pinned, or is about to be.
    pub(super) fn new(regions: &[RegionConfig]) -> io::Result<Self> {
        let mut watch = Self::default();
        watch.set_regions(regions)?;
        Ok(watch)
    }

    /// Watches the files of these regions from now on. Files that were watched before keep their number of blocks.
    pub(super) fn set_regions(&mut self, regions: &[RegionConfig]) -> io::Result<()> {
        let mut files: Vec<Watched> = Vec::new();
        let mut ranges: Vec<Vec<(u64, u64)>> = Vec::new();
        for &RegionConfig { ref file, file_offset_bytes, len_bytes, .. } in regions {
            let stat = stat(file)?;
            let identity = identity(&stat);
            let known = files.iter().position(|watched| watched.identity == identity);
            let index = known.unwrap_or_else(|| {
                let before = self.files.iter().find(|watched| watched.identity == identity);
                let blocks = before.map_or_else(|| blocks(&stat), |watched| watched.blocks);
                files.push(Watched { file: file.clone(), identity, blocks, memory_blocks: 0 });
                ranges.push(Vec::new());
                files.len() - 1
            });
            ranges[index].push((file_offset_bytes, file_offset_bytes + len_bytes));
        }
        for (watched, ranges) in files.iter_mut().zip(ranges) {
            watched.memory_blocks = covered_bytes(ranges) / BLOCK_BYTES;
        }
        self.files = files;
        Ok(())
    }

    /// All memory is pinned now: a page that does not exist was discarded, even if this is the first look.
    pub(super) fn expect_all(&mut self) {
        for watched in &mut self.files {
            watched.blocks = watched.blocks.max(watched.memory_blocks);
        }
    }

    /// Looks at all files. `None`: nothing was discarded since the last look.
    pub(super) fn look(&mut self) -> Option<Discarded> {
        let mut lost_blocks = 0;
        for watched in &mut self.files {
            // fstat(2) of an open file does not fail. If it does, the file counts as unchanged.
            let Ok(stat) = stat(&watched.file) else { continue };
            let now = blocks(&stat);
            lost_blocks += watched.blocks.saturating_sub(now);
            watched.blocks = now;
        }
        (lost_blocks > 0).then_some(Discarded { bytes: lost_blocks * BLOCK_BYTES })
    }
}

fn stat(file: &File) -> io::Result<Stat> {
    Ok(rustix::fs::fstat(file)?)
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn blocks(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or_default()
}

/// The number of bytes that are in at least one of the ranges.
fn covered_bytes(mut ranges: Vec<(u64, u64)>) -> u64 {
    ranges.sort_unstable();
    let (mut covered_bytes, mut reached) = (0, 0);
    for (start, end) in ranges {
        covered_bytes += end.saturating_sub(start.max(reached));
        reached = reached.max(end);
    }
    covered_bytes
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

    use super::*;

    const PAGES: u64 = 16;

    /// Memory of which no page exists.
    fn sparse() -> RegionConfig {
        let file = File::from(memfd_create("ringpass-test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(PAGES * 4096).unwrap();
        RegionConfig { gpa: 0, len_bytes: PAGES * 4096, file: Arc::new(file), file_offset_bytes: 0 }
    }

    /// Memory of which all pages exist.
    fn memory() -> RegionConfig {
        let region = sparse();
        fill(&region, 0, PAGES);
        region
    }

    fn fill(region: &RegionConfig, page: u64, pages: u64) {
        fallocate(&*region.file, FallocateFlags::empty(), page * 4096, pages * 4096).unwrap();
    }

    fn punch(region: &RegionConfig, page: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*region.file, flags, page * 4096, 4096).unwrap();
    }

    /// A part of a region, with a separate descriptor.
    fn part(region: &RegionConfig, page: u64, pages: u64) -> RegionConfig {
        let file = Arc::new(region.file.try_clone().unwrap());
        RegionConfig { gpa: page * 4096, len_bytes: pages * 4096, file, file_offset_bytes: page * 4096 }
    }

    #[test]
    fn a_page_that_is_discarded_is_noticed_once() {
        let regions = [memory(), memory()];
        let mut watch = DiscardWatch::new(&regions).unwrap();
        assert_eq!(watch.look(), None);
        punch(&regions[1], 3);
        assert_eq!(watch.look(), Some(Discarded { bytes: 4096 }));
        assert_eq!(watch.look(), None);
    }

    #[test]
    fn new_pages_are_not_taken_for_a_discard() {
        let region = sparse();
        let mut watch = DiscardWatch::new(std::slice::from_ref(&region)).unwrap();
        assert_eq!(watch.look(), None);
        fill(&region, 0, PAGES);
        watch.expect_all();
        assert_eq!(watch.look(), None);
    }

    #[test]
    fn a_page_that_is_discarded_before_the_first_look_is_noticed() {
        let region = sparse();
        let mut watch = DiscardWatch::new(std::slice::from_ref(&region)).unwrap();
        // The page is pinned, and discarded at once.
        fill(&region, 0, PAGES);
        punch(&region, 3);
        watch.expect_all();
        assert_eq!(watch.look(), Some(Discarded { bytes: 4096 }));
    }

    #[test]
    fn several_regions_of_one_file_are_watched_as_one_file() {
        let region = memory();
        let parts = [part(&region, 0, 6), part(&region, 6, 10), part(&region, 2, 4)];
        let mut watch = DiscardWatch::new(&parts).unwrap();
        watch.expect_all();
        assert_eq!(watch.look(), None, "pages that two regions share count once");
        punch(&region, 3);
        assert_eq!(watch.look(), Some(Discarded { bytes: 4096 }));
    }

    #[test]
    fn new_memory_does_not_hide_a_discard() {
        let region = sparse();
        fill(&region, 0, 8);
        let mut watch = DiscardWatch::new(&[part(&region, 0, 8)]).unwrap();
        // The other half is new and is pinned, while the guest discards a page of the first half.
        fill(&region, 8, 8);
        punch(&region, 3);
        watch.set_regions(&[part(&region, 0, 8), part(&region, 8, 8)]).unwrap();
        watch.expect_all();
        assert_eq!(watch.look(), Some(Discarded { bytes: 4096 }));
    }

    #[test]
    fn a_discard_between_two_tables_is_noticed() {
        let regions = [memory(), memory()];
        let mut watch = DiscardWatch::new(&regions[..1]).unwrap();
        punch(&regions[0], 0);
        watch.set_regions(&regions).unwrap();
        assert_eq!(watch.look(), Some(Discarded { bytes: 4096 }));
        // A discard is noticed even if the region left meanwhile and came back with another descriptor.
        punch(&regions[1], 0);
        watch.set_regions(&[part(&regions[1], 0, PAGES)]).unwrap();
        assert_eq!(watch.look(), Some(Discarded { bytes: 4096 }));
    }

    #[test]
    fn memory_that_has_left_is_not_watched() {
        let regions = [memory(), memory()];
        let mut watch = DiscardWatch::new(&regions).unwrap();
        watch.set_regions(&regions[..1]).unwrap();
        punch(&regions[1], 0);
        assert_eq!(watch.look(), None);
    }
}
