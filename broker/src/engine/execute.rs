//! Carrying out requests: from a checked request to the used ring.
//!
//! Each request is in a slot and goes through one or more steps; each step is one entry of the ring. A read or write
//! that the kernel did in part goes on where it stopped.

use std::fmt::Display;
use std::mem::discriminant;
use std::os::fd::AsFd;
use std::rc::Rc;

use io_uring::{opcode, squeue};
use nix::libc;
use rustix::io::Errno;
use vm_memory::{Bytes, GuestMemoryError};

use super::alignment::Alignment;
use super::bounce::BouncePool;
use super::piece::{Piece, Stage};
use super::ring::{DISK, PAGE_CACHE};
use super::slot::{Slot, Step};
use super::token::Token;
use super::vring::State;
use super::worker::Worker;
use crate::log_limit::Cause;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Answer, ByteRange, GuestError, Operation, Request, Status};

/// Attempts without progress after which a request fails: the kernel says "try again", but does not mean it.
pub(super) const RETRIES_MAX: u8 = 100;

impl Worker<'_> {
    /// Starts the request in a slot.
    #[inline]
    pub(super) fn begin(&mut self, number: u32) {
        if let Some(alignment) = self.alignment()
            && alignment.is_coarser_than_guest
            && !self.take_blocks(number, alignment)
        {
            return;
        }
        self.begin_with_blocks(number);
    }

    /// Starts a request that has the blocks of the disk that it changes.
    #[inline]
    pub(super) fn begin_with_blocks(&mut self, number: u32) {
        let alignment = self.alignment();
        let slot = self.slots.get(number);
        let Some(request) = &slot.request else { return };
        slot.step = match request.operation {
            Operation::Read { offset_bytes } | Operation::Write { offset_bytes } => {
                if alignment.is_some_and(|alignment| !alignment.takes(request, offset_bytes, &slot.segments)) {
                    return self.wait_for_chunk(number);
                }
                Step::Transfer
            }
            // There is nothing that it could make stable, and not all read-only file systems have fsync(2): squashfs
            // does not.
            Operation::Flush if self.limits.read_only() => return self.finish(number, Status::Ok),
            Operation::Flush => Step::Sync,
            Operation::Discard(_) | Operation::WriteZeroes { .. } => Step::Range,
            Operation::GetId => return self.give_id(number),
        };
        self.submit(number);
    }

    #[inline]
    pub(super) fn alignment(&self) -> Option<Alignment> {
        self.disk.as_ref().and_then(|disk| disk.alignment)
    }

    /// Hands the slot's step to the kernel.
    #[inline]
    pub(super) fn submit(&mut self, number: u32) {
        let slot = self.slots.get(number);
        let Some(request) = slot.request else { return };
        if let (Step::Transfer, Operation::Write { offset_bytes }) = (&slot.step, request.operation)
            && let (Some(writer), Some(disk)) = (&mut self.writer, &self.disk)
            && writer.is_needed()
            && !slot.is_write_through
        {
            let offset_bytes = offset_bytes + slot.progress_bytes;
            // SAFETY: as below; the iovecs stay in place until the slot is released, as their lists are on the heap.
            // The disk stays open, because the worker lets go of it only when no request is under way.
            return unsafe { writer.send(number, disk.disk.as_fd(), slot.remaining(), offset_bytes) };
        }
        let entry = entry(slot, &request, &self.bounce);
        let entry = entry.user_data(Token::Request(number).to_user_data());
        // SAFETY: the entry names the guest's memory, which `slot.memory` keeps mapped, or a chunk of `self.bounce`,
        // which lives as long as the worker. Iovecs lie in the slot's own lists. The slot is released only when the
        // completion was reaped, and the worker does not end, nor unwind, before all slots are released. Nobody has
        // references into these bytes: they are accessed by volatile copies only.
        unsafe { self.ring.push(&entry) };
    }

    /// The kernel is done with a slot's step.
    #[inline]
    pub(super) fn completed(&mut self, number: u32, result: i32) {
        let slot = self.slots.get(number);
        let Some(request) = slot.request else { return };
        if result < 0 {
            let errno = Errno::from_raw_os_error(-result);
            if matches!(errno, Errno::INTR | Errno::AGAIN) && slot.retries < RETRIES_MAX {
                slot.retries += 1;
                return self.submit(number);
            }
            if errno == Errno::OPNOTSUPP
                && slot.step == Step::Range
                && let Operation::WriteZeroes { unmap: true, .. } = request.operation
            {
                // To unmap is a permission (VIRTIO 1.2, 5.2.6): the zeroes are what counts.
                slot.step = Step::ZeroRange;
                return self.submit(number);
            }
            let queue = slot.queue;
            let cause = Cause::new((discriminant(&request.operation), errno.raw_os_error()));
            self.report_failure(queue, cause, &format_args!("{:?}: {errno}", request.operation));
            return self.finish(number, Status::from_errno(errno));
        }
        match &slot.step {
            Step::Transfer => {
                slot.progress_bytes += result as u64;
                if slot.progress_bytes == u64::from(request.data_bytes) {
                    return self.finish(number, Status::Ok);
                }
                self.go_on(number, result);
            }
            Step::Bounce { .. } => self.bounced(number, result as usize),
            Step::Range | Step::ZeroRange if slot.is_write_through => {
                slot.step = Step::Sync;
                self.submit(number);
            }
            Step::Range | Step::ZeroRange | Step::Sync => self.finish(number, Status::Ok),
            Step::WaitForBlocks | Step::WaitForChunk => {}
        }
    }

    /// Goes on with a read or write of which the kernel did a part.
    #[cold]
    fn go_on(&mut self, number: u32, result: i32) {
        let alignment = self.alignment();
        let slot = self.slots.get(number);
        let Some(request) = &slot.request else { return };
        let block_bytes = alignment.map_or(1, |alignment| alignment.block_bytes(&request.operation));
        // What is left begins with a whole block, or the kernel would not take it.
        let part_bytes = slot.progress_bytes % u64::from(block_bytes);
        if part_bytes < result as u64 {
            slot.progress_bytes -= part_bytes;
            slot.retries = 0;
            slot.compute_rest();
            return self.submit(number);
        }
        if result == 0 || slot.retries == RETRIES_MAX {
            return self.end_of_disk(number);
        }
        slot.progress_bytes -= result as u64;
        slot.retries += 1;
        self.submit(number);
    }

    /// The kernel read or wrote nothing: the disk is smaller than it was.
    pub(super) fn end_of_disk(&mut self, number: u32) {
        let queue = self.slots.get(number).queue;
        self.report_failure(
            queue,
            Cause::new("end of the disk"),
            &"it reached beyond the end of the disk, which must have become smaller",
        );
        self.finish(number, Status::IoError);
    }

    /// Logs what the disk did not do, unless it logged the same cause a short while ago.
    #[cold]
    fn report_failure(&self, queue: usize, cause: Cause, why: &dyn Display) {
        if let Some(total) = self.shared.disk_errors.count(cause) {
            let index = self.vrings[queue].index;
            tracing::warn!(queue = index, total, "the disk failed a request: {why} ({total} so far)");
        }
    }

    fn give_id(&mut self, number: u32) {
        let slot = self.slots.get(number);
        let Some(memory) = &slot.memory else { return };
        let mut id = &self.shared.serial.as_bytes()[..];
        let written = slot.segments.iter().try_for_each(|segment| {
            let (part, rest) = id.split_at(segment.len_bytes.min(id.len()));
            memory.write_slice(part, segment.gpa)?;
            slot.progress_bytes += part.len() as u64;
            id = rest;
            Ok::<_, GuestMemoryError>(())
        });
        self.finish(number, if written.is_ok() { Status::Ok } else { Status::IoError });
    }

    /// A request has ended: the driver is told, and its slot is free again.
    #[inline]
    pub(super) fn finish(&mut self, number: u32, status: Status) {
        let slot = self.slots.get(number);
        let (Some(request), Some(memory)) = (slot.request, slot.memory.take()) else { return };
        let (queue, head) = (slot.queue, slot.head);
        // Data first, then the log, then the used ring. Also what failed may have been written in part.
        let log = self.vrings[queue].active_mut().and_then(|active| active.log.as_deref());
        if let (Some(log), Operation::Read { .. } | Operation::GetId) = (log, request.operation) {
            for segment in slot.segments.iter() {
                log.mark(segment.gpa.0, segment.len_bytes as u64);
            }
        }
        let step = std::mem::replace(&mut slot.step, Step::Transfer);
        let written_bytes = match request.operation {
            // The kernel may have written more before it failed, and does not say how much.
            Operation::Read { .. } | Operation::GetId => slot.progress_bytes as u32,
            Operation::Write { .. } | Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes { .. } => 0,
        };
        if let Some(access) = slot.blocks.take() {
            self.let_go_of_blocks(number, access);
        }
        self.slots.release(number);
        self.count(queue, &request, status);
        let Request { status_gpa, writable_bytes, .. } = request;
        let answer = Answer { status, status_gpa, writable_bytes, written_bytes, refusal: None };
        self.give_back(queue, head, &memory, &answer);
        if let Some(active) = self.vrings[queue].active_mut() {
            active.in_flight -= 1;
            // Only a queue that runs goes on as if nothing had happened.
            self.is_unsettled |= active.in_flight == 0 && !matches!(self.vrings[queue].state, State::Running(_));
        }
        self.is_unsettled |= self.endings.disk.is_some() || !self.endings.former_memory.is_empty();
        if let Step::Bounce { chunk, .. } = step {
            self.give_chunk_back(chunk);
        }
    }

    /// Answers a chain that is not executed.
    pub(super) fn answer(&mut self, queue: usize, head: u16, memory: &Rc<DeviceMemory>, answer: &Answer) {
        if let Some(refusal) = &answer.refusal {
            let vring = &self.vrings[queue];
            vring.counters.refused.add(1);
            self.shared.guest_errors.record(vring.index, GuestError::from(refusal), refusal.cause(), refusal);
        }
        self.give_back(queue, head, memory, answer);
    }

    /// Writes the status and gives the chain back.
    #[inline]
    pub(super) fn give_back(&mut self, queue: usize, head: u16, memory: &Rc<DeviceMemory>, answer: &Answer) {
        // The byte was in this memory when the chain was parsed; what was pending since may be answered in another.
        let has_status = memory.write_obj(answer.status.byte(), answer.status_gpa).is_ok();
        let used_bytes = if has_status { answer.used_bytes() } else { answer.written_bytes };
        let Some(active) = self.vrings[queue].active_mut() else { return };
        let log = active.log.as_deref();
        if let Some(log) = log {
            log.mark(answer.status_gpa.0, 1);
        }
        match active.queue.add_used(head, used_bytes, log) {
            Ok(()) => active.has_unpublished = true,
            Err(error) => self.break_down(queue, error.cause(), &error),
        }
    }

    #[inline]
    fn count(&self, queue: usize, request: &Request, status: Status) {
        let counters = &self.vrings[queue].counters;
        if status != Status::Ok {
            return counters.failed.add(1);
        }
        match request.operation {
            Operation::Read { .. } => {
                counters.reads.add(1);
                counters.read_bytes.add(request.data_bytes.into());
            }
            Operation::Write { .. } => {
                counters.writes.add(1);
                counters.written_bytes.add(request.data_bytes.into());
            }
            Operation::Flush => counters.flushes.add(1),
            Operation::Discard(_) => counters.discards.add(1),
            Operation::WriteZeroes { .. } => counters.write_zeroes.add(1),
            Operation::GetId => {}
        }
    }
}

