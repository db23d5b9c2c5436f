//! Writes that the kernel cannot take without blocking, carried out by a thread beside the worker.
//!
//! Most file systems do not write into the page cache without blocking (`RWF_NOWAIT`, which ext4 refuses). io_uring
//! hands such writes to a thread of the kernel, one after the other for each file, and the hand-over there and back
//! costs several times what the write costs. This thread takes them from a ring in memory and gives their results back
//! through another: while both sides poll, the write is the only system call.
//!
//! The rings are atomic words. What a job names (a file, memory) its sender keeps until it has taken the result.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::libc::{self, iovec};

use super::cache_line::CacheLine;
use super::command::Waker;
use super::poll::{Idle, PollPolicy};
use crate::threads::AbortOnPanic;

/// Of the thread, which calls next to nothing.
const STACK_BYTES: usize = 128 << 10;

/// The worker's end: it sends jobs and takes their results.
#[derive(Debug)]
pub(super) struct Writer {
    channel: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
    /// Jobs sent, and results taken. Both wrap.
    sent: u32,
    taken: u32,
    /// Jobs were sent since the thread was woken last.
    has_new_jobs: bool,
}

/// What both threads have. Each ring has room for all jobs that can be outstanding.
#[derive(Debug)]
struct Channel {
    jobs: Box<[Job]>,
    results: Box<[AtomicU64]>,
    sent: CacheLine<AtomicU32>,
    done: CacheLine<AtomicU32>,
    /// The worker sleeps and wants to be woken by the next result.
    is_worker_asleep: CacheLine<AtomicBool>,
    /// The file takes writes without blocking: an io_uring is quicker.
    is_unneeded: AtomicBool,
    is_ended: AtomicBool,
}

/// A write. `Channel::sent` and `Channel::done` say which of the threads may touch it.
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
        let room = jobs_max.next_power_of_two();
        let channel = Arc::new(Channel {
            jobs: (0..room).map(|_| Job::default()).collect(),
            results: (0..room).map(|_| AtomicU64::default()).collect(),
            sent: CacheLine::default(),
            done: CacheLine::default(),
            is_worker_asleep: CacheLine::default(),
            is_unneeded: AtomicBool::default(),
            is_ended: AtomicBool::default(),
        });
        let name = thread::current().name().unwrap_or("worker").replace("worker", "writer");
        let its_channel = Arc::clone(&channel);
        let thread = thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            // A job that is never answered would be waited for ever.
            let _guard = AbortOnPanic;
            its_channel.work(poll, &worker);
        })?;
        Ok(Self { channel, thread: Some(thread), sent: 0, taken: 0, has_new_jobs: false })
    }

    /// Whether writes go this way. Not if the first one has shown that the kernel takes them without blocking.
    #[inline]
    pub(super) fn is_needed(&self) -> bool {
        !self.channel.is_unneeded.load(Ordering::Relaxed)
    }

    /// Whether results are still to come.
    #[inline]
    pub(super) fn is_busy(&self) -> bool {
        self.sent != self.taken
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
        let channel = &*self.channel;
        debug_assert!(
            (self.sent.wrapping_sub(self.taken) as usize) < channel.jobs.len(),
            "more jobs than there can be"
        );
        let job = &channel.jobs[self.sent as usize & (channel.jobs.len() - 1)];
        job.number.store(number, Ordering::Relaxed);
        job.file.store(file.as_raw_fd(), Ordering::Relaxed);
        job.iovecs.store(iovecs.as_ptr().cast_mut(), Ordering::Relaxed);
        job.iovec_count.store(iovecs.len() as u32, Ordering::Relaxed);
        job.offset_bytes.store(offset_bytes, Ordering::Relaxed);
        self.sent = self.sent.wrapping_add(1);
        // After the job: whoever sees the number sees the job.
        channel.sent.0.store(self.sent, Ordering::Release);
        self.has_new_jobs = true;
    }

    /// Wakes the thread if jobs were sent and it sleeps: no system call otherwise.
    #[inline]
    pub(super) fn wake(&mut self) {
        if std::mem::take(&mut self.has_new_jobs) {
            if let Some(thread) = &self.thread {
                thread.thread().unpark();
            }
        }
    }

    /// Whether a result has come. Nothing that the two threads share is looked at while none can come.
    #[inline]
    pub(super) fn has_result(&self) -> bool {
        self.is_busy() && self.channel.done.0.load(Ordering::Acquire) != self.taken
    }

    /// The next result: the job's number and what the kernel said, as io_uring gives it.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u32, i32)> {
        if !self.has_result() {
            return None;
        }
        let results = &self.channel.results;
        let result = results[self.taken as usize & (results.len() - 1)].load(Ordering::Relaxed);
        self.taken = self.taken.wrapping_add(1);
        Some(((result >> 32) as u32, result as u32 as i32))
    }

    /// Has the thread wake the worker with its next result. False: there is a result already.
    pub(super) fn announce_sleep(&self) -> bool {
        if !self.is_busy() {
            return true;
        }
        // Sequentially consistent, as is the other side: either it sees that the worker sleeps, or the worker the
        // result.
        self.channel.is_worker_asleep.0.store(true, Ordering::SeqCst);
        self.channel.done.0.load(Ordering::SeqCst) == self.taken
    }

    /// The worker is awake.
    pub(super) fn announce_waking(&self) {
        self.channel.is_worker_asleep.0.store(false, Ordering::Relaxed);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.channel.is_ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It aborts the process if it panics.
            let _ = thread.join();
        }
    }
}

impl Channel {
    /// Carries jobs out until it is told to end.
    fn work(&self, mut poll: PollPolicy, worker: &Waker) {
        let mut done = 0u32;
        let mut flags = libc::RWF_NOWAIT;
        loop {
            if self.sent.0.load(Ordering::Acquire) != done {
                poll.busy(Instant::now);
                let job = &self.jobs[done as usize & (self.jobs.len() - 1)];
                let mut result = job.carry_out(flags);
                if flags != 0 {
                    // The first job asks as well whether the kernel takes it without blocking: nothing is tried that
                    // the guest did not want.
                    flags = 0;
                    if result == -libc::EOPNOTSUPP {
                        result = job.carry_out(flags);
                    } else {
                        self.is_unneeded.store(true, Ordering::Relaxed);
                    }
                }
                let number = job.number.load(Ordering::Relaxed);
                let word = u64::from(number) << 32 | u64::from(result as u32);
                self.results[done as usize & (self.results.len() - 1)].store(word, Ordering::Relaxed);
                done = done.wrapping_add(1);
                // After the result, and before the look at whether the worker sleeps.
                self.done.0.store(done, Ordering::SeqCst);
                if self.is_worker_asleep.0.load(Ordering::SeqCst)
                    && self.is_worker_asleep.0.swap(false, Ordering::SeqCst)
                {
                    worker.wake();
                }
                continue;
            }
            if self.is_ended.load(Ordering::Acquire) {
                return;
            }
            match poll.idle(false, Instant::now) {
                // The worker may be bound to the same CPU.
                Idle::Poll => thread::yield_now(),
                Idle::Sleep => thread::park(),
            }
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
