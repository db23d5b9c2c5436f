//! Where a vring is in guest RAM.

use std::sync::atomic::Ordering;

use anyhow::Result;
use vm_memory::{Bytes, GuestAddress};

use crate::{
    descriptor::DESCRIPTOR_BYTES,
    ram::{Arena, Ram},
};

/// Where a vring is in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringLayout {
    /// Number of entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc_gpa: u64,
    /// Guest-physical address of the available ring.
    pub avail_gpa: u64,
    /// Guest-physical address of the used ring.
    pub used_gpa: u64,
}

impl VringLayout {
    /// Takes the memory of a vring from an arena.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn take(arena: &mut Arena, size: u16) -> Result<Self> {
        Ok(Self {
            size,
            desc_gpa: arena.take(Self::table_bytes(size), 16)?,
            avail_gpa: arena.take(Self::avail_bytes(size), 2)?,
            used_gpa: arena.take(Self::used_bytes(size), 4096)?,
        })
    }

    /// The used index in RAM: what a front-end takes as base after the back-end has died.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn used_idx(&self, ram: &Ram) -> Result<u16> {
        Ok(u16::from_le(ram.memory().load(GuestAddress(self.used_gpa + 2), Ordering::Acquire)?))
    }

    /// Length of the used ring in bytes, with the event index.
    pub fn used_bytes(size: u16) -> u64 {
        6 + 8 * u64::from(size)
    }

    /// Length of the available ring in bytes, with the event index.
    pub(super) fn avail_bytes(size: u16) -> u64 {
        6 + 2 * u64::from(size)
    }

    /// Length of the descriptor table in bytes.
    pub(super) fn table_bytes(size: u16) -> u64 {
        DESCRIPTOR_BYTES * u64::from(size)
    }

    /// Where the available ring's entry for an index is.
    pub(super) fn avail_entry_gpa(&self, index: u16) -> u64 {
        self.avail_gpa + 4 + 2 * u64::from(index % self.size)
    }

    /// Where the used ring's element for an index is.
    pub(super) fn used_element_gpa(&self, index: u16) -> u64 {
        self.used_gpa + 4 + 8 * u64::from(index % self.size)
    }

    /// Where the driver writes the used index at which it wants an interrupt (VIRTIO 1.2, 2.7.7).
    pub(super) fn used_event_gpa(&self) -> u64 {
        self.avail_gpa + 4 + 2 * u64::from(self.size)
    }

    /// Where the device writes the available index at which it wants a kick (VIRTIO 1.2, 2.7.10).
    pub(super) fn avail_event_gpa(&self) -> u64 {
        self.used_gpa + 4 + 8 * u64::from(self.size)
    }
}
