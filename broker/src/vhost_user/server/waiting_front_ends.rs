//! Front-ends that are connected and not yet served.
//!
//! The server serves a front-end from its first byte on. A front-end that is connected and silent has no guest that
//! uses the disk: a VMM may connect long before it makes the device. So a silent front-end blocks no other, and the
//! server serves the first one that speaks, regardless of the order of connections.
//!
//! The served front-end stays as long as it likes, even if it sends little: its guest has the disk. The exception is a
//! front-end that stops in the middle of a message, or does not read a reply, while another front-end has spoken and
//! waits. It then has [`PATIENCE`] to go on before the server disconnects it. While no other front-end waits, it may be
//! stopped (by a debugger, say) for any time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tracing::{debug, info, warn};

use super::super::connection::{ConnectionError, Unfinished, UnfinishedExchange, Wait, Waiter, pid_of_peer};
use super::super::listener::Listener;
use crate::log_limit::{LogCause, LogLimits};

/// How long a front-end may stop in the middle of a message while another front-end waits. A front-end writes a message
/// at once; a VMM that was swapped out, or waits for a busy machine, needs seconds at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// The maximum number of waiting front-ends, and of connections accepted in one call.
const WAITING_MAX: usize = 16;

/// A front-end that waits to be served.
#[derive(Debug)]
pub(super) struct WaitingFrontEnd {
    pub(super) stream: UnixStream,
    pub(super) pid: Option<i32>,
    /// The server has seen the first byte of this front-end.
    has_spoken: bool,
}

/// Accepts connections and keeps the front-ends that wait.
#[derive(Debug)]
pub(super) struct WaitingFrontEnds {
    listener: Listener,
    /// In the order in which they connected.
    front_ends: VecDeque<WaitingFrontEnd>,
    pub(super) patience: Duration,
    /// Limits the log lines about connections, because any process may connect at any rate.
    pub(super) log: Box<LogLimits>,
}

/// What has come from a waiting front-end.
#[derive(Debug, PartialEq, Eq)]
enum FirstMessage {
    NotYet,
    Begun,
    /// The front-end closed the connection without a byte.
    Closed,
}

impl WaitingFrontEnd {
    fn new(stream: UnixStream) -> Self {
        let pid = pid_of_peer(&stream);
        Self { stream, pid, has_spoken: false }
    }

    fn first_message(&self) -> FirstMessage {
        match recv(&self.stream, &mut [0_u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => FirstMessage::Closed,
            Ok(_) => FirstMessage::Begun,
            Err(Errno::AGAIN | Errno::INTR) => FirstMessage::NotYet,
            Err(_) => FirstMessage::Closed,
        }
    }
}

impl WaitingFrontEnds {
    pub(super) fn new(listener: Listener, patience: Duration) -> Self {
        Self { listener, front_ends: VecDeque::new(), patience, log: Box::new(LogLimits::new()) }
    }

    /// Accepts pending connections, at most [`WAITING_MAX`] in one call: a flood of connections must not keep the
    /// caller from its other work.
    ///
    /// When [`WAITING_MAX`] front-ends wait, a new one replaces the silent one that has waited longest. When all of
    /// them have spoken, further ones wait in the queue of the socket.
    pub(super) fn take_connections(&mut self) -> io::Result<()> {
        for _ in 0..WAITING_MAX {
            if !self.has_room() {
                return Ok(());
            }
            let Some(stream) = self.listener.accept()? else { return Ok(()) };
            if self.is_full() {
                self.remove_silent();
            }
            let front_end = WaitingFrontEnd::new(stream);
            debug!(pid = front_end.pid, "front-end waits to be served");
            self.front_ends.push_back(front_end);
        }
        Ok(())
    }

    /// Takes the first front-end that has sent something.
    pub(super) fn take_speaker(&mut self) -> Option<WaitingFrontEnd> {
        let mut index = 0;
        while let Some(front_end) = self.front_ends.get(index) {
            match front_end.first_message() {
                FirstMessage::NotYet => index += 1,
                FirstMessage::Begun => return self.front_ends.remove(index),
                FirstMessage::Closed => {
                    debug!(pid = front_end.pid, "front-end left before its first message");
                    self.front_ends.remove(index);
                }
            }
        }
        None
    }

    /// Whether no front-end waits and no connection can come any more.
    pub(super) fn is_closed(&self) -> bool {
        self.front_ends.is_empty() && self.listener.to_poll().is_none()
    }

    /// The descriptors that become readable when a connection is pending or a waiting front-end speaks.
    pub(super) fn to_poll(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listener.to_poll().into_iter().chain(self.streams())
    }

    /// Whether the next connection can be accepted.
    fn has_room(&self) -> bool {
        !self.is_full() || self.front_ends.iter().any(|front_end| front_end.first_message() != FirstMessage::Begun)
    }

    /// Disconnects the front-end that has been silent for longest.
    fn remove_silent(&mut self) {
        let index = self.front_ends.iter().position(|front_end| front_end.first_message() != FirstMessage::Begun);
        let Some(silent) = index.and_then(|index| self.front_ends.remove(index)) else { return };
        if let Some(total) = self.log.count(LogCause::new("replaced")) {
            info!(pid = silent.pid, total, "silent front-end disconnected: too many are connected");
        }
    }

