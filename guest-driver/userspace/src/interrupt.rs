//! Waits for the interrupt of a device.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::eventfd;

/// Waits until a device signals `event`, which must not block, and takes all signals. Returns false if no signal comes
/// within `timeout`.
///
/// # Errors
///
/// The kernel refuses to poll or read the descriptor: it is not an eventfd.
pub fn wait_for_interrupt(event: &EventFd, timeout: Duration) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        let left = timeout.saturating_sub(start.elapsed());
        // A timeout that the type cannot hold is longer than a program runs.
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let mut fds = [PollFd::from_borrowed_fd(eventfd::borrow(event), PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match event.read() {
            Ok(_) => return Ok(true),
            // Another thread took the signals, or a signal handler interrupted the read: wait on.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}
