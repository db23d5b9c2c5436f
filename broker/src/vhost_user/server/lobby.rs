//! Front-ends that are connected and not served yet.
//!
//! A front-end is served from its first byte on. One that is connected and says nothing has no guest that uses the disk: a VMM may
//! connect long before it makes the device. So it keeps nobody out, and the first that speaks is served, whichever came first.
//!
//! The one that is served stays for as long as it likes, however little it says: its guest has the disk. Only if it stops in the
//! middle of a message, or does not read a reply, and another one that has spoken waits, it has [`PATIENCE`] to go on; then it is
//! disconnected. While nobody waits it may be stopped (by a debugger, say) for as long as it takes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tracing::{debug, info, warn};

use super::super::connection::{ConnectionError, Undone, Unfinished, Wait, Waiter, pid_of_peer};
use super::super::listener::Listener;
use super::connection_log::ConnectionLog;

/// How long a front-end may stop in the middle of a message while another one waits. A message is written at once; a VMM that was
/// swapped out, or waits for a busy machine, needs seconds at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How many are known at a time. More wait in the queue of the socket.
const WAITING_MAX: usize = 16;

/// A front-end that waits to be served.
#[derive(Debug)]
pub(super) struct Visitor {
    pub(super) stream: UnixStream,
    pub(super) pid: Option<i32>,
}

/// Takes connections, and knows who waits.
#[derive(Debug)]
pub(super) struct Lobby {
    listener: Listener,
    /// In the order in which they came.
    waiting: VecDeque<Visitor>,
    pub(super) patience: Duration,
}

/// What a visitor has to say.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Nothing,
    Something,
    /// It has said nothing, and is gone.
    Gone,
}

impl Visitor {
    fn new(stream: UnixStream) -> Self {
        let pid = pid_of_peer(&stream);
        Self { stream, pid }
    }

    fn word(&self) -> Word {
        match recv(&self.stream, &mut [0_u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Word::Gone,
            Ok(_) => Word::Something,
            Err(Errno::AGAIN | Errno::INTR) => Word::Nothing,
            Err(_) => Word::Gone,
        }
    }
}

impl Lobby {
    pub(super) fn new(listener: Listener, patience: Duration) -> Self {
        Self { listener, waiting: VecDeque::new(), patience }
    }

    /// Takes all connections that are there.
    ///
    /// Those beyond [`WAITING_MAX`] wait in the queue of the socket. If `may_replace`, nobody is served, and the one that has
    /// been silent for longest has to go: silent ones keep nobody out.
    pub(super) fn take_connections(&mut self, may_replace: bool, mut on_new: impl FnMut(&Visitor)) -> io::Result<()> {
        loop {
            if self.is_full() && (!may_replace || self.has_speaker()) {
                return Ok(());
            }
            let Some(stream) = self.listener.accept()? else { return Ok(()) };
            if self.is_full()
                && let Some(silent) = self.waiting.pop_front()
            {
                info!(pid = silent.pid, "a front-end that says nothing is disconnected: too many are connected");
            }
            let visitor = Visitor::new(stream);
            on_new(&visitor);
            self.waiting.push_back(visitor);
        }
    }

    /// Takes the first that has something to say.
    pub(super) fn take_speaker(&mut self) -> Option<Visitor> {
        let mut index = 0;
        while let Some(visitor) = self.waiting.get(index) {
            match visitor.word() {
                Word::Nothing => index += 1,
                Word::Something => return self.waiting.remove(index),
                Word::Gone => {
                    debug!(pid = visitor.pid, "a front-end that has said nothing is gone");
                    self.waiting.remove(index);
                }
            }
        }
        None
    }

    /// Whether nobody waits and nobody can come any more.
    pub(super) fn is_closed(&self) -> bool {
        self.waiting.is_empty() && self.listener.to_poll().is_none()
    }

    /// What becomes readable when there is somebody to take, or one of those who wait speaks.
    pub(super) fn to_poll(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listener.to_poll().into_iter().chain(self.streams())
    }

    fn has_speaker(&mut self) -> bool {
        self.forget_gone();
        self.waiting.iter().any(|visitor| visitor.word() == Word::Something)
    }

    fn forget_gone(&mut self) {
        self.waiting.retain(|visitor| visitor.word() != Word::Gone);
    }

    fn streams(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().map(|visitor| visitor.stream.as_fd())
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX
    }
}

/// Waits for the front-end that is served, and takes others meanwhile.
#[derive(Debug)]
pub(super) struct Attendance<'a> {
    pub(super) lobby: &'a mut Lobby,
    pub(super) log: &'a mut ConnectionLog,
    /// The one that is served.
    pub(super) served_pid: Option<i32>,
    /// What ends a wait when it is readable.
    pub(super) wake: BorrowedFd<'a>,
}

impl Attendance<'_> {
    fn take_connections(&mut self) -> bool {
        let Self { lobby, log, served_pid, .. } = self;
        let taken = lobby.take_connections(false, |visitor| {
            if log.has_room() {
                warn!(
                    pid = visitor.pid,
                    served_pid = *served_pid,
                    "another front-end is connected; it waits until the one that is served is gone"
                );
            }
        });
        taken.inspect_err(|error| debug!(%error, "no front-end can be accepted now")).is_ok()
    }
}

impl Waiter for Attendance<'_> {
    fn wait(&mut self, wait: &Wait<'_>) -> Result<bool, ConnectionError> {
        // After an error the socket would stay readable; the next message is soon enough.
        let mut may_accept = true;
        loop {
            if self.lobby.is_full() {
                self.lobby.forget_gone();
            }
            let left =
                wait.unfinished.map(|Unfinished { since, .. }| self.lobby.patience.saturating_sub(since.elapsed()));
            let is_late = left.is_some_and(|left| left.is_zero());
            let mut fds = vec![
                PollFd::from_borrowed_fd(wait.socket, wait.events),
                PollFd::from_borrowed_fd(self.wake, PollFlags::IN),
            ];
            let listener = self.lobby.listener.to_poll().filter(|_| may_accept && !self.lobby.is_full());
            let listener_at = listener.map(|_| fds.len());
            let others = self.lobby.streams().filter(|_| is_late);
            fds.extend(listener.into_iter().chain(others).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            // Late: for as long as it takes until another one speaks.
            let limit = left.filter(|_| !is_late).map(timespec);
            match poll(&mut fds, limit.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(ConnectionError::System { what: "waiting for the front-end", source: errno.into() });
                }
            }
            let is_ready = |at: usize| !fds[at].revents().is_empty();
            if is_ready(1) {
                return Ok(true);
            }
            if is_ready(0) {
                return Ok(false);
            }
            if listener_at.is_some_and(is_ready) {
                may_accept = self.take_connections();
            }
            if let (Some(unfinished), true) = (wait.unfinished, is_late)
                && self.lobby.has_speaker()
            {
                return Err(too_late(unfinished));
            }
        }
    }
}

fn too_late(Unfinished { what, since }: Unfinished) -> ConnectionError {
    let silent_s = since.elapsed().as_secs();
    match what {
        Undone::Message { got_bytes } => ConnectionError::Silent { got_bytes, silent_s },
        Undone::Reply => ConnectionError::Unread { silent_s },
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_front_end_is_told_what_it_left_undone() {
        let since = Instant::now();
        let message = too_late(Unfinished { what: Undone::Message { got_bytes: 5 }, since });
        assert!(matches!(message, ConnectionError::Silent { got_bytes: 5, .. }), "{message}");
        let reply = too_late(Unfinished { what: Undone::Reply, since });
        assert!(matches!(reply, ConnectionError::Unread { .. }), "{reply}");
    }
}
