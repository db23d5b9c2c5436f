//! Access to bytes of guest RAM, which devices and other processes access too. The compiler cannot check this: the
//! contract of [`GuestRam::map`] does.

#![allow(unsafe_code)]

use std::slice;
use std::sync::atomic::{AtomicU16, AtomicU32};

use ringpass_guest_abi::{MappedRing, RingLayout};

use super::area::RamArea;
use super::guest_ram::{GuestRam, RamError, RamRegion};

impl GuestRam {
    /// Maps `regions`, shared, readable and writable.
    ///
    /// # Errors
    ///
    /// There is no region; a region is empty, is not aligned to 4096 bytes, ends above 16 TiB, overlaps another, or
    /// ends behind the end of its file; or the kernel refuses to map it.
    ///
    /// # Safety
    ///
    /// The caller ensures the following for as long as the value, and the areas and rings made from it, live:
    ///
    /// - No file becomes shorter (an access behind its end raises SIGBUS).
    /// - The owner of an [area](RamArea) keeps it, or [leaks](RamArea::leak) it, as long as a device uses it: the
    ///   allocator hands out the bytes of a dropped area again.
    /// - While this process borrows bytes through [`RamArea::bytes_mut`], nothing else accesses them: no other process
    ///   that has the files, no other mapping in this process, and no device for a request in flight. At all other
    ///   times they may change the memory.
    pub unsafe fn map(regions: &[RamRegion<'_>]) -> Result<Self, RamError> {
        Self::map_checked(regions)
    }
}

impl RamArea {
    /// The `len_bytes` bytes from `offset_bytes` of the area on. `None` if the area is shorter.
    ///
    /// Call this only while no request in flight names any of the bytes: see the contract of [`GuestRam::map`].
    pub fn bytes_mut(&mut self, offset_bytes: u64, len_bytes: u64) -> Option<&mut [u8]> {
        let (first, len) = self.range(offset_bytes, len_bytes)?;
        // SAFETY: `first` and the `len` bytes behind it are mapped for as long as `self`, which keeps the mapping (the
        // borrow ends before). This process has no other reference to them: areas do not overlap, an area is not
        // `Clone`, and this borrows it exclusively. No device and no other process accesses them, by the contract of
        // `GuestRam::map`. All bit patterns are valid bytes, and `len` is below 1 GiB.
        Some(unsafe { slice::from_raw_parts_mut(first.as_ptr(), len) })
    }

    /// Copies bytes from `offset_bytes` of the area into `into`, also while others may change them. Returns false, and
    /// copies nothing, if the area is shorter.
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

    /// Copies `from` to `offset_bytes` of the area, also while others may read the bytes. Returns false, and copies
    /// nothing, if the area is shorter.
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

    /// The 16 bits at `offset_bytes`, which others may change at any time. `None` if the area is shorter, or the offset
    /// is not aligned.
    pub(crate) fn word16(&self, offset_bytes: u64) -> Option<&AtomicU16> {
        let (at, _) = self.range(offset_bytes, 2).filter(|(at, _)| at.cast::<u16>().is_aligned())?;
        // SAFETY: mapped readable and writable for as long as `self`, which the result borrows, and aligned. All
        // accesses are atomic: this driver's through this function, the device's by the rules of virtqueues.
        Some(unsafe { AtomicU16::from_ptr(at.cast().as_ptr()) })
    }

    /// The 32 bits at `offset_bytes`, under the same conditions.
    pub(crate) fn word32(&self, offset_bytes: u64) -> Option<&AtomicU32> {
        let (at, _) = self.range(offset_bytes, 4).filter(|(at, _)| at.cast::<u32>().is_aligned())?;
        // SAFETY: as for 16 bits; both sides access the words of control pages as 32 bits.
        Some(unsafe { AtomicU32::from_ptr(at.cast().as_ptr()) })
    }
}

/// Maps RAM of this process, in files that are sealed against shrinking, for the driver in `vhost_user`.
pub(crate) fn map_sealed(regions: &[RamRegion<'_>]) -> Result<GuestRam, RamError> {
    // SAFETY: the seals keep the length of the files. The driver owns the buffers of its requests until the requests
    // have ended, so that only areas that no request names are borrowed. The allocator does not hand out again the
    // areas that the driver has lent to the device.
    unsafe { GuestRam::map(regions) }
}

/// The ring in two areas. `None` if they are shorter than the layout says. The caller keeps the areas for as long as
/// the ring, and borrows none of their bytes exclusively.
pub(crate) fn mapped_ring(rings: &RamArea, sqes: &RamArea, layout: &RingLayout) -> Option<MappedRing> {
    let (rings_start, _) = rings.range(0, layout.rings_bytes)?;
    let (sqes_start, _) = sqes.range(0, layout.sqes_bytes)?;
    // SAFETY: both ranges are mapped readable and writable for as long as the areas live, which the caller keeps. Areas
    // start at a page, so they are aligned. References to the bytes of an area exist only while it is borrowed
    // exclusively, which the caller, their owner, does not do.
    Some(unsafe { MappedRing::new(rings_start, layout.rings_bytes, sqes_start, layout.sqes_bytes) })
}
