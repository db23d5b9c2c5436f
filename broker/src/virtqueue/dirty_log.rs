//! The log of the pages that the device wrote, for live migration.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::shared_memory::{SharedMemory, SharedMemoryError};
use crate::lost_memory::Purpose;

/// Size of the page that one bit of the log stands for (`VHOST_LOG_PAGE` of vhost-user).
const PAGE_BYTES: u64 = 4096;

/// The front-end's log of pages that the device wrote (VHOST_USER_SET_LOG_BASE): one bit for each 4 KiB page of
/// guest-physical addresses, from address 0 on.
///
/// The front-end clears bits and then reads the pages. So the device marks a page *after* it has written it, and before
/// the driver or the front-end can learn of the write.
///
/// Several threads may mark at the same time.
#[derive(Debug)]
pub struct DirtyLog {
    bits: SharedMemory,
    out_of_range_pages: AtomicU64,
}

impl DirtyLog {
    /// Maps the log: `size_bytes` of the file from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// The area is empty, not at a page boundary of the file, partly beyond the end of the file, or cannot be mapped
    /// for writing.
    pub fn from_fd(fd: OwnedFd, offset_bytes: u64, size_bytes: u64) -> Result<Self, SharedMemoryError> {
        let bits = SharedMemory::map(fd, offset_bytes, size_bytes, Purpose::DirtyLog)?;
        Ok(Self { bits, out_of_range_pages: AtomicU64::new(0) })
    }

    /// Marks the pages of `len_bytes` bytes from `gpa` on as written. Counts the pages that the log has no bit for, and
    /// logs the first of them: the guest may lack them at the destination of the migration.
    pub fn mark(&self, gpa: u64, len_bytes: u64) {
        let Some(last_offset) = len_bytes.checked_sub(1) else { return };
        let first_page = gpa / PAGE_BYTES;
        let last_page = gpa.saturating_add(last_offset) / PAGE_BYTES;
        let end_page = last_page + 1;
        let logged_end = end_page.min((self.bits.len() as u64).saturating_mul(8));
        let mut page = first_page;
        while page < logged_end {
            let byte_end = (page / 8 + 1) * 8;
            let end = byte_end.min(logged_end);
            let mask = bits_from(page % 8) & bits_below(end - page / 8 * 8);
            // Release: a reader that sees the bit also sees the page's new content.
            self.bits.to_store::<AtomicU8>((page / 8) as usize).fetch_or(mask, Ordering::Release);
            page = end;
        }
        let outside = end_page - logged_end.clamp(first_page, end_page);
        if outside > 0 && self.count_out_of_range(outside) {
            let log_bytes = self.bits.len();
            tracing::warn!(
                gpa = format_args!("{gpa:#x}"),
                log_bytes,
                "page not logged: the front-end's dirty log has no bit for it (the guest may lack it after a migration)"
            );
        }
    }

    /// True: these are the first ones.
    fn count_out_of_range(&self, pages: u64) -> bool {
        self.out_of_range_pages.fetch_add(pages, Ordering::Relaxed) == 0
    }

    /// How many written pages had no bit in the log, because the front-end made it too small.
    pub fn out_of_range_pages(&self) -> u64 {
        self.out_of_range_pages.load(Ordering::Relaxed)
    }
}

/// The bits of a byte from `bit` on; `bit` is at most 7.
fn bits_from(bit: u64) -> u8 {
    0xff << bit
}

/// The bits of a byte below `bit`; `bit` is 1 to 8.
fn bits_below(bit: u64) -> u8 {
    0xff >> (8 - bit)
}
