//! Locks that belong to an open file description (`fcntl(2)`, "Open file description locks").

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::byte_range::ByteRange;
use super::{DiskError, ProcessName};
use crate::processes::Process;

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Others can have read locks. The file must be open for reading.
    Read,
    /// No other process has a lock. The file must be open for writing.
    Write,
}

impl Kind {
    fn lock_type(self) -> i32 {
        match self {
            Self::Read => libc::F_RDLCK,
            Self::Write => libc::F_WRLCK,
        }
    }
}

/// Locks a range for this open file description. Returns false if a conflicting lock exists.
pub(super) fn set(file: &OwnedFd, path: &Path, kind: Kind, range: ByteRange) -> Result<bool, DiskError> {
    let wanted = request(kind.lock_type(), range);
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(DiskError::Lock { path: path.to_owned(), error: errno.into() }),
        }
    }
}

/// Releases all locks of this open file description, even if other references to the description remain.
pub(super) fn unlock(file: &OwnedFd) {
    if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&request(libc::F_UNLCK, ByteRange::ALL))) {
        // The locks then end with the last reference.
        tracing::debug!(%error, "cannot unlock a disk");
    }
}

/// Whether another open file description or process has a lock on the range that conflicts with a lock of this kind. The
/// file may be open in any way. A file system that cannot tell has no locks: setting one fails there.
pub(super) fn any_lock(file: impl AsFd, kind: Kind, range: ByteRange) -> bool {
    conflict(file, kind, range).is_some()
}

/// The process with a conflicting POSIX lock. The kernel names no process for an OFD lock.
pub(super) fn conflicting_process(file: impl AsFd, kind: Kind, range: ByteRange) -> Option<ProcessName> {
    let pid = conflict(file, kind, range)?.l_pid;
    (pid > 0).then(|| Process::with_pid(pid.unsigned_abs()).name())
}

fn conflict(file: impl AsFd, kind: Kind, range: ByteRange) -> Option<libc::flock> {
    let mut found = request(kind.lock_type(), range);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).ok()?;
    (i32::from(found.l_type) != libc::F_UNLCK).then_some(found)
}

fn request(lock_type: i32, range: ByteRange) -> libc::flock {
    let offset = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    // A length of zero reaches to the end of the file, also after it grows. OFD calls require a pid of zero.
    let l_len = if range.end == u64::MAX { 0 } else { offset(range.end - range.start) };
    libc::flock { l_type: lock_type as _, l_whence: libc::SEEK_SET as _, l_start: offset(range.start), l_len, l_pid: 0 }
}
