//! How a connection waits for its front-end.

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
    /// What it is to be ready for.
    pub events: PollFlags,
    /// What the front-end has begun and not ended. `None`: it owes nothing.
    pub unfinished: Option<Unfinished>,
}

/// Something that the front-end has begun.
#[derive(Debug, Clone, Copy)]
pub struct Unfinished {
    /// What it has left undone.
    pub what: Undone,
    /// When it began.
    pub since: Instant,
}

/// What a front-end leaves undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undone {
    /// It has sent a part of a message: so many bytes.
    Message {
        /// How much of the message has come.
        got_bytes: usize,
    },
    /// It does not read a reply, and there is no room for more.
    Reply,
}

/// Waits in the place of a connection.
pub trait Waiter {
    /// Waits until the socket is ready. True: something else is, which goes first.
    ///
    /// # Errors
    ///
    /// The connection is to end.
    fn wait(&mut self, wait: &Wait<'_>) -> Result<bool, ConnectionError>;
}

/// Waits until the descriptor is readable, and for as long as the front-end likes.
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
