//! The pieces in which a request goes through its bounce buffer: whole blocks of direct I/O around the request's data.
//!
//! Where a guest's blocks are smaller than those of direct I/O, a piece of a write can begin or end within a block. Then the
//! first and the last block are read, the data is put into them, and the whole is written. [`BlockLocks`] keep others away
//! meanwhile.
//!
//! A file need not end with a whole block, and direct I/O cannot write beyond its end without making it longer. What is
//! behind the last whole block is written through the page cache, by itself. Nothing else ever writes there, so the two
//! ways never meet; but the kernel keeps that page together with others before it, and lets go of none while one is
//! being written. So such a write has the whole disk alone, and is stable when it ends: then the page is as it is on the
//! disk.
//!
//! [`BlockLocks`]: super::block_locks::BlockLocks

use super::bounce::CHUNK_BYTES;

/// A part of the disk that is in a bounce buffer, and a part of the request's data in that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it is on the disk.
    pub(super) offset_bytes: u64,
    /// Its length.
    pub(super) len_bytes: usize,
    /// Where the request's data begins in it.
    pub(super) skip_bytes: usize,
    /// How much of it is the request's data.
    pub(super) data_bytes: usize,
    /// The unit of direct I/O, a power of two; 1 through the page cache.
    block_bytes: usize,
    /// What the kernel does next.
    pub(super) stage: Stage,
}

/// What is done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The first block is read, of which a part will be written.
    ReadFirst,
    /// The same with the last block, if it is another one.
    ReadLast,
    /// The piece is read or written.
    Transfer,
}

/// One operation of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    pub(super) offset_bytes: u64,
    /// Where in the bounce buffer.
    pub(super) at_bytes: usize,
    pub(super) len_bytes: usize,
}

impl Piece {
    /// The first piece of a read of `left_bytes` from `offset_bytes` on. It may reach beyond the end of a file: the kernel
    /// reads what is there.
    pub(super) fn of_read(offset_bytes: u64, left_bytes: u64, block_bytes: u32) -> Self {
        Self::around(offset_bytes, left_bytes, block_bytes)
    }

    /// The first piece of a write. `size_bytes` is the disk's.
    pub(super) fn of_write(offset_bytes: u64, left_bytes: u64, block_bytes: u32, size_bytes: u64) -> Self {
        let end_of_blocks = size_bytes - size_bytes % u64::from(block_bytes);
        if offset_bytes >= end_of_blocks {
            // Behind the last whole block of the file.
            return Self::around(offset_bytes, left_bytes, 1);
        }
        let mut piece = Self::around(offset_bytes, left_bytes.min(end_of_blocks - offset_bytes), block_bytes);
        piece.stage = piece.next_stage(None);
        piece
    }

    fn around(offset_bytes: u64, left_bytes: u64, block_bytes: u32) -> Self {
        let block = u64::from(block_bytes);
        let begin = offset_bytes - offset_bytes % block;
        let end = (offset_bytes + left_bytes).min(begin + CHUNK_BYTES as u64);
        Self {
            offset_bytes: begin,
            len_bytes: (end.next_multiple_of(block) - begin) as usize,
            skip_bytes: (offset_bytes - begin) as usize,
            data_bytes: (end - offset_bytes) as usize,
            block_bytes: block_bytes as usize,
            stage: Stage::Transfer,
        }
    }

    /// Whether the data goes through the page cache.
    pub(super) fn is_through_page_cache(&self) -> bool {
        self.block_bytes == 1
    }

    /// What comes after a stage of a write; `None` before the first.
    pub(super) fn next_stage(&self, after: Option<Stage>) -> Stage {
        let has_part_of_last = (self.skip_bytes + self.data_bytes) & (self.block_bytes - 1) != 0;
        let has_one_block = self.len_bytes == self.block_bytes;
        match after {
            None if self.skip_bytes > 0 || has_part_of_last && has_one_block => Stage::ReadFirst,
            None | Some(Stage::ReadFirst) if has_part_of_last && !has_one_block => Stage::ReadLast,
            _ => Stage::Transfer,
        }
    }

    /// What the kernel does in the present stage.
    pub(super) fn transfer(&self) -> Transfer {
        let (at_bytes, len_bytes) = match self.stage {
            Stage::ReadFirst => (0, self.block_bytes),
            Stage::ReadLast => (self.len_bytes - self.block_bytes, self.block_bytes),
            Stage::Transfer => (0, self.len_bytes),
        };
        Transfer { offset_bytes: self.offset_bytes + at_bytes as u64, at_bytes, len_bytes }
    }

    /// How much of the request's data was read if the kernel read `read_bytes` of the piece.
    pub(super) fn data_read(&self, read_bytes: usize) -> usize {
        read_bytes.saturating_sub(self.skip_bytes).min(self.data_bytes)
    }

