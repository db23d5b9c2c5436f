//! A queue of a direct device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringpass_guest_abi::{FixedAddressing, RingLayout};
use vmm_sys_util::eventfd::EventFd;

use super::RingFile;
use crate::memory::PinnedMemory;
use crate::ring::{DoorbellId, DoorbellThread, Enabled, KernelRing, RingEnd, RingError, RingGauge, RingWindow};

/// A queue of a device: a ring that the guest drives. Closed when dropped; [`DirectDevice::ends`](super::DirectDevice::ends) then has its end.
#[derive(Debug)]
pub struct DirectQueue {
    pub(super) layout: RingLayout,
    pub(super) addressing: FixedAddressing,
    pub(super) running: Arc<Mutex<Option<Running>>>,
    pub(super) end: RingEnd,
    pub(super) doorbells: Arc<DoorbellThread>,
}

/// What a queue has until it is closed.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) ring: KernelRing<Enabled>,
    pub(super) doorbell: Option<DoorbellId>,
    /// The memory of the ring, which its I/O may use.
    pub(super) pinned: Arc<PinnedMemory>,
    pub(super) file: Arc<dyn RingFile>,
}

impl DirectQueue {
    /// The layout of the ring, for the guest.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// The rule for guest-physical addresses in the ring's SQEs, for the guest.
    pub fn addressing(&self) -> FixedAddressing {
        self.addressing
    }

    /// Counts the requests that the ring has outstanding. An embedder with guests that it does not trust should end the
    /// queue of a guest that has more outstanding than its CQ has entries: no honest driver does, and the kernel sets
    /// no limit.
    ///
    /// # Errors
    ///
    /// `/proc` cannot be read.
    pub fn gauge(&self) -> Result<RingGauge, RingError> {
        lock(&self.running).as_ref().expect("only the drop takes it").ring.gauge()
    }

    /// The ring's pages, if the kernel allocated them. While the window is held, the ring keeps running, even after it
    /// is closed.
    pub fn window(&self) -> Option<Arc<RingWindow>> {
        lock(&self.running).as_ref().and_then(|running| running.ring.window().cloned())
    }

    /// Replaces the eventfd that completions signal; the new eventfd is signalled once.
    pub fn replace_completion(&self, completion: Option<&EventFd>) -> Result<(), RingError> {
        match lock(&self.running).as_ref() {
            Some(running) => running.ring.replace_completion(completion),
            None => Ok(()),
        }
    }

    /// The same for a file that is known to be an eventfd, and which the caller signals. Creates no ring on the calling
    /// thread.
    pub(crate) fn set_completion(&self, completion: Option<&EventFd>) -> Result<(), RingError> {
        match lock(&self.running).as_ref() {
            Some(running) => running.ring.set_completion(completion),
            None => Ok(()),
        }
    }

    /// Tells when the queue's I/O has ended, once it is closed or dropped.
    pub(crate) fn end(&self) -> RingEnd {
        self.end.clone()
    }

    /// Ends the queue. Returns at once; [`RingEnd`] tells when its I/O has ended too.
    pub fn close(self) -> RingEnd {
        self.end.clone()
    }
}

impl Drop for DirectQueue {
    fn drop(&mut self) {
        let Some(Running { ring, doorbell, pinned, file }) = lock(&self.running).take() else { return };
        doorbell.iter().for_each(|doorbell| self.doorbells.remove(doorbell));
        // Dropped in this order, so that others can open the disk once the memory is released.
        ring.close(Box::new((file, pinned, self.doorbells.clone())));
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
