//! The code of this crate that the compiler cannot check: memory that others access too, and file descriptors in types
//! without ownership.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU16, AtomicU32};

use memmap2::MmapRaw;
use ringpass_guest_abi::{MappedRing, RingLayout};
use vmm_sys_util::eventfd::EventFd;

use crate::ram::{GuestRam, RamArea, RamError, RamRegion};
use crate::vhost_user::{ByAddress, Queue};

impl GuestRam {
    /// Maps `regions`, shared, readable and writable.
    ///
    /// # Errors
    ///
    /// There is no region; a region is empty, is not aligned to 4096 bytes, ends above 16 TiB, overlaps another, or ends
    /// behind the end of its file; or the kernel refuses to map it.
    ///
    /// # Safety
    ///
    /// For as long as the value, and the areas and rings made from it, live:
    ///
    /// - no file becomes shorter (an access behind its end raises SIGBUS);
    /// - an [area](RamArea) that a device uses is not dropped before the device has ended, because its bytes are handed out
    ///   again: its owner keeps it, or [leaks](RamArea::leak) it;
    /// - while bytes are borrowed through [`RamArea::bytes_mut`], no other access to them happens: by another process that
    ///   has the files, through another mapping in this process, or by a device for a request in flight. At all other
    ///   times others may change the memory.
    pub unsafe fn map(regions: &[RamRegion<'_>]) -> Result<Self, RamError> {
        Self::map_checked(regions)
    }
}

impl RamArea {
    /// The `len_bytes` bytes from `offset_bytes` of the area. None where the area is shorter.
    ///
    /// Call this only while no request in flight names any of the bytes: see the contract of [`GuestRam::map`].
    pub fn bytes_mut(&mut self, offset_bytes: u64, len_bytes: u64) -> Option<&mut [u8]> {
        let (first, len) = self.range(offset_bytes, len_bytes)?;
        // SAFETY: `first` and the `len` bytes behind it are mapped for as long as `self`, which keeps the mapping (the
        // borrow ends before). No one else in this process has a reference to them: areas do not overlap, an area is
        // not `Clone`, and this borrows it exclusively. No one outside accesses them: the contract of `GuestRam::map`.
        // All bit patterns are valid bytes, and `len` is below 1 GiB.
        Some(unsafe { slice::from_raw_parts_mut(first.as_ptr(), len) })
    }

    /// Copies out what is at `offset_bytes` of the area, also while others may change it. False, and nothing copied,
    /// where the area is shorter.
    pub fn read(&self, offset_bytes: u64, into: &mut [u8]) -> bool {
        let Some((first, len)) = self.range(offset_bytes, into.len() as u64) else {
            return false;
        };
        for (index, byte) in into.iter_mut().enumerate().take(len) {
            // SAFETY: below `len` bytes behind `first`, inside the mapping that `self` keeps.
            let at = unsafe { first.add(index) };
            // SAFETY: mapped and readable as above; volatile, since others may write it at the same time.
            *byte = unsafe { at.read_volatile() };
        }
        true
    }

    /// Copies `from` to `offset_bytes` of the area. False, and nothing copied, where the area is shorter.
    pub fn write(&mut self, offset_bytes: u64, from: &[u8]) -> bool {
        let Some((first, len)) = self.range(offset_bytes, from.len() as u64) else {
            return false;
        };
        for (index, byte) in from.iter().enumerate().take(len) {
            // SAFETY: below `len` bytes behind `first`, inside the mapping that `self` keeps.
            let at = unsafe { first.add(index) };
            // SAFETY: mapped and writable as above; volatile, since others may read it at the same time.
            unsafe { at.write_volatile(*byte) };
        }
        true
    }
}

impl RamArea {
    /// The 16 bits at `offset_bytes`, which others may change at any time. None where the area is shorter, or they are
    /// not aligned.
    pub(crate) fn word16(&self, offset_bytes: u64) -> Option<&AtomicU16> {
        let (at, _) = self.range(offset_bytes, 2).filter(|(at, _)| at.cast::<u16>().is_aligned())?;
        // SAFETY: mapped readable and writable for as long as `self`, which the result borrows, and aligned. Everybody
        // accesses it atomically: this driver through this function, the device by the rules of virtqueues.
        Some(unsafe { AtomicU16::from_ptr(at.cast().as_ptr()) })
    }

    /// The 32 bits at `offset_bytes`, in the same way.
    pub(crate) fn word32(&self, offset_bytes: u64) -> Option<&AtomicU32> {
        let (at, _) = self.range(offset_bytes, 4).filter(|(at, _)| at.cast::<u32>().is_aligned())?;
        // SAFETY: as for 16 bits; the words of control pages are 32 bits for both sides.
        Some(unsafe { AtomicU32::from_ptr(at.cast().as_ptr()) })
    }
}

impl Queue {
    /// The queue for requests that name their memory by guest-physical address.
    ///
    /// # Safety
    ///
    /// As long as a request that names bytes of an area has not ended, nothing borrows these bytes
    /// ([`RamArea::bytes_mut`]), and the area is not dropped (but may be [leaked](RamArea::leak)).
    pub unsafe fn by_address(&mut self) -> ByAddress<'_> {
        self.addressed()
    }
}

/// Maps RAM of this process in files whose length is sealed.
pub(crate) fn map_own(regions: &[RamRegion<'_>]) -> Result<GuestRam, RamError> {
    // SAFETY: the caller has sealed the files against shrinking. Bytes are borrowed only by owners of areas that no request
    // names: the driver owns the buffers of its requests until they have ended, and areas that it lends to the device are
    // not handed out again when they are dropped.
    unsafe { GuestRam::map(regions) }
}

/// The address of byte `offset` of a mapping. The caller has checked that it lies inside.
pub(crate) fn byte_of(mapping: &MmapRaw, offset: usize) -> NonNull<u8> {
    assert!(offset < mapping.len(), "byte {offset} of a mapping of {} bytes", mapping.len());
    let start = NonNull::new(mapping.as_mut_ptr()).expect("the kernel does not map at address 0");
    // SAFETY: inside the mapping by the assertion.
    unsafe { start.add(offset) }
}

/// The ring in two areas, which the caller keeps for as long as it keeps the ring, and lends to no one.
pub(crate) fn ring_in(rings: &RamArea, sqes: &RamArea, layout: &RingLayout) -> Option<MappedRing> {
    let (rings_start, _) = rings.range(0, layout.rings_bytes)?;
    let (sqes_start, _) = sqes.range(0, layout.sqes_bytes)?;
    // SAFETY: both ranges are mapped readable and writable for as long as the areas live, which the caller keeps. Areas
    // start at a page, which is enough of alignment. References to an area's bytes exist only while it is borrowed
    // exclusively; the caller owns the areas and lends neither in that way.
    Some(unsafe { MappedRing::new(rings_start, layout.rings_bytes, sqes_start, layout.sqes_bytes) })
}

/// An eventfd's descriptor, for calls that want it borrowed.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The descriptor as an eventfd.
pub(crate) fn into_event(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor was owned by `fd`, which gave it up, and is owned by the result alone.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}
