//! The socket to a device, and conversations of limited time over it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::Frontend;

use super::super::Error;
use super::super::watchdog::Watchdog;

/// vhost-user numbers queues with a byte.
pub(super) const QUEUES_MAX: u64 = 256;
/// Maximum pause between two attempts to connect.
pub(super) const RETRY_MAX: Duration = Duration::from_millis(40);

/// Runs conversations with the device, and limits the time of each.
#[derive(Debug)]
pub(super) struct Conversations {
    pub(super) watchdog: Watchdog,
    pub(super) patience: Duration,
}

impl Conversations {
    /// Runs a conversation, for which the device has `patience` in total.
    pub(super) fn run<T>(
        &self,
        link: &mut Link,
        messages: impl FnOnce(&mut Frontend) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let watch = self.watchdog.watch(&link.stream, self.patience)?;
        messages(&mut link.frontend).map_err(|error| match error {
            Error::Protocol { what, .. } if watch.is_cut() => Error::Silent { what, patience: self.patience },
            other => other,
        })
    }
}

/// An open connection.
pub(super) struct Link {
    pub(super) frontend: Frontend,
    /// The same socket, to wait for its end.
    pub(super) stream: UnixStream,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Link").field(&self.stream).finish()
    }
}

impl Link {
    /// Connects. While the accept queue of the socket is full (its server is stopped, and other front-ends wait as
    /// well), it tries again as long as `pause` returns true.
    pub(super) fn open(path: &Path, patience: Duration, pause: impl Fn(Duration) -> bool) -> Result<Self, Error> {
        let failed = |source| Error::Connect { path: path.to_owned(), source };
        let begin = Instant::now();
        let stream = loop {
            match connect(path) {
                Err(Errno::AGAIN | Errno::INTR) => {
                    if begin.elapsed() >= patience || !pause(RETRY_MAX) {
                        return Err(Error::Silent { what: "connecting", patience });
                    }
                }
                other => break other.map_err(|errno| failed(errno.into()))?,
            }
        };
        stream.set_nonblocking(false).map_err(failed)?;
        let ours = stream.try_clone().map_err(failed)?;
        Ok(Self { frontend: Frontend::from_stream(stream, QUEUES_MAX), stream: ours })
    }

    /// Whether the other side has closed the socket.
    pub(super) fn is_gone(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::RDHUP)];
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// Connects without waiting for room in the accept queue of the socket.
fn connect(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connecting_works_with_unlimited_patience() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let open = || Link::open(&path, Duration::MAX, |_| panic!("no reason to wait"));
        assert!(matches!(open(), Err(Error::Connect { .. })));
        let _server = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(open().is_ok());
    }
}
