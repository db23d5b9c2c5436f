//! Eventfds between a VM and a ring.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::KvmError;

/// An ioeventfd: a write of any width to a port or an address signals it, inside the kernel.
#[derive(Debug)]
pub(super) struct Doorbell {
    vm: Arc<VmFd>,
    address: IoEventAddress,
    eventfd: EventFd,
}

impl Doorbell {
    pub(super) fn new(vm: &Arc<VmFd>, address: IoEventAddress) -> Result<Self, KvmError> {
        let eventfd = new_eventfd()?;
        vm.register_ioevent(&eventfd, &address, NoDatamatch)
            .map_err(|source| KvmError::Doorbell { address: describe(&address), source })?;
        Ok(Self { vm: vm.clone(), address, eventfd })
    }

    pub(super) fn eventfd(&self) -> Result<EventFd, KvmError> {
        clone(&self.eventfd)
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        if let Err(error) = self.vm.unregister_ioevent(&self.eventfd, &self.address, NoDatamatch) {
            tracing::error!(%error, address = describe(&self.address), "cannot remove an ioeventfd");
        }
    }
}

/// An irqfd: signalling it interrupts the guest, inside the kernel.
#[derive(Debug)]
pub(super) struct Interrupt {
    vm: Arc<VmFd>,
    gsi: u32,
    eventfd: EventFd,
}

impl Interrupt {
    pub(super) fn new(vm: &Arc<VmFd>, gsi: u32) -> Result<Self, KvmError> {
        let eventfd = new_eventfd()?;
        vm.register_irqfd(&eventfd, gsi).map_err(|source| KvmError::Interrupt { gsi, source })?;
        Ok(Self { vm: vm.clone(), gsi, eventfd })
    }

    pub(super) fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    pub(super) fn clone_eventfd(&self) -> Result<EventFd, KvmError> {
        clone(&self.eventfd)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        if let Err(error) = self.vm.unregister_irqfd(&self.eventfd, self.gsi) {
            tracing::error!(%error, gsi = self.gsi, "cannot remove an irqfd");
        }
    }
}

fn new_eventfd() -> Result<EventFd, KvmError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(KvmError::system("making an eventfd"))
}

fn clone(eventfd: &EventFd) -> Result<EventFd, KvmError> {
    eventfd.try_clone().map_err(KvmError::system("duplicating an eventfd"))
}

fn describe(address: &IoEventAddress) -> String {
    match address {
        IoEventAddress::Pio(port) => format!("port {port:#x}"),
        IoEventAddress::Mmio(gpa) => format!("guest-physical {gpa:#x}"),
    }
}
