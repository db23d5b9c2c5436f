//! Chains between the available ring and the in-flight region.

use vm_memory::GuestMemoryMmap;

use super::SplitQueue;
use crate::virtqueue::chain::DescriptorChain;

/// A chain that was taken from the queue, and of which the in-flight region has no record yet.
///
/// The caller may look at the chain, and then decides: [`record`](Self::record), [`undo`](Self::undo) or
/// [`leave_unrecorded`](Self::leave_unrecorded). Only a decision gives the head, and no chain can be completed without
/// its head. So the device answers no chain for which it has not decided whether a later process takes the chain again.
#[derive(Debug)]
#[must_use = "a chain without a decision stays in flight, and no later process takes it again"]
pub struct PoppedChain<'q> {
    queue: &'q mut SplitQueue,
    head: u16,
    origin: Origin,
}

/// Where a chain was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The available ring.
    Available,
    /// The in-flight region, which keeps its record of the chain.
    Replay,
}

/// A chain that is in flight without a record in the in-flight region: for a later process the chain was never taken.
///
/// The holder completes the chain by its [head](Self::head), or gives this to [`SplitQueue::record`] or
/// [`SplitQueue::undo_pop`]. (If the chain was replayed, the region has its old record, and both do nothing.)
#[derive(Debug)]
#[must_use = "it is needed to record the chain, or to put the chain back"]
pub struct UnrecordedChain {
    head: u16,
    /// Index of the available ring's next entry when the chain was taken. `None`: the chain was replayed.
    next_avail: Option<u16>,
}

impl<'q> PoppedChain<'q> {
    #[inline]
    pub(super) fn available(queue: &'q mut SplitQueue, head: u16) -> Self {
        Self { queue, head, origin: Origin::Available }
    }

    #[inline]
    pub(super) fn replayed(queue: &'q mut SplitQueue, head: u16) -> Self {
        Self { queue, head, origin: Origin::Replay }
    }

    /// The chain's descriptors. The chain looks their addresses up in `memory`.
    #[inline]
    pub fn chain<'m>(&'m self, memory: &'m GuestMemoryMmap) -> DescriptorChain<'m> {
        DescriptorChain::in_queue(memory, &self.queue.rings, self.head)
    }

    /// Records the chain as in flight: a later process takes the chain again, unless this one completes it. Gives the
    /// chain's head.
    ///
    /// Call this before the device executes the chain.
    #[inline]
    pub fn record(self) -> u16 {
        if self.origin == Origin::Available {
            self.queue.note_taken(self.head);
        }
        self.head
    }

    /// Puts the chain back, as if the device had not taken it: the next [`SplitQueue::pop`] of this queue, or of a
    /// queue that continues it, gives the chain again.
    pub fn undo(self) {
        match self.origin {
            Origin::Available => self.queue.put_back(self.head),
            Origin::Replay => self.queue.replay.push_front(self.head),
        }
    }

    /// Leaves the chain in flight without a record: for a later process it was never taken, even if this process
    /// executes it.
    pub fn leave_unrecorded(self) -> UnrecordedChain {
        let next_avail = (self.origin == Origin::Available).then_some(self.queue.next_avail);
        UnrecordedChain { head: self.head, next_avail }
    }
}

impl UnrecordedChain {
    /// Index of the chain's first descriptor: the device completes the chain by this.
    pub fn head(&self) -> u16 {
        self.head
    }
}

impl SplitQueue {
    /// Records a chain that was left unrecorded, unless it was completed since.
    pub fn record(&mut self, chain: UnrecordedChain) {
        if chain.next_avail.is_some() && self.is_taken(chain.head) {
            self.note_taken(chain.head);
        }
    }

    /// Puts a chain that was left unrecorded back, as if the device had not taken it: the next [`pop`](Self::pop) of
    /// this queue, or of a queue that continues it, gives the chain again. False, and nothing changes: a chain was
    /// taken after this one, or this one was completed or replayed.
    pub fn undo_pop(&mut self, chain: UnrecordedChain) -> bool {
        let is_last = chain.next_avail == Some(self.next_avail) && self.is_taken(chain.head);
        if is_last {
            self.put_back(chain.head);
        }
        is_last
    }
}
