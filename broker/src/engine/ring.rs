//! A worker's io_uring: set-up with what this kernel supports, submission, waiting. `policy`: what the ring may do.

mod policy;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

pub(super) use policy::RingPolicy;

use super::EngineError;
use super::token::Token;
use crate::limits::while_memory_is_freed;
use crate::ring_fd::{UNTAGGED, register_tagged_files};

/// The disk's place in the table of fixed files.
pub(super) const DISK: types::Fixed = types::Fixed(0);

/// The place of the same file through the page cache, if there is that. Nothing else is in the table.
pub(super) const PAGE_CACHE: types::Fixed = types::Fixed(1);

/// Entries of the SQ. A poll iteration that has more to submit enters the kernel more than once.
const SQ_ENTRIES: u32 = 256;

/// Kernel threads for requests that would block (`IORING_REGISTER_IOWQ_MAX_WORKERS`): for files and block devices.
///
/// As many requests can block at one time without holding up others. Without a limit there are up to four for each
/// CPU, but never more than the SQ has entries.
const WORKERS_FOR_FILES_MAX: u32 = 32;

/// The same for everything else, which is nothing here. Zero would mean "leave it as it is".
const WORKERS_FOR_OTHERS_MAX: u32 = 1;

/// System calls in errors.
const REGISTER: &str = "io_uring_register";
const ENTER: &str = "io_uring_enter";

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

/// Creates the io_uring of the calling thread, with the restrictions of `policy`, and tries it out with each system call that a worker
/// makes later. No other thread may use it.
///
/// `completions_max` is the largest number of completions that can be outstanding.
pub(super) fn open(completions_max: u32, policy: &RingPolicy) -> Result<IoUring, EngineError> {
    let open = || {
        let mut ring = create(completions_max, policy)?;
        limit_kernel_threads(&ring);
        policy.enable(&ring).map_err(|source| EngineError::Ring { call: REGISTER, source })?;
        try_out(&mut ring)?;
        Ok(ring)
    };
    while_memory_is_freed(
        open,
        |error| matches!(error, EngineError::Ring { source, .. } if source.raw_os_error() == Some(libc::ENOMEM)),
    )
}

/// What the memory of a ring takes, in bytes, for which Linux 6.14 and later charge the user (`RLIMIT_MEMLOCK`).
pub(super) fn memory_bytes(completions_max: u32) -> u64 {
    /// `struct io_rings` without the CQEs.
    const HEADER_BYTES: u64 = 192;
    let pages = |bytes: u64| bytes.next_multiple_of(rustix::param::page_size() as u64);
    let (sqe, cqe) = (size_of::<squeue::Entry>() as u64, size_of::<cqueue::Entry>() as u64);
    pages(u64::from(SQ_ENTRIES) * sqe) + pages(HEADER_BYTES + u64::from(cq_entries(completions_max)) * cqe)
}

