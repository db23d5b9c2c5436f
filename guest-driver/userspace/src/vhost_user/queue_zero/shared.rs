//! Queue 0, as the drivers of all queues and the threads of the application share it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringpass_guest_abi::probe::Device;

use super::super::Error;
use super::super::backoff::Backoff;
use super::request::{Answer, QueueZeroRequest};
use super::{News, QueueZero};

/// Queue 0 of a disk under a lock, and its news.
#[derive(Debug)]
pub(in super::super) struct SharedQueueZero {
    queue: Mutex<QueueZero>,
    news: Arc<News>,
    patience: Duration,
}

impl SharedQueueZero {
    /// `news` are the counters of `queue`.
    pub(in super::super) fn new(queue: QueueZero, news: Arc<News>, patience: Duration) -> Self {
        Self { queue: Mutex::new(queue), news, patience }
    }

    pub(in super::super) fn lock(&self) -> MutexGuard<'_, QueueZero> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the device may take for an answer.
    pub(in super::super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Sends a request and waits for its answer. Other threads can send requests at the same time.
    ///
    /// # Errors
    ///
    /// The device fails the request, violates the protocol, or gives no answer in time.
    pub(in super::super) fn execute(&self, request: &QueueZeroRequest) -> Result<Answer, Error> {
        let mut backoff = Backoff::new(self.patience);
        let mut sent = None;
        loop {
            {
                let mut queue = self.lock();
                queue.reap()?;
                sent = sent.or_else(|| queue.send(request, None));
                if let Some(answer) = sent.and_then(|id| queue.take_answer(id)) {
                    return answer.check(request.name()).map(|()| answer);
                }
            }
            if !backoff.pause() {
                sent.into_iter().for_each(|id| self.lock().discard_answer(id));
                return Err(Error::Silent { what: request.name(), patience: self.patience });
            }
        }
    }

    /// Waits until the device has answered PROBE.
    ///
    /// # Errors
    ///
    /// The device violates the protocol, or gives no answer in time.
    pub(in super::super) fn wait_for_device(&self) -> Result<(), Error> {
        let mut backoff = Backoff::new(self.patience);
        loop {
            {
                let mut queue = self.lock();
                queue.reap()?;
                if !queue.is_probing() {
                    return Ok(());
                }
            }
            if !backoff.pause() {
                return Err(Error::Silent { what: "PROBE", patience: self.patience });
            }
        }
    }

    /// The device's description of its rings, if it offers some, and whether an answer to PROBE is pending.
    pub(in super::super) fn device(&self) -> (Option<Device>, bool) {
        let queue = self.lock();
        (queue.device(), queue.is_probing())
    }

    /// How many events the device has reported.
    pub(in super::super) fn event_count(&self) -> u64 {
        self.news.events.load(Ordering::Acquire)
    }

    /// How often the device has answered PROBE.
    pub(in super::super) fn probe_count(&self) -> u64 {
        self.news.probes.load(Ordering::Acquire)
    }
}
