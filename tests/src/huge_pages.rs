//! Huge pages for a test. The kernel has none unless a user reserves them.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

use crate::needs::Need;

/// The length of a huge page in bytes.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The kernel's 2 MiB huge pages (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The kernel supports huge pages, even if none is reserved.
pub fn supported() -> Need {
    Need::new("2 MiB huge pages", || {
        ensure!(Path::new(HUGE_PAGES).exists(), "{HUGE_PAGES} does not exist: this kernel has none");
        Ok(())
    })
}

/// The number of free huge pages.
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

/// Further huge pages, reserved until the drop.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Reserves `count` more huge pages.
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
        fs::write(format!("{HUGE_PAGES}/nr_hugepages"), count.to_string())
            .context("cannot set the number of huge pages")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = Self::set(self.before) {
            eprintln!("huge pages are left reserved: {error:#}");
        }
    }
}
