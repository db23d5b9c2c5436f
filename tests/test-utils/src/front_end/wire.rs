//! Messages as bytes on a Unix socket, with their file descriptors. Sending checks nothing, so that a test can send
//! anything.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// Length of a message's header: request, flags and size of the body, 32 bits each in the machine's byte order.
pub const HEADER_BYTES: usize = 12;
/// Flags of every message: version 1 (vhost-user, "Header").
pub const FLAG_VERSION: u32 = 1;
/// Flag of an answer.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag of a request that has no answer of its own and wants an acknowledgement (`VHOST_USER_PROTOCOL_F_REPLY_ACK`).
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The most descriptors that Linux passes with one message (`SCM_MAX_FD`, unix(7)).
pub const MAX_FDS: usize = 253;
/// Far more than any message has: a longer message is a fault of the peer.
const MAX_BODY_BYTES: usize = 1 << 16;

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Number of the request, in an answer too.
    pub request: u32,
    /// The header's flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// The descriptors that came with the message.
    pub fds: Vec<OwnedFd>,
}

/// The bytes of a message.
pub fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size_bytes = u32::try_from(body.len()).expect("bodies of tests are short");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    for word in [request, flags, size_bytes] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// Where this side cuts the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The message, from 0 on.
    pub message: usize,
    /// The place in the message.
    pub at: CutAt,
}

/// A place in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutAt {
    /// Half of the message is sent, and all its descriptors.
    Within,
    /// The whole message is sent, and no answer is read.
    Behind,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Wire {
    socket: UnixStream,
    cut: Option<Cut>,
    sent: AtomicUsize,
}

impl Wire {
    /// Connects to a server that listens at `path`.
    ///
    /// # Errors
    ///
    /// No process listens there.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let socket = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        Self::new(socket, timeout)
    }

    /// Takes a connected socket. `timeout` limits the wait for an answer, and the wait for room for a message.
    ///
    /// # Errors
    ///
    /// The time-outs cannot be set.
    pub fn new(socket: UnixStream, timeout: Duration) -> Result<Self> {
        socket.set_read_timeout(Some(timeout))?;
        socket.set_write_timeout(Some(timeout))?;
        Ok(Self { socket, cut: None, sent: AtomicUsize::new(0) })
    }

    /// The same wire, which cuts the connection there: sending that message fails, and [`is_cut`] recognizes the error.
    pub fn cut_at(self, cut: Option<Cut>) -> Self {
        Self { cut, ..self }
    }

    /// How many messages this side has sent.
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    /// Changes the limit of the wait for an answer.
    ///
    /// # Errors
    ///
    /// The socket does not take the limit.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(timeout))
    }

    /// Sends these bytes, with these descriptors at the first byte.
    ///
    /// # Errors
    ///
    /// The peer has closed, or takes nothing within the time-out.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("no room for the descriptors"));
        }
        let mut sent = rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        while sent < bytes.len() {
            let mut nothing = SendAncillaryBuffer::default();
            let rest = [IoSlice::new(&bytes[sent..])];
            sent += rustix::net::sendmsg(&self.socket, &rest, &mut nothing, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// As [`send_bytes`](Self::send_bytes).
    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = encode(request, flags, body);
        let message = self.sent.fetch_add(1, Ordering::Relaxed);
        let Some(Cut { at, .. }) = self.cut.filter(|cut| cut.message == message) else {
            return self.send_bytes(&bytes, fds);
        };
        let end = if at == CutAt::Within { bytes.len() / 2 } else { bytes.len() };
        self.send_bytes(&bytes[..end], fds)?;
        self.hang_up()?;
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection is cut here"))
    }

    /// The next message, or `None` if the peer has closed between two messages.
    ///
    /// # Errors
    ///
    /// Nothing comes within the time-out, the peer closes within a message, or the size in the header is too large.
    pub fn receive(&self) -> Result<Option<Message>> {
        let mut header = [0; HEADER_BYTES];
        let mut fds = Vec::new();
        match self.receive_exactly(&mut header, &mut fds)? {
            0 => return Ok(None),
            HEADER_BYTES => {}
            some => bail!("the peer closed after {some} bytes of a header"),
        }
        let word = |index: usize| u32::from_ne_bytes(header[4 * index..4 * index + 4].try_into().expect("four bytes"));
        let (request, flags, size_bytes) = (word(0), word(1), word(2) as usize);
        ensure!(size_bytes <= MAX_BODY_BYTES, "a message {request} with a body of {size_bytes} bytes");
        let mut body = vec![0; size_bytes];
        let received = self.receive_exactly(&mut body, &mut fds)?;
        ensure!(received == size_bytes, "the peer closed after {received} of {size_bytes} bytes of message {request}");
        Ok(Some(Message { request, flags, body, fds }))
    }

    /// Closes the connection for sending: the peer sees its end behind what was sent.
    ///
    /// # Errors
    ///
    /// The peer has closed.
    pub fn finish_sending(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    /// Ends the connection in both directions.
    ///
    /// # Errors
    ///
    /// The peer has closed.
    pub fn hang_up(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Both)
    }

    /// Reads complete messages until the peer closes the connection.
    ///
    /// # Errors
    ///
    /// The peer sends anything else, or nothing comes within the time-out.
    pub fn drain_until_closed(&self) -> Result<()> {
        loop {
            match self.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                // The peer had not read all of our bytes when it closed.
                Err(error) if is_reset(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `buffer` unless the peer closes before. Returns the number of bytes.
    fn receive_exactly(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut buffer[filled..])];
            let received = match rustix::net::recvmsg(&self.socket, &mut rest, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => received,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => bail!("no answer within the time-out"),
                Err(error) => return Err(io::Error::from(error).into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if received.bytes == 0 {
                break;
            }
            filled += received.bytes;
        }
        Ok(filled)
    }
}

/// Whether the error says that this side cut the connection, as [`Wire::cut_at`] chose.
pub fn is_cut(error: &anyhow::Error) -> bool {
    let causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.into_iter().any(|error| error.kind() == io::ErrorKind::ConnectionAborted)
}

/// Whether the error says that the peer closed with bytes unread.
pub fn is_reset(error: &anyhow::Error) -> bool {
    let kinds = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    error.downcast_ref::<io::Error>().is_some_and(|error| kinds.contains(&error.kind()))
}
