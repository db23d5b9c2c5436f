//! The lock on the disk's open file description.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::holders;
use super::{DiskError, ProcessName};
use crate::processes::Process;

/// Locks the whole file for this open file description: for reading if `read_only`, else for writing. Returns false if
/// a conflicting lock exists.
pub(super) fn try_lock(file: &OwnedFd, path: &Path, read_only: bool) -> Result<bool, DiskError> {
    let wanted = whole_file(read_only);
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(DiskError::Lock { path: path.to_owned(), error: errno.into() }),
        }
    }
}

/// Releases the lock of this open file description, even if other references to the description remain.
pub(super) fn unlock(file: &OwnedFd) {
    let unlocked = libc::flock { l_type: libc::F_UNLCK as _, ..whole_file(true) };
    if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&unlocked)) {
        // The lock then ends with the last reference.
        tracing::debug!(%error, "cannot unlock a disk");
    }
}

/// The processes whose lock conflicts with ours.
pub(super) fn holders(file: impl AsFd, read_only: bool) -> Vec<ProcessName> {
    let mut conflict = whole_file(read_only);
    // The kernel names the process of a POSIX lock; an OFD lock has no process (-1).
    match fcntl(&file, FcntlArg::F_OFD_GETLK(&mut conflict)) {
        Ok(_) if conflict.l_pid > 0 => vec![Process::with_pid(conflict.l_pid.unsigned_abs()).name()],
        _ => holders::lock_holders(file),
    }
}

fn whole_file(read_only: bool) -> libc::flock {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    // A length of zero reaches to the end of the file, also after it grows. OFD calls require a pid of zero.
    libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 }
}
