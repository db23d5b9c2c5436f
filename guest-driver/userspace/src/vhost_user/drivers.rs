//! The drivers of a disk's queues, and which of them the application has taken.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::Driver;

/// The drivers of all queues but queue 0. A driver lives as long as its disk: the device uses memory of the queue for as long.
#[derive(Debug)]
pub(super) struct Drivers {
    /// By the queue's index, from queue 1 on. `None`: the application has taken the queue.
    idle: Mutex<Vec<Option<Driver>>>,
}

/// A driver that the application has taken. After its drop the queue can be taken again.
pub(super) struct Taken {
    /// `None` only during the drop.
    driver: Option<Driver>,
    drivers: Arc<Drivers>,
}

impl Drivers {
    /// The drivers of queue 1 and up, in this order.
    pub(super) fn new(drivers: impl IntoIterator<Item = Driver>) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::new(drivers.into_iter().map(Some).collect()) })
    }

    /// Takes the driver of a queue. `None`: there is no such queue, or it is taken.
    pub(super) fn take(self: &Arc<Self>, index: u16) -> Option<Taken> {
        let mut idle = self.idle();
        let driver = place(&mut idle, index)?.take()?;
        Some(Taken { driver: Some(driver), drivers: self.clone() })
    }

    /// Looks at the queues that are not taken, as their users would: takes completions, which frees the buffers of the requests, and
    /// answers what the device announces about rings.
    pub(super) fn progress(&self) {
        self.idle().iter_mut().flatten().for_each(Driver::progress);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Option<Driver>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(idle: &mut [Option<Driver>], index: u16) -> Option<&mut Option<Driver>> {
    usize::from(index).checked_sub(1).and_then(|at| idle.get_mut(at))
}

impl Deref for Taken {
    type Target = Driver;

    #[inline]
    fn deref(&self) -> &Driver {
        self.driver.as_ref().expect("the driver is there until the drop")
    }
}

impl DerefMut for Taken {
    #[inline]
    fn deref_mut(&mut self) -> &mut Driver {
        self.driver.as_mut().expect("the driver is there until the drop")
    }
}

impl fmt::Debug for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.driver.fmt(f)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(mut driver) = self.driver.take() else { return };
        driver.abandon();
        let mut idle = self.drivers.idle();
        if let Some(place) = place(&mut idle, driver.index) {
            *place = Some(driver);
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
    fn a_queue_has_one_user_at_a_time_and_can_be_taken_again() {
        let guest = Guest::new();
        let drivers = Drivers::new([guest.driver().0]);
        let taken = drivers.take(1).unwrap();
        assert!(drivers.take(1).is_none() && drivers.take(0).is_none() && drivers.take(2).is_none());
        drop(taken);
        assert_eq!(drivers.take(1).unwrap().index, 1);
    }

    #[test]
    fn buffers_of_a_user_that_leaves_are_free_when_their_requests_have_ended_and_not_before() {
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
        assert_eq!(device.available(), 2, "what was not sent is never sent");

        // The next user sees nothing of them.
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
    fn a_driver_that_goes_while_the_device_has_a_buffer_does_not_free_it() {
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
