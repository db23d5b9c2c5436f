//! What a load does.

use std::time::Duration;

use super::{BLOCK_BYTES, SLACK_BYTES};
use crate::seed::Seed;

/// What a load does.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Block of the disk at which its area begins. No other load may use the area.
    pub first_block: u64,
    /// Length of the area in blocks.
    pub blocks: u64,
    /// The number of requests in flight.
    pub depth: usize,
    /// The most blocks of one request.
    pub max_blocks: usize,
    /// How many in a hundred requests are writes.
    pub write_percent: u8,
    /// How many in a hundred requests write zeroes. The device must have the feature.
    pub write_zeroes_percent: u8,
    /// How many in a hundred requests flush. The device must have the feature.
    pub flush_percent: u8,
    /// Whether every other request has its descriptors in a table of its own.
    pub indirect: bool,
    /// Whether every other buffer begins at an odd address.
    pub unaligned: bool,
    /// Whether the load waits for completions by looking at the ring rather than for the call eventfd.
    pub spin: bool,
    /// The load fails if nothing completes for this long.
    pub patience: Duration,
    /// The source of all choices and contents.
    pub seed: Seed,
}

impl LoadOptions {
    /// Half writes, up to 4 blocks each, with interrupts.
    pub fn new(first_block: u64, blocks: u64, depth: usize, seed: Seed) -> Self {
        Self {
            first_block,
            blocks,
            depth,
            max_blocks: 4,
            write_percent: 50,
            write_zeroes_percent: 0,
            flush_percent: 0,
            indirect: false,
            unaligned: false,
            spin: false,
            patience: Duration::from_secs(40),
            seed,
        }
    }

    /// How much RAM its buffers take.
    pub fn buffer_bytes(&self) -> u64 {
        let slot = self.max_blocks as u64 * BLOCK_BYTES + SLACK_BYTES + 2 * 4096;
        self.depth as u64 * slot
    }
}
