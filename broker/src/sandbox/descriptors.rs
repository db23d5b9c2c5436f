//! Keeping open files from executed programs.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::libc;
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use super::SandboxError;

/// Makes every open descriptor close-on-exec, including those that the parent process left open; the descriptors that
/// this crate opens are close-on-exec from the start. The standard streams are no exception, since a process that
/// serves executes nothing.
///
/// Call this at the start of a program, while it has one thread.
///
/// # Errors
///
/// `/proc` is not mounted, or the kernel refuses.
pub fn close_descriptors_on_exec() -> Result<(), SandboxError> {
    // `close_range(2)` could do this from Linux 5.11 on, but ringpass serves virtqueues on older kernels too.
    let listing = SandboxError::system("listing open descriptors in /proc/self/fd");
    let entries: io::Result<Vec<_>> = fs::read_dir("/proc/self/fd").and_then(Iterator::collect);
    for entry in entries.map_err(listing)? {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else { continue };
        close_on_exec(number).map_err(SandboxError::system("making a descriptor close-on-exec"))?;
    }
    Ok(())
}

/// Closes every descriptor but these. For a process that was forked: what owned the others in its parent is never used
/// here.
pub(crate) fn close_descriptors_but(kept: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
    let mut numbers: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    numbers.sort_unstable();
    let mut first = 0;
    for end in numbers.into_iter().map(Some).chain([None]) {
        let last = end.map_or(RawFd::MAX, |end| end - 1);
        if first <= last {
            close_range(first, last).map_err(SandboxError::system("closing the descriptors of the parent process"))?;
        }
        first = end.map_or(first, |end| end + 1);
    }
    Ok(())
}

fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: a system call that names no memory (Linux 5.9). What owned these descriptors belongs to the parent process, and the
    // caller uses none of it.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn close_on_exec(number: RawFd) -> Result<(), Errno> {
    // SAFETY: the number is only passed to `fcntl(2)`, for a flag of the descriptor on which no owner relies; if no
    // descriptor is open under the number, the kernel returns an error.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    match fcntl_getfd(descriptor).and_then(|flags| fcntl_setfd(descriptor, flags | FdFlags::CLOEXEC)) {
        // The descriptor of the listing itself, which is closed by now.
        Err(Errno::BADF) => Ok(()),
        other => other,
    }
}
