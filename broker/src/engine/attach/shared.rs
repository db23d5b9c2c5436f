//! What all queues of a device share about rings.

use ringpass_guest_abi::attach::Geometry;

use super::availability::{RingAvailability, RingKind};
use super::pauses::Pauses;
use super::range_registry::RangeRegistry;
use super::refusal::AttachRefusal;
use super::ring_metrics::RingMetrics;
use super::status::{KindStatus, RingsStatus};

/// What the workers and the builder of a device share about rings. Each part has its own lock, and no thread holds two
/// of them.
#[derive(Debug)]
pub(in crate::engine) struct SharedRings {
    pub(in crate::engine) availability: RingAvailability,
    pub(in crate::engine) pauses: Pauses,
    pub(in crate::engine) ranges: RangeRegistry,
    pub(in crate::engine) metrics: RingMetrics,
}

impl SharedRings {
    /// Rings are available, and no queue is attached.
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        Self {
            availability: RingAvailability::new(),
            pauses: Pauses::new(queue_count),
            ranges: RangeRegistry::new(queue_count),
            metrics: RingMetrics::new(queue_count),
        }
    }

    /// Gives a queue its ranges, if rings of this kind are available, the queue does not pause, and no other queue has
    /// a part of the ranges.
    ///
    /// The kind may become unavailable after the look at it. The worker then receives the command that ends its rings
    /// after this ATTACH, and the builder looks again before it makes the ring.
    pub(in crate::engine) fn enter(
        &self,
        queue: u16,
        kind: RingKind,
        geometry: &Geometry,
    ) -> Result<(), AttachRefusal> {
        if let Some(refused) = self.availability.closed(kind).or_else(|| self.pauses.refused(queue)) {
            return Err(refused.into());
        }
        Ok(self.ranges.enter(queue, geometry)?)
    }

    /// A queue is not attached any more, and uses its ranges no more. True: it was the last one.
    pub(in crate::engine) fn leave(&self, queue: u16) -> bool {
        self.metrics.set_state(queue, None);
        self.ranges.leave(queue)
    }

    /// Everything, for operators.
    pub(in crate::engine) fn status(&self) -> RingsStatus {
        let kinds = RingKind::ALL.into_iter().map(|kind| KindStatus { kind, closed: self.availability.closed(kind) });
        RingsStatus {
            operator_mode: self.availability.operator_mode(),
            kinds: kinds.collect(),
            queues: self.metrics.queues_status(),
        }
    }
}

#[cfg(test)]
mod tests {
    use ringpass_guest_abi::epoch::device::State;
    use ringpass_guest_abi::request::ErrorCode;

    use super::super::range_registry::tests::geometry;
    use super::*;

    #[test]
    fn a_queue_gets_ranges_only_while_rings_are_available_and_the_refusal_says_why() {
        let rings = SharedRings::new(2);
        let enter = || rings.enter(1, RingKind::Direct, &geometry(0));
        rings.availability.set_logging(true);
        let refusal = enter().unwrap_err();
        assert_eq!(refusal.error.code, ErrorCode::Mode);
        assert_eq!(refusal.why, "the guest is being migrated: what a ring writes cannot be logged");
        rings.availability.note_discard();
        assert_eq!(enter().unwrap_err().error.code, ErrorCode::Discarded);
        assert!(!rings.ranges.is_in_use(), "a refused queue has no ranges");
        rings.availability.set_logging(false);
        rings.availability.clear_discard();
        enter().unwrap();
        let refusal = rings.enter(0, RingKind::Direct, &geometry(0)).unwrap_err();
        assert_eq!(refusal.error.code, ErrorCode::Busy);
    }

    #[test]
    fn a_queue_that_leaves_is_a_virtqueue_in_the_status() {
        let rings = SharedRings::new(2);
        rings.enter(1, RingKind::Direct, &geometry(0)).unwrap();
        rings.metrics.set_state(1, Some(State::Stopping));
        let status = rings.status();
        assert_eq!((status.closed(RingKind::Direct), status.queues[1].state), (None, Some(State::Stopping)));
        assert!(rings.leave(1));
        assert_eq!(rings.status().queues[1].state, None);
        rings.availability.note_discard();
        let status = rings.status();
        assert_eq!(status.closed(RingKind::Direct).map(|refused| refused.code), Some(ErrorCode::Discarded));
    }
}
