//! The lock on the disk's open file description, and waiting for it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::holders;
use super::{DiskError, ProcessName};
use crate::processes::Process;

/// Locks the whole file for this open file description: for reading if `read_only`, else for writing.
pub(super) fn lock(file: &OwnedFd, path: &Path, read_only: bool, wait: &mut Wait) -> Result<(), DiskError> {
    let wanted = whole_file(read_only);
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(DiskError::Lock { path: path.to_owned(), error: errno.into() }),
        }
        if wait.is_first() {
            let holders = holders(file, read_only);
            tracing::info!(?path, ?holders, limit = ?wait.limit(), "waiting for the disk's lock");
        }
        if !wait.pause() {
            let holders = holders(file, read_only);
            return Err(DiskError::Locked { path: path.to_owned(), read_only, holders, waited: wait.waited() });
        }
    }
}

/// Who has a lock that is in the way of ours.
fn holders(file: impl AsFd, read_only: bool) -> Vec<ProcessName> {
    let mut conflict = whole_file(read_only);
    // For a lock of the older kind (POSIX) the kernel names the process; an OFD lock has none (-1).
    match fcntl(&file, FcntlArg::F_OFD_GETLK(&mut conflict)) {
        Ok(_) if conflict.l_pid > 0 => vec![Process::with_pid(conflict.l_pid.unsigned_abs()).name()],
        _ => holders::lock_holders(file),
    }
}

fn whole_file(read_only: bool) -> libc::flock {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    // A length of zero reaches to the end of the file, wherever that will be. OFD calls demand a pid of zero.
    libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 }
}

/// A bounded wait, over both the claim and the lock.
pub(super) struct Wait {
    limit: Option<Duration>,
    started: Instant,
    pauses: u32,
}

impl Wait {
    const FIRST_PAUSE: Duration = Duration::from_millis(1);
    const LONGEST_PAUSE: Duration = Duration::from_millis(64);

    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self { limit, started: Instant::now(), pauses: 0 }
    }

    pub(super) fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// Whether there will be a wait and none of it is over: the time to tell about it.
    pub(super) fn is_first(&self) -> bool {
        self.pauses == 0 && self.limit.is_some_and(|limit| !limit.is_zero())
    }

    /// Sleeps, longer from time to time. False, and no sleep, when the time is up.
    pub(super) fn pause(&mut self) -> bool {
        let left = self.limit.unwrap_or_default().saturating_sub(self.started.elapsed());
        if left.is_zero() {
            return false;
        }
        let pause = Self::FIRST_PAUSE.saturating_mul(1 << self.pauses.min(10)).min(Self::LONGEST_PAUSE);
        self.pauses += 1;
        thread::sleep(pause.min(left));
        true
    }

    /// How long it has taken so far; zero if there was no wait.
    pub(super) fn waited(&self) -> Duration {
        if self.pauses == 0 { Duration::ZERO } else { self.started.elapsed() }
    }
}
