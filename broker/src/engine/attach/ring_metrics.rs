//! What the queues' rings do: the states of their epochs, counts, refusals.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ringpass_guest_abi::RingLayout;
use ringpass_guest_abi::epoch::device::State;
use vm_memory::{Bytes, GuestAddress};

use super::refusal::Refused;
use super::status::{RingCounts, RingStatus};
use crate::ring_host::RingId;
use crate::vhost_user::DeviceMemory;

/// What the rings of each queue do, for operators. The guard of the ring host takes the words as hints; nothing else
/// decides by them.
#[derive(Debug)]
pub(in crate::engine) struct RingMetrics {
    queues: Mutex<Vec<QueueMetrics>>,
}

/// One queue.
#[derive(Debug, Default)]
struct QueueMetrics {
    state: Option<State>,
    ring: Option<RingWords>,
    counts: RingCounts,
    refused: Option<Refused>,
    ended_for_cost: u64,
}

/// The words of a ring that runs.
#[derive(Debug)]
struct RingWords {
    id: RingId,
    memory: DeviceMemory,
    rings_gpa: u64,
    layout: RingLayout,
    /// The tails at the last sample.
    sq_tail: u32,
    cq_tail: u32,
}

impl RingMetrics {
    /// No queue is attached.
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        let queues = (0..queue_count).map(|_| QueueMetrics::default()).collect();
        Self { queues: Mutex::new(queues) }
    }

    /// Notes the state of a queue's epochs. `None`: the queue is not attached.
    pub(in crate::engine) fn set_state(&self, queue: u16, state: Option<State>) {
        self.queues()[usize::from(queue)].state = state;
    }

    /// Notes why a queue got no ring.
    pub(in crate::engine) fn set_refused(&self, queue: u16, refused: Refused) {
        self.queues()[usize::from(queue)].refused = Some(refused);
    }

    /// A ring of the queue runs. Its words count from 0.
    pub(in crate::engine) fn ring_opened(
        &self,
        queue: u16,
        id: RingId,
        memory: DeviceMemory,
        rings_gpa: u64,
        layout: RingLayout,
    ) {
        let mut queues = self.queues();
        let metrics = &mut queues[usize::from(queue)];
        metrics.sample();
        metrics.ring = Some(RingWords { id, memory, rings_gpa, layout, sq_tail: 0, cq_tail: 0 });
        metrics.refused = None;
    }

    /// The front-end gave another memory table, which has the same memory under the queue's ring.
    pub(in crate::engine) fn ring_moved(&self, queue: u16, memory: &DeviceMemory) {
        if let Some(ring) = &mut self.queues()[usize::from(queue)].ring {
            ring.memory = memory.clone();
        }
    }

    /// The queue's ring is about to end: counts what the ring did, and lets its memory go.
    pub(in crate::engine) fn ring_closed(&self, queue: u16) {
        let mut queues = self.queues();
        let metrics = &mut queues[usize::from(queue)];
        metrics.sample();
        metrics.ring = None;
    }

    /// Reads the words of all rings. The builder calls this so often that no word wraps between two calls.
    pub(in crate::engine) fn sample(&self) {
        self.queues().iter_mut().for_each(QueueMetrics::sample);
    }

    /// The queue's ring ends because it cost too much.
    pub(in crate::engine) fn end_for_cost(&self, queue: u16, refused: Refused) {
        let mut queues = self.queues();
        let metrics = &mut queues[usize::from(queue)];
        metrics.ended_for_cost += 1;
        metrics.refused = Some(refused);
    }

    /// The queue may have a ring again.
    pub(in crate::engine) fn clear_refused(&self, queue: u16) {
        self.queues()[usize::from(queue)].refused = None;
    }

    /// The rings whose words say that they have more requests outstanding than their CQ has entries. The guest can
    /// write these words.
    pub(super) fn exceeding(&self) -> Vec<RingId> {
        let queues = self.queues();
        let rings = queues.iter().filter_map(|metrics| metrics.ring.as_ref());
        let exceeds =
            |ring: &&RingWords| ring.claimed_outstanding().is_some_and(|count| count > ring.layout.cq_entries);
        rings.filter(exceeds).map(|ring| ring.id).collect()
    }

    /// The present values of each queue.
    pub(in crate::engine) fn queues_status(&self) -> Vec<RingStatus> {
        let mut queues = self.queues();
        let status = |metrics: &mut QueueMetrics| {
            metrics.sample();
            RingStatus {
                state: metrics.state,
                layout: metrics.ring.as_ref().map(|ring| ring.layout),
                counts: metrics.counts,
                refused: metrics.refused.clone(),
                ended_for_cost: metrics.ended_for_cost,
            }
        };
        queues.iter_mut().map(status).collect()
    }

    fn queues(&self) -> MutexGuard<'_, Vec<QueueMetrics>> {
        // A panic between two changes leaves at most a count that is too small.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RingWords {
    fn load(&self, offset_bytes: u32, order: Ordering) -> Option<u32> {
        self.memory.load(GuestAddress(self.rings_gpa + u64::from(offset_bytes)), order).ok()
    }

    /// What the words say is outstanding: SQEs consumed, less CQEs posted.
    fn claimed_outstanding(&self) -> Option<u32> {
        // In this order: a request that ends in between counts as outstanding, and never the other way round.
        let cq_tail = self.load(self.layout.cq_tail_offset, Ordering::Acquire)?;
        let difference = self.load(self.layout.sq_head_offset, Ordering::Acquire)?.wrapping_sub(cq_tail) as i32;
        Some(difference.max(0) as u32)
    }
}

