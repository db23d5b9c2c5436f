//! The driver of one queue: requests go to its ring while there is one, over queue 0 while the next ring is being made, and
//! otherwise to its virtqueue.
//!
//! The driver keeps a request until it knows the result. When a ring has ended, the driver takes the completions that
//! the ring still has. It sends the other requests again, another way or to the next ring. It does so only after
//! the I/O of the former ring has ended, which the device announces.

mod delegated;
mod epochs;
mod pending;
#[cfg(test)]
mod tests;
mod transfers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::block_queue::Request;
use ringpass_guest_abi::request::ErrorCode;

use self::delegated::DelegatedRequests;
use self::epochs::Refusal;
pub(super) use self::pending::Ended;
use self::pending::Pending;
use self::transfers::Placed;
use super::Error;
use super::attachment::{Attachment, WantedRings};
use super::queue_zero::SharedQueueZero;
use super::requests::Requests;
use super::virtqueue::{Virtqueue, Vring};
use crate::ram::RamArea;

const EIO: i32 = -5;

/// While the application polls a ring, the driver looks for more than completions in one of this many polls.
const POLLS_PER_PROGRESS: u32 = 16;

/// What one queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Number of rings that the queue has had.
    pub epochs: u64,
    /// Number of requests that the driver sent again, because their ring has ended.
    pub resubmitted: u64,
    /// Number of requests that the driver sent over queue 0, because a ring could not execute them or has not executed
    /// them, or because there was no ring at that moment.
    pub fallbacks: u64,
}

/// How the queue is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Virtqueue,
    /// The device has ARM and ATTACH on the virtqueue, on which the driver then sends nothing else.
    Attached {
        /// The head of ATTACH.
        attach: u16,
        /// The number of events before the driver sent ATTACH.
        events_before: u64,
        /// The last announcement of the device that the driver has handled; 0 before the first.
        last_announced: u32,
        is_draining: bool,
    },
}

/// How the application wants the queue to be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Virtqueue,
    /// A ring, as soon as the virtqueue is empty.
    Ring,
    /// A ring, which the device refuses for now.
    RingLater(Refusal),
}

/// The driver of a queue other than 0.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) index: u16,
    queue_zero: Arc<SharedQueueZero>,
    queue: Virtqueue,
    requests: Requests,
    attachment: Option<Attachment>,
    /// `None`: the application has never wanted rings.
    rings: Option<WantedRings>,
    /// The number of answers to PROBE when the driver allocated memory for rings, or found that it has to wait for one.
    probes_before: u64,
    mode: Mode,
    wanted: Wanted,
    /// The error code with which the device completed ATTACH.
    refused: Option<ErrorCode>,
    /// How often it has completed ATTACH since the last ring.
    refusals: u32,
    /// The error code because of which the driver has sent PROBE again since the last ring.
    probed_for: Option<ErrorCode>,
    is_muted: bool,
    /// Number of polls that found no completion.
    empty_polls: u32,
    /// The requests that have not ended, by their ids.
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// The requests to send, in this order.
    waiting: VecDeque<usize>,
    /// The request of each chain on the virtqueue, by the chain's head.
    by_head: Vec<usize>,
    /// The requests that queue 0 executes for this queue.
    delegated: DelegatedRequests,
    ended: VecDeque<Ended>,
    sequence: u64,
    counters: Counters,
    fault: Option<Error>,
}

impl Driver {
    pub(super) fn new(
        index: u16,
        queue_zero: Arc<SharedQueueZero>,
        queue: Virtqueue,
        requests: Requests,
        depth_max: usize,
    ) -> Self {
        let size = usize::from(queue.vring().size);
        Self {
            index,
            queue_zero,
            queue,
            requests,
            attachment: None,
            rings: None,
            probes_before: 0,
            mode: Mode::Virtqueue,
            wanted: Wanted::Virtqueue,
            refused: None,
            refusals: 0,
            probed_for: None,
            is_muted: false,
            empty_polls: 0,
            slots: (0..depth_max).map(|_| None).collect(),
            free: (0..depth_max).rev().collect(),
            waiting: VecDeque::with_capacity(depth_max),
            by_head: vec![usize::MAX; size],
            delegated: DelegatedRequests::default(),
            ended: VecDeque::with_capacity(depth_max),
            sequence: 0,
            counters: Counters::default(),
            fault: None,
        }
    }

    pub(super) fn vring(&self) -> &Arc<Vring> {
        self.queue.vring()
    }

    pub(super) fn is_ring(&self) -> bool {
        self.fault.is_none() && self.attachment.as_ref().is_some_and(Attachment::may_submit)
    }

