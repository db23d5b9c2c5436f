//! The pages of a file in the page cache that are not on the disk yet.

use std::{fs::File, io, os::fd::AsRawFd};

use anyhow::{Context, Result};
use nix::libc;

use crate::needs::Need;

/// `cachestat(2)`, Linux 6.5; the same number on all architectures. The libc crate does not have it yet.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`: the whole file.
#[repr(C)]
#[derive(Default)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat`, in pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// How many pages of the file a power failure would take: dirty, or on their way to the disk.
///
/// # Errors
///
/// The kernel cannot tell.
pub fn unstable_pages(file: &File) -> Result<u64> {
    let (range, mut pages) = (CachestatRange::default(), Cachestat::default());
    // SAFETY: the pointers are to two values of the kernel's layout which outlive the call; it writes the second only.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut pages, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("cachestat");
    }
    Ok(pages.nr_dirty + pages.nr_writeback)
}

impl Need {
    /// The kernel can tell which pages of a file are only in the page cache.
    pub fn cachestat() -> Self {
        Self::new("cachestat(2), which Linux has from 6.5 on", || {
            unstable_pages(&File::open("/proc/self/exe")?).map(drop)
        })
    }
}
