//! What an honest driver does not do: tests of hostile drivers call these methods.

use std::sync::atomic::Ordering;

use anyhow::Result;
use vm_memory::{Bytes, GuestAddress};

use super::DriverVring;
use crate::descriptor::{DESCRIPTOR_BYTES, Descriptor};

impl DriverVring {
    /// Writes one descriptor of the table, with any content.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) -> Result<()> {
        let gpa = self.layout.desc_gpa + DESCRIPTOR_BYTES * u64::from(index);
        Ok(self.ram.memory().write_slice(&descriptor.to_bytes(), GuestAddress(gpa))?)
    }

    /// Adds an entry with any head to the available ring: the chain is what the table holds there.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn add_head(&mut self, head: u16) -> Result<()> {
        let gpa = self.layout.avail_entry_gpa(self.next_avail);
        self.ram.memory().write_obj(head.to_le(), GuestAddress(gpa))?;
        if let Some(count) = self.available.get_mut(usize::from(head)) {
            *count += 1;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Writes any available index. From then on the driver does not know which chains the device may use, and does not
    /// check heads of used elements.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn write_avail_idx(&mut self, index: u16) -> Result<()> {
        (self.next_avail, self.published) = (index, index);
        self.knows_available = false;
        self.store(self.layout.avail_gpa + 2, index, Ordering::Release)
    }
}
