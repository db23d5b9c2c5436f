//! Answers to commands that a worker owes: each goes out once what it waits for has ended.

use std::sync::Arc;
use std::time::Instant;

use super::command::{DiskRelease, UndrainedQueues};
use super::reply::{Reply, done};
use crate::disk::Disk;

/// Commands that are in force once requests, rings or queues have ended.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    /// The worker is to let go of the disk.
    pub(super) disk_release: Option<Reply<DiskRelease>>,
    /// And this disk comes after it. A lock that is shared can be had again before.
    pub(super) next_disk: Option<Arc<Disk>>,
    /// All queues are to stop.
    pub(super) resets: Vec<Reply<()>>,
    /// A queue was enabled or disabled.
    pub(super) enables: Vec<(usize, Reply<()>)>,
    /// No request is to be in memory that has left.
    pub(super) former_memory: Vec<Reply<()>>,
    /// All rings are to be gone.
    pub(super) rings: Vec<Reply<()>>,
    /// The drivers are asked to leave their rings.
    pub(super) drain: Option<Drain>,
    /// The worker is to end.
    pub(super) is_shutdown: bool,
}

/// Drivers that are asked to leave their rings.
#[derive(Debug)]
pub(super) struct Drain {
    pub(super) reply: Reply<UndrainedQueues>,
    /// When the worker answers at the latest.
    pub(super) deadline: Instant,
}

impl Deferred {
    /// When the worker has to look at its deferred answers although nothing has come.
    #[inline]
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.drain.as_ref().map(|drain| drain.deadline)
    }

    /// Whether the end of a request can be what an answer waits for.
    #[inline]
    pub(super) fn waits_for_requests(&self) -> bool {
        self.disk_release.is_some() || !self.former_memory.is_empty()
    }
}

/// Answers commands that are in force now.
pub(super) fn all_done(replies: &mut Vec<Reply<()>>) {
    replies.drain(..).for_each(|reply| done(&reply));
}
