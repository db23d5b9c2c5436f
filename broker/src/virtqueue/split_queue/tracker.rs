//! Writing a queue's part of the in-flight region.

use crate::virtqueue::inflight::InflightQueue;

/// Writes this queue's part of the in-flight region.
#[derive(Debug)]
pub(super) struct Tracker {
    region: InflightQueue,
    next_counter: u64,
    last_batch_head: u16,
}

impl Tracker {
    /// Goes on with a region that was recovered: `next_counter` and `last_batch_head` are what it gave.
    pub(super) fn new(region: InflightQueue, next_counter: u64, last_batch_head: u16) -> Self {
        Self { region, next_counter, last_batch_head }
    }

    /// Records a taken chain. If the process dies before the last store, the chain is simply still available.
    #[inline]
    pub(super) fn taken(&mut self, head: u16) {
        self.region.set_counter(head, self.next_counter);
        self.next_counter = self.next_counter.wrapping_add(1);
        self.region.set_in_flight(head, true);
    }

    /// Links a chain that the queue is about to put into the used ring. This has no effect until the ring's index
    /// moves.
    #[inline]
    pub(super) fn about_to_use(&mut self, head: u16) {
        self.region.set_next(head, self.last_batch_head);
        self.region.set_last_batch_head(head);
        self.last_batch_head = head;
    }

    /// The batch is in the used ring, whose index is `used_idx` now.
    #[inline]
    pub(super) fn used(&self, batch: &[u16], used_idx: u16) {
        for &head in batch {
            self.region.set_in_flight(head, false);
        }
        self.region.set_used_idx(used_idx);
    }
}
