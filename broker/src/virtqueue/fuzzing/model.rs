//! A reference model of an in-flight region. Unlike the code, it works on a copy, with sets.

use std::collections::BTreeSet;

use super::SIZE_MAX;
use crate::virtqueue::InflightQueue;

/// A copy of one queue's region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) version: u16,
    pub(super) used_idx: u16,
    last_batch_head: u16,
    /// In flight, counter, next.
    entries: Vec<(bool, u64, u16)>,
}

/// Where a queue goes on.
pub(super) struct Expected {
    pub(super) next_avail: u16,
    pub(super) replay: Vec<u16>,
}

impl Contents {
    pub(super) fn of(region: &InflightQueue) -> Self {
        Self {
            version: region.version(),
            used_idx: region.used_idx(),
            last_batch_head: region.last_batch_head(),
            entries: (0..SIZE_MAX)
                .map(|head| (region.is_in_flight(head), region.counter(head), region.next(head)))
                .collect(),
        }
    }

    /// `None`: no queue may start from this region.
    pub(super) fn recovered(&self, size: u16, used_idx: u16, next_avail: u16) -> Option<Expected> {
        let anew = Some(Expected { next_avail, replay: Vec::new() });
        if self.version != 1 {
            return if self.version == 0 { anew } else { None };
        }
        let in_queue = |head: &u16| *head < size;
        let marked: BTreeSet<u16> = (0..size).filter(|&head| self.entries[usize::from(head)].0).collect();
        let batch = usize::from(used_idx.wrapping_sub(self.used_idx));
        let list = std::iter::successors(Some(self.last_batch_head).filter(in_queue), |&head| {
            Some(self.entries[usize::from(head)].2).filter(in_queue)
        });
        let published: Vec<u16> = if batch > size.into() { Vec::new() } else { list.take(batch).collect() };
        if published.len() < batch {
            // Rings that begin at 0 have used nothing yet, so the marked chains belong to a previous driver.
            return if marked.is_empty() || (used_idx, next_avail) == (0, 0) { anew } else { None };
        }
        let mut replay: Vec<u16> = marked.difference(&published.into_iter().collect()).copied().collect();
        // A stable sort: heads with the same counter keep their order.
        replay.sort_by_key(|&head| self.entries[usize::from(head)].1);
        Some(Expected { next_avail: used_idx.wrapping_add(replay.len() as u16), replay })
    }
}
