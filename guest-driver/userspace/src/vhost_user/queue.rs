//! The queue as applications use it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringpass_guest_abi::block_queue::{Completion, Request};
use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use super::driver::{Counters, Driver, Ended};
use super::drivers::Taken;
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
    /// Nothing at the moment: a ring has ended or ATTACH was sent, and the next ring does not exist yet.
    Nobody,
}

/// A request that has ended, with its buffer.
#[derive(Debug)]
#[non_exhaustive]
pub struct Done {
    /// What the request was given.
    pub tag: u64,
    /// Bytes that were transferred: all of them.
    pub result: io::Result<u32>,
    /// The request's buffer.
    pub buffer: RamArea,
}

/// One queue of a disk. It belongs to one thread at a time.
///
/// When a queue is dropped, [`Disk::queue`](super::Disk::queue) can take it again. Requests that were not sent by then are never
/// executed. The disk keeps the buffers of the others until these requests have ended: a device may still write to them.
#[derive(Debug)]
pub struct Queue {
    driver: Taken,
}

impl Queue {
    pub(super) fn new(driver: Taken) -> Self {
        Self { driver }
    }

    /// Puts a request into the queue: the first `len_bytes` bytes of `buffer`, which the queue keeps until they have been
    /// transferred. It is sent by [`send`](Self::send), [`poll`](Self::poll) or [`wait`](Self::wait).
    ///
    /// # Errors
    ///
    /// The buffer comes back: as many requests are outstanding as can be, or it is shorter than that.
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

    /// Sends what was submitted, as far as there is room.
    pub fn send(&mut self) {
        self.driver.send();
    }

    /// The next request that has ended, if there is one. Also sends what was submitted.
    pub fn poll(&mut self) -> Option<Done> {
        loop {
            let Ended { completion: Completion { user_data: tag, res }, buffer } = self.driver.reap()?;
            // A request by address has no buffer, and is not reported here.
            let Some(buffer) = buffer else { continue };
            let result = u32::try_from(res).map_err(|_| io::Error::from_raw_os_error(-res));
            return Some(Done { tag, result, buffer });
        }
    }

    /// The next request that ends, by interrupt; `None` if none does in this time.
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

    /// Signalled when there is something to [`poll`](Self::poll) for, unless that is muted.
    pub fn interrupt(&self) -> Arc<EventFd> {
        self.driver.setup().call()
    }

    /// Requests that have not ended.
    pub fn outstanding(&self) -> usize {
        self.driver.outstanding()
    }

    /// Who executes the queue now.
    pub fn executed_by(&self) -> ExecutedBy {
        match self.driver.epoch() {
            Some(epoch) if self.driver.is_ring() => ExecutedBy::Ring { epoch },
            _ if self.driver.is_virtqueue() => ExecutedBy::Virtqueue { refused: self.driver.refused() },
            _ => ExecutedBy::Nobody,
        }
    }

    /// Has the queue become a virtqueue, and waits for that.
    ///
    /// # Errors
    ///
    /// The device violated the protocol, or is silent for longer than [`Options::patience`](super::Options::patience).
    pub fn detach(&mut self) -> Result<(), Error> {
        let (begin, patience) = (Instant::now(), self.driver.patience());
        self.driver.give_ring_up();
        while !self.driver.is_virtqueue() {
            self.driver.progress();
            if let Some(fault) = self.driver.fault() {
                return Err(Error::BrokenDevice(fault.to_string()));
            }
            if begin.elapsed() >= patience {
                return Err(Error::Silent { what: "giving the ring up", patience });
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// What the queue has done.
    pub fn counters(&self) -> Counters {
        self.driver.counters()
    }

    /// What the device did against the rules. Requests that it does not have fail then. Those that it has do not come back unless
    /// it completes them: it may still use their buffers.
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
    fn a_wait_without_end_ends_with_the_request() {
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
