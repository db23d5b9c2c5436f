//! Memory slots: what the guest sees at its guest-physical addresses.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::KvmError;
use crate::memory::GuestMemory;
use crate::ring::RingWindow;

/// The guest's RAM as memory slots of a VM, one per region. Gone when dropped: no vCPU may run any more by then, or it
/// finds nothing at its RAM's addresses.
#[derive(Debug)]
pub struct RamSlots {
    slots: Vec<MemorySlot>,
}

impl RamSlots {
    /// Shows all regions of `memory` to the VM, in ascending order, as slots `first_slot` and up.
    ///
    /// # Errors
    ///
    /// [`KvmError::Slot`] names the region that KVM refuses.
    pub fn map(vm: &Arc<VmFd>, memory: &GuestMemory, first_slot: u32) -> Result<Self, KvmError> {
        let map = |(slot, (gpa, len_bytes)): (u32, (u64, u64))| {
            let host = memory.host_address(gpa, len_bytes)? as u64;
            MemorySlot::new(vm, Place { slot, gpa, host, len_bytes }, Backing::Ram(memory.clone()))
        };
        let regions = memory.regions().iter().map(|region| (region.config.gpa, region.config.len_bytes));
        let slots = (first_slot..).zip(regions).map(map).collect::<Result<_, _>>()?;
        Ok(Self { slots })
    }

    /// How many slots there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Never: memory has at least one region.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

/// A ring that the kernel allocated, as two memory slots.
#[derive(Debug)]
pub(super) struct WindowSlots {
    _slots: [MemorySlot; 2],
}

impl WindowSlots {
    /// Shows the rings area at `rings_gpa` and the SQE area at `sqes_gpa`, as slots `first_slot` and the one behind.
    pub(super) fn map(
        vm: &Arc<VmFd>,
        window: &Arc<RingWindow>,
        first_slot: u32,
        rings_gpa: u64,
        sqes_gpa: u64,
    ) -> Result<Self, KvmError> {
        let slot = |slot, gpa, host: *mut u8, len_bytes| {
            let place = Place { slot, gpa, host: host as u64, len_bytes };
            MemorySlot::new(vm, place, Backing::Window(window.clone()))
        };
        let rings = slot(first_slot, rings_gpa, window.rings().as_ptr(), window.rings_bytes())?;
        let sqes = slot(first_slot + 1, sqes_gpa, window.sqes().as_ptr(), window.sqes_bytes())?;
        Ok(Self { _slots: [rings, sqes] })
    }
}

/// Where a slot is.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: u32,
    gpa: u64,
    /// Address in this process.
    host: u64,
    len_bytes: u64,
}

/// What must stay mapped for as long as the slot is there. Held, not read.
#[derive(Debug)]
#[expect(dead_code, reason = "the values are held for their lifetime")]
enum Backing {
    Ram(GuestMemory),
    Window(Arc<RingWindow>),
}

/// One memory slot. Removed when dropped, before its backing goes.
#[derive(Debug)]
struct MemorySlot {
    vm: Arc<VmFd>,
    slot: u32,
    backing: Option<Backing>,
}

impl MemorySlot {
    fn new(vm: &Arc<VmFd>, place: Place, backing: Backing) -> Result<Self, KvmError> {
        let Place { slot, gpa, host, len_bytes } = place;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len_bytes,
            userspace_addr: host,
        };
        // SAFETY: the bytes are shared memory that `backing` keeps mapped and that nothing in this process refers to;
        // the slot is removed before `backing` is dropped.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| KvmError::Slot {
            slot,
            gpa,
            len_bytes,
            source,
        })?;
        Ok(Self { vm: vm.clone(), slot, backing: Some(backing) })
    }
}

impl Drop for MemorySlot {
    fn drop(&mut self) {
        let nothing = kvm_userspace_memory_region { slot: self.slot, ..Default::default() };
        // SAFETY: a size of 0 removes the slot.
        if let Err(error) = unsafe { self.vm.set_user_memory_region(nothing) } {
            tracing::error!(slot = self.slot, %error, "a memory slot cannot be removed: its memory stays mapped");
            // The guest can still look through it, so its addresses must never be used for anything else.
            std::mem::forget(self.backing.take());
        }
    }
}