fn create(completions_max: u32, policy: &RingPolicy) -> Result<IoUring, EngineError> {
    let failed = |source| EngineError::Ring { call: "io_uring_setup", source };
    let mut refusal = None;
    for (task_run, newest) in [
        (TaskRun::Deferred, true),
        (TaskRun::Deferred, false),
        (TaskRun::Cooperative, false),
        (TaskRun::Interrupting, false),
    ] {
        match build(completions_max, policy, task_run, newest) {
            Ok(ring) => {
                tracing::debug!(?task_run, newest, is_restricted = policy.restricts(), "io_uring of a worker");
                return Ok(ring);
            }
            // The kernel does not know one of the flags.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = Some(error),
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(refusal.expect("the loop returns unless it was refused")))
}

/// Limits the kernel threads of the calling thread's rings. The restrictions forbid it later.
fn limit_kernel_threads(ring: &IoUring) {
    let mut limits = [WORKERS_FOR_FILES_MAX, WORKERS_FOR_OTHERS_MAX];
    // Linux 5.15.
    if let Err(error) = ring.submitter().register_iowq_max_workers(&mut limits) {
        tracing::debug!(%error, "the ring's worker threads have the kernel's own limit");
    }
}

/// Registers a file, as the disk will be, and executes a request.
fn try_out(ring: &mut IoUring) -> Result<(), EngineError> {
    let failed = |call| move |source| EngineError::Ring { call, source };
    // Any file will do.
    let file = EventFd::new(EFD_CLOEXEC).map_err(EngineError::Eventfd)?;
    ring.submitter().register_files(&[file.as_raw_fd()]).map_err(failed(REGISTER))?;
    // SAFETY: the entry names no memory and no file.
    unsafe { ring.submission().push(&opcode::Nop::new().build()) }.expect("the ring is empty");
    let executed = loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    executed.map_err(failed(ENTER))?;
    let refused = ring.completion().next().map(|completion| completion.result()).filter(|&result| result < 0);
    if let Some(result) = refused {
        return Err(failed(ENTER)(io::Error::from_raw_os_error(-result)));
    }
    ring.submitter().unregister_files().map_err(failed(REGISTER))
}

fn cq_entries(completions_max: u32) -> u32 {
    completions_max.max(SQ_ENTRIES).next_power_of_two()
}

fn build(completions_max: u32, policy: &RingPolicy, task_run: TaskRun, newest: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_cqsize(cq_entries(completions_max));
    if policy.restricts() {
        builder.setup_r_disabled();
    }
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
    fd: BorrowedFd<'r>,
    submitter: io_uring::Submitter<'r>,
    sq: squeue::SubmissionQueue<'r>,
    cq: cqueue::CompletionQueue<'r>,
    /// Entries in the SQ that the kernel has not taken.
    unsubmitted: u32,
    /// The kernel tells of the release of a fixed file by a completion.
    tells_of_release: bool,
}

/// Whether a fixed file that was unregistered is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Release {
    /// The kernel holds nothing of it any more for this ring.
    Done,
    /// [`Token::DiskReleased`] will tell.
    ToBeTold,
}

impl<'r> Ring<'r> {
    /// Makes a ring ready for the calling thread.
    ///
    /// # Errors
    ///
    /// [`EngineError::Eventfd`]: there is no descriptor for a trial.
    pub(super) fn new(ring: &'r mut IoUring) -> Result<Self, EngineError> {
        let fd = ring.as_raw_fd();
        // SAFETY: `ring` is open, and borrowed for as long as the result lives.
        let fd: BorrowedFd<'r> = unsafe { BorrowedFd::borrow_raw(fd) };
        let (mut submitter, sq, cq) = ring.split();
        // Saves the kernel a look-up at each call (Linux 5.18).
        if let Err(error) = submitter.register_ring_fd() {
            tracing::debug!(%error, "the ring is used by its file descriptor");
        }
        let mut ring = Self { fd, submitter, sq, cq, unsubmitted: 0, tells_of_release: false };
        ring.tells_of_release = ring.try_release()?;
        tracing::debug!(ring.tells_of_release, "how a worker's io_uring lets go of the disk");
        Ok(ring)
    }

    /// Finds out how this kernel lets go of a fixed file. Before Linux 6.13 the system call that unregisters it waits until no
    /// request holds it. Since then a request that has completed can hold it for a while, and a completion tells of its release.
    fn try_release(&mut self) -> Result<bool, EngineError> {
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .map_err(|errno| EngineError::Eventfd(errno.into()))?;
        let tag = Token::DiskReleased.to_user_data();
        let is_registered = register_tagged_files(self.fd, [(file.as_fd(), tag)]).is_ok();
        if !is_registered || self.submitter.unregister_files().is_err() {
            // Older than Linux 5.13.
            return Ok(false);
        }
        self.cq.sync();
        Ok(self.cq.next().is_some_and(|completion| completion.user_data() == tag))
    }

