//! The lock on the disk's open file description.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::holders;
use super::{DiskError, ProcessName};
use crate::processes::Process;

/// Locks the whole file for this open file description: for reading if `read_only`, else for writing. False: somebody
/// else has a lock that is in the way.
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

/// Gives the lock of this open file description back, whoever else has a reference to that.
pub(super) fn unlock(file: &OwnedFd) {
    let unlocked = libc::flock { l_type: libc::F_UNLCK as _, ..whole_file(true) };
    if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&unlocked)) {
        // Then it goes with the last reference.
        tracing::debug!(%error, "unlocking a disk");
    }
}

/// Who has a lock that is in the way of ours.
pub(super) fn holders(file: impl AsFd, read_only: bool) -> Vec<ProcessName> {
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
