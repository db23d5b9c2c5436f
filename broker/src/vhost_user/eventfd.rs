//! Eventfds that the front-end passes.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::CWD;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// The target of an eventfd's link in /proc/self/fd.
const EVENTFD_LINK: &str = "anon_inode:[eventfd]";

/// The front-end passed a file that is not an eventfd as kick, call or error eventfd.
///
/// Any other file could block the back-end or swallow what it writes: a FIFO, a terminal, a file of a remote file
/// system.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the file descriptor is not an eventfd but {link}; the front-end must pass an eventfd")]
pub struct NotAnEventfd {
    link: String,
}

/// Takes a descriptor as an eventfd.
///
/// The flags stay unchanged: O_NONBLOCK belongs to the open file description, which the front-end goes on using.
///
/// # Errors
///
/// The descriptor is not an eventfd. Without /proc this check is impossible, and every descriptor passes.
pub(crate) fn adopt(fd: OwnedFd) -> Result<EventFd, NotAnEventfd> {
    if let Ok(link) = rustix::fs::readlinkat(CWD, format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()) {
        let link = link.to_string_lossy();
        if link != EVENTFD_LINK {
            return Err(NotAnEventfd { link: link.into_owned() });
        }
    }
    let fd = fd.into_raw_fd();
    // SAFETY: `into_raw_fd` gave up the ownership of an open descriptor just now, and `EventFd` takes it over.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}

/// A second descriptor for the same eventfd, close-on-exec.
pub(super) fn duplicate(fd: Option<&EventFd>) -> io::Result<Option<EventFd>> {
    fd.map(EventFd::try_clone).transpose()
}
