//! Memory slots: the memory that the guest sees at its guest-physical addresses.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::KvmError;
use crate::memory::GuestMemory;
use crate::ring::RingWindow;

/// The guest's RAM as memory slots of a VM, one per region. Removed when dropped: no vCPU may run any more by then, or
/// it finds no memory at its RAM's addresses.
#[derive(Debug)]
pub struct RamSlots {
    slots: Vec<MemorySlot>,
}

impl RamSlots {
    /// Shows all regions of `memory` to the VM, in ascending order, as slots `first_slot` and up.
    ///
    /// These slot numbers must be free. This module refuses slots that it has made itself, but KVM does not report
    /// slots that the monitor made: KVM would move such a slot of the same memory and size, and dropping this value
    /// would remove it.
    ///
    /// # Errors
    ///
    /// [`KvmError::SlotNumbers`] and [`KvmError::SlotInUse`]; [`KvmError::Slot`] names the region that KVM refuses.
    pub fn map(vm: &Arc<VmFd>, memory: &GuestMemory, first_slot: u32) -> Result<Self, KvmError> {
        let map = |(slot, (gpa, len_bytes)): (u32, (u64, u64))| {
            let host = memory.host_address(gpa, len_bytes)? as u64;
            MemorySlot::new(vm, Place { slot, gpa, host, len_bytes }, Backing::Ram(memory.clone()))
        };
        let regions = memory.regions().iter().map(|region| (region.config.gpa, region.config.len_bytes));
        let slots = numbers(first_slot, regions.len())?.zip(regions).map(map).collect::<Result<_, _>>()?;
        Ok(Self { slots })
    }

    /// The number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Always false: memory has at least one region.
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
    /// Shows the rings area at `rings_gpa` and the SQE area at `sqes_gpa`, as slots `first_slot` and the next.
    pub(super) fn map(
        vm: &Arc<VmFd>,
        window: &Arc<RingWindow>,
        first_slot: u32,
        rings_gpa: u64,
        sqes_gpa: u64,
    ) -> Result<Self, KvmError> {
        let numbers = numbers(first_slot, 2)?;
        let slot = |slot, gpa, host: *mut u8, len_bytes| {
            let place = Place { slot, gpa, host: host as u64, len_bytes };
            MemorySlot::new(vm, place, Backing::Window(window.clone()))
        };
        let rings = slot(numbers.start, rings_gpa, window.rings().as_ptr(), window.rings_bytes())?;
        let sqes = slot(numbers.start + 1, sqes_gpa, window.sqes().as_ptr(), window.sqes_bytes())?;
        Ok(Self { _slots: [rings, sqes] })
    }
}

/// The numbers of `count` slots. From 65536 on, slots belong to system management mode, which no guest sees.
pub(super) fn numbers(first_slot: u32, count: usize) -> Result<Range<u32>, KvmError> {
    let end = u32::try_from(count).ok().and_then(|count| first_slot.checked_add(count)).filter(|end| *end <= 1 << 16);
    end.map(|end| first_slot..end).ok_or(KvmError::SlotNumbers { first_slot, count })
}

/// The slots in use, by the address of their VM, which they keep alive.
fn in_use() -> MutexGuard<'static, HashSet<(usize, u32)>> {
    static IN_USE: LazyLock<Mutex<HashSet<(usize, u32)>>> = LazyLock::new(Mutex::default);
    IN_USE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of a slot.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: u32,
    gpa: u64,
    /// Address in this process.
    host: u64,
    len_bytes: u64,
}

/// The memory that must stay mapped as long as the slot exists. Held, not read.
#[derive(Debug)]
#[expect(dead_code, reason = "the values are held for their lifetime")]
enum Backing {
    Ram(GuestMemory),
    Window(Arc<RingWindow>),
}

/// One memory slot. Removed when dropped, before its backing is dropped.
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
        // Held until it is known whether the slot exists.
        let mut in_use = in_use();
        let key = (Arc::as_ptr(vm).addr(), slot);
        if in_use.contains(&key) {
            return Err(KvmError::SlotInUse { slot });
        }
        // SAFETY: the bytes are shared memory that `backing` keeps mapped and that nothing in this process refers to;
        // the slot is removed before `backing` is dropped.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| KvmError::Slot {
            slot,
            gpa,
            len_bytes,
            source,
        })?;
        in_use.insert(key);
        Ok(Self { vm: vm.clone(), slot, backing: Some(backing) })
    }
}

impl Drop for MemorySlot {
    fn drop(&mut self) {
        let nothing = kvm_userspace_memory_region { slot: self.slot, ..Default::default() };
        let mut in_use = in_use();
        // SAFETY: a size of 0 removes the slot.
        if let Err(error) = unsafe { self.vm.set_user_memory_region(nothing) } {
            tracing::error!(slot = self.slot, %error, "cannot remove a memory slot: its memory stays mapped");
            // The guest can still reach the memory, so its addresses must never be used for anything else. The slot
            // stays in use, and its VM must not make room for another VM at the same address.
            std::mem::forget((self.backing.take(), self.vm.clone()));
        } else {
            in_use.remove(&(Arc::as_ptr(&self.vm).addr(), self.slot));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_numbers_end_where_the_next_address_space_begins() {
        assert_eq!(numbers(1, 2).expect("two small numbers"), 1..3);
        assert_eq!(numbers(65534, 2).expect("the last two"), 65534..65536);
        for (first_slot, count) in [(65535, 2), (65536, 1), (u32::MAX, 1), (u32::MAX, 2), (0, usize::MAX)] {
            let refused = numbers(first_slot, count);
            assert!(matches!(refused, Err(KvmError::SlotNumbers { .. })), "{first_slot}, {count}: {refused:?}");
        }
    }
}
