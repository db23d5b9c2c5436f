//! A worker's io_uring: set-up on whatever this kernel has, submission, waiting.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc;
use vmm_sys_util::eventfd::EventFd;

use super::EngineError;

/// The disk's place in the table of fixed files; nothing else is in it.
pub(super) const DISK: types::Fixed = types::Fixed(0);

/// Entries of the SQ. A turn of the worker that has more to submit enters the kernel more than once.
const SQ_ENTRIES: u32 = 256;

/// Kernel threads for requests that would block (`IORING_REGISTER_IOWQ_MAX_WORKERS`): for files and block devices.
///
/// As many requests can block at one time without holding up others. Without a limit there are up to four for each
/// CPU, but never more than the SQ has entries.
const WORKERS_FOR_FILES_MAX: u32 = 32;

/// The same for everything else, which is nothing here. Zero would mean "leave it as it is".
const WORKERS_FOR_OTHERS_MAX: u32 = 1;

/// How the kernel runs what is left to do when a request completes by interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TaskRun {
    /// When the worker enters the kernel to wait, and at no other time (Linux 6.1). A flag in the ring tells of it.
    Deferred,
    /// At the worker's next system call (Linux 5.19). The same flag tells of it.
    Cooperative,
    /// At once: the worker is interrupted.
    Interrupting,
}

/// Creates the ring of the calling thread, which must be the only one that uses it.
///
/// `completions_max` is the largest number of completions that can be outstanding.
pub(super) fn create(completions_max: u32) -> Result<IoUring, EngineError> {
    let mut refusal = None;
    for (task_run, newest) in [
        (TaskRun::Deferred, true),
        (TaskRun::Deferred, false),
        (TaskRun::Cooperative, false),
        (TaskRun::Interrupting, false),
    ] {
        match build(completions_max, task_run, newest) {
            Ok(ring) => {
                tracing::debug!(?task_run, newest, "io_uring of a worker");
                return Ok(ring);
            }
            // The kernel does not know one of the flags.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = Some(error),
            Err(error) => return Err(EngineError::Ring(error)),
        }
    }
    Err(EngineError::Ring(refusal.expect("the loop returns unless it was refused")))
}

fn build(completions_max: u32, task_run: TaskRun, newest: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_cqsize(completions_max.max(SQ_ENTRIES).next_power_of_two());
    match task_run {
        TaskRun::Deferred => builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag(),
        TaskRun::Cooperative => builder.setup_coop_taskrun().setup_taskrun_flag(),
        TaskRun::Interrupting => &mut builder,
    };
    if task_run != TaskRun::Interrupting {
        // One bad entry does not hold up those behind it (Linux 5.18).
        builder.setup_submit_all();
    }
    if newest {
        // One indirection less per entry (Linux 6.6).
        builder.setup_no_sqarray();
    }
    builder.build(SQ_ENTRIES)
}

/// A ring in use.
pub(super) struct Ring<'r> {
    submitter: io_uring::Submitter<'r>,
    sq: squeue::SubmissionQueue<'r>,
    cq: cqueue::CompletionQueue<'r>,
    /// Entries in the SQ that the kernel has not taken.
    unsubmitted: u32,
}

impl<'r> Ring<'r> {
    /// Makes a ring ready for the calling thread.
    pub(super) fn new(ring: &'r mut IoUring) -> Self {
        let (mut submitter, sq, cq) = ring.split();
        // Saves the kernel a look-up at each call (Linux 5.18).
        if let Err(error) = submitter.register_ring_fd() {
            tracing::debug!(%error, "the ring is used by its file descriptor");
        }
        let mut limits = [WORKERS_FOR_FILES_MAX, WORKERS_FOR_OTHERS_MAX];
        // Linux 5.15.
        if let Err(error) = submitter.register_iowq_max_workers(&mut limits) {
            tracing::debug!(%error, "the ring's worker threads have the kernel's own limit");
        }
        Self { submitter, sq, cq, unsubmitted: 0 }
    }

    /// Makes `disk` the fixed file that requests name. The kernel holds the open file description from now on.
    pub(super) fn register_disk(&self, disk: BorrowedFd<'_>) -> io::Result<()> {
        self.submitter.register_files(&[disk.as_raw_fd()])
    }

    /// Lets go of the disk. No request may be under way.
    pub(super) fn unregister_disk(&self) -> io::Result<()> {
        self.submitter.unregister_files()
    }

    /// Puts an entry into the SQ; if it is full, what is there is submitted first.
    ///
    /// # Safety
    ///
    /// The kernel may read and write the memory that the entry names until its completion was reaped: it must be mapped
    /// for so long, and nobody may rely on a reference into it. Arrays of iovecs are read when the entry is submitted,
    /// and must stay in place until then.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the caller's contract is the same.
            if unsafe { self.sq.push(entry) }.is_ok() {
                self.unsubmitted += 1;
                return;
            }
            self.submit();
        }
    }

    /// Wants to know when `eventfd` becomes readable: one completion with `user_data`, at once if it is already.
    pub(super) fn push_poll(&mut self, eventfd: &EventFd, user_data: u64) {
        let entry =
            opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).build().user_data(user_data);
        // SAFETY: the entry names no memory. The descriptor is looked up when it is submitted; a wrong one is refused.
        unsafe { self.push(&entry) };
    }

    /// Takes a poll back. It completes, and so does this, with `user_data`.
    pub(super) fn push_poll_remove(&mut self, poll: u64, user_data: u64) {
        let entry = opcode::PollRemove::new(poll).build().user_data(user_data);
        // SAFETY: the entry names no memory.
        unsafe { self.push(&entry) };
    }

    /// Hands the kernel what is in the SQ, and lets it finish what it deferred. No system call if there is nothing
    /// of either.
    pub(super) fn submit(&mut self) {
        self.sq.sync();
        if self.unsubmitted > 0 || self.sq.taskrun() || self.sq.cq_overflow() {
            self.enter(0);
        }
    }

    /// The same, and waits for a completion.
    pub(super) fn submit_and_wait(&mut self) {
        self.sq.sync();
        self.enter(1);
    }

    fn enter(&mut self, want: usize) {
        match self.submitter.submit_and_wait(want) {
            Ok(_) => {}
            // A signal; or the kernel is short of memory or wants the CQ emptied first. What was not taken stays in the
            // SQ, and the next turn hands it over again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            // Anything else is about the ring, which only this code uses.
            Err(error) => panic!("entering a worker's io_uring: {error}"),
        }
        self.sq.sync();
        self.unsubmitted = self.sq.len() as u32;
    }

    /// Takes the next completion.
    pub(super) fn reap(&mut self) -> Option<cqueue::Entry> {
        self.cq.next()
    }

    /// Makes the completions that came since the last time visible to [`reap`](Self::reap).
    pub(super) fn sync_completions(&mut self) {
        self.cq.sync();
    }
}
