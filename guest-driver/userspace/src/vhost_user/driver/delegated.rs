//! The requests that the driver of a queue delegates to queue 0: fallbacks of requests that no ring executes, and flushes
//! after durable writes.

use std::collections::VecDeque;

use ringpass_guest_abi::block_queue::Request;

use super::super::Error;
use super::super::queue_zero::{Answer, QueueZeroRequest, RequestId};
use super::pending::Place;
use super::{Driver, EIO};

/// A request that queue 0 executes for another queue. `id` names the request of the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delegated {
    /// A read or write that no ring can execute, that a ring has not executed, or for which there is no ring now.
    Fallback { id: usize },
    /// A flush that makes a finished write stable.
    Flush { id: usize },
}

/// The delegated requests of one queue. The driver does not wait for their answers, so that the application can do
/// other work.
#[derive(Debug, Default)]
pub(super) struct DelegatedRequests {
    /// Not sent yet, because queue 0 had no room.
    pub(super) waiting: VecDeque<Delegated>,
    pub(super) sent: Vec<(RequestId, Delegated)>,
}

impl DelegatedRequests {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }
}

impl Driver {
    /// Executes a request over queue 0.
    pub(super) fn fall_back(&mut self, id: usize) {
        self.counters.fallbacks += 1;
        self.delegate(Delegated::Fallback { id });
    }

    pub(super) fn delegate(&mut self, request: Delegated) {
        let (Delegated::Fallback { id } | Delegated::Flush { id }) = request;
        if let Some(pending) = &mut self.slots[id] {
            pending.place = Place::QueueZero;
        }
        self.delegated.waiting.push_back(request);
    }

    /// Takes the answers of queue 0, and sends the requests that wait for room in it.
    pub(super) fn progress_delegated(&mut self) {
        if let Err(error) = self.try_progress_delegated() {
            self.set_fault(error);
        }
    }

    fn try_progress_delegated(&mut self) -> Result<(), Error> {
        let shared = self.queue_zero.clone();
        let mut queue_zero = shared.lock();
        queue_zero.reap()?;
        let mut index = 0;
        while let Some(&(id, delegated)) = self.delegated.sent.get(index) {
            match queue_zero.take_answer(id) {
                Some(answer) => {
                    self.delegated.sent.swap_remove(index);
                    self.end_delegated(delegated, &answer);
                }
                None => index += 1,
            }
        }
        while self.fault.is_none() {
            let Some(&delegated) = self.delegated.waiting.front() else { break };
            let request = match delegated {
                Delegated::Fallback { id } => self.slots[id].as_mut().map(|pending| {
                    let Request { write, offset_bytes, gpa, len_bytes, .. } = pending.rest();
                    // The device takes no more in one request: the driver sends the rest when this part is done.
                    let len_bytes = len_bytes.min(queue_zero.transfer_bytes_max());
                    pending.sent_bytes = len_bytes;
                    QueueZeroRequest::Transfer { offset_bytes, gpa, len_bytes, is_write: write }
                }),
                Delegated::Flush { .. } => Some(QueueZeroRequest::Flush),
            };
            let Some(request) = request else {
                self.delegated.waiting.pop_front();
                continue;
            };
            let Some(id) = queue_zero.send(&request, Some(self.queue.vring())) else { break };
            self.delegated.waiting.pop_front();
            self.delegated.sent.push((id, delegated));
        }
        Ok(())
    }

    fn end_delegated(&mut self, delegated: Delegated, answer: &Answer) {
        let (id, is_flush) = match delegated {
            Delegated::Fallback { id } => (id, false),
            Delegated::Flush { id } => (id, true),
        };
        let Some(pending) = self.slots[id].as_mut() else { return };
        let Request { len_bytes, durable, write, .. } = pending.request;
        match answer.check("request") {
            Err(_) => self.complete(id, EIO),
            Ok(()) if is_flush => self.complete(id, len_bytes as i32),
            Ok(()) if !pending.note_part_done() => self.delegate(Delegated::Fallback { id }),
            Ok(()) if durable && write => self.delegate(Delegated::Flush { id }),
            Ok(()) => self.complete(id, len_bytes as i32),
        }
    }
}
