//! DETACH requests on their way from the worker that took them to the worker of the queue.

use std::sync::atomic::{AtomicBool, Ordering};

/// Which queues have a DETACH on its way to their worker.
///
/// At most one is on its way for each queue. A worker may be busy, and without this bound a guest could fill the host's
/// memory with DETACHes that wait for the worker.
#[derive(Debug)]
pub(in crate::engine) struct PendingDetaches {
    queues: Box<[AtomicBool]>,
}

impl PendingDetaches {
    /// No DETACH is on its way.
    pub(in crate::engine) fn new(queue_count: u16) -> Self {
        Self { queues: (0..queue_count).map(|_| AtomicBool::new(false)).collect() }
    }

    /// A driver asks for a queue back. True: the caller sends the DETACH to the queue's worker. False: an earlier one,
    /// which the worker has not received, stands for this one as well.
    pub(in crate::engine) fn begin(&self, queue: u16) -> bool {
        !self.queues[usize::from(queue)].swap(true, Ordering::AcqRel)
    }

    /// The worker has received the DETACH of its queue. The worker calls this before it detaches the queue, so that a
    /// DETACH that comes later is sent again.
    pub(in crate::engine) fn received(&self, queue: u16) {
        self.queues[usize::from(queue)].swap(false, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_detach_of_a_queue_is_on_its_way_at_a_time() {
        let detaches = PendingDetaches::new(2);
        assert!(detaches.begin(1) && !detaches.begin(1) && detaches.begin(0));
        detaches.received(1);
        assert!(detaches.begin(1) && !detaches.begin(0));
    }
}
