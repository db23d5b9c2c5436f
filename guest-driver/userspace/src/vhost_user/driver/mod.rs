//! The driver of one queue: requests go to its ring while there is one, and otherwise to its virtqueue.
//!
//! A request stays a request until it is known what became of it. A ring that has ended gives back what it completed; the
//! rest is sent again, to the next ring or to the virtqueue, and never before the older ring's I/O has ended: that is what
//! the device's word says.

mod epochs;
mod errands;
mod pending;
#[cfg(test)]
mod tests;
mod transfers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;
use ringpass_workload::{Completion, Request};

use self::epochs::Refusal;
use self::errands::Errands;
use self::pending::Pending;
use self::transfers::Placed;
use super::Error;
use super::attachment::Attachment;
use super::requests::Requests;
use super::shared::Shared;
use super::virtqueue::Virtqueue;

const EIO: i32 = -5;

/// How often somebody who polls looks for a completion before the driver looks at everything else.
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
    /// ARM and ATTACH are on the virtqueue, which is not touched.
    Attached {
        attach: u16,
        /// The news that had come before ATTACH was sent.
        news: u64,
        /// The device's word as it was looked at last; 0 before the first.
        heard: u32,
        is_draining: bool,
    },
}

/// Who is to execute the queue.
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
    /// What the device said when it completed ATTACH.
    refused: Option<ErrorCode>,
    is_muted: bool,
    /// Looks for a completion that found none.
    looks: u32,
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    waiting: VecDeque<usize>,
    /// By head of the virtqueue.
    by_head: Vec<usize>,
    /// What goes over queue 0 for this queue.
    errands: Errands,
    done: VecDeque<Completion>,
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
            slots: vec![None; depth_max],
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

    /// The device broke a rule: nothing more is sent to it.
    fn break_down(&mut self, error: Error) {
        self.fault.get_or_insert(error);
    }

    /// Requests that have not completed.
    pub(super) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request. False: as many are outstanding as can be.
    pub(super) fn push(&mut self, request: &Request) -> bool {
        let Some(id) = self.free.pop() else { return false };
        self.sequence += 1;
        self.slots[id] = Some(Pending::new(*request, self.sequence));
        // The usual case: there is a ring, and nobody waits.
        if !(self.waiting.is_empty() && self.is_ring() && self.place_on_ring(id) == Placed::OnRing) {
            self.waiting.push_back(id);
        }
        true
    }

    /// Takes the next completion.
    pub(super) fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.done.pop_front() {
            return Some(completion);
        }
        // The usual case; what the device announces is looked at when there is none.
        if let Some(completion) = self.reap_one_of_ring() {
            return Some(completion);
        }
        if self.is_polled() {
            self.publish();
            return None;
        }
        self.progress();
        self.done.pop_front()
    }

    /// Whether somebody polls a ring with nothing to be sent to it, and comes again: most such looks are for a completion only. Each
    /// is a part of a request's latency.
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

    /// Whether completions are to interrupt. True: there is one already.
    pub(super) fn set_muted(&mut self, muted: bool) -> bool {
        let was_muted = std::mem::replace(&mut self.is_muted, muted);
        let has_more = match self.mode {
            Mode::Virtqueue => self.queue.want_interrupts(!muted) && !muted,
            Mode::Attached { .. } => {
                self.attachment.as_mut().is_some_and(|attachment| attachment.set_muted(muted)) && !muted
            }
        };
        if was_muted && !muted {
            // The interrupt for what the device announced may have been taken while those who poll looked for completions only.
            self.progress();
        }
        has_more || !self.done.is_empty()
    }

    /// Looks at everything once, and sends what can be sent.
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

    /// Sends what waits, as far as there is room. To a broken device nothing is sent.
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
                // The queue must be empty for ARM; what is new waits for the ring.
                if self.queue.is_empty() {
                    self.attach();
                }
            }
            Mode::Virtqueue => self.send_to_virtqueue(),
        }
    }
}
