//! The drivers of a disk's queues, and which of them the application has taken.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::Driver;

/// The drivers of all queues but queue 0. A driver lives as long as its disk, because the device uses the memory of the
/// queue for as long.
#[derive(Debug)]
pub(super) struct Drivers {
    /// By the queue's index, from queue 1 on. `None`: the application has taken the queue.
    idle: Mutex<Vec<Option<Driver>>>,
}

/// A driver that the application has taken. Its drop returns it, so that the application can take the queue again.
pub(super) struct TakenDriver {
    /// `None` only during the drop.
    driver: Option<Driver>,
    drivers: Arc<Drivers>,
}

impl Drivers {
    /// The drivers of queue 1 and up, in this order.
    pub(super) fn new(drivers: impl IntoIterator<Item = Driver>) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::new(drivers.into_iter().map(Some).collect()) })
    }

    /// Takes the driver of a queue. `None`: there is no such queue, or the application has already taken it.
    pub(super) fn take(self: &Arc<Self>, index: u16) -> Option<TakenDriver> {
        let mut idle = self.idle();
        let driver = driver_of(&mut idle, index)?.take()?;
        Some(TakenDriver { driver: Some(driver), drivers: self.clone() })
    }

    /// Does for the queues that the application has not taken what a poll does for the others: takes completions, which
    /// frees the buffers of the requests, and acknowledges what the device announces about rings.
    pub(super) fn progress(&self) {
        self.idle().iter_mut().flatten().for_each(Driver::progress);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Option<Driver>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn driver_of(idle: &mut [Option<Driver>], index: u16) -> Option<&mut Option<Driver>> {
    usize::from(index).checked_sub(1).and_then(|at| idle.get_mut(at))
}

impl Deref for TakenDriver {
    type Target = Driver;

    #[inline]
    fn deref(&self) -> &Driver {
        self.driver.as_ref().expect("the driver is there until the drop")
    }
}

impl DerefMut for TakenDriver {
    #[inline]
    fn deref_mut(&mut self) -> &mut Driver {
        self.driver.as_mut().expect("the driver is there until the drop")
    }
}

impl fmt::Debug for TakenDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.driver.fmt(f)
    }
}

impl Drop for TakenDriver {
    fn drop(&mut self) {
        let Some(mut driver) = self.driver.take() else { return };
        driver.abandon();
        let mut idle = self.drivers.idle();
        if let Some(idle_driver) = driver_of(&mut idle, driver.index) {
            *idle_driver = Some(driver);
        }
    }
}

#[cfg(test)]
mod tests {
    use ringpass_guest_abi::block_queue::Request;

    use super::super::test_device::Guest;
    use super::*;

    fn read(gpa: u64) -> Request {
        Request { write: false, offset_bytes: 0, gpa, len_bytes: 4096, durable: false, user_data: 7 }
    }

    #[test]
    fn a_queue_can_be_taken_once_at_a_time_and_again_after_its_drop() {
        let guest = Guest::new();
        let drivers = Drivers::new([guest.driver().0]);
        let taken = drivers.take(1).unwrap();
        assert!(drivers.take(1).is_none() && drivers.take(0).is_none() && drivers.take(2).is_none());
        drop(taken);
        assert_eq!(drivers.take(1).unwrap().index, 1);
    }

    #[test]
    fn buffers_of_a_dropped_queue_are_free_when_their_requests_have_ended_and_not_before() {
        let guest = Guest::new();
        let (driver, mut device) = guest.driver();
        let drivers = Drivers::new([driver]);
        let free_bytes = guest.memory.free_bytes();
        let mut taken = drivers.take(1).unwrap();
        let buffers = [(); 3].map(|()| guest.memory.allocate(4096).unwrap());
        let [sent, ended, unsent] = buffers;
        for buffer in [ended, sent] {
            taken.push(&read(buffer.gpa()), Some(buffer)).unwrap();
        }
        taken.send();
        device.complete(0, &[], 0);
        taken.push(&read(unsent.gpa()), Some(unsent)).unwrap();
        drop(taken);
        drivers.progress();
        assert_eq!(guest.memory.free_bytes(), free_bytes - 4096, "the device has one buffer");
        assert_eq!(device.available(), 2, "the driver never sends the third request");

        // The driver does not report the ends of these requests to the next user.
        let mut taken = drivers.take(1).unwrap();
        let buffer = guest.memory.allocate(4096).unwrap();
        taken.push(&read(buffer.gpa()), Some(buffer)).unwrap();
        taken.send();
        device.complete(1, &[], 0);
        assert!(taken.reap().is_none());
        assert_eq!(guest.memory.free_bytes(), free_bytes - 4096, "only the buffer of the new request is in use");
        device.complete(2, &[], 0);
        let ended = taken.reap().unwrap();
        assert_eq!((ended.completion.res, taken.outstanding()), (4096, 0));
        drop(ended);
        assert_eq!(guest.memory.free_bytes(), free_bytes);
    }

    #[test]
    fn the_drop_of_a_driver_does_not_free_a_buffer_that_the_device_has() {
        let guest = Guest::new();
        let (mut driver, device) = guest.driver();
        let buffer = guest.memory.allocate(4096).unwrap();
        let free_bytes = guest.memory.free_bytes();
        driver.push(&read(buffer.gpa()), Some(buffer)).unwrap();
        driver.send();
        assert_eq!(device.available(), 1);
        drop(driver);
        assert_eq!(guest.memory.free_bytes(), free_bytes);
    }
}
