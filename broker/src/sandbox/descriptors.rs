//! Keeping open files from programs that would be executed.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use super::SandboxError;

/// Makes every open descriptor close-on-exec, those among them that whoever started the process has left open: what this crate
/// opens itself is so from the beginning. The standard streams are not excepted, since a process that serves executes nothing.
///
/// To be called at the start of a program, while it has one thread.
///
/// # Errors
///
/// `/proc` is not mounted, or the kernel refuses.
pub fn close_descriptors_on_exec() -> Result<(), SandboxError> {
    // `close_range(2)` could do this from Linux 5.11 on; virtqueues are served on older kernels too.
    let listing = SandboxError::system("listing open descriptors in /proc/self/fd");
    let entries: io::Result<Vec<_>> = fs::read_dir("/proc/self/fd").and_then(Iterator::collect);
    for entry in entries.map_err(listing)? {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else { continue };
        close_on_exec(number).map_err(SandboxError::system("making a descriptor close-on-exec"))?;
    }
    Ok(())
}

fn close_on_exec(number: RawFd) -> Result<(), Errno> {
    // SAFETY: the number is only given to `fcntl(2)`, for a flag of the descriptor that no owner of one relies on; if nothing is
    // open under it, the kernel says so.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    match fcntl_getfd(descriptor).and_then(|flags| fcntl_setfd(descriptor, flags | FdFlags::CLOEXEC)) {
        // The one that listed the others.
        Err(Errno::BADF) => Ok(()),
        other => other,
    }
}
