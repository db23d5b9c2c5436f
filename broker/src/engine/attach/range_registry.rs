//! Which ranges of guest memory belong to the rings of which queue.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ringpass_guest_abi::attach::{AttachError, Geometry, GpaRange};
use ringpass_guest_abi::request::ErrorCode;

/// The control page and the areas of one queue.
type Ranges = [GpaRange; 5];

/// Which ranges of guest memory belong to which attached queue. No two queues have a byte in common.
///
/// A queue keeps its ranges until its last ring has really ended. So a new attachment never shares memory with an older
/// ring of this process.
#[derive(Debug)]
pub(in crate::engine) struct RangeRegistry {
    /// By queue. `None`: the queue is not attached.
    queues: Mutex<Vec<Option<Ranges>>>,
}

impl RangeRegistry {
    /// No queue has ranges.
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        Self { queues: Mutex::new(vec![None; usize::from(queue_count)]) }
    }

    /// Gives a queue the ranges of `geometry`.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Busy`] with the first field whose range another queue has a part of. Nothing changes.
    pub(in crate::engine) fn enter(&self, queue: u16, geometry: &Geometry) -> Result<(), AttachError> {
        let mut queues = self.queues();
        for (field_offset_bytes, range) in geometry.ranges() {
            let mut taken = queues.iter().flatten().flatten();
            if taken.any(|other| other.gpa() < range.end_gpa() && range.gpa() < other.end_gpa()) {
                return Err(AttachError { code: ErrorCode::Busy, field_offset_bytes, value: range.gpa() });
            }
        }
        queues[usize::from(queue)] = Some(geometry.ranges().map(|(_, range)| range));
        Ok(())
    }

    /// Takes the ranges of a queue back. True: no queue has ranges any more.
    pub(in crate::engine) fn leave(&self, queue: u16) -> bool {
        let mut queues = self.queues();
        queues[usize::from(queue)] = None;
        queues.iter().all(Option::is_none)
    }

    /// Whether a queue has ranges.
    pub(in crate::engine) fn is_in_use(&self) -> bool {
        self.queues().iter().any(Option::is_some)
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Option<Ranges>>> {
        // A change is one assignment, so a panic cannot leave half of one.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(in crate::engine) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use ringpass_guest_abi::attach::{AreaAddress, AttachLimits, AttachPayload};
    use ringpass_guest_abi::probe::VERSION;

    use super::*;

    const PAGE_BYTES: u64 = 4096;
    /// Pages of a [`geometry`].
    const PAGES: u64 = 5;

    /// A geometry of one page for each range, from page `first` on.
    pub(in crate::engine) fn geometry(first: u64) -> Geometry {
        let page = |number: u64| ((first + number) * PAGE_BYTES).into();
        let payload = AttachPayload {
            version: VERSION.into(),
            sq_entries: 8.into(),
            cq_entries: 16.into(),
            control_gpa: page(0),
            areas: [1, 3].map(|n| AreaAddress { rings_gpa: page(n), sqes_gpa: page(n + 1) }),
            ..AttachPayload::default()
        };
        let limits = AttachLimits { features: 0, sq_entries_max: 8, cq_entries_max: 16, page_bytes: 4096 };
        payload.check(&limits).unwrap()
    }

    #[test]
    fn no_two_queues_have_a_byte_in_common() {
        let registry = RangeRegistry::new(3);
        registry.enter(1, &geometry(10)).unwrap();
        for first in [6, 10, 14] {
            let error = registry.enter(2, &geometry(first)).unwrap_err();
            assert_eq!(error.code, ErrorCode::Busy, "page {first}");
        }
        registry.enter(2, &geometry(15)).unwrap();
        assert!(!registry.leave(1) && registry.is_in_use());
        assert!(registry.leave(2) && !registry.is_in_use(), "queue 2 was the last one");
        registry.enter(2, &geometry(10)).unwrap();
    }

    #[test]
    fn a_refusal_names_the_field_and_changes_nothing() {
        let registry = RangeRegistry::new(2);
        registry.enter(0, &geometry(10)).unwrap();
        let error = registry.enter(1, &geometry(6)).unwrap_err();
        let (field_offset_bytes, range) = geometry(6).ranges()[4];
        assert_eq!(range.gpa(), 10 * PAGE_BYTES);
        assert_eq!((error.field_offset_bytes, error.value), (field_offset_bytes, range.gpa()));
        assert!(registry.leave(0), "queue 1 has no ranges");
    }

    proptest! {
        #[test]
        fn the_registry_agrees_with_a_model_of_pages(steps in vec((0..4_u16, proptest::option::of(0..24_u64)), 1..60)) {
            let registry = RangeRegistry::new(4);
            // By queue: its first page.
            let mut model: [Option<u64>; 4] = [None; 4];
            for (queue, first) in steps {
                let own = &model[usize::from(queue)];
                match first {
                    // A queue that is attached does not enter.
                    Some(first) if own.is_none() => {
                        let is_free = model.iter().flatten().all(|other| other.abs_diff(first) >= PAGES);
                        prop_assert_eq!(registry.enter(queue, &geometry(first)).is_ok(), is_free);
                        if is_free {
                            model[usize::from(queue)] = Some(first);
                        }
                    }
                    Some(_) => {}
                    None => {
                        model[usize::from(queue)] = None;
                        prop_assert_eq!(registry.leave(queue), model == [None; 4]);
                    }
                }
                prop_assert_eq!(registry.is_in_use(), model != [None; 4]);
            }
        }
    }
}
