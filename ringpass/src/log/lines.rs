//! A bounded queue of log lines for standard error.
//!
//! A reader that does not read (a full pipe, a terminal stopped with ^S) can block `write(2)` for any time. Therefore
//! the threads of a server only append lines to a bounded queue, and a dedicated thread writes them. The queue counts
//! the lines that find no room, and writes the count in their place.
//!
//! `tracing-appender`'s non-blocking writer does not fit: its thread starts before the first line, but a process can
//! drop its privileges only while it has one thread; and the writer does not report how many lines it lost. Here each
//! thread writes its own lines until [`Lines::write_in_background`], as far as standard error accepts them without
//! waiting.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Maximum number of queued bytes. A line of the log has one to two hundred bytes.
const QUEUE_BYTES_MAX: usize = 256 << 10;
/// A pipe that is ready for writing takes this many bytes without blocking (`PIPE_BUF`).
const PIECE_BYTES: usize = 4096;

/// A queue of lines for standard error.
pub(super) struct Lines {
    /// The destination. `None`: standard error.
    output: Option<OwnedFd>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    queue: VecDeque<Entry>,
    queue_bytes: usize,
    /// Number of lines lost since the last entry of the queue.
    lost: u64,
    /// Whether the last write failed. Then another attempt makes no sense before the next line.
    is_broken: bool,
    has_thread: bool,
    /// Whether the thread writes an entry that is no longer in the queue.
    is_writing: bool,
}

/// Queued text, and the number of log lines that are lost if the text is lost.
struct Entry {
    text: Vec<u8>,
    written_bytes: usize,
    lines: u64,
}

impl Entry {
    fn line(text: Vec<u8>) -> Self {
        Self { text, written_bytes: 0, lines: 1 }
    }

    fn lost(lines: u64) -> Self {
        let missing =
            if lines == 1 { "1 line of the log is".to_owned() } else { format!("{lines} lines of the log are") };
        let text = format!("ringpass: {missing} missing here: standard error took no more\n");
        Self { text: text.into_bytes(), written_bytes: 0, lines }
    }

