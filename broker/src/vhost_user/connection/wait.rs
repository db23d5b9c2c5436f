//! The wait of a connection for its front-end.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{ConnectionError, system};

/// What a connection waits for.
#[derive(Debug)]
pub struct Wait<'a> {
    /// The socket.
    pub socket: BorrowedFd<'a>,
    /// The events to wait for.
    pub events: PollFlags,
    /// What the front-end has begun and not finished. `None`: nothing.
    pub unfinished: Option<Unfinished>,
}

/// An exchange that the front-end has begun and not finished.
#[derive(Debug, Clone, Copy)]
pub struct Unfinished {
    /// What the front-end has left undone.
    pub what: UnfinishedExchange,
    /// When the exchange began.
    pub since: Instant,
}

/// What a front-end has left undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnfinishedExchange {
    /// It has sent only a part of a message.
    PartialMessage {
        /// How many bytes of the message have arrived.
        got_bytes: usize,
    },
    /// It does not read a reply, and the socket is full.
    UnreadReply,
}

/// Waits on behalf of a connection.
pub trait Waiter {
    /// Waits until the socket is ready. True: the waiter has something else that goes first.
    ///
    /// # Errors
    ///
    /// The connection must end.
    fn wait(&mut self, wait: &Wait<'_>) -> Result<bool, ConnectionError>;
}

/// Waits until the descriptor is readable, without a time limit for the front-end.
impl Waiter for BorrowedFd<'_> {
    fn wait(&mut self, wait: &Wait<'_>) -> Result<bool, ConnectionError> {
        loop {
            let mut fds =
                [PollFd::from_borrowed_fd(wait.socket, wait.events), PollFd::from_borrowed_fd(*self, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) if !fds[1].revents().is_empty() => return Ok(true),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(false),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("waiting for the front-end", errno)),
            }
        }
    }
}
