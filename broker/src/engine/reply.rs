//! Answers to commands: who gives an answer, and who waits for it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// The time between two looks at whether an answer is still wanted. Most answers come long before.
const LOOK: Duration = Duration::from_millis(50);

/// Gives one answer to a command: sent when the command is in force.
pub(super) type Reply<T> = SyncSender<T>;

/// Answers a command that is in force. A sender that waits no more needs no answer.
pub(super) fn done(reply: &Reply<()>) {
    let _ = reply.send(());
}

/// Waits for the answer to a command.
pub(super) struct Pending<T>(Receiver<T>);

impl<T> Pending<T> {
    /// Both ends of an answer.
    pub(super) fn new() -> (Reply<T>, Self) {
        // Room for the two answers that one of the commands has, so that no worker waits.
        let (reply, pending) = sync_channel(2);
        (reply, Self(pending))
    }

    /// Waits for the answer. `None`: the receiver of the command has ended.
    pub(super) fn wait(self) -> Option<T> {
        self.0.recv().ok()
    }

    /// Waits for the answer as long as `is_wanted` says so, which is asked now and then. `None`: it said no, or the
    /// receiver of the command has ended.
    pub(super) fn wait_while(self, is_wanted: impl Fn() -> bool) -> Option<T> {
        self.next_while(is_wanted)
    }

    /// The same for a command that may have another answer.
    pub(super) fn next_while(&self, is_wanted: impl Fn() -> bool) -> Option<T> {
        loop {
            match self.0.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) if is_wanted() => {}
                answer => return answer.ok(),
            }
        }
    }
}
