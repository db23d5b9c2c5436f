//! The driver of one queue: requests go to its ring while there is one, and otherwise to its virtqueue.
//!
//! The driver keeps a request until it knows the result. When a ring has ended, the driver takes the completions that the ring still
//! has. It sends the other requests again, to the next ring or to the virtqueue, and never before the I/O of the old ring has ended:
//! the device announces that.

mod epochs;
mod errands;
mod pending;
#[cfg(test)]
mod tests;
mod transfers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::block_queue::Request;
use ringpass_guest_abi::request::ErrorCode;

use self::epochs::Refusal;
use self::errands::Errands;
pub(super) use self::pending::Ended;
use self::pending::Pending;
use self::transfers::Placed;
use super::Error;
use super::attachment::Attachment;
use super::requests::Requests;
use super::shared::Shared;
use super::virtqueue::Virtqueue;
use crate::ram::RamArea;

const EIO: i32 = -5;

/// While the user polls a ring, the driver looks for more than completions only once in so many calls.
const LOOKS_MAX: u32 = 16;

/// What one queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Rings that were begun.
    pub epochs: u64,
    /// Requests that were sent again, because the ring or the connection they were on has ended, or the device did a part.
    pub resubmitted: u64,
    /// Requests that went to queue 0, because they failed on a ring.
    pub detoured: u64,
}

/// Who executes the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Virtqueue,
    /// ARM and ATTACH are on the virtqueue, which the driver does not touch.
    Attached {
        attach: u16,
        /// The number of events before the driver sent ATTACH.
        news: u64,
        /// The device's announcement at the last look; 0 before the first.
        heard: u32,
        is_draining: bool,
    },
}

/// How the user wants the queue to be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Virtqueue,
    /// A ring, as soon as the virtqueue is empty.
    Ring,
    /// A ring, which the device refused for now.
    RingLater(Refusal),
}

/// The driver of a queue other than 0.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) index: u16,
    shared: Arc<Shared>,
    queue: Virtqueue,
    requests: Requests,
    attachment: Option<Attachment>,
    mode: Mode,
    wish: Wish,
    /// The error code with which the device completed ATTACH.
    refused: Option<ErrorCode>,
    is_muted: bool,
    /// Calls that found no completion.
    looks: u32,
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    waiting: VecDeque<usize>,
    /// The request of each chain on the virtqueue, by the chain's head.
    by_head: Vec<usize>,
    /// The requests that queue 0 executes for this queue.
    errands: Errands,
    done: VecDeque<Ended>,
    sequence: u64,
    counters: Counters,
    fault: Option<Error>,
}

impl Driver {
    pub(super) fn new(index: u16, shared: Arc<Shared>, queue: Virtqueue, requests: Requests, depth_max: usize) -> Self {
        let size = usize::from(queue.setup().size);
        Self {
            index,
            shared,
            queue,
            requests,
            attachment: None,
            mode: Mode::Virtqueue,
            wish: Wish::Virtqueue,
            refused: None,
            is_muted: false,
            looks: 0,
            slots: (0..depth_max).map(|_| None).collect(),
            free: (0..depth_max).rev().collect(),
            waiting: VecDeque::with_capacity(depth_max),
            by_head: vec![usize::MAX; size],
            errands: Errands::default(),
            done: VecDeque::with_capacity(depth_max),
            sequence: 0,
            counters: Counters::default(),
            fault: None,
        }
    }

    pub(super) fn setup(&self) -> &Arc<super::virtqueue::Setup> {
        self.queue.setup()
    }

    pub(super) fn is_ring(&self) -> bool {
        self.fault.is_none() && self.attachment.as_ref().is_some_and(Attachment::may_submit)
    }

    pub(super) fn is_virtqueue(&self) -> bool {
        self.mode == Mode::Virtqueue && self.wish == Wish::Virtqueue
    }

    pub(super) fn epoch(&self) -> Option<u32> {
        self.attachment.as_ref().and_then(Attachment::epoch)
    }

    /// Why the queue is not a ring.
    pub(super) fn refused(&self) -> Option<ErrorCode> {
        self.refused
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { epochs: self.attachment.as_ref().map_or(0, |attachment| attachment.epochs), ..self.counters }
    }

    pub(super) fn fault(&self) -> Option<&Error> {
        self.fault.as_ref()
    }

    /// The device broke a rule: the driver sends nothing more to it.
    fn break_down(&mut self, error: Error) {
        self.fault.get_or_insert(error);
    }

    /// Requests that have not completed.
    pub(super) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request, and keeps its buffer until the request has ended.
    ///
    /// # Errors
    ///
    /// The queue is full: the buffer comes back.
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
        if let Some(ended) = self.done.pop_front() {
            return Some(ended);
        }
        // The usual case. The driver looks at the device's announcements when there is no completion.
        if let Some(ended) = self.reap_one_of_ring() {
            return Some(ended);
        }
        if self.is_polled() {
            self.publish();
            return None;
        }
        self.progress();
        self.done.pop_front()
    }

    /// Whether the user polls a ring and nothing is to be sent. Most such calls look for a completion only, because each of them is a
    /// part of a request's latency.
    #[inline]
    fn is_polled(&mut self) -> bool {
        self.looks = self.looks.wrapping_add(1);
        self.looks % LOOKS_MAX != 0
            && self.is_muted
            && self.waiting.is_empty()
            && self.errands.are_done()
            && self.is_ring()
    }

    /// How long to wait for an answer.
    pub(super) fn patience(&self) -> Duration {
        self.shared.patience()
    }

    /// Turns interrupts for completions off or on. Returns true if a completion is there already.
    pub(super) fn set_muted(&mut self, muted: bool) -> bool {
        let was_muted = std::mem::replace(&mut self.is_muted, muted);
        let has_more = match self.mode {
            Mode::Virtqueue => self.queue.want_interrupts(!muted) && !muted,
            Mode::Attached { .. } => {
                self.attachment.as_mut().is_some_and(|attachment| attachment.set_muted(muted)) && !muted
            }
        };
        if was_muted && !muted {
            // The user may have taken the interrupt of an announcement while it polled for completions only.
            self.progress();
        }
        has_more || !self.done.is_empty()
    }

    /// Looks at everything once, and sends the requests that can be sent.
    pub(super) fn progress(&mut self) {
        match self.mode {
            Mode::Virtqueue => self.reap_virtqueue(),
            Mode::Attached { .. } => {
                self.reap_ring();
                self.look();
            }
        }
        if self.fault.is_none() {
            self.send();
        }
        if !self.errands.sent.is_empty() {
            self.run_errands();
        }
        if self.fault.is_some() {
            self.fail_unsent();
        }
    }

    /// Sends the waiting requests, as far as there is room. The driver sends nothing to a broken device.
    pub(super) fn send(&mut self) {
        if self.fault.is_some() {
            return;
        }
        self.send_requests();
        if !self.errands.waiting.is_empty() {
            self.run_errands();
        }
    }

    fn send_requests(&mut self) {
        match self.mode {
            Mode::Attached { .. } => self.send_to_ring(),
            Mode::Virtqueue if self.may_ask() => {
                // The queue must be empty for ARM; new requests wait for the ring.
                if self.queue.is_empty() {
                    self.attach();
                }
            }
            Mode::Virtqueue => self.send_to_virtqueue(),
        }
    }
}
