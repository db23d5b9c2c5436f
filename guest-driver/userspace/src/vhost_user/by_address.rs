//! A queue for requests that name their memory by guest-physical address.

#![allow(unsafe_code)]

use ringpass_guest_abi::block_queue::{BlockQueue, Completion, PushRefusal, Request};

use super::driver::Driver;
use super::queue::Queue;

/// A queue that takes requests by guest-physical address. It does not own their buffers.
#[derive(Debug)]
pub struct ByAddress<'q> {
    driver: &'q mut Driver,
}

impl Queue {
    /// The queue for requests that name their memory by guest-physical address.
    ///
    /// # Safety
    ///
    /// The caller ensures that, until a request that names bytes of an area has ended, nothing borrows these bytes
    /// ([`RamArea::bytes_mut`](crate::RamArea::bytes_mut)) and nothing drops the area; it may be
    /// [leaked](crate::RamArea::leak).
    pub unsafe fn by_address(&mut self) -> ByAddress<'_> {
        ByAddress { driver: self.driver_mut() }
    }
}

impl BlockQueue for ByAddress<'_> {
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal> {
        self.driver.push(request, None).map_err(|_| PushRefusal::Full)
    }

    fn publish(&mut self) -> bool {
        // The driver rings the doorbell itself, because the queue can get another doorbell at any time.
        self.driver.send();
        false
    }

    fn reap(&mut self) -> Option<Completion> {
        self.driver.reap().map(|ended| ended.completion)
    }

    fn mute(&mut self) {
        self.driver.set_muted(true);
    }

    fn unmute(&mut self) -> bool {
        self.driver.set_muted(false)
    }
}
