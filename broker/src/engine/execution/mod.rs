//! Execution of requests: from a checked operation to its status.
//!
//! [`Execution`] owns what a worker executes requests with: its io_uring, the disk, the slots of requests under way, the bounce
//! buffers, the writer thread. It knows operations and their segments, and nothing of virtqueues: a request carries its [`Origin`]
//! along, and when it has ended the worker completes it there.
//!
//! Each request is in a slot and goes through one or more steps; each step is one SQE. A read or write that the kernel did in part
//! goes on where it stopped.
//!
//! - [`slot`]: requests under way. [`origin`]: where they came from. `entry`: the SQE of a step.
//! - `bounced`, [`piece`], [`bounce`]: requests that direct I/O does not take as they are.
//! - `blocks`, [`block_locks`]: requests that change parts of blocks of direct I/O.
//! - `disk`: the disk in use and its release.

pub(super) mod block_locks;
mod blocks;
pub(super) mod bounce;
mod bounced;
mod disk;
mod entry;
mod origin;
mod piece;
pub(super) mod slot;

use std::collections::VecDeque;
use std::fmt::Display;
use std::mem::discriminant;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::{Bytes, GuestMemoryError};

pub(super) use origin::{ChainOrigin, Origin};

use block_locks::Owner;
use bounce::BouncePool;
use disk::{DiskInUse, FormerDisk};
use slot::{Slot, Slots, Step};

use super::Shared;
use super::ring::Ring;
use super::token::Token;
use super::writer::Writer;
use crate::log_limit::LogCause;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Operation, SegmentList, Status};

/// Attempts without progress after which a request fails: the kernel says "try again", but does not mean it.
const RETRIES_MAX: u8 = 100;

/// What a worker executes requests with.
pub(super) struct Execution<'r> {
    ring: Ring<'r>,
    slots: Slots,
    bounce: BouncePool,
    /// Requests that wait for a bounce buffer, the first one first.
    waiting_for_chunk: VecDeque<u32>,
    /// Requests that have their blocks now, and have waited for them.
    granted: Vec<u32>,
    /// Requests of other workers that have their blocks now.
    granted_elsewhere: Vec<Owner>,
    /// Requests that have ended and are not completed at their origin yet.
    ended: Vec<u32>,
    disk: Option<DiskInUse>,
    /// The disk before, which the kernel has not let go of yet.
    former_disk: Option<FormerDisk>,
    /// Carries out writes into the page cache of a file. `None`: the disk is not such a file, or there is none yet.
    writer: Option<Writer>,
    /// Number of the worker.
    worker: usize,
    /// The device is read-only.
    is_read_only: bool,
    shared: Arc<Shared>,
}

/// A request that is to be executed. Its data is in the slot's segments.
pub(super) struct NewRequest {
    pub(super) operation: Operation,
    /// Length of the data: for reads and writes whole logical blocks and never 0.
    pub(super) data_bytes: u32,
    /// Keeps the data's memory mapped.
    pub(super) memory: Rc<DeviceMemory>,
    /// What it writes is to be stable when it completes.
    pub(super) is_write_through: bool,
    pub(super) origin: Origin,
}

