//! Requests over queue 0: those that the queue's own ring or virtqueue cannot execute, flushes after durable writes, and DETACH.

use std::collections::VecDeque;

use ringpass_guest_abi::block_queue::Request;

use super::super::Error;
use super::super::first_queue::{Answer, Question, Ticket};
use super::pending::Place;
use super::{Driver, EIO};

/// Something that queue 0 does for another queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Errand {
    /// A request that cannot go another way.
    Transfer {
        id: usize,
    },
    /// A flush that makes a finished write stable.
    Flush {
        id: usize,
    },
    Detach,
}

/// The requests of one queue over queue 0. The driver does not wait for their answers, so that the user can do other work.
#[derive(Debug, Default)]
pub(super) struct Errands {
    /// Not sent yet, because queue 0 had no room.
    pub(super) waiting: VecDeque<Errand>,
    pub(super) sent: Vec<(Ticket, Errand)>,
}

impl Errands {
    pub(super) fn are_done(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }
}

impl Driver {
    /// Executes a request over queue 0.
    pub(super) fn detour(&mut self, id: usize) {
        self.counters.detoured += 1;
        self.run_errand(Errand::Transfer { id });
    }

    pub(super) fn run_errand(&mut self, errand: Errand) {
        if let Errand::Transfer { id } | Errand::Flush { id } = errand {
            if let Some(pending) = &mut self.slots[id] {
                pending.place = Place::FirstQueue;
            }
        }
        self.errands.waiting.push_back(errand);
    }

    /// Takes the answers of queue 0, and sends the requests that wait for it.
    pub(super) fn run_errands(&mut self) {
        if let Err(error) = self.try_errands() {
            self.break_down(error);
        }
    }

    fn try_errands(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let mut first = shared.first();
        first.service()?;
        let mut index = 0;
        while let Some(&(ticket, errand)) = self.errands.sent.get(index) {
            match first.take(ticket) {
                Some(answer) => {
                    self.errands.sent.swap_remove(index);
                    self.end_errand(errand, &answer)?;
                }
                None => index += 1,
            }
        }
        while self.fault.is_none() {
            let Some(&errand) = self.errands.waiting.front() else { break };
            let question = match errand {
                Errand::Transfer { id } => self.slots[id].as_mut().map(|pending| {
                    let Request { write, offset_bytes, gpa, len_bytes, .. } = pending.rest();
                    // The device takes no more in one request: the rest follows when this part is done.
                    let len_bytes = len_bytes.min(first.transfer_bytes_max());
                    pending.sent_bytes = len_bytes;
                    Question::Transfer { offset_bytes, gpa, len_bytes, is_write: write }
                }),
                Errand::Flush { .. } => Some(Question::Flush),
                Errand::Detach => Some(Question::Detach { queue: self.index }),
            };
            let Some(question) = question else {
                self.errands.waiting.pop_front();
                continue;
            };
            let Some(ticket) = first.ask(&question, Some(self.queue.setup())) else { break };
            self.errands.waiting.pop_front();
            self.errands.sent.push((ticket, errand));
        }
        Ok(())
    }

    fn end_errand(&mut self, errand: Errand, answer: &Answer) -> Result<(), Error> {
        let (id, is_durable) = match errand {
            Errand::Detach => return answer.check("DETACH"),
            Errand::Transfer { id } => (id, false),
            Errand::Flush { id } => (id, true),
        };
        let Some(pending) = self.slots[id].as_mut() else { return Ok(()) };
        let Request { len_bytes, durable, write, .. } = pending.request;
        match answer.check("request") {
            Err(_) => self.complete(id, EIO),
            Ok(()) if is_durable => self.complete(id, len_bytes as i32),
            Ok(()) if !pending.note_sent_done() => self.run_errand(Errand::Transfer { id }),
            Ok(()) if durable && write => self.run_errand(Errand::Flush { id }),
            Ok(()) => self.complete(id, len_bytes as i32),
        }
        Ok(())
    }
}
