//! A queue, as applications use it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringpass_guest_abi::block_queue::{Completion, Request};
use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use super::driver::{Counters, Driver, Ended};
use super::drivers::TakenDriver;
use crate::interrupt::wait_for_interrupt;
use crate::ram::RamArea;

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Read from the disk into the buffer.
    Read,
    /// Write the buffer to the disk.
    Write,
    /// Write the buffer to the disk; the data is stable when the request completes.
    DurableWrite,
}

/// What executes a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecutedBy {
    /// The host kernel, as a ring of this epoch.
    Ring {
        /// The number of the epoch.
        epoch: u32,
    },
    /// The device's process, as a virtqueue.
    Virtqueue {
        /// The reason, if the device refused a ring.
        refused: Option<ErrorCode>,
    },
    /// Nothing at the moment: a ring has ended or the driver has sent ATTACH, and the next ring does not exist yet.
    BetweenRings,
}

/// A request that has ended, with its buffer.
#[derive(Debug)]
#[non_exhaustive]
pub struct Done {
    /// The tag that [`Queue::submit`] got.
    pub tag: u64,
    /// Number of transferred bytes, which is the length of the request, or the error.
    pub result: io::Result<u32>,
    /// The request's buffer.
    pub buffer: RamArea,
}

/// One queue of a disk. It belongs to one thread at a time.
///
/// After the drop of a queue, [`Disk::queue`](super::Disk::queue) can take it again. Requests that the queue had not
/// sent are never executed. The disk keeps the buffers of the others until these requests have ended, because a device
/// may still write to them.
#[derive(Debug)]
pub struct Queue {
    driver: TakenDriver,
}

impl Queue {
    pub(super) fn new(driver: TakenDriver) -> Self {
        Self { driver }
    }

    /// Puts a request into the queue: it transfers the first `len_bytes` bytes of `buffer` from or to the bytes of the
    /// disk at `offset_bytes`, and [`Done::tag`] is `tag` at its end. The queue keeps the buffer until the request has
    /// ended. [`send`](Self::send), [`poll`](Self::poll) or [`wait`](Self::wait) sends the request.
    ///
    /// # Errors
    ///
    /// Returns the buffer: the queue is full, `len_bytes` is 0, or the buffer is shorter than `len_bytes`.
    pub fn submit(
        &mut self,
        operation: Operation,
        buffer: RamArea,
        offset_bytes: u64,
        len_bytes: u32,
        tag: u64,
    ) -> Result<(), RamArea> {
        if u64::from(len_bytes) > buffer.len_bytes() || len_bytes == 0 {
            return Err(buffer);
        }
        let request = Request {
            write: operation != Operation::Read,
            offset_bytes,
            gpa: buffer.gpa(),
            len_bytes,
            durable: operation == Operation::DurableWrite,
            user_data: tag,
        };
        self.driver.push(&request, Some(buffer)).map_err(|buffer| buffer.expect("the buffer that was pushed"))
    }

    /// Sends the submitted requests for which there is room.
    pub fn send(&mut self) {
        self.driver.send();
    }

    /// The next request that has ended, if there is one. Also sends the submitted requests for which there is room.
    pub fn poll(&mut self) -> Option<Done> {
        loop {
            let Ended { completion: Completion { user_data: tag, res }, buffer } = self.driver.reap()?;
            // A request by address has no buffer: only `ByAddress` reports its end.
            let Some(buffer) = buffer else { continue };
            let result = u32::try_from(res).map_err(|_| io::Error::from_raw_os_error(-res));
            return Some(Done { tag, result, buffer });
        }
    }

    /// Waits for an interrupt, and returns the next request that has ended. `None`: no request ends within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<Done> {
        let begin = Instant::now();
        loop {
            let _ = self.driver.set_muted(false);
            if let Some(done) = self.poll() {
                return Some(done);
            }
            let left = timeout.saturating_sub(begin.elapsed());
            if left.is_zero() || !wait_for_interrupt(&self.interrupt(), left).unwrap_or(false) {
                return self.poll();
            }
        }
    }

    /// The eventfd that the device signals when [`poll`](Self::poll) may find a request that has ended, unless
    /// interrupts are muted. It can [change](super::Disk::move_interrupt).
    pub fn interrupt(&self) -> Arc<EventFd> {
        self.driver.vring().call()
    }

    /// Number of submitted requests whose [`Done`] the application has not taken, whether they have ended or not.
    pub fn outstanding(&self) -> usize {
        self.driver.outstanding()
    }

    /// What executes the queue now.
    pub fn executed_by(&self) -> ExecutedBy {
        match self.driver.epoch() {
            Some(epoch) if self.driver.is_ring() => ExecutedBy::Ring { epoch },
            _ if self.driver.is_virtqueue() => ExecutedBy::Virtqueue { refused: self.driver.refused() },
            _ => ExecutedBy::BetweenRings,
        }
    }

    /// Turns the queue into a virtqueue, and waits until it is one.
    ///
    /// # Errors
    ///
    /// The device violates the protocol, or is silent for longer than [`Options::patience`](super::Options::patience).
    pub fn detach(&mut self) -> Result<(), Error> {
        let (begin, patience) = (Instant::now(), self.driver.patience());
        self.driver.detach();
        while !self.driver.is_virtqueue() {
            self.driver.progress();
            if let Some(fault) = self.driver.fault() {
                return Err(Error::BrokenDevice(fault.to_string()));
            }
            if begin.elapsed() >= patience {
                return Err(Error::Silent { what: "detaching the queue from its ring", patience });
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Counters of the queue since the connection.
    pub fn counters(&self) -> Counters {
        self.driver.counters()
    }

    /// How the device has violated the protocol. From then on, requests that the device does not have fail. A request
    /// that the device has ends only if the device completes it, because the device may still use its buffer.
    pub fn fault(&self) -> Option<&Error> {
        self.driver.fault()
    }

    pub(super) fn driver_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

#[cfg(test)]
mod tests {
    use super::super::drivers::Drivers;
    use super::super::test_device::Guest;
    use super::*;

    #[test]
    fn a_request_is_outstanding_until_the_application_takes_its_end() {
        let guest = Guest::new();
        let (driver, mut device) = guest.driver();
        let mut queue = Queue::new(Drivers::new([driver]).take(1).unwrap());
        for tag in [1, 2] {
            queue.submit(Operation::Read, guest.memory.allocate(4096).unwrap(), 0, 4096, tag).unwrap();
        }
        queue.send();
        device.complete(0, &[], 0);
        device.complete(1, &[], 0);
        // One look at the virtqueue finds both ends, of which the application takes one.
        assert_eq!((queue.poll().map(|done| done.tag), queue.outstanding()), (Some(1), 1));
        assert_eq!((queue.poll().map(|done| done.tag), queue.outstanding()), (Some(2), 0));
    }

    #[test]
    fn a_wait_without_a_limit_ends_with_the_request() {
        let guest = Guest::new();
        let (driver, mut device) = guest.driver();
        let mut queue = Queue::new(Drivers::new([driver]).take(1).unwrap());
        let buffer = guest.memory.allocate(4096).unwrap();
        queue.submit(Operation::Read, buffer, 0, 4096, 7).unwrap();
        queue.send();
        device.complete(0, &[], 0);
        let done = queue.wait(Duration::MAX).unwrap();
        assert_eq!((done.tag, done.result.unwrap()), (7, 4096));
    }
}
