//! Writes that the kernel cannot take without blocking, carried out by a thread beside the worker.
//!
//! Most file systems do not write into the page cache without blocking (`RWF_NOWAIT`, which ext4 refuses). io_uring
//! hands such writes to a thread of the kernel, one after the other for each file, and the hand-over there and back
//! costs several times what the write costs. This thread takes them from a ring in memory and gives their results back
//! through another: while both sides poll, the write is the only system call.
//!
//! `channel` has the rings, which are atomic words, and the handshake of sleepers; `model` checks both with loom. The sender of a
//! job keeps what the job names (a file, memory) until it has taken the result.

mod channel;
#[cfg(test)]
mod model;

/// The atomics of `channel`. In its model they are those of loom.
mod atomics {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
}

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::libc::{self, iovec};

use self::channel::{Thread, WorkerEnd, channel};
use super::command::Waker;
use super::poll::{Idle, PollPolicy};
use crate::threads::AbortOnPanic;

/// Of the thread, which calls next to nothing.
const STACK_BYTES: usize = 128 << 10;

/// The thread as the worker sees it: the worker sends jobs and takes their results.
#[derive(Debug)]
pub(super) struct Writer {
    end: WorkerEnd<Job>,
    /// The file takes writes without blocking: an io_uring is quicker.
    is_unneeded: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A write. The counters of the channel say which of the threads may touch it.
#[derive(Debug, Default)]
struct Job {
    number: AtomicU32,
    file: AtomicI32,
    iovecs: AtomicPtr<iovec>,
    iovec_count: AtomicU32,
    offset_bytes: AtomicU64,
}

impl Writer {
    /// Starts the thread, with the name, the CPUs and the signals of the calling one. At most `jobs_max` jobs are
    /// outstanding at any time.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub(super) fn start(jobs_max: usize, poll: PollPolicy, worker: Waker) -> io::Result<Self> {
        let (end, thread_end) = channel(jobs_max);
        let is_unneeded = Arc::new(AtomicBool::new(false));
        let name = thread::current().name().unwrap_or("worker").replace("worker", "writer");
        let mut writes = Writes { poll, worker, is_unneeded: is_unneeded.clone(), flags: libc::RWF_NOWAIT };
        let thread = thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            // A job that is never answered would be waited for ever.
            let _guard = AbortOnPanic;
            thread_end.work(&mut writes);
        })?;
        Ok(Self { end, is_unneeded, thread: Some(thread) })
    }

    /// Whether writes go this way. Not if the first one has shown that the kernel takes them without blocking.
    #[inline]
    pub(super) fn is_needed(&self) -> bool {
        !self.is_unneeded.load(Ordering::Relaxed)
    }

    /// Whether results are still to come.
    #[inline]
    pub(super) fn is_busy(&self) -> bool {
        self.end.is_busy()
    }

    /// Sends a write; `number` comes back with its result. The thread may begin at once, and does so at the latest
    /// after [`wake`](Self::wake).
    ///
    /// # Safety
    ///
    /// Until the result was taken, the file is open, the iovecs stay in place, and the memory that they name is mapped;
    /// nobody relies on a reference into it to which a write of somebody else would matter.
    #[inline]
    pub(super) unsafe fn send(&mut self, number: u32, file: BorrowedFd<'_>, iovecs: &[iovec], offset_bytes: u64) {
        self.end.send(|job| {
            job.number.store(number, Ordering::Relaxed);
            job.file.store(file.as_raw_fd(), Ordering::Relaxed);
            job.iovecs.store(iovecs.as_ptr().cast_mut(), Ordering::Relaxed);
            job.iovec_count.store(iovecs.len() as u32, Ordering::Relaxed);
            job.offset_bytes.store(offset_bytes, Ordering::Relaxed);
        });
    }

    /// Wakes the thread if jobs were sent and it sleeps: no system call otherwise.
    #[inline]
    pub(super) fn wake(&mut self) {
        if self.end.has_to_wake_thread() {
            self.unpark();
        }
    }

    fn unpark(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Whether a result has come.
    #[cfg(test)]
    pub(super) fn has_result(&self) -> bool {
        self.end.has_result()
    }

    /// The next result: the job's number and what the kernel said, as io_uring gives it.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u32, i32)> {
        self.end.take().map(|result| ((result >> 32) as u32, result as u32 as i32))
    }

    /// Has the thread wake the worker with its next result. False: there is a result already.
    pub(super) fn announce_sleep(&self) -> bool {
        self.end.announce_sleep()
    }

    /// The worker is awake.
    pub(super) fn announce_waking(&self) {
        self.end.announce_waking();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end.end();
        self.unpark();
        if let Some(thread) = self.thread.take() {
            // It aborts the process if it panics.
            let _ = thread.join();
        }
    }
}

/// What the thread does with jobs, and without.
#[derive(Debug)]
struct Writes {
    poll: PollPolicy,
    worker: Waker,
    is_unneeded: Arc<AtomicBool>,
    /// Of the next write.
    flags: i32,
}

impl Thread<Job> for Writes {
    fn carry_out(&mut self, job: &Job) -> u64 {
        self.poll.busy(Instant::now);
        let mut result = job.carry_out(self.flags);
        if std::mem::take(&mut self.flags) != 0 {
            // The first job asks as well whether the kernel takes it without blocking: nothing is tried that the guest did
            // not want.
            if result == -libc::EOPNOTSUPP {
                result = job.carry_out(0);
            } else {
                self.is_unneeded.store(true, Ordering::Relaxed);
            }
        }
        let number = job.number.load(Ordering::Relaxed);
        u64::from(number) << 32 | u64::from(result as u32)
    }

    fn wake_worker(&mut self) {
        self.worker.wake();
    }

    fn pause(&mut self) {
        match self.poll.idle(false, Instant::now) {
            // The worker may be bound to the same CPU.
            Idle::Poll => thread::yield_now(),
            Idle::Sleep => thread::park(),
        }
    }
}

impl Job {
    /// Writes, and gives the number of bytes or a negative errno.
    fn carry_out(&self, flags: i32) -> i32 {
        // SAFETY: `Writer::send` promises that the file is open and that the iovecs and the memory that they name are
        // there until the result was taken, and it has not been given yet. The kernel only reads that memory.
        let written = unsafe {
            libc::pwritev2(
                self.file.load(Ordering::Relaxed),
                self.iovecs.load(Ordering::Relaxed),
                self.iovec_count.load(Ordering::Relaxed) as i32,
                self.offset_bytes.load(Ordering::Relaxed) as i64,
                flags,
            )
        };
        match written {
            -1 => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
            // At most 2 GiB (write(2)).
            bytes => bytes as i32,
        }
    }
}
