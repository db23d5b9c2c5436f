//! The thread that follows what happens to rings: their ends, and what the ring host's guard finds.
//!
//! It also compares the words of each ring, and tells the guard at once what an honest guest would not write. And it
//! ends the pauses of queues that had an excess.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::attachment::AttachmentId;
use super::pauses::Excess;
use super::penalty::Penalty;
use super::shared::SharedRings;
use super::workers::{AttachEvent, Workers};
use crate::engine::EngineError;
use crate::log_limit::{LogCause, LogLimits};
use crate::ring_host::{NextEvent, RingEvents, RingOwner};
use crate::threads::{AbortOnPanic, leave_signals_to_others};

/// The time between two looks at the words of rings.
const GLANCE: Duration = Duration::from_millis(50);

struct RingWatch {
    events: RingEvents,
    rings: Arc<SharedRings>,
    workers: Arc<dyn Workers>,
    penalty: Penalty,
    log: LogLimits,
}

/// Starts the thread. It ends with the ring host.
pub(in crate::engine) fn start(
    events: RingEvents,
    rings: Arc<SharedRings>,
    workers: Arc<dyn Workers>,
) -> Result<(), EngineError> {
    thread::Builder::new()
        .name("ring-watch".into())
        .spawn(move || {
            leave_signals_to_others();
            // Queues wait for the ends of their rings.
            let _abort = AbortOnPanic;
            RingWatch { events, rings, workers, penalty: Penalty::default(), log: LogLimits::new() }.run();
        })
        .map_err(EngineError::Thread)?;
    Ok(())
}

impl RingWatch {
    fn run(&mut self) {
        loop {
            match self.events.next(self.timeout()) {
                NextEvent::Excess { owner, outstanding } => self.end_ring(owner, outstanding),
                NextEvent::Nothing => {}
                NextEvent::Closed => return,
            }
            self.rings.metrics.exceeding().into_iter().for_each(|id| self.events.control().suspect(id));
            self.end_pauses();
        }
    }

    /// Until the next look at words or the end of a pause.
    fn timeout(&self) -> Option<Duration> {
        let glance = self.events.control().has_rings().then_some(GLANCE);
        let pause = self.rings.pauses.next_end().map(|end| end.saturating_duration_since(Instant::now()));
        glance.into_iter().chain(pause).min()
    }

    /// The queue gets no ring for a while.
    fn end_ring(&mut self, owner: RingOwner, outstanding: Option<u32>) {
        let RingOwner { queue, attachment, cq_entries } = owner;
        let now = Instant::now();
        let pause = self.penalty.begin(now);
        let excess = Excess { outstanding, cq_entries };
        // First, so that the queue is not attached again in between.
        self.rings.pauses.begin(queue, excess, now + pause);
        self.rings.metrics.end_for_cost(queue, excess.refused(pause));
        if let Some(total) = self.log.count(LogCause::new("excess")) {
            tracing::warn!(
                queue,
                outstanding,
                cq_entries,
                pause_s = pause.as_secs(),
                total,
                "a ring ends: the guest had more requests outstanding than its CQ has entries, which no honest driver has. The \
                 queue goes on as a virtqueue, and gets no ring for a while (`ringpass dev set NAME mode auto` ends the pause; \
                 {total} times so far)"
            );
        }
        self.workers.attach_event(queue, AttachmentId(attachment), AttachEvent::Excess);
    }

    fn end_pauses(&self) {
        let resumed = self.rings.pauses.take_over(Instant::now());
        resumed.iter().for_each(|&queue| self.rings.metrics.clear_refused(queue));
        if !resumed.is_empty() {
            self.workers.tell_driver();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use ringpass_guest_abi::request::ErrorCode;

    use super::*;
    use crate::engine::tests::attach::attach_config;
    use crate::ring_host::RingHost;

    /// Notes that the driver is told.
    #[derive(Debug)]
    struct Told(Sender<()>);

    impl Workers for Told {
        fn attach_event(&self, _queue: u16, _attachment: AttachmentId, _event: AttachEvent) {}
        fn tell_driver(&self) {
            self.0.send(()).unwrap();
        }
        fn end_rings(&self, _reason: ErrorCode) {}
        fn finish_rings(&self, _reason: ErrorCode) {}
    }

    #[test]
    fn the_driver_is_told_when_a_pause_ends_and_the_queue_may_have_a_ring_again() {
        let rings = Arc::new(SharedRings::new(2));
        let begin = Instant::now();
        let pause = Duration::from_millis(30);
        let excess = Excess { outstanding: Some(2000), cq_entries: 1024 };
        rings.pauses.begin(1, excess, begin + pause);
        rings.metrics.end_for_cost(1, excess.refused(pause));
        let (sender, told) = channel();
        let (_host, events) = RingHost::in_threads(attach_config(), 2).unwrap().open().unwrap();
        start(events, rings.clone(), Arc::new(Told(sender))).unwrap();
        told.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(begin.elapsed() >= pause, "the pause ended too early");
        assert_eq!(rings.pauses.refused(1), None);
        let status = rings.status();
        assert_eq!((&status.queues[1].refused, status.queues[1].ended_for_cost), (&None, 1));
    }
}