impl QueueMetrics {
    fn sample(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let load = |offset_bytes| ring.load(offset_bytes, Ordering::Relaxed);
        let (sq_tail, cq_tail) = (load(ring.layout.sq_tail_offset), load(ring.layout.cq_tail_offset));
        let count = |total: &mut u64, last: &mut u32, now: Option<u32>| {
            let now = now.unwrap_or(*last);
            *total += u64::from(now.wrapping_sub(*last));
            *last = now;
        };
        count(&mut self.counts.submitted, &mut ring.sq_tail, sq_tail);
        count(&mut self.counts.completed, &mut ring.cq_tail, cq_tail);
    }
}

#[cfg(test)]
mod tests {
    use ringpass_guest_abi::Doorbell;
    use ringpass_guest_abi::request::ErrorCode;

    use super::*;

    const LAYOUT: RingLayout = RingLayout {
        sq_entries: 8,
        cq_entries: 16,
        sq_head_offset: 0,
        sq_tail_offset: 4,
        sq_flags_offset: 8,
        cq_head_offset: 12,
        cq_tail_offset: 16,
        cq_flags_offset: 20,
        cqes_offset: 64,
        rings_bytes: 4096,
        sqes_bytes: 4096,
        doorbell: Doorbell::Always,
    };

    fn memory() -> DeviceMemory {
        DeviceMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap()
    }

    fn store_tails(memory: &DeviceMemory, sq_tail: u32, cq_tail: u32) {
        memory.store(sq_tail, GuestAddress(4), Ordering::Relaxed).unwrap();
        memory.store(cq_tail, GuestAddress(16), Ordering::Relaxed).unwrap();
    }

    fn counts(metrics: &RingMetrics) -> (u64, u64) {
        let RingCounts { submitted, completed } = metrics.queues_status()[0].counts;
        (submitted, completed)
    }

    #[test]
    fn indexes_that_wrap_are_counted_on() {
        let memory = memory();
        let metrics = RingMetrics::new(1);
        metrics.ring_opened(0, RingId::default(), memory.clone(), 0, LAYOUT);
        for (sq_tail, cq_tail) in [(0xf000_0000_u32, 0xefff_fff0_u32), (5, 3)] {
            store_tails(&memory, sq_tail, cq_tail);
            metrics.sample();
        }
        assert_eq!(counts(&metrics), ((1 << 32) + 5, (1 << 32) + 3));
        metrics.ring_closed(0);
        metrics.ring_opened(0, RingId::default(), memory.clone(), 0, LAYOUT);
        store_tails(&memory, 1, 0);
        assert_eq!(counts(&metrics).0, (1 << 32) + 6);
    }

    #[test]
    fn a_ring_that_closes_is_counted_to_its_end_and_not_read_afterwards() {
        let memory = memory();
        let metrics = RingMetrics::new(1);
        metrics.ring_opened(0, RingId::default(), memory.clone(), 0, LAYOUT);
        store_tails(&memory, 7, 6);
        metrics.ring_closed(0);
        store_tails(&memory, 100, 100);
        assert_eq!(counts(&metrics), (7, 6));
        assert_eq!(metrics.queues_status()[0].layout, None);
    }

    #[test]
    fn a_ring_that_moved_is_read_in_the_new_table() {
        let (former, present) = (memory(), memory());
        let metrics = RingMetrics::new(1);
        metrics.ring_opened(0, RingId::default(), former.clone(), 0, LAYOUT);
        metrics.ring_moved(0, &present);
        store_tails(&former, 100, 100);
        store_tails(&present, 2, 1);
        assert_eq!(counts(&metrics), (2, 1));
        // Without a ring there is nothing to move.
        metrics.ring_closed(0);
        metrics.ring_moved(0, &former);
        assert_eq!(counts(&metrics), (2, 1));
    }

    #[test]
    fn words_that_are_in_no_memory_keep_their_counts() {
        let memory = memory();
        let metrics = RingMetrics::new(1);
        metrics.ring_opened(0, RingId::default(), memory.clone(), 0, LAYOUT);
        store_tails(&memory, 3, 3);
        metrics.sample();
        metrics.ring_moved(0, &DeviceMemory::new());
        assert_eq!(counts(&metrics), (3, 3));
    }

    #[test]
    fn a_refusal_is_shown_until_a_ring_opens() {
        let metrics = RingMetrics::new(2);
        let refused = Refused { code: ErrorCode::Memory, why: "a reason".into() };
        metrics.set_refused(1, refused.clone());
        metrics.set_state(1, Some(State::Stopping));
        let [other, queue] = <[_; 2]>::try_from(metrics.queues_status()).unwrap();
        assert_eq!((queue.state, queue.refused), (Some(State::Stopping), Some(refused)));
        assert_eq!((other.state, other.refused), (None, None));
        metrics.ring_opened(1, RingId::default(), memory(), 0, LAYOUT);
        metrics.set_state(1, None);
        let queue = &metrics.queues_status()[1];
        assert_eq!((queue.state, queue.layout, &queue.refused), (None, Some(LAYOUT), &None));
    }
}
