//! Which requests may change which blocks at a time, over all workers of a device.
//!
//! Needed where a guest's blocks are smaller than those of direct I/O. A write of a part of a block reads the block, changes
//! the part, and writes the block: what another request has changed in that block in between would be lost. So such a write
//! has its blocks *alone*. All other changes (writes of whole blocks, discards, write zeroes) may go side by side, as
//! they would without this: they have their blocks *shared*.
//!
//! A request claims all its blocks at once and before it takes anything else that is scarce, so claims cannot wait for
//! one another in a circle. Claims that overlap are granted in the order in which they came.
//!
//! Shared claims are the rule. Each worker notes its own in a table of its own, and looks further only while a request has
//! blocks alone, or waits for them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::cache_line::CacheLine;

/// How a request has its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Together with others that change whole blocks.
    Shared,
    /// No other request changes them.
    Alone,
}

/// A request: its worker, and its slot there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Owner {
    pub(in crate::engine) worker: usize,
    pub(in crate::engine) slot: u32,
}

/// What a request wants.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) owner: Owner,
    /// Bytes of the disk, in whole blocks.
    pub(super) range: Range<u64>,
    pub(super) access: Access,
}

/// What a worker has shared, by slot. Empty ranges: nothing.
type Table = CacheLine<Mutex<Vec<Range<u64>>>>;

/// The claims of all workers.
#[derive(Debug)]
pub(in crate::engine) struct BlockLocks {
    /// Claims in `queue`. Raised before the tables are scanned: a worker that holds its table's lock and sees zero is ahead of
    /// the scan, and the scan finds its entry.
    contenders: CacheLine<AtomicUsize>,
    /// One for each worker.
    shared: Box<[Table]>,
    queue: CacheLine<Mutex<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Granted.
    alone: Vec<Claim>,
    /// Not granted, the first one first.
    waiting: VecDeque<Claim>,
}

impl BlockLocks {
    pub(in crate::engine) fn new(workers: usize) -> Self {
        Self {
            contenders: CacheLine::default(),
            shared: (0..workers).map(|_| CacheLine::default()).collect(),
            queue: CacheLine::default(),
        }
    }

    /// True: the request has its blocks. False: [`release`](Self::release) of another one names it when it has them.
    pub(super) fn acquire(&self, claim: Claim) -> bool {
        if claim.access == Access::Shared {
            let mut own = lock(&self.shared[claim.owner.worker].0);
            if self.contenders.0.load(Ordering::SeqCst) == 0 {
                note(&mut own, claim.owner.slot, claim.range);
                return true;
            }
        }
        let mut queue = lock(&self.queue.0);
        self.contenders.0.fetch_add(1, Ordering::SeqCst);
        let is_free = self.is_free(&queue, queue.waiting.len(), &claim);
        if is_free {
            self.grant(&mut queue, claim);
        } else {
            queue.waiting.push_back(claim);
        }
        is_free
    }

    /// The request has its blocks no more. Gives those that have theirs now, and have waited until now.
    pub(super) fn release(&self, owner: Owner, access: Access) -> Vec<Owner> {
        let released = match access {
            Access::Shared => {
                let mut own = lock(&self.shared[owner.worker].0);
                std::mem::take(&mut own[owner.slot as usize])
            }
            Access::Alone => {
                let mut queue = lock(&self.queue.0);
                let number = queue.alone.iter().position(|claim| claim.owner == owner);
                let claim = queue.alone.swap_remove(number.expect("it has its blocks alone"));
                self.contenders.0.fetch_sub(1, Ordering::SeqCst);
                claim.range
            }
        };
        if self.contenders.0.load(Ordering::SeqCst) == 0 {
            return Vec::new();
        }
        self.grant_waiting(&released)
    }

    /// Grants what only a claim of `released` can have held up.
    fn grant_waiting(&self, released: &Range<u64>) -> Vec<Owner> {
        let mut queue = lock(&self.queue.0);
        let mut granted = Vec::new();
        let mut number = 0;
        while let Some(claim) = queue.waiting.get(number) {
            if !overlap(&claim.range, released) || !self.is_free(&queue, number, claim) {
                number += 1;
                continue;
            }
            if let Some(claim) = queue.waiting.remove(number) {
                granted.push(claim.owner);
                self.grant(&mut queue, claim);
            }
        }
        granted
    }

    /// Whether nothing stands in the way of a claim, nor of the first `earlier` that wait.
    fn is_free(&self, queue: &Queue, earlier: usize, claim: &Claim) -> bool {
        let is_in_the_way = |other: &Claim| {
            (other.access == Access::Alone || claim.access == Access::Alone) && overlap(&other.range, &claim.range)
        };
        if queue.alone.iter().any(is_in_the_way) || queue.waiting.iter().take(earlier).any(is_in_the_way) {
            return false;
        }
        let is_shared = |table: &Table| lock(&table.0).iter().any(|range| overlap(range, &claim.range));
        claim.access == Access::Shared || !self.shared.iter().any(is_shared)
    }

    /// Moves a claim, which counts as a contender, to those that are granted.
    fn grant(&self, queue: &mut Queue, claim: Claim) {
        match claim.access {
            Access::Alone => queue.alone.push(claim),
            Access::Shared => {
                note(&mut lock(&self.shared[claim.owner.worker].0), claim.owner.slot, claim.range);
                self.contenders.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

fn note(table: &mut Vec<Range<u64>>, slot: u32, range: Range<u64>) {
    let slot = slot as usize;
    if table.len() <= slot {
        table.resize(slot + 1, 0..0);
    }
    table[slot] = range;
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panics ends the process.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
