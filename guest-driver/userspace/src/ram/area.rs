//! A piece of a guest's RAM that has one owner.

use std::ptr::NonNull;
use std::sync::Arc;

use super::guest_ram::GuestRam;

/// A piece of a guest's RAM that has one owner. It lies in one region and one 1 GiB slot, in whole pages, and keeps the
/// RAM mapped.
///
/// When an area is dropped, its allocator can hand out its bytes again. This must not happen while a device may still
/// write to the area. The driver in [`vhost_user`](crate::vhost_user) keeps the buffers of its requests until the
/// requests have ended. A program that names an area to a device in another way keeps the area as long, or
/// [leaks](Self::leak) it.
#[derive(Debug)]
pub struct RamArea {
    ram: Arc<GuestRam>,
    gpa: u64,
    len_bytes: u64,
    /// A device may use the bytes: a drop does not return them.
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
    /// The caller has taken these bytes out of what can be handed out.
    pub(super) fn new(ram: Arc<GuestRam>, gpa: u64, len_bytes: u64) -> Self {
        Self { ram, gpa, len_bytes, is_lent: false }
    }

    /// From now on a device may use the bytes: they are not handed out again if the area is dropped before
    /// [`take_back`](Self::take_back).
    pub(crate) fn lend(&mut self) {
        self.is_lent = true;
    }

    /// No device uses the bytes any more.
    pub(crate) fn take_back(&mut self) {
        self.is_lent = false;
    }

    /// Gives the area up without returning its bytes to the allocator: a device may use them, and nothing in this
    /// process waits for the end of that. The bytes are lost to the allocator for as long as the RAM lives.
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

    /// The address and length of a part of the area in this process.
    pub(crate) fn range(&self, offset_bytes: u64, len_bytes: u64) -> Option<(NonNull<u8>, usize)> {
        if offset_bytes.checked_add(len_bytes)? > self.len_bytes {
            return None;
        }
        // An empty range at the very end has no address of its own.
        let gpa = if len_bytes == 0 { self.gpa } else { self.gpa + offset_bytes };
        Some((self.ram.pointer(gpa, len_bytes)?, usize::try_from(len_bytes).ok()?))
    }
}
