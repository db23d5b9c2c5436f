//! Requests on a ring.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::{Cqe, DriverRing, Sqe};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};

use super::RingDriver;
use crate::PATIENCE;

/// The results of requests that were not executed. This driver has no other queue for them, as `docs/abi.md` wants it, and
/// sends them to the next ring.
const NOT_EXECUTED: [i32; 2] = [-Errno::CANCELED.raw_os_error(), -Errno::AGAIN.raw_os_error()];

impl RingDriver {
    /// An SQE that reads into, or writes from, a buffer.
    ///
    /// # Errors
    ///
    /// A request cannot have this length.
    pub fn sqe(&self, is_write: bool, buffer: u64, len_bytes: u32, offset_bytes: u64, user_data: u64) -> Result<Sqe> {
        self.sqe_at(is_write, self.buffers().at(buffer), len_bytes, offset_bytes, user_data)
    }

    /// An SQE for any memory.
    ///
    /// # Errors
    ///
    /// The memory has no address for rings.
    pub fn sqe_at(&self, is_write: bool, gpa: u64, len_bytes: u32, offset_bytes: u64, user_data: u64) -> Result<Sqe> {
        let address = self.addressing.resolve(gpa, len_bytes).map_err(|error| anyhow::anyhow!("{error}"))?;
        let make = if is_write { Sqe::write_fixed } else { Sqe::read_fixed };
        Ok(make(address, len_bytes, offset_bytes, user_data))
    }

    /// Submits a request, now or when the next ring opens.
    ///
    /// # Errors
    ///
    /// The ring is full.
    pub fn submit(&mut self, sqe: Sqe) -> Result<()> {
        if let Some(ring) = self.ring.as_mut().filter(|_| self.machine.may_submit()) {
            ring.push(&sqe).map_err(|error| anyhow::anyhow!("{error}"))?;
            if ring.publish() {
                self.vring.kick()?;
            }
        }
        self.outstanding.push(sqe);
        Ok(())
    }

    /// Submits requests so that the kernel sees all of them at once. The ring is open.
    ///
    /// # Errors
    ///
    /// The ring has no room for all of them, or there is none.
    pub fn submit_together(&mut self, sqes: &[Sqe]) -> Result<()> {
        let ring = self.ring.as_mut().filter(|_| self.machine.may_submit()).context("no ring is open")?;
        for sqe in sqes {
            ring.push(sqe).map_err(|error| anyhow::anyhow!("{error}"))?;
        }
        self.outstanding.extend_from_slice(sqes);
        if ring.publish() {
            self.vring.kick()?;
        }
        Ok(())
    }

    /// Takes completions. Requests that were not executed stay outstanding, and go to the next ring.
    pub fn reap(&mut self) {
        while let Some(cqe) = self.ring.as_mut().and_then(DriverRing::reap) {
            if !NOT_EXECUTED.contains(&cqe.res) {
                self.outstanding.retain(|sqe| sqe.user_data != cqe.user_data);
                self.completions.push(cqe);
            }
        }
    }

    /// The completion of this request, if [`reap`](Self::reap) has taken it.
    pub fn take_completion(&mut self, user_data: u64) -> Option<i32> {
        let found = self.completions.iter().position(|cqe| cqe.user_data == user_data)?;
        Some(self.completions.swap_remove(found).res)
    }

    /// Any completion.
    pub fn pop_completion(&mut self) -> Option<Cqe> {
        self.completions.pop()
    }

    /// Waits for the completion of a request. Looks at the ring all the time, over any number of epochs.
    ///
    /// # Errors
    ///
    /// The completion does not come, or ATTACH ends.
    pub fn wait(&mut self, user_data: u64) -> Result<i32> {
        let end = Instant::now() + PATIENCE;
        loop {
            self.reap();
            if let Some(res) = self.take_completion(user_data) {
                return Ok(res);
            }
            self.look()?;
            self.ensure_attached()?;
            ensure!(Instant::now() < end, "no completion of {user_data:#x} within {PATIENCE:?}: {:?}", self.machine);
            thread::yield_now();
        }
    }

    /// Whether an interrupt comes within this time.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be read.
    pub fn wait_interrupt(&mut self, timeout: Duration) -> Result<bool> {
        let call = self.vring.eventfds().call();
        let came = call.wait(timeout)?;
        call.take()?;
        Ok(came)
    }

    /// Submits a request and waits for its completion. Any result is good.
    ///
    /// # Errors
    ///
    /// The request does not end.
    pub fn perform(&mut self, sqe: Sqe) -> Result<i32> {
        self.submit(sqe)?;
        self.wait(sqe.user_data)
    }

    /// Reads from the disk, into the first buffer.
    ///
    /// # Errors
    ///
    /// The request fails, or does not end.
    pub fn read(&mut self, offset_bytes: u64, len_bytes: u32) -> Result<Vec<u8>> {
        let res = self.perform(self.sqe(false, 0, len_bytes, offset_bytes, 1)?)?;
        ensure!(i64::from(res) == i64::from(len_bytes), "reading {len_bytes} at {offset_bytes}: {res}");
        self.buffer(0, len_bytes)
    }

    /// The content of a buffer.
    ///
    /// # Errors
    ///
    /// The buffer is not in RAM.
    pub fn buffer(&self, buffer: u64, len_bytes: u32) -> Result<Vec<u8>> {
        let mut data = vec![0; len_bytes as usize];
        self.vring.ram().memory().read_slice(&mut data, GuestAddress(self.buffers().at(buffer)))?;
        Ok(data)
    }

    /// Writes to the disk, from the first buffer.
    ///
    /// # Errors
    ///
    /// The request fails, or does not end.
    pub fn write(&mut self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        self.submit_write(offset_bytes, data, 2)?;
        let res = self.wait(2)?;
        ensure!(usize::try_from(res) == Ok(data.len()), "writing {} at {offset_bytes}: {res}", data.len());
        Ok(())
    }

    /// Submits a write from the first buffer.
    ///
    /// # Errors
    ///
    /// The ring is full.
    pub fn submit_write(&mut self, offset_bytes: u64, data: &[u8], user_data: u64) -> Result<()> {
        self.vring.ram().memory().write_slice(data, GuestAddress(self.buffers().at(0)))?;
        self.submit(self.sqe(true, 0, u32::try_from(data.len())?, offset_bytes, user_data)?)
    }
}
