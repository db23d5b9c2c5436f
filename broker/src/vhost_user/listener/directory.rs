//! A lock between processes that make, replace or remove sockets in one directory. Without the lock, two processes
//! could find the same stale socket, and the second would remove the new socket of the first.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

/// How long to wait for other processes, which need the lock for a moment only. Any process that may read the directory
/// could hold the lock for ever, so a server goes on without it after this time.
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
        // A directory that this user may write to but not read has no lock.
        Self(rustix::fs::open(parent, flags, Mode::empty()).ok())
    }

    /// `None`: this user may not read the directory, its file system has no locks, or another process keeps the lock.
    pub(super) fn lock(&self) -> Option<DirectoryLock<'_>> {
        let directory = self.0.as_ref()?;
        let end = Instant::now() + PATIENCE;
        loop {
            match flock(directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(DirectoryLock(directory)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < end => thread::sleep(PAUSE),
                Err(error) => {
                    tracing::debug!(%error, "directory of a socket not locked: going on without the lock");
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