    /// Calls `on_first_message` for each front-end that has spoken since the last call, and drops those that closed
    /// without a byte.
    fn note_first_messages(&mut self, mut on_first_message: impl FnMut(&LogLimits, &WaitingFrontEnd)) {
        let Self { front_ends, log, .. } = self;
        front_ends.retain_mut(|front_end| {
            let first_message = if front_end.has_spoken { FirstMessage::NotYet } else { front_end.first_message() };
            if first_message == FirstMessage::Begun {
                front_end.has_spoken = true;
                on_first_message(log, front_end);
            }
            first_message != FirstMessage::Closed
        });
    }

    fn has_speaker(&self) -> bool {
        self.front_ends.iter().any(|front_end| front_end.has_spoken)
    }

    fn streams(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.front_ends.iter().map(|front_end| front_end.stream.as_fd())
    }

    /// The connections of front-ends that have sent nothing yet.
    fn silent_streams(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.front_ends.iter().filter(|front_end| !front_end.has_spoken).map(|front_end| front_end.stream.as_fd())
    }

    fn is_full(&self) -> bool {
        self.front_ends.len() >= WAITING_MAX
    }
}

/// Waits for the served front-end, and accepts others meanwhile.
#[derive(Debug)]
pub(super) struct FrontEndWaiter<'a> {
    pub(super) waiting: &'a mut WaitingFrontEnds,
    /// The process of the served front-end.
    pub(super) served_pid: Option<i32>,
    /// Ends a wait when readable.
    pub(super) wake: BorrowedFd<'a>,
}

impl FrontEndWaiter<'_> {
    fn take_connections(&mut self) -> bool {
        self.waiting.take_connections().inspect_err(|error| debug!(%error, "no front-end can be accepted now")).is_ok()
    }

    /// Logs the front-ends that have begun to speak. A front-end that only connects may just check whether this server
    /// is there.
    fn note_first_messages(&mut self) {
        let Self { waiting, served_pid, .. } = self;
        waiting.note_first_messages(|log, front_end| {
            if let Some(total) = log.count(LogCause::new("waits")) {
                warn!(
                    pid = front_end.pid,
                    served_pid = *served_pid,
                    total,
                    "another front-end is connected; it waits until the served one disconnects"
                );
            }
        });
    }
}

impl Waiter for FrontEndWaiter<'_> {
    fn wait(&mut self, wait: &Wait<'_>) -> Result<bool, ConnectionError> {
        // After an error the socket would stay readable; the next message is early enough for the next try.
        let mut may_accept = true;
        loop {
            let left =
                wait.unfinished.map(|Unfinished { since, .. }| self.waiting.patience.saturating_sub(since.elapsed()));
            let late = wait.unfinished.filter(|_| left.is_some_and(|left| left.is_zero()));
            let too_late = late.filter(|_| self.waiting.has_speaker());
            let mut fds = vec![
                PollFd::from_borrowed_fd(wait.socket, wait.events),
                PollFd::from_borrowed_fd(self.wake, PollFlags::IN),
            ];
            let listener = self.waiting.listener.to_poll().filter(|_| may_accept && self.waiting.has_room());
            let listener_at = listener.map(|_| fds.len());
            let others = listener.into_iter().chain(self.waiting.silent_streams());
            fds.extend(others.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            // The served front-end is late and no other has spoken: wait without a limit until one does.
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
            self.note_first_messages();
        }
    }
}

fn too_late_error(Unfinished { what, since }: Unfinished) -> ConnectionError {
    let silent_s = since.elapsed().as_secs();
    match what {
        UnfinishedExchange::PartialMessage { got_bytes } => ConnectionError::Silent { got_bytes, silent_s },
        UnfinishedExchange::UnreadReply => ConnectionError::Unread { silent_s },
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
    fn a_flood_of_connections_is_accepted_in_parts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut waiting = WaitingFrontEnds::new(Listener::bind(&path, SocketAccess::default()).unwrap(), PATIENCE);
        let clients: Vec<_> = (0..3 * WAITING_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        waiting.take_connections().unwrap();
        assert_eq!(waiting.front_ends.len(), WAITING_MAX);
        assert!(waiting.listener.accept().unwrap().is_some(), "the others are still in the queue of the socket");
        waiting.take_connections().unwrap();
        assert_eq!(waiting.front_ends.len(), WAITING_MAX);
        assert!(waiting.listener.accept().unwrap().is_some());
        drop(clients);
    }

    #[test]
    fn the_error_says_what_the_front_end_left_undone() {
        let since = Instant::now();
        let message = too_late_error(Unfinished { what: UnfinishedExchange::PartialMessage { got_bytes: 5 }, since });
        assert!(matches!(message, ConnectionError::Silent { got_bytes: 5, .. }), "{message}");
        let reply = too_late_error(Unfinished { what: UnfinishedExchange::UnreadReply, since });
        assert!(matches!(reply, ConnectionError::Unread { .. }), "{reply}");
    }
}
