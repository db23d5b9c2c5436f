//! Requests that go through bounce buffers, because direct I/O does not take them as the guest sends them.

use super::bounce::Chunk;
use super::execute::RETRIES_MAX;
use super::piece::{Piece, Stage};
use super::slot::Step;
use super::worker::Worker;
use crate::virtio_blk::{Operation, Status};

impl Worker<'_> {
    /// Has the request in a slot carried out through a bounce buffer, as soon as there is one.
    pub(super) fn wait_for_chunk(&mut self, number: u32) {
        let slot = self.slots.get(number);
        slot.step = Step::WaitForChunk;
        self.vrings[slot.queue].counters.bounced.add(1);
        self.waiting.push_back(number);
        self.serve_waiting();
    }

    /// A request does not need its bounce buffer any more.
    pub(super) fn give_chunk_back(&mut self, chunk: Chunk) {
        self.bounce.give_back(chunk);
        self.serve_waiting();
    }

    /// Starts requests that wait for a bounce buffer, as long as there are some.
    fn serve_waiting(&mut self) {
        while !self.waiting.is_empty() {
            let Some(chunk) = self.bounce.take() else { return };
            if let Some(number) = self.waiting.pop_front() {
                self.begin_piece(number, chunk);
            }
        }
    }

    /// Starts the next piece of a request in its bounce buffer.
    fn begin_piece(&mut self, number: u32, chunk: Chunk) {
        let (Some(alignment), Some(in_use)) = (self.alignment(), &self.disk) else { return };
        let size_bytes = in_use.disk.size_bytes();
        let slot = self.slots.get(number);
        let Some(request) = &slot.request else { return };
        let left_bytes = u64::from(request.data_bytes) - slot.progress_bytes;
        let block_bytes = alignment.block_bytes(&request.operation);
        let piece = match request.operation {
            Operation::Write { offset_bytes } => {
                Piece::of_write(offset_bytes + slot.progress_bytes, left_bytes, block_bytes, size_bytes)
            }
            Operation::Read { offset_bytes } => {
                Piece::of_read(offset_bytes + slot.progress_bytes, left_bytes, block_bytes)
            }
            // They have no data on the disk.
            _ => return,
        };
        slot.step = Step::Bounce { chunk, piece };
        self.begin_stage(number);
    }

    /// Hands the present stage of a piece to the kernel.
    fn begin_stage(&mut self, number: u32) {
        let slot = self.slots.get(number);
        let (Some(request), Some(memory), Step::Bounce { chunk, piece }) = (&slot.request, &slot.memory, &slot.step)
        else {
            return;
        };
        if piece.stage == Stage::Transfer && matches!(request.operation, Operation::Write { .. }) {
            let (at_bytes, len_bytes) = (piece.skip_bytes, piece.data_bytes);
            let data = (slot.progress_bytes, len_bytes);
            if self.bounce.fill((chunk, at_bytes), (memory, &slot.segments), data).is_err() {
                return self.finish(number, Status::IoError);
            }
        }
        self.submit(number);
    }

    /// The kernel is done with a stage of a piece.
    pub(super) fn bounced(&mut self, number: u32, done_bytes: usize) {
        let slot = self.slots.get(number);
        let (Some(request), Some(memory), Step::Bounce { chunk, piece }) =
            (&slot.request, &slot.memory, &mut slot.step)
        else {
            return;
        };
        if piece.stage != Stage::Transfer {
            if done_bytes < piece.transfer().len_bytes {
                return self.bounce_again(number, done_bytes);
            }
            slot.retries = 0;
            piece.stage = piece.next_stage(Some(piece.stage));
            return self.begin_stage(number);
        }
        let is_read = matches!(request.operation, Operation::Read { .. });
        let data_bytes = if is_read { piece.data_read(done_bytes) } else { piece.data_written(done_bytes) };
        if data_bytes == 0 {
            return self.bounce_again(number, done_bytes);
        }
        if is_read {
            let data = (slot.progress_bytes, data_bytes);
            if self.bounce.empty((chunk, piece.skip_bytes), (memory, &slot.segments), data).is_err() {
                return self.finish(number, Status::IoError);
            }
        }
        slot.progress_bytes += data_bytes as u64;
        slot.retries = 0;
        if slot.progress_bytes == u64::from(request.data_bytes) {
            return self.finish(number, Status::Ok);
        }
        if let Step::Bounce { chunk, .. } = std::mem::replace(&mut slot.step, Step::WaitForChunk) {
            self.begin_piece(number, chunk);
        }
    }

    /// The kernel did less than a block, or nothing.
    fn bounce_again(&mut self, number: u32, done_bytes: usize) {
        let slot = self.slots.get(number);
        if done_bytes == 0 || slot.retries == RETRIES_MAX {
            return self.end_of_disk(number);
        }
        slot.retries += 1;
        self.submit(number);
    }
}