    /// The same for a write. What is not a whole block is written once more.
    pub(super) fn data_written(&self, written_bytes: usize) -> usize {
        self.data_read(written_bytes - written_bytes % self.block_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: u64 = 16 << 20;

    /// The operations of the kernel for one write: offset and length of each, reads with their place in the buffer.
    fn stages(piece: &Piece) -> Vec<(Stage, Transfer)> {
        let mut piece = *piece;
        let mut stages = vec![(piece.stage, piece.transfer())];
        while piece.stage != Stage::Transfer {
            piece.stage = piece.next_stage(Some(piece.stage));
            stages.push((piece.stage, piece.transfer()));
        }
        stages
    }

    fn at(offset_bytes: u64, at_bytes: usize, len_bytes: usize) -> Transfer {
        Transfer { offset_bytes, at_bytes, len_bytes }
    }

    #[test]
    fn a_sector_costs_one_block_read_and_written() {
        let piece = Piece::of_write(8192 + 512, 512, 4096, DISK);
        assert_eq!((piece.skip_bytes, piece.data_bytes), (512, 512));
        assert_eq!(stages(&piece), [(Stage::ReadFirst, at(8192, 0, 4096)), (Stage::Transfer, at(8192, 0, 4096))]);
        let first = Piece::of_write(8192, 512, 4096, DISK);
        assert_eq!(stages(&first), stages(&piece), "also at the beginning of the block");
    }

    #[test]
    fn of_a_long_write_only_the_blocks_at_its_ends_are_read() {
        let piece = Piece::of_write(512, 5 * 4096, 4096, DISK);
        let (first, last, all) = (at(0, 0, 4096), at(5 * 4096, 5 * 4096, 4096), at(0, 0, 6 * 4096));
        assert_eq!(stages(&piece), [(Stage::ReadFirst, first), (Stage::ReadLast, last), (Stage::Transfer, all)]);
        let piece = Piece::of_write(0, 5 * 4096 + 512, 4096, DISK);
        assert_eq!(stages(&piece), [(Stage::ReadLast, last), (Stage::Transfer, all)]);
        let piece = Piece::of_write(512, 6 * 4096 - 512, 4096, DISK);
        assert_eq!(stages(&piece), [(Stage::ReadFirst, first), (Stage::Transfer, all)]);
    }

    #[test]
    fn whole_blocks_are_not_read_first() {
        assert_eq!(stages(&Piece::of_write(4096, 8192, 4096, DISK)), [(Stage::Transfer, at(4096, 0, 8192))]);
        assert_eq!(stages(&Piece::of_write(512, 1024, 512, DISK)), [(Stage::Transfer, at(512, 0, 1024))]);
    }

    #[test]
    fn what_is_behind_the_last_whole_block_goes_through_the_page_cache_by_itself() {
        let size = 3 * 4096 + 1024;
        let piece = Piece::of_write(2 * 4096 + 512, 4096, 4096, size);
        assert!(!piece.is_through_page_cache());
        assert_eq!((piece.offset_bytes, piece.len_bytes, piece.data_bytes), (2 * 4096, 4096, 3584));
        let piece = Piece::of_write(3 * 4096, 512, 4096, size);
        assert!(piece.is_through_page_cache());
        assert_eq!(stages(&piece), [(Stage::Transfer, at(3 * 4096, 0, 512))]);
        let piece = Piece::of_write(3 * 4096 + 512, 512, 4096, size);
        assert_eq!(stages(&piece), [(Stage::Transfer, at(3 * 4096 + 512, 0, 512))]);
    }

    #[test]
    fn a_read_at_the_end_of_a_file_asks_for_a_whole_block_and_takes_what_is_there() {
        let piece = Piece::of_read(3 * 4096 + 512, 512, 4096);
        assert_eq!(piece.transfer(), at(3 * 4096, 0, 4096));
        assert_eq!(piece.data_read(1024), 512);
        assert_eq!(piece.data_read(512), 0, "the file is shorter by now");
    }

    #[test]
    fn of_a_block_that_was_written_in_part_nothing_counts() {
        let piece = Piece::of_write(512, 2 * 4096, 4096, DISK);
        assert_eq!(piece.data_written(3 * 4096), 2 * 4096);
        assert_eq!(piece.data_written(4096 + 512), 4096 - 512);
        assert_eq!(piece.data_written(4095), 0);
    }

    proptest! {
        /// All pieces of a write together are its data, each once and in order; none is beyond the whole blocks of the file but
        /// through the page cache; each stage is in whole blocks and in the buffer.
        #[test]
        fn the_pieces_are_the_data(
            sector in 0..2000_u64, sectors in 1..1200_u64, shift in 0..8_u32, is_write in any::<bool>(),
        ) {
            let block = 512 << shift;
            let size = 3200 * 512 + 512;
            let (mut offset, mut left) = (sector * 512, sectors * 512);
            while left > 0 {
                let piece = if is_write {
                    Piece::of_write(offset, left, block, size)
                } else {
                    Piece::of_read(offset, left, block)
                };
                prop_assert!(piece.data_bytes > 0 && piece.data_bytes as u64 <= left);
                prop_assert_eq!(piece.offset_bytes + piece.skip_bytes as u64, offset);
                prop_assert!(piece.skip_bytes + piece.data_bytes <= piece.len_bytes);
                for (_, transfer) in stages(&piece) {
                    prop_assert!(transfer.at_bytes + transfer.len_bytes <= CHUNK_BYTES);
                    if !piece.is_through_page_cache() {
                        let block = u64::from(block);
                        prop_assert_eq!(transfer.offset_bytes % block, 0);
                        prop_assert_eq!(transfer.len_bytes as u64 % block, 0);
                        prop_assert!(!is_write || transfer.offset_bytes + transfer.len_bytes as u64 <= size);
                    }
                }
                offset += piece.data_bytes as u64;
                left -= piece.data_bytes as u64;
            }
        }
    }
}
