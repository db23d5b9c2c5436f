//! RAM of a guest for the tests.

#![allow(dead_code, unsafe_code, reason = "each test program uses its own part; the RAM is mapped here only")]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use ringpass_guest::{GuestRam, RamAllocator, RamError, RamRegion};
use ringpass_guest_abi::{Doorbell, RingLayout};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// A memfd of this length. Untouched pages take no memory.
pub(crate) fn memfd(len_bytes: u64) -> File {
    let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).expect("memfd_create");
    ftruncate(&file, len_bytes).expect("ftruncate");
    File::from(file)
}

pub(crate) fn region(gpa: u64, len_bytes: u64, file: &File, offset_bytes: u64) -> RamRegion<'_> {
    RamRegion { gpa, len_bytes, file: file.as_fd(), offset_bytes }
}

pub(crate) fn map(regions: &[RamRegion<'_>]) -> Result<Arc<GuestRam>, RamError> {
    // SAFETY: the tests' files keep their length, and no test accesses bytes through the file while it borrows them.
    unsafe { GuestRam::map(regions) }.map(Arc::new)
}

/// RAM of `len_bytes` at address 0 and its allocator, on a new memfd.
pub(crate) fn ram(len_bytes: u64) -> (File, RamAllocator) {
    let file = memfd(len_bytes);
    let allocator = map(&[region(0, len_bytes, &file, 0)]).unwrap().allocator().unwrap();
    (file, allocator)
}

/// A ring of 8 and 16 entries.
pub(crate) fn layout() -> RingLayout {
    RingLayout {
        sq_entries: 8,
        cq_entries: 16,
        sq_head_offset: 0,
        sq_tail_offset: 4,
        sq_flags_offset: 8,
        cq_head_offset: 64,
        cq_tail_offset: 68,
        cq_flags_offset: 72,
        cqes_offset: 128,
        rings_bytes: 4096,
        sqes_bytes: 4096,
        doorbell: Doorbell::Always,
    }
}