    pub(super) fn is_virtqueue(&self) -> bool {
        // Without memory for rings the driver waits for an answer to PROBE.
        self.mode == Mode::Virtqueue && (self.wanted == Wanted::Virtqueue || self.attachment.is_none())
    }

    pub(super) fn epoch(&self) -> Option<u32> {
        self.attachment.as_ref().and_then(Attachment::epoch)
    }

    /// The code with which the device refused the last ring.
    pub(super) fn refused(&self) -> Option<ErrorCode> {
        self.refused
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { epochs: self.attachment.as_ref().map_or(0, |attachment| attachment.epochs), ..self.counters }
    }

    pub(super) fn fault(&self) -> Option<&Error> {
        self.fault.as_ref()
    }

    /// The device has violated the protocol: the driver sends nothing more to it.
    fn set_fault(&mut self, error: Error) {
        self.fault.get_or_insert(error);
    }

    /// Number of requests that the application has pushed and not reaped.
    pub(super) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len() + self.ended.len()
    }

    /// Takes a request, and keeps its buffer until the request has ended.
    ///
    /// # Errors
    ///
    /// Returns the buffer: the queue is full.
    pub(super) fn push(&mut self, request: &Request, buffer: Option<RamArea>) -> Result<(), Option<RamArea>> {
        let Some(id) = self.free.pop() else { return Err(buffer) };
        self.sequence += 1;
        self.slots[id] = Some(Pending::new(*request, buffer, self.sequence));
        // The usual case: there is a ring, and no request waits.
        if !(self.waiting.is_empty() && self.is_ring() && self.place_on_ring(id) == Placed::OnRing) {
            self.waiting.push_back(id);
        }
        Ok(())
    }

    /// Takes the next request that has ended.
    pub(super) fn reap(&mut self) -> Option<Ended> {
        if let Some(ended) = self.ended.pop_front() {
            return Some(ended);
        }
        // The usual case. The driver reads the announcements of the device when there is no completion.
        if let Some(ended) = self.reap_one_of_ring() {
            return Some(ended);
        }
        if self.is_polled() {
            self.publish();
            return None;
        }
        self.progress();
        self.ended.pop_front()
    }

    /// Whether the application polls a ring and there is nothing to send. Most such polls look only for a completion,
    /// because the time of a poll is a part of a request's latency.
    #[inline]
    fn is_polled(&mut self) -> bool {
        self.empty_polls = self.empty_polls.wrapping_add(1);
        self.empty_polls % POLLS_PER_PROGRESS != 0
            && self.is_muted
            && self.waiting.is_empty()
            && self.delegated.is_empty()
            && self.is_ring()
    }

    /// How long the device may take for an answer.
    pub(super) fn patience(&self) -> Duration {
        self.queue_zero.patience()
    }

    /// Turns interrupts for completions off or on. Returns true if a completion is there already.
    pub(super) fn set_muted(&mut self, muted: bool) -> bool {
        let was_muted = std::mem::replace(&mut self.is_muted, muted);
        let has_more = match self.mode {
            Mode::Virtqueue => self.queue.enable_interrupts(!muted) && !muted,
            Mode::Attached { .. } => {
                self.attachment.as_mut().is_some_and(|attachment| attachment.set_muted(muted)) && !muted
            }
        };
        if was_muted && !muted {
            // The application may have taken the interrupt of an announcement while it polled only for completions.
            self.progress();
        }
        has_more || !self.ended.is_empty()
    }

    /// Handles everything that the device has done, and sends the requests for which there is room.
    pub(super) fn progress(&mut self) {
        match self.mode {
            Mode::Virtqueue => self.reap_virtqueue(),
            Mode::Attached { .. } => {
                self.reap_ring();
                self.handle_ring_events();
            }
        }
        if self.fault.is_none() {
            self.send();
        }
        if !self.delegated.sent.is_empty() {
            self.progress_delegated();
        }
        if self.fault.is_some() {
            self.fail_unsent();
        }
    }

    /// Sends the waiting requests for which there is room. The driver sends nothing to a device with a fault.
    pub(super) fn send(&mut self) {
        if self.fault.is_some() {
            return;
        }
        self.send_requests();
        if !self.delegated.waiting.is_empty() {
            self.progress_delegated();
        }
    }

    fn send_requests(&mut self) {
        match self.mode {
            Mode::Attached { .. } => self.send_to_ring(),
            Mode::Virtqueue if self.may_attach() => {
                // The queue must be empty for ARM: new requests wait for the ring.
                if !self.queue.is_empty() {
                    return;
                }
                if self.is_prepared_for_ring() {
                    self.attach();
                } else {
                    self.send_to_virtqueue();
                }
            }
            Mode::Virtqueue => self.send_to_virtqueue(),
        }
    }
}
