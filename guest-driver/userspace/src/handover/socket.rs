//! Sends and receives the message over a socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recv, recvmsg, sendmsg,
};

use super::setup::FDS_MAX;
use super::{Handover, QueueEvents, Setup, SetupError};
use crate::eventfd;

/// Maximum length of a line in bytes, including its end.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// The reason why a handover failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// The socket failed, or its time-out passed.
    #[error("cannot {what} over the socket: {source}")]
    Socket {
        /// The operation that failed.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The other side closed the connection before the line ended.
    #[error("the connection was closed after {received_bytes} bytes of the setup, before its end")]
    Closed {
        /// Number of received bytes.
        received_bytes: usize,
    },
    /// The line is too long.
    #[error("the setup is longer than {LINE_BYTES_MAX} bytes: use fewer regions or queues")]
    TooLong,
    /// The line is not a setup.
    #[error("the setup is malformed: {0}")]
    Malformed(#[source] serde_json::Error),
    /// The setup is invalid.
    #[error("the setup cannot be used: {0}")]
    Setup(#[source] SetupError),
    /// The number of descriptors is not the number that the setup needs.
    #[error(
        "the setup needs {needed} file descriptors ({regions} for memory, {queues} times 2 for events), but there are {given}"
    )]
    Descriptors {
        /// Number of descriptors that the setup needs.
        needed: usize,
        /// Number of regions.
        regions: usize,
        /// Number of queues.
        queues: usize,
        /// Number of given descriptors.
        given: usize,
    },
    /// The kernel has dropped some descriptors.
    #[error(
        "the kernel has dropped file descriptors of the message: too many were sent at once, or RLIMIT_NOFILE of this process \
         is too low"
    )]
    DescriptorsTruncated,
}

/// Sends `setup` with its descriptors: the file of each region and the events of each queue, in the order of the setup.
pub fn send(
    stream: &UnixStream,
    setup: &Setup,
    memory: &[BorrowedFd<'_>],
    events: &[QueueEvents],
) -> Result<(), HandoverError> {
    setup.check().map_err(HandoverError::Setup)?;
    let mut fds = memory.to_vec();
    fds.extend(events.iter().flat_map(|queue| [eventfd::borrow(&queue.doorbell), eventfd::borrow(&queue.completion)]));
    if memory.len() != setup.regions.len() || events.len() != setup.queues.len() {
        return Err(missing(setup, fds.len()));
    }
    let mut line = serde_json::to_vec(setup).map_err(HandoverError::Malformed)?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(HandoverError::TooLong);
    }

    let failed = |source| HandoverError::Socket { what: "send the setup", source };
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "a checked setup has at most {FDS_MAX} descriptors");
    // If the peer is gone, report an error instead of raising SIGPIPE.
    let send_first = || sendmsg(stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL);
    let sent = rustix::io::retry_on_intr(send_first).map_err(|error| failed(error.into()))?;
    let mut stream = stream;
    stream.write_all(&line[sent..]).map_err(failed)
}

/// Receives a message of [`send`], and consumes nothing after it. Waits for at most the read time-out of the socket.
pub fn receive(stream: &UnixStream) -> Result<Handover, HandoverError> {
    let (first, fds) = receive_descriptors(stream)?;
    let line = receive_line(stream, first)?;
    let setup: Setup = serde_json::from_slice(&line).map_err(HandoverError::Malformed)?;
    setup.check().map_err(HandoverError::Setup)?;
    if fds.len() != setup.fd_count() {
        return Err(missing(&setup, fds.len()));
    }
    let mut fds = fds.into_iter();
    let memory = fds.by_ref().take(setup.regions.len()).collect();
    let mut events = Vec::with_capacity(setup.queues.len());
    while let (Some(doorbell), Some(completion)) = (fds.next(), fds.next()) {
        events.push(QueueEvents { doorbell: eventfd::from_fd(doorbell), completion: eventfd::from_fd(completion) });
    }
    Ok(Handover { setup, memory, events })
}

fn missing(setup: &Setup, given: usize) -> HandoverError {
    HandoverError::Descriptors {
        needed: setup.fd_count(),
        regions: setup.regions.len(),
        queues: setup.queues.len(),
        given,
    }
}

/// Receives the first byte, which carries the descriptors. They are close-on-exec from the start.
fn receive_descriptors(stream: &UnixStream) -> Result<(u8, Vec<OwnedFd>), HandoverError> {
    let mut first = [0];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let receive = || recvmsg(stream, &mut [IoSliceMut::new(&mut first)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let received = rustix::io::retry_on_intr(receive)
        .map_err(|error| HandoverError::Socket { what: "receive the setup", source: error.into() })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    if received.bytes == 0 {
        return Err(HandoverError::Closed { received_bytes: 0 });
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(HandoverError::DescriptorsTruncated);
    }
    Ok((first[0], fds))
}

/// Receives the rest of the line that starts with `first`. Peeks before reading, so that it consumes nothing after the
/// line.
fn receive_line(stream: &UnixStream, first: u8) -> Result<Vec<u8>, HandoverError> {
    let failed = |source| HandoverError::Socket { what: "receive the setup", source };
    let mut line = vec![first];
    while line.last() != Some(&b'\n') {
        let mut ahead = [0; 4096];
        let peek = || recv(stream, &mut ahead[..], RecvFlags::PEEK);
        let (seen, _) = rustix::io::retry_on_intr(peek).map_err(|error| failed(error.into()))?;
        if seen == 0 {
            return Err(HandoverError::Closed { received_bytes: line.len() });
        }
        let taken = ahead[..seen].iter().position(|&byte| byte == b'\n').map_or(seen, |end| end + 1);
        if line.len() + taken > LINE_BYTES_MAX {
            return Err(HandoverError::TooLong);
        }
        let mut stream = stream;
        stream.read_exact(&mut ahead[..taken]).map_err(failed)?;
        line.extend_from_slice(&ahead[..taken]);
    }
    Ok(line)
}
