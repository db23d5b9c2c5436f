//! The socket to one front-end: whole messages with their file descriptors.

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
pub use self::wait::{Undone, Unfinished, Wait, Waiter};
use super::message::{HEADER_BYTES, Header, MAX_FDS, MessageError, Reply};
use crate::log_limit::Cause;

/// A message whose header was understood. The body was not looked at.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its body: as many bytes as the header said.
    pub body: Vec<u8>,
    /// The file descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// What waiting for a message gave.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// The front-end closed the connection, between two messages.
    Closed,
    /// The descriptor to watch became readable first. What had come of a message by then is kept.
    Woken,
}

/// Why the connection cannot go on.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// Header that cannot be understood.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The front-end died while it wrote.
    #[error("the front-end closed the connection after {got_bytes} bytes of a message")]
    Truncated {
        /// How much of the message had come.
        got_bytes: usize,
    },
    /// More descriptors than one message can carry, or more than this process may have open.
    #[error(
        "file descriptors of a message were lost: more than {MAX_FDS} were sent, or RLIMIT_NOFILE of this process is \
         reached"
    )]
    FdsLost,
    /// The kernel's answer.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another front-end waits for this one's place, which it has no use for.
    #[error(
        "the front-end stopped in the middle of a message, after {got_bytes} bytes, {silent_s} s ago, and another one waits"
    )]
    Silent {
        /// How much of the message had come.
        got_bytes: usize,
        /// How long ago its first byte came, in seconds.
        silent_s: u64,
    },
    /// The same, and a reply that it does not read.
    #[error("the front-end has not read a reply for {silent_s} s, and another one waits")]
    Unread {
        /// For how long, in seconds.
        silent_s: u64,
    },
    /// Somebody asked for the end while a reply could not be written.
    #[error("stopped while the front-end did not read a reply")]
    Interrupted,
}

impl ConnectionError {
    /// The cause for the limits of log lines: what is wrong, without the values.
    pub(super) fn cause(&self) -> Cause {
        match self {
            Self::Message(error) => Cause::new((discriminant(self), discriminant(error))),
            Self::System { what, .. } => Cause::new((discriminant(self), what)),
            _ => Cause::new(discriminant(self)),
        }
    }
}

/// The connection to one front-end.
///
/// Nothing blocks in it but the waits, which are a [`Waiter`]'s.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// What has come of the next message.
    bytes: Vec<u8>,
    /// When its first byte came.
    begun: Option<Instant>,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Messages over `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, bytes: Vec::new(), begun: None, fds: Vec::new() }
    }

    /// The process at the other end, if the kernel tells.
    pub fn peer_pid(&self) -> Option<i32> {
        pid_of_peer(&self.stream)
    }

    /// Tells somebody else whether the front-end is still there.
    ///
    /// # Errors
    ///
    /// There is no descriptor for it.
    pub fn peer_watch(&self) -> io::Result<PeerWatch> {
        PeerWatch::new(&self.stream)
    }

    /// Waits for a whole message, or until the waiter has something else to tell: a descriptor that is a waiter, that it is
    /// readable.
    ///
    /// # Errors
    ///
    /// The connection is of no use any more.
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
            let what = Undone::Message { got_bytes: self.bytes.len() };
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

    /// Reads up to `needed_bytes` of the message, and no byte of the next one: its descriptors would come along.
    /// `None`: there was nothing after all.
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
            // A front-end that was killed with unread replies.
            Err(Errno::CONNRESET) => Ok(Some(0)),
            Err(errno) => Err(system("reading from the front-end", errno)),
        }
    }

    /// Writes a reply, or gives up when the waiter says so and the front-end does not read.
    ///
    /// # Errors
    ///
    /// The connection is of no use any more.
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
                    let unfinished = Some(Unfinished { what: Undone::Reply, since });
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

/// Sends what fits at once, without a signal if nobody reads.
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
