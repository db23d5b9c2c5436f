//! Requests that go through bounce buffers, because direct I/O does not take them as the guest sends them.

use super::bounce::Chunk;
use super::piece::{Piece, Stage};
use super::slot::Step;
use super::{Execution, RETRIES_MAX};
use crate::virtio_blk::{Operation, Status};

impl Execution<'_> {
    /// Has the request in a slot carried out through a bounce buffer, as soon as there is one.
    pub(super) fn wait_for_chunk(&mut self, number: u32) {
        let slot = self.slots.get_mut(number);
        slot.step = Step::WaitForChunk;
        slot.is_bounced = true;
        self.waiting_for_chunk.push_back(number);
        self.serve_waiting();
    }

    /// A request does not need its bounce buffer any more.
    pub(super) fn give_chunk_back(&mut self, chunk: Chunk) {
        self.bounce.give_back(chunk);
        self.serve_waiting();
    }

    /// Starts requests that wait for a bounce buffer, as long as there are some.
    fn serve_waiting(&mut self) {
        while !self.waiting_for_chunk.is_empty() {
            let Some(chunk) = self.bounce.take() else { return };
            if let Some(number) = self.waiting_for_chunk.pop_front() {
                self.begin_piece(number, chunk);
            }
        }
    }

    /// Starts the next piece of a request in its bounce buffer.
    fn begin_piece(&mut self, number: u32, chunk: Chunk) {
        let (Some(alignment), Some(in_use)) = (self.alignment(), &self.disk) else { return };
        let size_bytes = in_use.disk.size_bytes();
        let slot = self.slots.get_mut(number);
        let left_bytes = u64::from(slot.data_bytes) - slot.progress_bytes;
        let block_bytes = alignment.block_bytes(&slot.operation);
        let piece = match slot.operation {
            Operation::Write { offset_bytes } => {
                Piece::of_write(offset_bytes + slot.progress_bytes, left_bytes, block_bytes, size_bytes)
            }
            Operation::Read { offset_bytes } => {
                Piece::of_read(offset_bytes + slot.progress_bytes, left_bytes, block_bytes)
            }
            // Other operations have no data on the disk.
            _ => return,
        };
        slot.step = Step::Bounce { chunk, piece };
        self.begin_stage(number);
    }

    /// Hands the present stage of a piece to the kernel.
    fn begin_stage(&mut self, number: u32) {
        let slot = self.slots.get(number);
        let (Some(memory), Step::Bounce { chunk, piece }) = (&slot.memory, &slot.step) else { return };
        if piece.stage == Stage::Transfer && matches!(slot.operation, Operation::Write { .. }) {
            let (at_bytes, len_bytes) = (piece.skip_bytes, piece.data_bytes);
            let data = (slot.progress_bytes, len_bytes);
            if self.bounce.fill((chunk, at_bytes), (memory, &slot.segments), data).is_err() {
                return self.end(number, Status::IoError);
            }
        }
        self.submit_step(number);
    }

    /// The kernel is done with a stage of a piece.
    pub(super) fn bounced(&mut self, number: u32, done_bytes: usize) {
        let slot = self.slots.get_mut(number);
        let (Some(memory), Step::Bounce { chunk, piece }) = (&slot.memory, &mut slot.step) else { return };
        if piece.stage != Stage::Transfer {
            if done_bytes < piece.transfer().len_bytes {
                return self.bounce_again(number, done_bytes);
            }
            slot.retries = 0;
            piece.stage = piece.next_stage(Some(piece.stage));
            return self.begin_stage(number);
        }
        let is_read = matches!(slot.operation, Operation::Read { .. });
        let data_bytes = if is_read { piece.data_read(done_bytes) } else { piece.data_written(done_bytes) };
        if data_bytes == 0 {
            return self.bounce_again(number, done_bytes);
        }
        if is_read {
            let data = (slot.progress_bytes, data_bytes);
            if self.bounce.empty((chunk, piece.skip_bytes), (memory, &slot.segments), data).is_err() {
                return self.end(number, Status::IoError);
            }
        }
        slot.progress_bytes += data_bytes as u64;
        slot.retries = 0;
        if slot.progress_bytes == u64::from(slot.data_bytes) {
            return self.end(number, Status::Ok);
        }
        if let Step::Bounce { chunk, .. } = std::mem::replace(&mut slot.step, Step::WaitForChunk) {
            self.begin_piece(number, chunk);
        }
    }

    /// The kernel did less than a block, or nothing.
    fn bounce_again(&mut self, number: u32, done_bytes: usize) {
        let slot = self.slots.get_mut(number);
        if done_bytes == 0 || slot.retries == RETRIES_MAX {
            return self.end_of_disk(number);
        }
        slot.retries += 1;
        self.submit_step(number);
    }
}
