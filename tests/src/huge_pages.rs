//! Huge pages for a test: the kernel has none to give unless somebody set them aside.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

use crate::needs::Need;

/// Bytes of one.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The kernel's 2 MiB huge pages (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The kernel can have them, though it may have none.
pub fn supported() -> Need {
    Need::new("2 MiB huge pages", || {
        ensure!(Path::new(HUGE_PAGES).exists(), "{HUGE_PAGES} does not exist: this kernel has none");
        Ok(())
    })
}

/// Huge pages that nobody has.
///
/// # Errors
///
/// The kernel's number cannot be read.
pub fn free() -> Result<u64> {
    let path = format!("{HUGE_PAGES}/free_hugepages");
    if !Path::new(&path).exists() {
        return Ok(0);
    }
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

/// More huge pages than there were, until the drop.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Sees to `count` more huge pages.
    ///
    /// # Errors
    ///
    /// Not root, or the kernel does not find that many pieces of memory.
    pub fn add(count: u64) -> Result<Self> {
        let pages = Self { before: Self::total()? };
        Self::set(pages.before + count)?;
        let free = free()?;
        ensure!(free >= count, "of {count} huge pages the kernel finds only {free}: memory is too fragmented");
        Ok(pages)
    }

    fn total() -> Result<u64> {
        Ok(fs::read_to_string(format!("{HUGE_PAGES}/nr_hugepages"))?.trim().parse()?)
    }

    fn set(count: u64) -> Result<()> {
        fs::write(format!("{HUGE_PAGES}/nr_hugepages"), count.to_string()).context("setting the number of huge pages")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = Self::set(self.before) {
            eprintln!("huge pages stay behind: {error:#}");
        }
    }
}
