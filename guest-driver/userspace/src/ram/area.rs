//! A piece of a guest's RAM that has one owner.

use std::ptr::NonNull;
use std::sync::Arc;

use super::guest_ram::GuestRam;

/// A piece of a guest's RAM that has one owner. It lies in one region and one 1 GiB slot, in whole pages, and keeps the
/// RAM mapped.
///
/// After the drop of an area, the allocator can hand out its bytes again. This must not happen while a device may still
/// write to the area. The driver in [`vhost_user`](crate::vhost_user) keeps the buffers of its requests until the
/// requests have ended. A program that gives the address of an area to a device in another way keeps the area as long
/// as the device uses it, or [leaks](Self::leak) it.
#[derive(Debug)]
pub struct RamArea {
    ram: Arc<GuestRam>,
    gpa: u64,
    len_bytes: u64,
    /// A device may use the bytes: the drop does not return them.
    is_lent: bool,
}

impl Drop for RamArea {
    fn drop(&mut self) {
        if !self.is_lent {
            self.ram.free().give_back(self.gpa, self.len_bytes);
        }
    }
}

impl RamArea {
    /// The area of bytes that the caller has taken from the free ranges.
    pub(super) fn new(ram: Arc<GuestRam>, gpa: u64, len_bytes: u64) -> Self {
        Self { ram, gpa, len_bytes, is_lent: false }
    }

    /// Lends the bytes to a device: before [`take_back`](Self::take_back), the drop of the area does not return them to
    /// the allocator.
    pub(crate) fn lend(&mut self) {
        self.is_lent = true;
    }

    /// Ends the loan: no device uses the bytes any more.
    pub(crate) fn take_back(&mut self) {
        self.is_lent = false;
    }

    /// Drops the area without returning its bytes to the allocator, because a device may use them and this process does
    /// not learn when it ends. The allocator does not hand out the bytes again for as long as the RAM lives.
    pub fn leak(mut self) {
        self.lend();
    }

    /// First byte, guest-physical; a multiple of 4096.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes; a multiple of 4096.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The address and length in this process of a part of the area. `None` if the area is shorter.
    pub(crate) fn range(&self, offset_bytes: u64, len_bytes: u64) -> Option<(NonNull<u8>, usize)> {
        if offset_bytes.checked_add(len_bytes)? > self.len_bytes {
            return None;
        }
        // An empty range at the end of the area may have no address.
        let gpa = if len_bytes == 0 { self.gpa } else { self.gpa + offset_bytes };
        Some((self.ram.pointer(gpa, len_bytes)?, usize::try_from(len_bytes).ok()?))
    }
}
