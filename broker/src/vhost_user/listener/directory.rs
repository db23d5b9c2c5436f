//! Keeps processes that make, replace or remove sockets in one directory out of each other's way: without that, the second of two that
//! found a stale socket would remove the new one of the first.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

/// How long to wait for others, who need the lock for a moment only. Whoever may read the directory could keep it for ever, so a server
/// goes on without it after this time.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(2);

/// The directory of a socket.
#[derive(Debug)]
pub(super) struct Directory(Option<OwnedFd>);

/// The lock of a directory (`flock(2)`), until it is dropped.
pub(super) struct DirectoryLock<'d>(&'d OwnedFd);

impl Directory {
    pub(super) fn of(socket: &Path) -> Self {
        let parent = socket.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // One that may only be written to has no lock.
        Self(rustix::fs::open(parent, flags, Mode::empty()).ok())
    }

    /// `None`: this user may not read the directory, its file system has no locks, or others keep the lock.
    pub(super) fn lock(&self) -> Option<DirectoryLock<'_>> {
        let directory = self.0.as_ref()?;
        let end = Instant::now() + PATIENCE;
        loop {
            match flock(directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(DirectoryLock(directory)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < end => thread::sleep(PAUSE),
                Err(error) => {
                    tracing::debug!(%error, "the directory of a socket cannot be locked");
                    return None;
                }
            }
        }
    }
}

impl Drop for DirectoryLock<'_> {
    fn drop(&mut self) {
        let _ = flock(self.0, FlockOperation::Unlock);
    }
}
