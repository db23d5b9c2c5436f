//! An answer that waits for several things to happen.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine::reply::{Reply, done};

/// Sends an answer when each of a known number of things has happened.
#[derive(Debug)]
pub(super) struct Countdown {
    left: AtomicUsize,
    /// `None`: only while the countdown is dropped.
    reply: Option<Reply<()>>,
}

/// One of the things that a countdown waits for.
#[derive(Debug)]
#[must_use = "the countdown waits for this, for ever if it is dropped"]
pub(super) struct Count(Arc<Countdown>);

impl Countdown {
    /// Splits the answer into `counts` counts, of which each is to be [done](Count::done). Without any the answer is
    /// sent now.
    ///
    /// A count that is dropped and not done counts as something that never happens: the answer is not sent, and the
    /// receiver is not told either that no answer can come. A receiver that took the loss of a count for the answer
    /// would act as if the thing had happened. So the receiver must have its own reason to stop waiting.
    pub(super) fn split(reply: Reply<()>, counts: usize) -> Vec<Count> {
        if counts == 0 {
            done(&reply);
            return Vec::new();
        }
        let countdown = Arc::new(Self { left: AtomicUsize::new(counts), reply: Some(reply) });
        (0..counts).map(|_| Count(Arc::clone(&countdown))).collect()
    }
}

impl Count {
    /// The thing has happened. The last one sends the answer.
    pub(super) fn done(self) {
        // What happened before each `done` happens before the answer.
        if self.0.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        if let Some(reply) = &self.0.reply {
            done(reply);
        }
    }
}

impl Drop for Countdown {
    fn drop(&mut self) {
        if *self.left.get_mut() > 0 {
            // Dropped, the reply would tell the receiver that no answer can come.
            mem::forget(self.reply.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{TryRecvError, sync_channel};
    use std::thread;

    use super::*;

    #[test]
    fn the_answer_comes_with_the_last_count() {
        let (reply, answer) = sync_channel(1);
        let counts = Countdown::split(reply, 3);
        assert_eq!(counts.len(), 3);
        for count in counts {
            assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
            count.done();
        }
        assert_eq!(answer.try_recv(), Ok(()));
        assert_eq!(answer.try_recv(), Err(TryRecvError::Disconnected), "it comes once");
    }

    #[test]
    fn without_counts_the_answer_comes_at_once() {
        let (reply, answer) = sync_channel(1);
        assert!(Countdown::split(reply, 0).is_empty());
        assert_eq!(answer.try_recv(), Ok(()));
    }

    #[test]
    fn a_count_that_is_lost_is_never_answered_and_not_told_as_an_end() {
        for lost in 0..3 {
            let (reply, answer) = sync_channel(1);
            for (number, count) in Countdown::split(reply, 3).into_iter().enumerate() {
                if number == lost {
                    drop(count);
                } else {
                    count.done();
                }
            }
            assert_eq!(answer.try_recv(), Err(TryRecvError::Empty), "count {lost} of 3");
        }
    }

    #[test]
    fn a_receiver_that_is_gone_is_no_matter() {
        let (reply, answer) = sync_channel(1);
        drop(answer);
        Countdown::split(reply, 2).into_iter().for_each(Count::done);
    }

    #[test]
    fn counts_of_several_threads_give_one_answer() {
        for _ in 0..100 {
            let (reply, answer) = sync_channel(8);
            thread::scope(|scope| {
                for count in Countdown::split(reply, 4) {
                    scope.spawn(move || count.done());
                }
            });
            assert_eq!(answer.try_recv(), Ok(()));
            assert_eq!(answer.try_recv(), Err(TryRecvError::Disconnected));
        }
    }
}
