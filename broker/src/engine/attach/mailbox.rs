//! The way to the builder: one queue, in which a repeated entry takes the place of the earlier one.
//!
//! A guest can bring some entries about as often as it likes, also while the builder is busy with an entry that takes
//! long. Such entries must not pile up. So an entry [replaces](Entry::replaces) the one before it that says the same,
//! at its place.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a mailbox holds.
pub(in crate::engine) trait Entry {
    /// Whether this entry takes the place of `earlier`, which the receiver has not taken yet.
    fn replaces(&self, earlier: &Self) -> bool;

    /// Whether this entry gives the guest other memory.
    fn changes_memory(&self) -> bool;
}

/// Puts entries into a mailbox. The receiver is told when the last sender is gone.
#[derive(Debug)]
pub(in crate::engine) struct Sender<T: Entry>(Arc<Mailbox<T>>);

/// Takes entries out of a mailbox.
#[derive(Debug)]
pub(in crate::engine) struct Receiver<T: Entry> {
    mailbox: Arc<Mailbox<T>>,
    changes: Changes,
}

/// Tells whether entries that change the guest's memory are in the mailbox. One load.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes(Arc<AtomicBool>);

#[derive(Debug)]
struct Mailbox<T> {
    state: Mutex<State<T>>,
    /// The queue is not empty, or no sender is left.
    has_news: Condvar,
}

#[derive(Debug)]
struct State<T> {
    queue: VecDeque<T>,
    changes: Changes,
    senders: usize,
    has_receiver: bool,
}

/// A mailbox: its first sender, and its receiver.
pub(super) fn mailbox<T: Entry>() -> (Sender<T>, Receiver<T>) {
    let changes = Changes::default();
    let state = State { queue: VecDeque::new(), changes: changes.clone(), senders: 1, has_receiver: true };
    let mailbox = Arc::new(Mailbox { state: Mutex::new(state), has_news: Condvar::new() });
    (Sender(Arc::clone(&mailbox)), Receiver { mailbox, changes })
}

impl Changes {
    /// Whether the guest has other memory by now, of which the receiver has not taken the entry yet. The receiver reads
    /// nothing on the strength of this answer, except the mailbox.
    pub(super) fn are_coming(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl<T> Mailbox<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        // A sender that panicked has put its whole entry into the queue or nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Entry> State<T> {
    /// Puts an entry into the queue. Gives the entry whose place the new one took.
    fn put(&mut self, entry: T) -> Option<T> {
        let earlier = self.queue.iter_mut().find(|earlier| entry.replaces(earlier));
        let replaced = match earlier {
            Some(earlier) => Some(std::mem::replace(earlier, entry)),
            None => {
                self.queue.push_back(entry);
                None
            }
        };
        self.note_changes();
        replaced
    }

    fn take(&mut self) -> Option<T> {
        let entry = self.queue.pop_front();
        self.note_changes();
        entry
    }

    /// Counted anew from the queue each time, so that the two cannot differ. The queue is short: one entry for each
    /// queue of the device, and the few of the front-end.
    fn note_changes(&self) {
        let are_coming = self.queue.iter().any(Entry::changes_memory);
        self.changes.0.store(are_coming, Ordering::Relaxed);
    }
}

impl<T: Entry> Sender<T> {
    /// Puts an entry into the mailbox. Without a receiver the entry is dropped.
    pub(in crate::engine) fn send(&self, entry: T) {
        let mut state = self.0.state();
        let unwanted = if state.has_receiver { state.put(entry) } else { Some(entry) };
        drop(state);
        self.0.has_news.notify_one();
        // Not under the lock: an entry may close files, and wake a thread that waits for its answer.
        drop(unwanted);
    }
}

impl<T: Entry> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.state().senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T: Entry> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.state().senders -= 1;
        self.0.has_news.notify_one();
    }
}

impl<T: Entry> Receiver<T> {
    /// Takes the next entry, and waits for one at most this long. `None`: as long as it takes.
    ///
    /// # Errors
    ///
    /// The time is up; or the mailbox is empty and no sender is left.
    pub(in crate::engine) fn next(&self, timeout: Option<Duration>) -> Result<T, RecvTimeoutError> {
        let end = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = self.mailbox.state();
        loop {
            if let Some(entry) = state.take() {
                return Ok(entry);
            }
            if state.senders == 0 {
                return Err(RecvTimeoutError::Disconnected);
            }
            let has_news = &self.mailbox.has_news;
            state = match end {
                None => has_news.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(RecvTimeoutError::Timeout);
                    }
                    has_news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Tells of entries that change the guest's memory.
    pub(super) fn changes(&self) -> &Changes {
        &self.changes
    }
}

impl<T: Entry> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.mailbox.state();
        state.has_receiver = false;
        let left = std::mem::take(&mut state.queue);
        drop(state);
        // Threads that wait for the answer to an entry learn in this way that none comes.
        drop(left);
    }
}

#[cfg(test)]
mod tests;
