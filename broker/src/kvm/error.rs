//! Why a queue cannot be connected to a VM.

use std::io;

use crate::memory::MemoryError;
use crate::ring::RingError;

/// Why something could not be connected to a VM. Nothing of it remains connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The queue itself was refused.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The guest's memory is unsuitable.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused a memory slot.
    #[error(
        "KVM refuses memory slot {slot} ({len_bytes} bytes at guest-physical {gpa:#x}): {source}{}",
        slot_hint(.source)
    )]
    Slot {
        /// Number of the slot.
        slot: u32,
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len_bytes: u64,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// A memory slot of this number already shows other memory: KVM would move it, and the first owner to go would
    /// remove the slot of the other.
    #[error("memory slot {slot} of this VM is in use: choose another number")]
    SlotInUse {
        /// Number of the slot.
        slot: u32,
    },
    /// Memory slots cannot have such numbers.
    #[error(
        "there are no {count} memory slots from number {first_slot} on: numbers are below 65536, the upper half chooses an \
         address space"
    )]
    SlotNumbers {
        /// Number of the first slot.
        first_slot: u32,
        /// The number of slots.
        count: usize,
    },
    /// KVM refused the doorbell's ioeventfd.
    #[error("KVM refuses an ioeventfd at {address}: {source}{}", doorbell_hint(.source))]
    Doorbell {
        /// The doorbell's port or guest-physical address.
        address: String,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM refused the interrupt's irqfd.
    #[error("KVM refuses an irqfd for interrupt {gsi}: {source}{}", interrupt_hint(.source))]
    Interrupt {
        /// The global system interrupt.
        gsi: u32,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// A window is not page-aligned.
    #[error("the window for the {area} area at guest-physical {gpa:#x} is not aligned to 4096 bytes")]
    UnalignedWindow {
        /// `"rings"` or `"SQE"`.
        area: &'static str,
        /// Its guest-physical address.
        gpa: u64,
    },
    /// The vCPU's statistics lack a counter.
    #[error("this kernel's statistics of a vCPU have no counter named {name}")]
    NoCounter {
        /// Its name.
        name: &'static str,
    },
    /// Another system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// The step that failed.
        what: &'static str,
        /// The error that the kernel returned.
        source: io::Error,
    },
}

impl KvmError {
    /// For `map_err` on a system call.
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

fn slot_hint(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        nix::libc::EEXIST => "; it overlaps another memory slot of the VM",
        nix::libc::EINVAL => "; the number is in use with another size, or beyond KVM_CAP_NR_MEMSLOTS",
        _ => "",
    }
}

fn doorbell_hint(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        nix::libc::EEXIST => "; another ioeventfd is there: each queue needs a doorbell of its own",
        nix::libc::ENOSPC => "; the VM has as many doorbells as KVM allows (NR_IOBUS_DEVS, 1000)",
        _ => "",
    }
}

fn interrupt_hint(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        nix::libc::EAGAIN | nix::libc::EINVAL | nix::libc::ENODEV => {
            "; the VM needs an interrupt controller in the kernel"
        }
        _ => "",
    }
}
