//! The way over queue 0: for requests that cannot go another way, for flushes behind durable writes, and for DETACH.

use std::collections::VecDeque;

use ringpass_workload::Request;

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
    /// A write that is done, and is to be stable.
    Flush {
        id: usize,
    },
    Detach,
}

/// Nobody waits for queue 0: the user of this queue may do other things meanwhile.
#[derive(Debug, Default)]
pub(super) struct Errands {
    /// Not sent yet: there was no room.
    pub(super) waiting: VecDeque<Errand>,
    pub(super) sent: Vec<(Ticket, Errand)>,
}

impl Errands {
    pub(super) fn are_done(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }
}

impl Driver {
    /// Does a request over queue 0.
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

    /// Takes the answers of queue 0, and sends what waits for it.
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
                Errand::Transfer { id } => self.slots[id].as_ref().map(|pending| {
                    let Request { write, offset_bytes, gpa, len_bytes, .. } = pending.rest();
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
        let Some(Request { len_bytes, durable, write, .. }) = self.slots[id].as_ref().map(|pending| pending.request)
        else {
            return Ok(());
        };
        match answer.check("request") {
            Ok(()) if durable && write && !is_durable => self.run_errand(Errand::Flush { id }),
            Ok(()) => self.complete(id, len_bytes as i32),
            Err(_) => self.complete(id, EIO),
        }
        Ok(())
    }
}
