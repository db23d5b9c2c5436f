//! The part that all queues of a disk share: queue 0 and its events.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Error;
use super::first_queue::{Answer, FirstQueue, Pauses, Question};

/// The part that all queues of a disk share.
#[derive(Debug)]
pub(super) struct Shared {
    first: Mutex<FirstQueue>,
    news: Arc<AtomicU64>,
    patience: Duration,
}

impl Shared {
    pub(super) fn new(first: FirstQueue, news: Arc<AtomicU64>, patience: Duration) -> Self {
        Self { first: Mutex::new(first), news, patience }
    }

    pub(super) fn first(&self) -> MutexGuard<'_, FirstQueue> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time-out for answers of the device.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Sends a request on queue 0 and waits for the answer. Other threads can send requests at the same time.
    pub(super) fn ask(&self, question: &Question) -> Result<Answer, Error> {
        let mut pauses = Pauses::new(self.patience);
        let mut ticket = None;
        loop {
            {
                let mut first = self.first();
                first.service()?;
                ticket = ticket.or_else(|| first.ask(question, None));
                if let Some(answer) = ticket.and_then(|ticket| first.take(ticket)) {
                    return answer.check(question.name()).map(|()| answer);
                }
            }
            if !pauses.pause() {
                ticket.into_iter().for_each(|ticket| self.first().abandon(ticket));
                return Err(Error::Silent { what: question.name(), patience: self.patience });
            }
        }
    }

    /// The number of events that the device has reported.
    pub(super) fn news(&self) -> u64 {
        self.news.load(Ordering::Acquire)
    }
}
