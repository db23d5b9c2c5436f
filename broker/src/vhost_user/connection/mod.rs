//! The socket to one front-end, which carries whole messages with their file descriptors.

mod peer;
#[cfg(test)]
mod tests;
mod wait;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, discriminant};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use thiserror::Error;

pub use self::peer::PeerWatch;
pub(crate) use self::peer::pid_of_peer;
pub use self::wait::{Unfinished, UnfinishedExchange, Wait, Waiter};
use super::message::{HEADER_BYTES, Header, MAX_FDS, MessageError, Reply};
use crate::log_limit::LogCause;

/// A message with a valid header. The connection does not look at the body.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its body, as long as the header says.
    pub body: Vec<u8>,
    /// The file descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// The result of waiting for a message.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// The front-end closed the connection, between two messages.
    Closed,
    /// The watched descriptor became readable first. The connection keeps the bytes of a partial message.
    Woken,
}

/// Why the connection cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The header is invalid.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The front-end closed the connection in the middle of a message.
    #[error("the front-end closed the connection after {got_bytes} bytes of a message")]
    Truncated {
        /// How many bytes of the message arrived.
        got_bytes: usize,
    },
    /// The message carried more descriptors than one message can, or than this process may have open.
    #[error(
        "file descriptors of a message were lost: the front-end sent more than {MAX_FDS}, or this process has reached \
         its RLIMIT_NOFILE"
    )]
    FdsLost,
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// What the connection was doing.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The front-end is silent in the middle of a message while another front-end waits to be served.
    #[error(
        "the front-end stopped in the middle of a message, after {got_bytes} bytes, {silent_s} s ago, and another one \
         waits"
    )]
    Silent {
        /// How many bytes of the message arrived.
        got_bytes: usize,
        /// How long ago the first byte arrived, in seconds.
        silent_s: u64,
    },
    /// The front-end does not read a reply while another front-end waits to be served.
    #[error("the front-end has not read a reply for {silent_s} s, and another one waits")]
    Unread {
        /// How long the front-end has not read, in seconds.
        silent_s: u64,
    },
    /// The server was told to stop while the connection could not write a reply.
    #[error("stopped while the front-end did not read a reply")]
    Interrupted,
}

impl ConnectionError {
    /// The cause for rate limits of log lines: the kind of error without its values.
    pub(super) fn cause(&self) -> LogCause {
        match self {
            Self::Message(error) => LogCause::new((discriminant(self), discriminant(error))),
            Self::System { what, .. } => LogCause::new((discriminant(self), what)),
            _ => LogCause::new(discriminant(self)),
        }
    }
}

/// The connection to one front-end.
///
/// Only the waits block, and a [`Waiter`] does those.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The bytes of the next message that have arrived.
    bytes: Vec<u8>,
    /// When the first of those bytes arrived.
    begun: Option<Instant>,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Messages over `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, bytes: Vec::new(), begun: None, fds: Vec::new() }
    }

    /// The process at the other end, if the kernel knows its id.
    pub fn peer_pid(&self) -> Option<i32> {
        pid_of_peer(&self.stream)
    }

    /// A watch with which another part of the program can find out whether the front-end is still there.
    ///
    /// # Errors
    ///
    /// The socket's descriptor cannot be duplicated.
    pub fn peer_watch(&self) -> io::Result<PeerWatch> {
        PeerWatch::new(&self.stream)
    }

    /// Waits for a whole message, or until the waiter reports something else. A waiter that is a descriptor reports
    /// that the descriptor is readable.
    ///
    /// # Errors
    ///
    /// The connection is unusable from then on.
    pub fn receive(&mut self, mut waiter: impl Waiter) -> Result<Received, ConnectionError> {
        loop {
            let (header, needed_bytes) = match self.bytes.first_chunk::<HEADER_BYTES>() {
                None => (None, HEADER_BYTES),
                Some(bytes) => {
                    let header = Header::parse(*bytes)?;
                    (Some(header), HEADER_BYTES + header.body_bytes)
                }
            };
            if let (Some(header), true) = (header, self.bytes.len() == needed_bytes) {
                let body = self.bytes.split_off(HEADER_BYTES);
                self.bytes.clear();
                self.begun = None;
                return Ok(Received::Message(Message { header, body, fds: std::mem::take(&mut self.fds) }));
            }
            let what = UnfinishedExchange::PartialMessage { got_bytes: self.bytes.len() };
            let unfinished = self.begun.map(|since| Unfinished { what, since });
            if waiter.wait(&Wait { socket: self.stream.as_fd(), events: PollFlags::IN, unfinished })? {
                return Ok(Received::Woken);
            }
            match self.read_some(needed_bytes)? {
                Some(0) if self.bytes.is_empty() => return Ok(Received::Closed),
                Some(0) => return Err(ConnectionError::Truncated { got_bytes: self.bytes.len() }),
                Some(_) => {
                    self.begun.get_or_insert_with(Instant::now);
                }
                None => {}
            }
        }
    }

    /// Reads up to `needed_bytes` of the message, and no byte of the next message, whose descriptors would arrive with
    /// it. `None`: there was nothing to read.
    fn read_some(&mut self, needed_bytes: usize) -> Result<Option<usize>, ConnectionError> {
        let had_bytes = self.bytes.len();
        self.bytes.resize(needed_bytes, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let rest = &mut [IoSliceMut::new(&mut self.bytes[had_bytes..])];
        let received = rustix::net::recvmsg(&self.stream, rest, &mut control, flags);
        let got_bytes = received.as_ref().map_or(0, |message| message.bytes);
        self.bytes.truncate(had_bytes + got_bytes);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        match received {
            Ok(message) if message.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS => {
                Err(ConnectionError::FdsLost)
            }
            Ok(message) => Ok(Some(message.bytes)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            // The front-end was killed and left replies unread.
            Err(Errno::CONNRESET) => Ok(Some(0)),
            Err(errno) => Err(system("reading from the front-end", errno)),
        }
    }

    /// Writes a reply. Gives up when the waiter says so while the front-end does not read.
    ///
    /// # Errors
    ///
    /// The connection is unusable from then on.
    pub fn send(&mut self, reply: &Reply, mut waiter: impl Waiter) -> Result<(), ConnectionError> {
        let bytes = reply.to_bytes();
        let mut begun = None;
        let mut sent_bytes = 0;
        while sent_bytes < bytes.len() {
            let fds = reply.fd.iter().filter(|_| sent_bytes == 0).map(AsFd::as_fd).collect::<Vec<_>>();
            match send_some(&self.stream, &bytes[sent_bytes..], &fds) {
                Ok(count) => sent_bytes += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let since = *begun.get_or_insert_with(Instant::now);
                    let unfinished = Some(Unfinished { what: UnfinishedExchange::UnreadReply, since });
                    if waiter.wait(&Wait { socket: self.stream.as_fd(), events: PollFlags::OUT, unfinished })? {
                        return Err(ConnectionError::Interrupted);
                    }
                }
                Err(errno) => return Err(system("writing to the front-end", errno)),
            }
        }
        Ok(())
    }
}

/// Sends what the socket takes at once. A closed peer causes no SIGPIPE.
pub(super) fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

fn system(what: &'static str, errno: Errno) -> ConnectionError {
    ConnectionError::System { what, source: errno.into() }
}
