//! A line on standard error, written by a signal handler.

use std::fmt;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Fits into a pipe as a whole (`PIPE_BUF` is at least 512 everywhere).
const BYTES_MAX: usize = 512;

/// A line of text without an allocator. Text beyond its end is cut off.
pub(crate) struct Line {
    bytes: [u8; BYTES_MAX],
    len: usize,
}

impl Line {
    /// The line with this text and a newline.
    pub(crate) fn of(text: fmt::Arguments<'_>) -> Self {
        let mut line = Self { bytes: [0; BYTES_MAX], len: 0 };
        // Writing to a `Line` never fails.
        let _ = fmt::Write::write_fmt(&mut line, format_args!("{text}\n"));
        line
    }

    /// Writes the line, unless standard error has no room: the calling thread must not wait for a reader.
    ///
    /// Uses only the stack and two system calls.
    pub(crate) fn write_to_stderr(&self) {
        let stderr = std::io::stderr();
        let mut fds = [PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, Some(&now)) == Ok(1) {
            // There is no other place to report a failed write.
            let _ = rustix::io::write(stderr.as_fd(), &self.bytes[..self.len]);
        }
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_cut_off() {
        let line = Line::of(format_args!("{:#x} {}", 255, "y".repeat(1000)));
        assert_eq!(line.len, BYTES_MAX);
        assert!(line.bytes.starts_with(b"0xff yyy"));
        let line = Line::of(format_args!("short"));
        assert_eq!(&line.bytes[..line.len], b"short\n");
    }
}
