//! A queue of a device, connected to a VM.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use ringpass_guest_abi::{FixedAddressing, RingLayout};

use super::KvmError;
use super::events::{Doorbell, Interrupt};
use super::slots::{self, WindowSlots};
use crate::direct::{DirectDevice, DirectQueue, QueueConfig, QueuePlacement};
use crate::ring::{RingConfig, RingEnd};

/// The configuration of a queue of a VM.
#[derive(Debug)]
#[non_exhaustive]
pub struct KvmQueueConfig {
    /// Size of the ring.
    pub ring: RingConfig,
    /// Where the guest finds the ring.
    pub placement: KvmPlacement,
    /// The port or guest-physical address to which the guest writes to ring the doorbell: any value, of any width. The
    /// address must lie in no memory slot and belong to no other queue. None: see [`QueueConfig::doorbell`].
    pub doorbell: Option<IoEventAddress>,
    /// The global system interrupt of completions, for which the VM has a route: edge-triggered, usually an MSI. None:
    /// the guest only polls. KVM does not report whether there is a route; without a route the guest gets no interrupt.
    pub interrupt_gsi: Option<u32>,
}

impl KvmQueueConfig {
    /// A queue without doorbell and interrupt.
    pub fn new(ring: RingConfig, placement: KvmPlacement) -> Self {
        Self { ring, placement, doorbell: None, interrupt_gsi: None }
    }

    /// Sets [`ring`](Self#structfield.ring).
    #[must_use]
    pub fn ring(self, ring: RingConfig) -> Self {
        Self { ring, ..self }
    }

    /// Sets [`placement`](Self#structfield.placement).
    #[must_use]
    pub fn placement(self, placement: KvmPlacement) -> Self {
        Self { placement, ..self }
    }

    /// Sets [`doorbell`](Self#structfield.doorbell).
    #[must_use]
    pub fn doorbell(self, doorbell: impl Into<Option<IoEventAddress>>) -> Self {
        Self { doorbell: doorbell.into(), ..self }
    }

    /// Sets [`interrupt_gsi`](Self#structfield.interrupt_gsi).
    #[must_use]
    pub fn interrupt_gsi(self, interrupt_gsi: impl Into<Option<u32>>) -> Self {
        Self { interrupt_gsi: interrupt_gsi.into(), ..self }
    }
}

/// Where the guest finds a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvmPlacement {
    /// In its RAM, where its driver has allocated the ring.
    GuestRam {
        /// Guest-physical address of the rings area.
        rings_gpa: u64,
        /// Guest-physical address of the SQE area.
        sqes_gpa: u64,
    },
    /// In pages of the kernel, shown through two memory slots. The [`layout`](KvmQueue::layout) has their length.
    Window {
        /// Guest-physical address of the rings area, aligned to 4096. The range must be free.
        rings_gpa: u64,
        /// Guest-physical address of the SQE area, aligned to 4096.
        sqes_gpa: u64,
        /// Number of the first of two free memory slots.
        first_slot: u32,
    },
}

/// A queue that a guest on KVM drives. Detached when dropped.
///
/// The VM lives at least as long as the queue.
#[derive(Debug)]
pub struct KvmQueue {
    vm: Arc<VmFd>,
    layout: RingLayout,
    addressing: FixedAddressing,
    parts: Option<Parts>,
}

/// The parts, in the order in which they are undone.
#[derive(Debug)]
struct Parts {
    doorbell: Option<Doorbell>,
    interrupt: Mutex<Option<Interrupt>>,
    window: Option<WindowSlots>,
    queue: DirectQueue,
}

