//! A watch that tells whether the other end of a connection is still there.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The process at the other end of a connection. `None`: the process is in another PID namespace, so the kernel has no
/// id for it.
pub(crate) fn pid_of_peer(socket: &impl AsFd) -> Option<i32> {
    // Not rustix: its process ids cannot be 0.
    getsockopt(socket, PeerCredentials).ok().map(|credentials| credentials.pid()).filter(|&pid| pid > 0)
}

/// Tells whether a front-end is gone, for code that does not read the front-end's messages.
#[derive(Debug)]
pub struct PeerWatch(UnixStream);

impl PeerWatch {
    /// Watches the other end of `stream`.
    ///
    /// # Errors
    ///
    /// The socket's descriptor cannot be duplicated.
    pub fn new(stream: &UnixStream) -> io::Result<Self> {
        stream.try_clone().map(Self)
    }

    /// Whether the front-end is gone: it reads nothing any more, so the last messages that it sent need no answer.
    pub fn is_gone(&self) -> bool {
        // The kernel reports HUP and ERR even if they are not requested.
        let mut fds = [PollFd::new(&self.0, PollFlags::HUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // If poll fails now, the next look may succeed.
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;

    use super::*;

    #[test]
    fn a_peer_that_shut_down_writing_is_there_and_a_closed_peer_is_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let peer = PeerWatch::new(&ours).unwrap();
        assert!(!peer.is_gone());
        theirs.write_all(b"unread").unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        assert!(!peer.is_gone(), "the peer still waits for an answer");
        drop(theirs);
        assert!(peer.is_gone());
    }
}
