//! The SQE of a request's step.

use io_uring::{opcode, squeue};
use nix::libc;

use super::bounce::BouncePool;
use super::piece::{Piece, Stage};
use super::slot::{Slot, Step};
use crate::engine::ring::{DISK, PAGE_CACHE};
use crate::virtio_blk::{ByteRange, Operation};

/// The entry for a slot's step.
#[inline]
pub(super) fn of(slot: &Slot, bounce: &BouncePool) -> squeue::Entry {
    let write_flags = if slot.is_write_through { libc::RWF_DSYNC } else { 0 };
    match (&slot.step, slot.operation) {
        (Step::Bounce { chunk, piece }, operation) => of_stage(bounce.address(chunk), piece, operation, write_flags),
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
        // Execution gives no operation any other step than these and `Sync`.
        _ => opcode::Fsync::new(DISK).flags(io_uring::types::FsyncFlags::DATASYNC).build(),
    }
}

/// The entry for a stage of a piece in a bounce buffer.
fn of_stage(buffer: *mut u8, piece: &Piece, operation: Operation, write_flags: i32) -> squeue::Entry {
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