/// The ring's entry for a slot's step.
#[inline]
fn entry(slot: &Slot, request: &Request, bounce: &BouncePool) -> squeue::Entry {
    let write_flags = if slot.is_write_through { libc::RWF_DSYNC } else { 0 };
    match (&slot.step, request.operation) {
        (Step::Bounce { chunk, piece }, operation) => {
            bounce_entry(bounce.address(chunk), piece, operation, write_flags)
        }
        (Step::Transfer, Operation::Write { offset_bytes }) => match slot.remaining() {
            &[one] => {
                let write = opcode::Write::new(DISK, one.iov_base.cast(), one.iov_len as u32);
                write.offset(offset_bytes + slot.progress_bytes).rw_flags(write_flags).build()
            }
            several => {
                let write = opcode::Writev::new(DISK, several.as_ptr(), several.len() as u32);
                write.offset(offset_bytes + slot.progress_bytes).rw_flags(write_flags).build()
            }
        },
        (Step::Transfer, Operation::Read { offset_bytes }) => match slot.remaining() {
            &[one] => {
                let read = opcode::Read::new(DISK, one.iov_base.cast(), one.iov_len as u32);
                read.offset(offset_bytes + slot.progress_bytes).build()
            }
            several => {
                let read = opcode::Readv::new(DISK, several.as_ptr(), several.len() as u32);
                read.offset(offset_bytes + slot.progress_bytes).build()
            }
        },
        (Step::Range, Operation::Discard(range)) => punch_hole(range),
        (Step::Range, Operation::WriteZeroes { range, unmap: true }) => punch_hole(range),
        (Step::Range, Operation::WriteZeroes { range, unmap: false })
        | (Step::ZeroRange, Operation::WriteZeroes { range, .. }) => {
            fallocate(range, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
        }
        // `begin` gives no operation any other step than these and `Sync`.
        _ => opcode::Fsync::new(DISK).flags(io_uring::types::FsyncFlags::DATASYNC).build(),
    }
}

/// The entry for a stage of a piece in a bounce buffer.
fn bounce_entry(buffer: *mut u8, piece: &Piece, operation: Operation, write_flags: i32) -> squeue::Entry {
    let transfer = piece.transfer();
    let (address, len_bytes) = (buffer.wrapping_add(transfer.at_bytes), transfer.len_bytes as u32);
    if matches!(operation, Operation::Write { .. }) && piece.stage == Stage::Transfer {
        let (file, flags) =
            if piece.is_through_page_cache() { (PAGE_CACHE, libc::RWF_DSYNC) } else { (DISK, write_flags) };
        opcode::Write::new(file, address, len_bytes).offset(transfer.offset_bytes).rw_flags(flags).build()
    } else {
        opcode::Read::new(DISK, address, len_bytes).offset(transfer.offset_bytes).build()
    }
}

fn punch_hole(range: ByteRange) -> squeue::Entry {
    fallocate(range, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
}

fn fallocate(range: ByteRange, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(DISK, range.len_bytes).offset(range.offset_bytes).mode(mode).build()
}
