//! The descriptors of eventfds, whose type borrows and owns them without Rust's types for that.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd, for calls that borrow it.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The eventfd that a descriptor refers to.
pub(crate) fn from_fd(fd: OwnedFd) -> EventFd {
    // SAFETY: `into_raw_fd` gives the ownership of the descriptor up, so that only the result owns it.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}
