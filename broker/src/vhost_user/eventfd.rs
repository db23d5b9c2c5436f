//! Eventfds that the front-end passes.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::CWD;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// What the link of an eventfd in /proc/self/fd says.
const EVENTFD_LINK: &str = "anon_inode:[eventfd]";

/// The front-end passed something else as kick, call or error eventfd.
///
/// Anything else could block us or swallow what is written to it: a FIFO, a terminal, a file of a remote file system.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the file descriptor is no eventfd but {link}")]
pub struct NotAnEventfd {
    link: String,
}

/// Takes a descriptor as an eventfd.
///
/// Its flags stay as they are: O_NONBLOCK belongs to the open file description, which the front-end goes on using.
///
/// # Errors
///
/// It is no eventfd. Without /proc nothing can be known, and it is taken as one.
pub(super) fn adopt(fd: OwnedFd) -> Result<EventFd, NotAnEventfd> {
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