    /// Writes the rest of the entry. If the wait has an `end` and standard error accepts no more until then: TIMEDOUT.
    fn write_to(&mut self, output: BorrowedFd<'_>, end: Option<Instant>) -> Result<(), Errno> {
        while self.written_bytes < self.text.len() {
            if end.is_some() {
                wait_until_writable(output, end)?;
            }
            let rest = &self.text[self.written_bytes..];
            match rustix::io::write(output, &rest[..rest.len().min(PIECE_BYTES)]) {
                Ok(count) => self.written_bytes += count,
                Err(Errno::INTR) => {}
                // Another process that shares the open file has made it non-blocking.
                Err(Errno::AGAIN) => wait_until_writable(output, end)?,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

impl Lines {
    pub(super) const fn new() -> Self {
        let state = State {
            queue: VecDeque::new(),
            queue_bytes: 0,
            lost: 0,
            is_broken: false,
            has_thread: false,
            is_writing: false,
        };
        Self { output: None, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Queues a line, or counts it as lost if the queue is full.
    pub(super) fn push(&self, line: Vec<u8>) {
        let mut state = self.lock();
        if state.queue_bytes + line.len() > QUEUE_BYTES_MAX {
            state.lost += 1;
            return;
        }
        self.add(state, line);
    }

    /// Queues a line even if the queue is full: for the last line of a program.
    pub(super) fn push_always(&self, line: Vec<u8>) {
        self.add(self.lock(), line);
    }

    fn add(&self, mut state: MutexGuard<'_, State>, line: Vec<u8>) {
        if state.lost > 0 {
            let lost = std::mem::take(&mut state.lost);
            state.put_back(Entry::lost(lost));
        }
        state.put_back(Entry::line(line));
        if state.has_thread {
            self.changed.notify_all();
        } else {
            state.write_until(self.output(), Instant::now());
        }
    }

    /// Starts the thread that writes all lines from now on.
    pub(super) fn write_in_background(&'static self) -> io::Result<()> {
        let mut state = self.lock();
        if !state.has_thread {
            thread::Builder::new().name("log".into()).spawn(|| self.write_for_ever())?;
            state.has_thread = true;
        }
        Ok(())
    }

    /// Waits until all lines are written, but not longer than `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let mut state = self.lock();
        if state.has_thread {
            let is_busy = |state: &mut State| state.is_writing || state.has_more();
            let waited = self.changed.wait_timeout_while(state, limit, is_busy);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        } else {
            state.write_until(self.output(), Instant::now() + limit);
        }
    }

    fn write_for_ever(&self) {
        leave_signals_to_others();
        let mut state = self.lock();
        loop {
            let Some(mut entry) = state.next() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.is_writing = true;
            drop(state);
            let written = entry.write_to(self.output(), None);
            state = self.lock();
            state.is_writing = false;
            state.note(&entry, written);
            self.changed.notify_all();
        }
    }

    fn output(&self) -> BorrowedFd<'_> {
        match &self.output {
            Some(output) => output.as_fd(),
            // Without the lock of `Stderr`, on which other threads would block.
            None => rustix::stdio::stderr(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic the queue is still usable: at worst one line is cut short.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn put_back(&mut self, entry: Entry) {
        self.queue_bytes += entry.text.len();
        self.queue.push_back(entry);
    }

    fn has_more(&self) -> bool {
        !self.queue.is_empty() || self.has_news()
    }

    /// Whether lines were lost after the last queued entry, and the writer may report this now.
    fn has_news(&self) -> bool {
        self.lost > 0 && !self.is_broken
    }

    /// The next entry to write.
    fn next(&mut self) -> Option<Entry> {
        let Some(entry) = self.queue.pop_front() else {
            return self.has_news().then(|| Entry::lost(std::mem::take(&mut self.lost)));
        };
        self.queue_bytes -= entry.text.len();
        Some(entry)
    }

    fn note(&mut self, entry: &Entry, written: Result<(), Errno>) {
        self.is_broken = written.is_err();
        if self.is_broken {
            self.lost += entry.lines;
        }
    }

    /// Writes on this thread while standard error accepts lines, at most until `end`.
    fn write_until(&mut self, output: BorrowedFd<'_>, end: Instant) {
        while let Some(mut entry) = self.next() {
            match entry.write_to(output, Some(end)) {
                Err(Errno::TIMEDOUT) => {
                    self.queue_bytes += entry.text.len();
                    self.queue.push_front(entry);
                    return;
                }
                written => self.note(&entry, written),
            }
        }
    }
}

fn wait_until_writable(output: BorrowedFd<'_>, end: Option<Instant>) -> Result<(), Errno> {
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut [PollFd::from_borrowed_fd(output, PollFlags::OUT)], left.as_ref()) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Another thread of the program waits for signals. SIGSYS must stay unblocked: its handler reports system calls that
/// the sandbox refuses.
fn leave_signals_to_others() {
    let mut signals = SigSet::all();
    signals.remove(nix::sys::signal::Signal::SIGSYS);
    // If this fails, signals interrupt the thread now and then, which does no harm.
    let _ = signals.thread_block();
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::fd::OwnedFd;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// Lines for a full pipe, the pipe's reader, and the number of bytes in the pipe. Lines live as long as their
    /// writer thread.
    fn full_pipe() -> (&'static Lines, File, usize) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut writer = File::from(writer);
        let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
        rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
        let mut filled_bytes = 0;
        while let Ok(count) = writer.write(&[b'.'; 4096]) {
            filled_bytes += count;
        }
        rustix::fs::fcntl_setfl(&writer, flags).unwrap();
        let output = Some(OwnedFd::from(writer));
        (Box::leak(Box::new(Lines { output, ..Lines::new() })), reader.into(), filled_bytes)
    }

    fn lost_in(line: &str) -> Option<usize> {
        line.strip_prefix("ringpass: ").filter(|line| line.contains("missing here"))?.split(' ').next()?.parse().ok()
    }

    #[test]
    fn the_line_about_missing_lines_agrees_with_their_number() {
        for (lines, start) in
            [(1, "ringpass: 1 line of the log is missing"), (2, "ringpass: 2 lines of the log are missing")]
        {
            assert!(String::from_utf8(Entry::lost(lines).text).unwrap().starts_with(start), "{lines}");
        }
    }

    #[test]
    fn a_blocked_reader_delays_no_thread_and_learns_how_many_lines_are_missing() {
        let (lines, mut reader, filled_bytes) = full_pipe();
        lines.push(b"line 0 before there is a thread\n".to_vec());
        lines.write_in_background().unwrap();
        const PUSHED: usize = 20_000;
        for number in 1..PUSHED {
            lines.push(format!("line {number} of a server that goes on\n").into_bytes());
        }
        lines.flush(Duration::from_millis(1));
        reader.read_exact(&mut vec![0; filled_bytes]).unwrap();
        let (mut expected, mut missing) = (0, 0);
        let mut reader = BufReader::new(reader);
        while expected < PUSHED {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(lost) = lost_in(&line) {
                expected += lost;
                missing += lost;
            } else {
                assert!(line.starts_with(&format!("line {expected} ")), "line {expected} comes next: {line}");
                expected += 1;
            }
        }
        assert!(missing > 0, "so many lines have no room");
        lines.push(b"later\n".to_vec());
        lines.flush(LIMIT);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "later\n");
    }

    #[test]
    fn the_last_line_of_a_program_waits_for_the_reader_for_a_limited_time() {
        let (lines, mut reader, filled_bytes) = full_pipe();
        lines.push(vec![b'x'; QUEUE_BYTES_MAX]);
        lines.push(b"too much\n".to_vec());
        lines.push_always(b"the end\n".to_vec());
        lines.flush(Duration::from_millis(10));
        reader.read_exact(&mut vec![0; filled_bytes]).unwrap();
        let rest = thread::spawn(move || {
            let mut rest = vec![0; QUEUE_BYTES_MAX];
            reader.read_exact(&mut rest).unwrap();
            BufReader::new(reader).lines().take(2).map(Result::unwrap).collect::<Vec<_>>()
        });
        lines.flush(LIMIT);
        let rest = rest.join().unwrap();
        assert_eq!((lost_in(&rest[0]), rest[1].as_str()), (Some(1), "the end"));
    }

    #[test]
    fn a_closed_reader_delays_no_thread() {
        let (lines, reader, _) = full_pipe();
        lines.write_in_background().unwrap();
        lines.push(b"one\n".to_vec());
        drop(reader);
        lines.push(b"two\n".to_vec());
        lines.flush(LIMIT);
        let state = lines.lock();
        assert!(!state.has_more() && state.lost == 2 && state.is_broken);
    }
}