    /// Makes `disk` the fixed file that requests name, and `page_cache` the other one. The kernel holds the open file
    /// descriptions from now on.
    pub(super) fn register_disk(&self, disk: BorrowedFd<'_>, page_cache: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if self.tells_of_release {
            // The lock is the disk's only.
            let files = [Some((disk, Token::DiskReleased.to_user_data())), page_cache.map(|file| (file, UNTAGGED))];
            return register_tagged_files(self.fd, files.into_iter().flatten());
        }
        let files: Vec<_> = [Some(disk), page_cache].iter().flatten().map(AsRawFd::as_raw_fd).collect();
        self.submitter.register_files(&files)
    }

    /// Has the kernel let go of the disk. No request may be under way.
    pub(super) fn unregister_disk(&self) -> io::Result<Release> {
        self.submitter.unregister_files()?;
        Ok(if self.tells_of_release { Release::ToBeTold } else { Release::Done })
    }

    /// Puts an entry into the SQ; if it is full, what is there is submitted first.
    ///
    /// # Safety
    ///
    /// The kernel may read and write the memory that the entry names until its completion was reaped: it must be mapped
    /// for so long, and no code may rely on a reference into it. Arrays of iovecs are read when the entry is submitted,
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

    /// Asks to be told when `eventfd` becomes readable: one completion with `user_data`, at once if it is already.
    pub(super) fn push_poll(&mut self, eventfd: &EventFd, user_data: u64) {
        let entry =
            opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).build().user_data(user_data);
        // SAFETY: the entry names no memory. The descriptor is looked up when it is submitted; a wrong one is refused.
        unsafe { self.push(&entry) };
    }

    /// Asks to be told of each write to `eventfd` that follows, and once at the beginning if it is readable: completions with
    /// `user_data` and IORING_CQE_F_MORE until it is taken back (Linux 5.13; older kernels refuse it at once).
    pub(super) fn push_poll_writes(&mut self, eventfd: &EventFd, user_data: u64) {
        let poll = opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).multi(true);
        let entry = poll.build().user_data(user_data);
        // SAFETY: the entry names no memory. The descriptor is looked up when it is submitted; a wrong one is refused.
        unsafe { self.push(&entry) };
    }

    /// Takes a poll back. It completes, and so does this, with `user_data`.
    pub(super) fn push_poll_remove(&mut self, poll: u64, user_data: u64) {
        let entry = opcode::PollRemove::new(poll).build().user_data(user_data);
        // SAFETY: the entry names no memory.
        unsafe { self.push(&entry) };
    }

    /// Takes a timeout back. It completes, and so does this, with `user_data`.
    pub(super) fn push_timeout_remove(&mut self, timeout: u64, user_data: u64) {
        let entry = opcode::TimeoutRemove::new(timeout).build().user_data(user_data);
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
            // SQ, and the next poll iteration hands it over again.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::driver::wait_until;
    use crate::skipped::skipped;

    #[test]
    fn a_file_that_was_unregistered_is_released_when_the_last_request_that_names_it_is_gone() {
        let mut ring = open(8, &RingPolicy::of_this_kernel()).unwrap();
        let mut ring = Ring::new(&mut ring).unwrap();
        if !ring.tells_of_release {
            return skipped(
                "engine::ring::tests::a_file_that_was_unregistered_is_released_when_the_last_request_that_names_it_is_gone",
                "this kernel waits for such requests when a file is unregistered",
            );
        }
        let event = EventFd::new(0).unwrap();
        // SAFETY: the eventfd is open, and outlives what is borrowed here.
        ring.register_disk(unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }, None).unwrap();
        let poll = opcode::PollAdd::new(DISK, libc::POLLIN as u32).build().user_data(Token::Nothing.to_user_data());
        // SAFETY: the entry names no memory.
        unsafe { ring.push(&poll) };
        ring.submit();
        assert_eq!(ring.unregister_disk().unwrap(), Release::ToBeTold);
        ring.submit();
        ring.sync_completions();
        assert!(ring.reap().is_none(), "the request still has the file");
        event.write(1).unwrap();
        let mut told = Vec::new();
        wait_until("both completions", || {
            ring.submit();
            ring.sync_completions();
            told.extend(std::iter::from_fn(|| ring.reap()).map(|entry| Token::from_user_data(entry.user_data())));
            told.len() == 2
        });
        assert!(told.contains(&Token::DiskReleased), "{told:?}");
    }
}
