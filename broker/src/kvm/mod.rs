//! For virtual machine monitors on KVM: a device's queues, connected to a VM.
//!
//! A [`DirectDevice`](crate::direct::DirectDevice) knows nothing of virtual machines; its queues have a doorbell and a
//! completion eventfd, and rings in guest RAM or in a window. This module connects these to a VM, so that no part of
//! the monitor is on the data path:
//!
//! | the guest | KVM | the ring |
//! | --- | --- | --- |
//! | reads and writes its RAM | [`RamSlots`]: memory slots over [`GuestMemory`](crate::memory::GuestMemory) | the pinned pages |
//! | rings the doorbell: a write to a port or an address | ioeventfd | wakes the SQ thread, or is entered |
//! | takes an interrupt | irqfd | the completion eventfd, signalled by the kernel |
//! | looks into a window | memory slots over pages of the kernel | the ring itself |
//!
//! [`KvmQueue`] makes all of that for one queue as a whole, and undoes it in the right order. [`ExitCounters`] counts
//! a vCPU's exits, to show that there are none.
//!
//! # Example
//!
//! What remains for the monitor: to make the VM and its vCPUs, to choose addresses, and to tell the guest.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use ringpass_broker::direct::{DirectConfig, DirectDevice, SubmissionConfig};
//! use ringpass_broker::disk::{Disk, DiskConfig};
//! use ringpass_broker::kernel;
//! use ringpass_broker::kvm::kvm_bindings::{
//!     KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
//! };
//! use ringpass_broker::kvm::kvm_ioctls::{IoEventAddress, Kvm};
//! use ringpass_broker::kvm::{KvmPlacement, KvmQueue, KvmQueueConfig, RamSlots};
//! use ringpass_broker::limits;
//! use ringpass_broker::memory::{GuestMemory, RegionConfig, Sharing};
//! use ringpass_broker::ring::{RingConfig, SqThreadConfig};
//! use ringpass_restrictions::{Access, Policy};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let ram_file = std::fs::File::open("/dev/null")?;
//! # let ram_bytes = 1 << 30;
//! # fn stop_vcpus() {}
//! // The VM, with an interrupt controller in the kernel: irqfds need one.
//! let vm = Arc::new(Kvm::new()?.create_vm()?);
//! vm.create_irq_chip()?;
//!
//! // The queue's interrupt: a message to the first vCPU's local APIC, as the guest programmed it into the device's MSI-X
//! // table. These are all routes of the VM: a monitor lists those of its other devices and of the I/O APIC's pins too.
//! let gsi = 24;
//! let msi = kvm_irq_routing_msi { address_lo: 0xfee0_0000, data: 0x40, ..Default::default() };
//! let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
//! let route = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() };
//! vm.set_gsi_routing(&KvmIrqRouting::from_entries(&[route])?)?;
//!
//! // Guest RAM is a memfd, once for the VM and once, pinned, for the rings.
//! let region = RegionConfig { gpa: 0, len_bytes: ram_bytes, file: Arc::new(ram_file), file_offset_bytes: 0 };
//! let memory = GuestMemory::new([region])?;
//! let ram = RamSlots::map(&vm, &memory, 0)?;
//!
//! // All files are open. The image must not grow, and the process drops its capabilities now (see below): a ring may
//! // do what its creator may do.
//! let disk = Arc::new(Disk::open(&DiskConfig::new("disk.img"))?);
//! limits::cap_file_growth(&disk)?;
//! let device = DirectDevice::new(
//!     disk,
//!     &memory,
//!     Policy::direct(Access::ReadWrite).compile(&kernel::support()?)?,
//!     DirectConfig::new(SubmissionConfig::SqThread(SqThreadConfig::default()), Sharing::Clone),
//! )?;
//!
//! // When the guest's driver has allocated a ring and said where:
//! let queue = KvmQueue::attach(
//!     &vm,
//!     &device,
//!     KvmQueueConfig::new(
//!         RingConfig { sq_entries: 64, cq_entries: 128 },
//!         KvmPlacement::GuestRam { rings_gpa: 0x10_0000, sqes_gpa: 0x20_0000 },
//!     )
//!     .doorbell(IoEventAddress::Mmio(0xfe00_0000))
//!     .interrupt_gsi(gsi),
//! )?;
//! println!("tell the driver: {:?}, {:?}", queue.layout(), queue.addressing());
//!
//! // The vCPUs run. At the end, or at the guest's reset, they stop: then no vCPU reaches the ring any more. Then the
//! // monitor closes the ring, and the RAM is free for other uses once the ring's I/O has ended.
//! stop_vcpus();
//! let end = queue.detach();
//! end.wait(std::time::Duration::from_secs(30))?;
//! drop(ram);
//! # Ok(())
//! # }
//! ```
//!
//! # Where this has been run
//!
//! On one KVM only: a nested one without hardware support (`kvm_pvm`, on an AMD processor), which runs a guest's CPL 0
//! in software. Nothing has been run on VMX or SVM yet. The code uses nothing that is particular to any of them.
//!
//! # What the process must do
//!
//! The kernel checks the guest's submissions with the rights of the process that made the ring. So the process must not
//! have rights that the guest must not have:
//!
//! - **One guest per process.** `attr_ptr` of an SQE (Linux 6.14) is read in the address space of the ring's creator,
//!   and the errno tells mapped from unmapped addresses. With one guest's memory and no secrets in the process there is
//!   nothing to find. Two guests in one process also share its limits.
//! - **No capabilities when the ring is made.** Real-time I/O priority in an SQE is checked against the credentials
//!   that the creator had *at set-up*: drop `CAP_SYS_ADMIN` and `CAP_SYS_NICE` before [`DirectDevice::new`] (the SQ
//!   thread starts there). `CAP_IPC_LOCK` goes with them: raise `RLIMIT_MEMLOCK` first, to the RAM plus the rings.
//! - **`RLIMIT_FSIZE` at the size of the image**, or a guest can make the image grow:
//!   [`limits::cap_file_growth`](crate::limits::cap_file_growth), once all memory files exist.
//! - **A memory control group.** A guest that never reaps makes the kernel queue completions for it without bound.
//! - **No discarding of RAM.** No balloon, free page reporting, virtio-mem or postcopy for a guest with such a device:
//!   the ring would continue with the old pages.
//! - **No `datamatch` on the doorbell's ioeventfd** ([`KvmQueue`] uses none): CVE-2026-63806, fixed in Linux 6.12.95,
//!   6.18.38 and 7.1.3.
//!
//! [`DirectDevice::new`]: crate::direct::DirectDevice::new

mod error;
mod events;
mod exits;
mod queue;
mod slots;
mod support;

// The versions of the crates whose types are in this interface.
pub use {kvm_bindings, kvm_ioctls};

pub use error::KvmError;
pub use exits::{ExitCounters, Exits};
pub use queue::{KvmPlacement, KvmQueue, KvmQueueConfig};
pub use slots::RamSlots;
pub use support::{KvmRefusal, KvmSupport};
