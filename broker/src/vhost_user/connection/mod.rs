//! The socket to one front-end: whole messages with their file descriptors.

mod peer;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use thiserror::Error;

pub use self::peer::PeerWatch;
use super::message::{HEADER_BYTES, Header, MAX_FDS, MessageError, Reply};

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
    /// Somebody asked for the end while a reply could not be written.
    #[error("stopped while the front-end did not read a reply")]
    Interrupted,
}

/// The connection to one front-end.
///
/// Nothing blocks in it but the waits, and these end when a second descriptor becomes readable.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// What has come of the next message.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Messages over `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, bytes: Vec::new(), fds: Vec::new() }
    }

    /// The process at the other end, if the kernel tells.
    pub fn peer_pid(&self) -> Option<i32> {
        rustix::net::sockopt::socket_peercred(&self.stream).ok().map(|credentials| credentials.pid.as_raw_pid())
    }

    /// Tells somebody else whether the front-end is still there.
    ///
    /// # Errors
    ///
    /// There is no descriptor for it.
    pub fn peer_watch(&self) -> io::Result<PeerWatch> {
        PeerWatch::new(&self.stream)
    }

    /// Waits for a whole message, or until `wake` is readable.
    ///
    /// # Errors
    ///
    /// The connection is of no use any more.
    pub fn receive(&mut self, wake: BorrowedFd<'_>) -> Result<Received, ConnectionError> {
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
                return Ok(Received::Message(Message { header, body, fds: std::mem::take(&mut self.fds) }));
            }
            if wait(self.stream.as_fd(), PollFlags::IN, wake)? {
                return Ok(Received::Woken);
            }
            match self.read_some(needed_bytes)? {
                Some(0) if self.bytes.is_empty() => return Ok(Received::Closed),
                Some(0) => return Err(ConnectionError::Truncated { got_bytes: self.bytes.len() }),
                _ => {}
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

    /// Writes a reply, or gives up when `stop` is readable and the front-end does not read.
    ///
    /// # Errors
    ///
    /// The connection is of no use any more.
    pub fn send(&mut self, reply: &Reply, stop: BorrowedFd<'_>) -> Result<(), ConnectionError> {
        let bytes = reply.to_bytes();
        let mut sent_bytes = 0;
        while sent_bytes < bytes.len() {
            let fds = reply.fd.iter().filter(|_| sent_bytes == 0).map(AsFd::as_fd).collect::<Vec<_>>();
            match send_some(&self.stream, &bytes[sent_bytes..], &fds) {
                Ok(count) => sent_bytes += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if wait(self.stream.as_fd(), PollFlags::OUT, stop)? {
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

/// Waits until `fd` is ready or `wake` is readable. True: it was `wake`, which goes first.
fn wait(fd: BorrowedFd<'_>, events: PollFlags, wake: BorrowedFd<'_>) -> Result<bool, ConnectionError> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(fd, events), PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return Ok(true),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(system("waiting for the front-end", errno)),
        }
    }
}

fn system(what: &'static str, errno: Errno) -> ConnectionError {
    ConnectionError::System { what, source: errno.into() }
}
