//! The way of a request: from a chain of a virtqueue to execution, and from its end to the used ring.

use std::fmt::Display;
use std::rc::Rc;

use super::Worker;
use crate::engine::attach::PendingAttachRequest;
use crate::engine::command::Command;
use crate::engine::execution::{ChainOrigin, NewRequest, Origin};
use crate::engine::queue_life::Takes;
use crate::log_limit::LogCause;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Answer, GuestError, Parsed, Request, parse};
use crate::virtqueue::QueueError;

/// The most chains that a poll iteration takes from one queue.
///
/// Chains that the worker takes together complete together, and the driver can go on only then: an iteration must be short against
/// the queue, or driver and worker wait for one another in turn. And it must be long against a system call, of which there is
/// one for each iteration. The number also bounds how long one queue holds up others.
const CHAINS_PER_ITERATION: usize = 8;

impl Worker<'_> {
    /// Whether chains may be taken at all. If not because there is no room, the next completion makes some.
    #[inline]
    pub(in crate::engine) fn may_take(&self) -> bool {
        self.execution.has_disk() && self.deferred.disk_release.is_none() && self.execution.has_room()
    }

    /// Takes chains from one queue. False: there were none.
    pub(in crate::engine) fn take(&mut self, number: usize) -> bool {
        for taken in 0..CHAINS_PER_ITERATION {
            match self.take_one(number) {
                Taken::Nothing => return taken > 0,
                Taken::Chain => {}
                Taken::Broken => return true,
            }
        }
        true
    }

    #[inline]
    fn take_one(&mut self, number: usize) -> Taken {
        let Some((slot, segments)) = self.execution.find_slot() else { return Taken::Nothing };
        let vring = self.queues.get_mut(number);
        let index = vring.index;
        let Some((active, takes)) = vring.taking_or_replaying_mut() else { return Taken::Nothing };
        let (memory, request_types) = (Rc::clone(&active.memory), active.request_types);
        let popped = match takes {
            Takes::Everything => active.queue.pop(),
            Takes::Replay => Ok(active.queue.pop_replay()),
        };
        let popped = match popped {
            Ok(Some(popped)) => popped,
            Ok(None) => return Taken::Nothing,
            Err(error) => {
                self.report_broken_ring(number, error.cause(), &error);
                return Taken::Broken;
            }
        };
        // The queue has stopped when the last of them has ended, which may be in this iteration.
        self.is_unsettled |= takes == Takes::Replay;
        let parsed = parse(popped.chain(&memory), &self.limits, request_types, segments);
        if let Parsed::AttachRequest(parsed) = &parsed {
            let chain = popped.leave_unrecorded();
            let (request, payload) = PendingAttachRequest::new(chain, parsed, memory, segments);
            self.take_attach_request(number, parsed.request_type, request, &payload);
            return Taken::Chain;
        }
        let head = popped.record();
        active.sequence.take(None, 0);
        match parsed {
            Parsed::AttachRequest(_) => {}
            Parsed::Request(request) => {
                active.in_flight += 1;
                let Request { operation, data_bytes, status_gpa, writable_bytes } = request;
                let origin = Origin::Chain(ChainOrigin { queue: number, index, head, status_gpa, writable_bytes });
                let is_write_through = self.shared.is_write_through();
                self.execution.begin(slot, NewRequest { operation, data_bytes, memory, is_write_through, origin });
                self.complete_ended();
            }
            Parsed::Answer(answer) => self.answer(number, head, &memory, &answer),
            Parsed::Malformed(error) => {
                let cause = error.cause();
                self.shared.guest_errors.record(index, GuestError::from(&error), cause, &error);
                self.break_down(number, cause, &error);
                return Taken::Broken;
            }
        }
        Taken::Chain
    }

    /// Completes requests that have ended where they came from.
    #[inline]
    pub(super) fn complete_ended(&mut self) {
        while let Some(slot) = self.execution.take_ended() {
            let request = self.execution.request(slot);
            let result = match request.origin {
                Some(Origin::Chain(chain)) => {
                    self.queues.complete_request(&chain, request).map_err(|error| (chain.queue, error))
                }
                None => Ok(false),
            };
            self.execution.release(slot);
            match result {
                Ok(is_last) => self.is_unsettled |= is_last,
                Err((queue, error)) => self.break_down(queue, error.cause(), &error),
            }
            self.is_unsettled |= self.deferred.waits_for_requests();
        }
    }

    /// Begins requests that have their blocks now, and tells other workers of theirs. False: there are none.
    #[inline]
    pub(super) fn begin_granted(&mut self) -> bool {
        let busy = self.execution.begin_granted();
        if busy {
            self.complete_ended();
        }
        while let Some(owner) = self.execution.take_granted_elsewhere() {
            self.workers.send_to(owner.worker, Command::BeginGranted { slot: owner.slot });
        }
        busy
    }

    /// Answers a chain that is not executed.
    pub(super) fn answer(&mut self, queue: usize, head: u16, memory: &DeviceMemory, answer: &Answer) {
        if let Some(refusal) = &answer.refusal {
            let vring = self.queues.get(queue);
            vring.counters.refused.add(1);
            self.shared.guest_errors.record(vring.index, GuestError::from(refusal), refusal.cause(), refusal);
        }
        self.complete(queue, head, memory, answer);
    }

    /// Writes the status of a chain and puts it into the used ring.
    pub(super) fn complete(&mut self, queue: usize, head: u16, memory: &DeviceMemory, answer: &Answer) {
        if let Err(error) = self.queues.get_mut(queue).complete(head, memory, answer) {
            self.break_down(queue, error.cause(), &error);
        }
    }

    #[cold]
    fn report_broken_ring(&mut self, number: usize, cause: LogCause, error: &QueueError) {
        let index = self.queues.get(number).index;
        self.shared.guest_errors.record(index, GuestError::BrokenRing, cause, error);
        self.break_down(number, cause, error);
    }

    /// Marks a queue as broken.
    #[cold]
    pub(super) fn break_down(&mut self, queue: usize, cause: LogCause, why: &dyn Display) {
        self.disarm(queue);
        if self.queues.get_mut(queue).break_down() {
            self.report_stop(queue, cause, why);
            self.note_queue_stop(queue);
        }
        self.is_unsettled = true;
    }

    /// Logs that a queue takes nothing for now, unless the worker logged the same cause a short while ago.
    pub(super) fn report_stop(&self, queue: usize, cause: LogCause, why: &dyn Display) {
        if let Some(total) = self.shared.stopped_queues.count(cause) {
            tracing::warn!(
                queue = self.queues.get(queue).index,
                total,
                "the queue stops: {why} ({total} times so far)"
            );
        }
    }
}

/// What came of a look at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    Nothing,
    Chain,
    Broken,
}
