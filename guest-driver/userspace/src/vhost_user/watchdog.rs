//! Ends waits for a device that does not answer.
//!
//! The `vhost` crate waits for replies without limit, and ignores a time-out of the socket. Therefore a thread shuts
//! down the socket when the time is up, which ends the wait with an error.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Error;

/// Limits the time of conversations with a device.
#[derive(Debug)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    conversations: BTreeMap<u64, Conversation>,
    next_number: u64,
    /// The watchdog cuts each new conversation.
    cuts_all: bool,
    is_ending: bool,
}

#[derive(Debug)]
struct Conversation {
    stream: UnixStream,
    end: Instant,
    is_cut: bool,
}

/// The watch over a conversation, which ends with the drop of this value.
#[derive(Debug)]
pub(super) struct Watch<'w> {
    shared: &'w Shared,
    number: u64,
}

impl Watchdog {
    pub(super) fn start() -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let for_thread = shared.clone();
        let thread = thread::Builder::new().name("ringpass-watch".into()).spawn(move || for_thread.run());
        let thread = thread.map_err(Error::system("starting the thread that ends waits"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watches a conversation over `stream`, and cuts it after `limit`.
    pub(super) fn watch(&self, stream: &UnixStream, limit: Duration) -> Result<Watch<'_>, Error> {
        let stream = stream.try_clone().map_err(Error::system("duplicating a descriptor"))?;
        let mut state = self.shared.lock();
        let number = state.next_number;
        state.next_number += 1;
        let end = Instant::now().checked_add(limit).unwrap_or_else(far_away);
        let mut conversation = Conversation { stream, end, is_cut: false };
        if state.cuts_all {
            conversation.cut();
        }
        state.conversations.insert(number, conversation);
        self.shared.changed.notify_all();
        Ok(Watch { shared: &self.shared, number })
    }

    /// Cuts all conversations, and each new conversation until [`allow`](Self::allow).
    pub(super) fn cut_all(&self) {
        let mut state = self.shared.lock();
        state.cuts_all = true;
        state.conversations.values_mut().for_each(Conversation::cut);
    }

    /// Cuts new conversations only after their time limits again.
    pub(super) fn allow(&self) {
        self.shared.lock().cuts_all = false;
    }
}

/// The end for limits that exceed the range of the clock.
fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(1 << 31)
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().is_ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic. If it did, the end would be the same.
            let _ = thread.join();
        }
    }
}

impl Watch<'_> {
    /// Whether the watchdog has cut the conversation.
    pub(super) fn is_cut(&self) -> bool {
        self.shared.lock().conversations.get(&self.number).is_some_and(|conversation| conversation.is_cut)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.shared.lock().conversations.remove(&self.number);
    }
}

impl Conversation {
    fn cut(&mut self) {
        self.is_cut = true;
        let _: io::Result<()> = self.stream.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.is_ending {
            let now = Instant::now();
            let mut next = None;
            for conversation in state.conversations.values_mut().filter(|conversation| !conversation.is_cut) {
                if conversation.end <= now {
                    conversation.cut();
                } else {
                    next = next.into_iter().chain([conversation.end]).min();
                }
            }
            state = match next {
                Some(end) => {
                    let wait = self.changed.wait_timeout(state, end - now);
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_wait_ends_when_its_time_is_up_and_not_before() {
        let watchdog = Watchdog::start().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let watch = watchdog.watch(&ours, Duration::from_secs(600)).unwrap();
        let short = watchdog.watch(&ours, Duration::from_millis(50)).unwrap();
        let begin = Instant::now();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert!(begin.elapsed() >= Duration::from_millis(45), "{:?}", begin.elapsed());
        assert!(short.is_cut() && !watch.is_cut());
        drop(theirs);
    }

    #[test]
    fn the_watchdog_does_not_cut_a_conversation_after_its_watch() {
        let watchdog = Watchdog::start().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        drop(watchdog.watch(&ours, Duration::from_millis(1)).unwrap());
        let other = watchdog.watch(&theirs, Duration::from_millis(20)).unwrap();
        while !other.is_cut() {
            thread::yield_now();
        }
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "the other end is cut");
    }

    #[test]
    fn cut_all_cuts_every_conversation_until_allow() {
        let watchdog = Watchdog::start().unwrap();
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let before = watchdog.watch(&ours, Duration::MAX).unwrap();
        watchdog.cut_all();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        let (mut again, _theirs) = UnixStream::pair().unwrap();
        let after = watchdog.watch(&again, Duration::MAX).unwrap();
        assert_eq!(again.read(&mut [0]).unwrap(), 0);
        assert!(before.is_cut() && after.is_cut());
        watchdog.allow();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(!watchdog.watch(&ours, Duration::MAX).unwrap().is_cut());
    }
}
