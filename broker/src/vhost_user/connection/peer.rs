//! Whether the other end of a connection is still there.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The process at the other end of a connection, if the kernel tells: it has no number for one in another PID namespace.
pub(crate) fn pid_of_peer(socket: &impl AsFd) -> Option<i32> {
    // Not rustix, whose process ids cannot be 0.
    getsockopt(socket, PeerCredentials).ok().map(|credentials| credentials.pid()).filter(|&pid| pid > 0)
}

/// Tells whether a front-end is gone, also to somebody who does not read what it says.
#[derive(Debug)]
pub struct PeerWatch(UnixStream);

impl PeerWatch {
    /// Watches the other end of `stream`.
    ///
    /// # Errors
    ///
    /// There is no descriptor for it.
    pub fn new(stream: &UnixStream) -> io::Result<Self> {
        stream.try_clone().map(Self)
    }

    /// Whether it is gone: it reads nothing any more, and what it has sent last needs no answer.
    pub fn is_gone(&self) -> bool {
        // Reported whether it is asked for or not.
        let mut fds = [PollFd::new(&self.0, PollFlags::HUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // What the kernel cannot tell now, it may at the next look.
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;

    use super::*;

    #[test]
    fn a_peer_that_only_says_no_more_is_there_and_one_that_closed_is_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let peer = PeerWatch::new(&ours).unwrap();
        assert!(!peer.is_gone());
        theirs.write_all(b"unread").unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        assert!(!peer.is_gone(), "it still waits for an answer");
        drop(theirs);
        assert!(peer.is_gone());
    }
}