impl<'r> Execution<'r> {
    pub(super) fn new(
        ring: Ring<'r>,
        slots: Slots,
        bounce: BouncePool,
        (worker, is_read_only): (usize, bool),
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            ring,
            slots,
            bounce,
            waiting_for_chunk: VecDeque::new(),
            granted: Vec::new(),
            granted_elsewhere: Vec::new(),
            ended: Vec::new(),
            disk: None,
            former_disk: None,
            writer: None,
            worker,
            is_read_only,
            shared,
        }
    }

    /// The worker's io_uring, which also waits for its eventfds.
    #[inline]
    pub(super) fn ring(&mut self) -> &mut Ring<'r> {
        &mut self.ring
    }

    /// The thread that writes into the page cache.
    #[inline]
    pub(super) fn writer(&self) -> Option<&Writer> {
        self.writer.as_ref()
    }

    /// Whether another request can be executed. If not, the next completion makes room.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.slots.has_room()
    }

    /// How many requests are under way.
    #[inline]
    pub(super) fn under_way(&self) -> usize {
        self.slots.occupied()
    }

    /// A free slot, and room in it for the segments of a request. [`begin`](Self::begin) takes it.
    #[inline]
    pub(super) fn find_slot(&mut self) -> Option<(u32, &mut SegmentList)> {
        let number = self.slots.find()?;
        Some((number, &mut self.slots.get_mut(number).segments))
    }

    /// Hands the kernel what is ready, and wakes the writer thread if it has new jobs.
    #[inline]
    pub(super) fn submit(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.wake();
        }
        self.ring.submit();
    }

    /// Takes the next result of the writer thread: slot and result.
    #[inline]
    pub(super) fn take_written(&mut self) -> Option<(u32, i32)> {
        self.writer.as_mut().and_then(Writer::take)
    }

    /// Executes a request in the slot that [`find_slot`](Self::find_slot) found last.
    #[inline]
    pub(super) fn begin(&mut self, number: u32, request: NewRequest) {
        let NewRequest { operation, data_bytes, memory, is_write_through, origin } = request;
        let slot = self.slots.get_mut(number);
        slot.origin = Some(origin);
        slot.operation = operation;
        slot.data_bytes = data_bytes;
        slot.memory = Some(memory);
        slot.is_write_through = is_write_through;
        slot.status = Status::Ok;
        slot.progress_bytes = 0;
        slot.retries = 0;
        slot.is_bounced = false;
        slot.is_partial_write = false;
        self.slots.occupy(number);
        match self.alignment() {
            Some(alignment) if alignment.is_coarser_than_guest && !self.take_blocks(number, alignment) => {}
            _ => self.begin_with_blocks(number),
        }
    }

    /// Starts a request that has the blocks of the disk that it changes.
    #[inline]
    fn begin_with_blocks(&mut self, number: u32) {
        let alignment = self.alignment();
        let slot = self.slots.get_mut(number);
        slot.step = match slot.operation {
            Operation::Read { offset_bytes } | Operation::Write { offset_bytes } => {
                let is_refused =
                    alignment.is_some_and(|alignment| !alignment.takes(&slot.operation, offset_bytes, &slot.segments));
                if is_refused {
                    return self.wait_for_chunk(number);
                }
                Step::Transfer
            }
            // A read-only device has nothing to make stable, and not all read-only file systems have fsync(2): squashfs does not.
            Operation::Flush if self.is_read_only => return self.end(number, Status::Ok),
            Operation::Flush => Step::Sync,
            Operation::Discard(_) | Operation::WriteZeroes { .. } => Step::Range,
            Operation::GetId => return self.give_id(number),
        };
        self.submit_step(number);
    }

    /// Hands the slot's step to the kernel.
    #[inline]
    fn submit_step(&mut self, number: u32) {
        let slot = self.slots.get(number);
        if slot.origin.is_none() {
            return;
        }
        match (&slot.step, slot.operation, &mut self.writer, &self.disk) {
            (Step::Transfer, Operation::Write { offset_bytes }, Some(writer), Some(disk))
                if writer.is_needed() && !slot.is_write_through =>
            {
                let offset_bytes = offset_bytes + slot.progress_bytes;
                // SAFETY: as below; the iovecs stay in place until the slot is released, as their lists are on the heap. The disk
                // stays open, because the worker lets go of it only when no request is under way.
                return unsafe { writer.send(number, disk.disk.as_fd(), slot.remaining(), offset_bytes) };
            }
            _ => {}
        }
        let entry = entry::of(slot, &self.bounce);
        let entry = entry.user_data(Token::Request(number).to_user_data());
        // SAFETY: the entry names the guest's memory, which `slot.memory` keeps mapped, or a chunk of `self.bounce`,
        // which lives as long as the worker. Iovecs lie in the slot's own lists. The slot is released only when the
        // completion was reaped, and the worker does not end, nor unwind, before all slots are released. No code has
        // references into these bytes: they are accessed by volatile copies only.
        unsafe { self.ring.push(&entry) };
    }

    /// The kernel is done with a slot's step.
    #[inline]
    pub(super) fn completed(&mut self, number: u32, result: i32) {
        let slot = self.slots.get_mut(number);
        if slot.origin.is_none() {
            return;
        }
        if result < 0 {
            return self.step_failed(number, Errno::from_raw_os_error(-result));
        }
        match &slot.step {
            Step::Transfer => {
                slot.progress_bytes += result as u64;
                if slot.progress_bytes == u64::from(slot.data_bytes) {
                    return self.end(number, Status::Ok);
                }
                self.go_on(number, result);
            }
            Step::Bounce { .. } => self.bounced(number, result as usize),
            Step::Range | Step::ZeroRange if slot.is_write_through => {
                slot.step = Step::Sync;
                self.submit_step(number);
            }
            Step::Range | Step::ZeroRange | Step::Sync => self.end(number, Status::Ok),
            Step::WaitForBlocks | Step::WaitForChunk => {}
        }
    }

    #[cold]
    fn step_failed(&mut self, number: u32, errno: Errno) {
        let slot = self.slots.get_mut(number);
        if matches!(errno, Errno::INTR | Errno::AGAIN) && slot.retries < RETRIES_MAX {
            slot.retries += 1;
            return self.submit_step(number);
        }
        let is_range = slot.step == Step::Range;
        if errno == Errno::OPNOTSUPP && is_range && matches!(slot.operation, Operation::WriteZeroes { unmap: true, .. })
        {
            // To unmap is a permission (VIRTIO 1.2, 5.2.6): the zeroes are what counts.
            slot.step = Step::ZeroRange;
            return self.submit_step(number);
        }
        let operation = slot.operation;
        let cause = LogCause::new((discriminant(&operation), errno.raw_os_error()));
        self.report_failure(number, cause, &format_args!("{operation:?}: {errno}"));
        self.end(number, Status::from_errno(errno));
    }

    /// Goes on with a read or write of which the kernel did a part.
    #[cold]
    fn go_on(&mut self, number: u32, result: i32) {
        let alignment = self.alignment();
        let slot = self.slots.get_mut(number);
        let block_bytes = alignment.map_or(1, |alignment| alignment.block_bytes(&slot.operation));
        // What is left begins with a whole block, or the kernel would not take it.
        let part_bytes = slot.progress_bytes % u64::from(block_bytes);
        if part_bytes < result as u64 {
            slot.progress_bytes -= part_bytes;
            slot.retries = 0;
            slot.compute_rest();
            return self.submit_step(number);
        }
        if result == 0 || slot.retries == RETRIES_MAX {
            return self.end_of_disk(number);
        }
        slot.progress_bytes -= result as u64;
        slot.retries += 1;
        self.submit_step(number);
    }

    /// The kernel read or wrote nothing: the disk is smaller than it was.
    fn end_of_disk(&mut self, number: u32) {
        self.report_failure(
            number,
            LogCause::new("end of the disk"),
            &"it reached beyond the end of the disk, which must have become smaller",
        );
        self.end(number, Status::IoError);
    }

    /// Logs what the disk did not do, unless the worker logged the same cause a short while ago.
    #[cold]
    fn report_failure(&self, number: u32, cause: LogCause, why: &dyn Display) {
        let queue = self.slots.get(number).origin.map(|origin| origin.queue_index());
        if let Some(total) = self.shared.disk_errors.count(cause) {
            tracing::warn!(queue, total, "the disk failed a request: {why} ({total} so far)");
        }
    }

    fn give_id(&mut self, number: u32) {
        let slot = self.slots.get_mut(number);
        let Some(memory) = &slot.memory else { return };
        let mut id = &self.shared.serial.as_bytes()[..];
        let written = slot.segments.iter().try_for_each(|segment| {
            let (part, rest) = id.split_at(segment.len_bytes.min(id.len()));
            memory.write_slice(part, segment.gpa)?;
            slot.progress_bytes += part.len() as u64;
            id = rest;
            Ok::<_, GuestMemoryError>(())
        });
        let status = if written.is_ok() { Status::Ok } else { Status::IoError };
        self.end(number, status);
    }

    /// A request has ended. It lets go of its blocks and its bounce buffer; the worker completes it at its origin.
    #[inline]
    fn end(&mut self, number: u32, status: Status) {
        let slot = self.slots.get_mut(number);
        slot.status = status;
        let step = std::mem::replace(&mut slot.step, Step::Transfer);
        let access = slot.blocks.take();
        self.ended.push(number);
        if let Some(access) = access {
            self.let_go_of_blocks(number, access);
        }
        if let Step::Bounce { chunk, .. } = step {
            self.give_chunk_back(chunk);
        }
    }

    /// Takes a request that has ended. It keeps its slot until [`release`](Self::release).
    #[inline]
    pub(super) fn take_ended(&mut self) -> Option<u32> {
        self.ended.pop()
    }

    /// A slot's request.
    #[inline]
    pub(super) fn request(&self, number: u32) -> &Slot {
        self.slots.get(number)
    }

    /// Frees the slot of a request that is completed.
    #[inline]
    pub(super) fn release(&mut self, number: u32) {
        self.slots.release(number);
    }
}
