//! Noticing that the front-end discards memory while it is pinned.
//!
//! A balloon, free page reporting, virtio-mem and postcopy punch holes into the file of guest memory. The guest then has
//! new pages where a ring still uses the old ones, and neither of the two fails. The kernel tells nobody; what can be seen is
//! that the file has fewer blocks (`st_blocks`). All pages are there when they are pinned, and the pins themselves never take
//! one away, so a number that falls means a discard. (Pages that come to another part of the file at the same time can
//! hide one: it is then seen when the next falls.)

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::memory::RegionConfig;

/// The files of pinned memory, and how many blocks they had.
#[derive(Debug, Default)]
pub(super) struct DiscardWatch {
    files: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    file: Arc<File>,
    /// The most that were seen, in 512 bytes.
    blocks: u64,
}

/// Memory that was discarded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Discarded {
    /// How much at least, in bytes.
    pub(super) bytes: u64,
}

impl DiscardWatch {
    /// Watches the files of memory that was just pinned.
    pub(super) fn new(regions: &[RegionConfig]) -> io::Result<Self> {
        let mut watch = Self::default();
        watch.set_regions(regions)?;
        Ok(watch)
    }

    /// Watches other files from now on; those that stay keep what was seen of them.
    pub(super) fn set_regions(&mut self, regions: &[RegionConfig]) -> io::Result<()> {
        let mut files: Vec<Watched> = Vec::new();
        for RegionConfig { file, .. } in regions {
            if files.iter().any(|watched| Arc::ptr_eq(&watched.file, file)) {
                continue;
            }
            let before = self.files.iter().find(|watched| Arc::ptr_eq(&watched.file, file));
            let blocks = match before {
                Some(watched) => watched.blocks,
                None => blocks(file)?,
            };
            files.push(Watched { file: file.clone(), blocks });
        }
        self.files = files;
        Ok(())
    }

    /// Looks at all files. `None`: nothing was discarded since the last time.
    pub(super) fn look(&mut self) -> Option<Discarded> {
        let mut lost_blocks = 0;
        for watched in &mut self.files {
            // A file that cannot be looked at is as it was: fstat(2) of an open file does not fail.
            let Ok(now) = blocks(&watched.file) else { continue };
            lost_blocks += watched.blocks.saturating_sub(now);
            watched.blocks = now;
        }
        (lost_blocks > 0).then_some(Discarded { bytes: lost_blocks * 512 })
    }
}

fn blocks(file: &File) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

    use super::*;

    const PAGES: u64 = 16;

    fn memory() -> RegionConfig {
        let file = File::from(memfd_create("ringpass-test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(PAGES * 4096).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, PAGES * 4096).unwrap();
        RegionConfig { gpa: 0, len_bytes: PAGES * 4096, file: Arc::new(file), file_offset_bytes: 0 }
    }

    fn punch(region: &RegionConfig, page: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*region.file, flags, page * 4096, 4096).unwrap();
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
    fn a_discard_between_two_tables_is_noticed() {
        let regions = [memory(), memory()];
        let mut watch = DiscardWatch::new(&regions[..1]).unwrap();
        punch(&regions[0], 0);
        watch.set_regions(&regions).unwrap();
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
