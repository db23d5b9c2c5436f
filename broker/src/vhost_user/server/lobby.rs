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
use crate::log_limit::{Cause, LogLimits};

/// How long a front-end may stop in the middle of a message while another one waits. A message is written at once; a VMM that was
/// swapped out, or waits for a busy machine, needs seconds at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How many are known at a time, and how many are accepted at a time.
const WAITING_MAX: usize = 16;

/// A front-end that waits to be served.
#[derive(Debug)]
pub(super) struct Visitor {
    pub(super) stream: UnixStream,
    pub(super) pid: Option<i32>,
    /// The server has seen its first byte.
    has_spoken: bool,
}

/// Takes connections, and knows who waits.
#[derive(Debug)]
pub(super) struct Lobby {
    listener: Listener,
    /// In the order in which they came.
    waiting: VecDeque<Visitor>,
    pub(super) patience: Duration,
    /// For lines about connections: others connect as often as they like.
    pub(super) log: Box<LogLimits>,
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
        Self { stream, pid, has_spoken: false }
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
        Self { listener, waiting: VecDeque::new(), patience, log: Box::new(LogLimits::new()) }
    }

    /// Accepts connections that are there, at most [`WAITING_MAX`] in one call: a flood of them must not keep the caller from
    /// looking at anything else.
    ///
    /// When [`WAITING_MAX`] front-ends wait, a new one replaces the silent one that has waited longest. When all of them have
    /// spoken, further ones wait in the queue of the socket.
    pub(super) fn take_connections(&mut self) -> io::Result<()> {
        for _ in 0..WAITING_MAX {
            if !self.has_room() {
                return Ok(());
            }
            let Some(stream) = self.listener.accept()? else { return Ok(()) };
            if self.is_full() {
                self.remove_silent();
            }
            let visitor = Visitor::new(stream);
            debug!(pid = visitor.pid, "a front-end is connected");
            self.waiting.push_back(visitor);
        }
        Ok(())
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

    /// Whether the next connection can be taken.
    fn has_room(&self) -> bool {
        !self.is_full() || self.waiting.iter().any(|visitor| visitor.word() != Word::Something)
    }

    /// Disconnects the one that has been silent for longest.
    fn remove_silent(&mut self) {
        let index = self.waiting.iter().position(|visitor| visitor.word() != Word::Something);
        if let Some(silent) = index.and_then(|index| self.waiting.remove(index))
            && let Some(total) = self.log.count(Cause::new("replaced"))
        {
            info!(pid = silent.pid, total, "a front-end that says nothing is disconnected: too many are connected");
        }
    }

    /// Calls `on_first_word` for each that has spoken since the last call, and forgets those that are gone without a word.
    fn listen(&mut self, mut on_first_word: impl FnMut(&LogLimits, &Visitor)) {
        let Self { waiting, log, .. } = self;
        waiting.retain_mut(|visitor| {
            let word = if visitor.has_spoken { Word::Nothing } else { visitor.word() };
            if word == Word::Something {
                visitor.has_spoken = true;
                on_first_word(log, visitor);
            }
            word != Word::Gone
        });
    }

    fn has_speaker(&self) -> bool {
        self.waiting.iter().any(|visitor| visitor.has_spoken)
    }

    fn streams(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().map(|visitor| visitor.stream.as_fd())
    }

    /// Those of whom nothing was heard yet.
    fn silent_streams(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().filter(|visitor| !visitor.has_spoken).map(|visitor| visitor.stream.as_fd())
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX
    }
}

/// Waits for the front-end that is served, and takes others meanwhile.
#[derive(Debug)]
pub(super) struct Attendance<'a> {
    pub(super) lobby: &'a mut Lobby,
    /// The one that is served.
    pub(super) served_pid: Option<i32>,
    /// What ends a wait when it is readable.
    pub(super) wake: BorrowedFd<'a>,
}

impl Attendance<'_> {
    fn take_connections(&mut self) -> bool {
        self.lobby.take_connections().inspect_err(|error| debug!(%error, "no front-end can be accepted now")).is_ok()
    }

    /// Names those that have begun to speak. One that only connects may want to know no more than whether this server is there.
    fn listen(&mut self) {
        let Self { lobby, served_pid, .. } = self;
        lobby.listen(|log, visitor| {
            if let Some(total) = log.count(Cause::new("waits")) {
                warn!(
                    pid = visitor.pid,
                    served_pid = *served_pid,
                    total,
                    "another front-end is connected; it waits until the one that is served is gone"
                );
            }
        });
    }
}

impl Waiter for Attendance<'_> {
    fn wait(&mut self, wait: &Wait<'_>) -> Result<bool, ConnectionError> {
        // After an error the socket would stay readable; the next message is soon enough.
        let mut may_accept = true;
        loop {
            let left =
                wait.unfinished.map(|Unfinished { since, .. }| self.lobby.patience.saturating_sub(since.elapsed()));
            let late = wait.unfinished.filter(|_| left.is_some_and(|left| left.is_zero()));
            let too_late = late.filter(|_| self.lobby.has_speaker());
            let mut fds = vec![
                PollFd::from_borrowed_fd(wait.socket, wait.events),
                PollFd::from_borrowed_fd(self.wake, PollFlags::IN),
            ];
            let listener = self.lobby.listener.to_poll().filter(|_| may_accept && self.lobby.has_room());
            let listener_at = listener.map(|_| fds.len());
            let others = listener.into_iter().chain(self.lobby.silent_streams());
            fds.extend(others.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            // Late, and another one has not spoken: for as long as it takes until one does.
            let limit = left.filter(|_| late.is_none() || too_late.is_some()).map(timespec);
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
            if let Some(unfinished) = too_late {
                return Err(too_late_error(unfinished));
            }
            if listener_at.is_some_and(is_ready) {
                may_accept = self.take_connections();
            }
            self.listen();
        }
    }
}

fn too_late_error(Unfinished { what, since }: Unfinished) -> ConnectionError {
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

    use super::super::super::listener::SocketAccess;
    use super::*;

    #[test]
    fn a_flood_of_connections_is_taken_in_parts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut lobby = Lobby::new(Listener::bind(&path, SocketAccess::default()).unwrap(), PATIENCE);
        let clients: Vec<_> = (0..3 * WAITING_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        lobby.take_connections().unwrap();
        assert_eq!(lobby.waiting.len(), WAITING_MAX);
        assert!(lobby.listener.accept().unwrap().is_some(), "the others are still in the queue of the socket");
        lobby.take_connections().unwrap();
        assert_eq!(lobby.waiting.len(), WAITING_MAX);
        assert!(lobby.listener.accept().unwrap().is_some());
        drop(clients);
    }

    #[test]
    fn a_front_end_is_told_what_it_left_undone() {
        let since = Instant::now();
        let message = too_late_error(Unfinished { what: Undone::Message { got_bytes: 5 }, since });
        assert!(matches!(message, ConnectionError::Silent { got_bytes: 5, .. }), "{message}");
        let reply = too_late_error(Unfinished { what: Undone::Reply, since });
        assert!(matches!(reply, ConnectionError::Unread { .. }), "{reply}");
    }
}