impl KvmQueue {
    /// Makes the queue, starts it, and connects it to the VM.
    ///
    /// # Errors
    ///
    /// KVM or the ring refuses. Nothing remains connected; a ring that was already made ends by itself.
    pub fn attach(vm: &Arc<VmFd>, device: &DirectDevice, config: KvmQueueConfig) -> Result<Self, KvmError> {
        let KvmQueueConfig { ring, placement, doorbell, interrupt_gsi } = config;
        check(placement)?;
        // The doorbell works before the guest can find a ring, and the interrupt before that ring runs.
        let doorbell = doorbell.map(|address| Doorbell::new(vm, address)).transpose()?;
        let interrupt = interrupt_gsi.map(|gsi| Interrupt::new(vm, gsi)).transpose()?;
        let queue = device.attach(QueueConfig {
            ring,
            placement: match placement {
                KvmPlacement::GuestRam { rings_gpa, sqes_gpa } => QueuePlacement::GuestRam { rings_gpa, sqes_gpa },
                KvmPlacement::Window { .. } => QueuePlacement::Window,
            },
            doorbell: doorbell.as_ref().map(Doorbell::eventfd).transpose()?,
            completion: interrupt.as_ref().map(Interrupt::clone_eventfd).transpose()?,
        })?;
        let window = match (placement, queue.window()) {
            (KvmPlacement::Window { rings_gpa, sqes_gpa, first_slot }, Some(window)) => {
                Some(WindowSlots::map(vm, &window, first_slot, rings_gpa, sqes_gpa)?)
            }
            _ => None,
        };
        let (layout, addressing) = (*queue.layout(), queue.addressing());
        let parts = Parts { doorbell, interrupt: Mutex::new(interrupt), window, queue };
        Ok(Self { vm: vm.clone(), layout, addressing, parts: Some(parts) })
    }

    /// The layout of the ring, for the guest.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// The rule for guest-physical addresses in the ring's SQEs, for the guest.
    pub fn addressing(&self) -> FixedAddressing {
        self.addressing
    }

    /// From now on interrupts the guest through `gsi` (or not at all), even if that is the old value: for a change
    /// of the route that must not lose a completion. The guest gets one interrupt more than there were completions.
    ///
    /// # Errors
    ///
    /// KVM refuses an irqfd: then nothing has changed. Or the ring refuses the new eventfd: then the guest gets no
    /// interrupts until another call succeeds.
    pub fn replace_interrupt(&self, gsi: Option<u32>) -> Result<(), KvmError> {
        let parts = self.parts();
        let mut interrupt = lock(&parts.interrupt);
        let new = gsi.map(|gsi| Interrupt::new(&self.vm, gsi)).transpose()?;
        parts.queue.replace_completion(new.as_ref().map(Interrupt::eventfd))?;
        // The old irqfd goes last: its earlier signals have reached the guest by then.
        *interrupt = new;
        Ok(())
    }

    /// Disconnects the queue from the VM and ends it.
    ///
    /// From here on the guest's writes to the doorbell come out of `KVM_RUN`, and so does every access to a window: a
    /// running guest must have been told before. Returns at once. [`RingEnd`] tells when the I/O has ended too; the
    /// guest's RAM must not be used for anything else before.
    pub fn detach(mut self) -> RingEnd {
        self.end().expect("only detached here or when dropped")
    }

    fn end(&mut self) -> Option<RingEnd> {
        let Parts { doorbell, interrupt, window, queue } = self.parts.take()?;
        drop(doorbell);
        drop(interrupt);
        // A mapping keeps a ring running, and the slots hold the mapping, so they go before the ring.
        drop(window);
        Some(queue.close())
    }

    fn parts(&self) -> &Parts {
        self.parts.as_ref().expect("only taken when the queue goes")
    }
}

impl Drop for KvmQueue {
    fn drop(&mut self) {
        self.end();
    }
}

fn check(placement: KvmPlacement) -> Result<(), KvmError> {
    if let KvmPlacement::Window { rings_gpa, sqes_gpa, first_slot } = placement {
        slots::numbers(first_slot, 2)?;
        for (area, gpa) in [("rings", rings_gpa), ("SQE", sqes_gpa)] {
            if gpa % 4096 != 0 {
                return Err(KvmError::UnalignedWindow { area, gpa });
            }
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
