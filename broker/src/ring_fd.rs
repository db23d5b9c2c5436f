//! The io_uring system calls, one safe function for each use. The unsafe code of rings.
//!
//! These are raw calls, because the `io-uring` crate always maps a ring itself and does not support rings in guest
//! memory (`IORING_SETUP_NO_MMAP`). All structures come from rustix, except the restrictions, which have a crate of
//! their own.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};

use ringpass_restrictions::Restriction;
use rustix::io_uring::{
    IoringEnterFlags, IoringRegisterOp, IoringRsrcFlags, IoringSetupFlags, io_uring_clone_buffers, io_uring_params,
    io_uring_ptr, io_uring_rsrc_register, io_uring_rsrc_update2, iovec,
};

/// `IORING_REGISTER_DST_REPLACE` (Linux 6.13): the destination already has a table, replace the named slots.
const CLONE_DST_REPLACE: u32 = 1 << 1;

/// An io_uring, by its file descriptor (which the kernel makes close-on-exec).
#[derive(Debug)]
pub(crate) struct RingFd(OwnedFd);

/// The host addresses of a ring's own memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingPages {
    /// Host address of the rings area.
    pub(crate) rings: NonNull<u8>,
    /// Host address of the SQE area.
    pub(crate) sqes: NonNull<u8>,
}

impl RingFd {
    /// Creates a ring whose memory the kernel allocates.
    pub(crate) fn setup(entries: u32, params: &mut io_uring_params) -> io::Result<Self> {
        params.flags.remove(IoringSetupFlags::NO_MMAP);
        // SAFETY: without NO_MMAP the call passes no pointer; `wq_fd`, if used, comes from a borrowed `RingFd`, and the
        // kernel would only refuse a wrong descriptor.
        let fd = unsafe { rustix::io_uring::io_uring_setup(entries, params) }?;
        Ok(Self(fd))
    }

    /// Creates a ring in memory that the caller provides.
    ///
    /// # Safety
    ///
    /// From now until the ring has really ended, the kernel writes to the first `rings_area_bytes(cq_entries)` bytes
    /// at `pages.rings` and reads the first `sqes_area_bytes(sq_entries)` bytes at `pages.sqes`. Both must be mapped
    /// shared memory of that size to which no Rust reference exists. (They may be unmapped at any time: the kernel
    /// holds the pages.)
    pub(crate) unsafe fn setup_in(entries: u32, params: &mut io_uring_params, pages: RingPages) -> io::Result<Self> {
        params.flags.insert(IoringSetupFlags::NO_MMAP);
        params.cq_off.user_addr = io_uring_ptr::new(pages.rings.as_ptr().cast());
        params.sq_off.user_addr = io_uring_ptr::new(pages.sqes.as_ptr().cast());
        // SAFETY: the caller's contract for the two addresses; `wq_fd` as in `setup`.
        let fd = unsafe { rustix::io_uring::io_uring_setup(entries, params) }?;
        Ok(Self(fd))
    }

    /// The raw descriptor, for `params.wq_fd`.
    pub(crate) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// `io_uring_register(2)` with an argument that the kernel only reads.
    ///
    /// # Safety
    ///
    /// `arg` must point to `count` elements of the type that `operation` reads, and those must point to valid data in
    /// turn.
    unsafe fn register(&self, operation: IoringRegisterOp, arg: *const c_void, count: u32) -> io::Result<u32> {
        // SAFETY: the caller's contract. No operation in this module keeps the pointer or writes through it,
        // except the worker limits, which point to a local.
        Ok(unsafe { rustix::io_uring::io_uring_register(&self.0, operation, arg, count) }?)
    }

    /// Gives the ring a table of `slots` empty fixed buffers (`IORING_REGISTER_BUFFERS2`, sparse, Linux 5.19).
    pub(crate) fn register_empty_buffers(&self, slots: u32) -> io::Result<()> {
        let mut table = io_uring_rsrc_register::default();
        table.nr = slots;
        table.flags = IoringRsrcFlags::REGISTER_SPARSE;
        // SAFETY: the argument is one structure, with its size in place of a count; it names no other memory.
        unsafe {
            self.register(IoringRegisterOp::RegisterBuffers2, (&raw const table).cast(), size_of_val(&table) as u32)
        }?;
        Ok(())
    }

    /// Pins each range of bytes as a fixed buffer, from slot `first` on (`IORING_REGISTER_BUFFERS_UPDATE`, Linux 5.13).
    /// Returns the index of the range that the kernel refused, and why; the ranges before it are pinned.
    ///
    /// # Safety
    ///
    /// The kernel may read and write those bytes until the buffers are replaced or the ring has ended: they must be
    /// mapped shared memory to which no Rust reference exists.
    pub(crate) unsafe fn pin_buffers(&self, first: u32, ranges: &[Range<u64>]) -> Result<(), (usize, io::Error)> {
        let buffer = |range: &Range<u64>| iovec {
            iov_base: range.start as *mut c_void,
            iov_len: (range.end - range.start) as usize,
        };
        let buffers: Vec<_> = ranges.iter().map(buffer).collect();
        // SAFETY: the caller's contract.
        unsafe { self.update_buffers(first, &buffers) }
    }

    /// Empties `count` slots of fixed buffers (the same operation, Linux 5.19).
    pub(crate) fn clear_buffers(&self, first: u32, count: u32) -> io::Result<()> {
        let none = || iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let buffers: Vec<_> = (0..count).map(|_| none()).collect();
        // SAFETY: the buffers name no bytes.
        unsafe { self.update_buffers(first, &buffers) }.map_err(|(_, error)| error)
    }

    /// # Safety
    ///
    /// As for [`pin_buffers`](Self::pin_buffers); 0 bytes at address 0 name none.
    unsafe fn update_buffers(&self, first: u32, buffers: &[iovec]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        while done < buffers.len() {
            let rest = &buffers[done..];
            let mut update = io_uring_rsrc_update2::default();
            update.offset = first + done as u32;
            update.data = io_uring_ptr::new(rest.as_ptr().cast_mut().cast());
            update.nr = rest.len() as u32;
            // SAFETY: one structure, with its size in place of a count, that points to as many iovecs as it says; all
            // live until the call returns. The caller's contract covers the bytes that the iovecs name.
            let updated = unsafe {
                self.register(
                    IoringRegisterOp::RegisterBuffersUpdate,
                    (&raw const update).cast(),
                    size_of_val(&update) as u32,
                )
            };
            // The kernel stops at a buffer that it refuses. It returns the reason only if that is the first of a call.
            match updated {
                Ok(0) => return Err((done, io::Error::other("the kernel updated no buffer"))),
                Ok(updated) => done += updated as usize,
                Err(error) => return Err((done, error)),
            }
        }
        Ok(())
    }

    /// Releases all fixed buffers (`IORING_UNREGISTER_BUFFERS`, Linux 5.1). Only for a ring with no requests under way.
    pub(crate) fn unregister_buffers(&self) -> io::Result<()> {
        // SAFETY: the operation takes no argument.
        unsafe { self.register(IoringRegisterOp::UnregisterBuffers, ptr::null(), 0) }?;
        Ok(())
    }

    /// Shares the whole buffer table of `source`, which this process has pinned
    /// (`IORING_REGISTER_CLONE_BUFFERS`, Linux 6.12). This ring must not have a table yet.
    pub(crate) fn clone_buffers(&self, source: &Self) -> io::Result<()> {
        self.clone_with(source, |_| {})
    }

    /// Shares `count` slots from `first` on, replacing the same slots of this ring (Linux 6.13). An empty slot of
    /// `source` empties the slot of this ring.
    pub(crate) fn clone_buffer_slots(&self, source: &Self, first: u32, count: u32) -> io::Result<()> {
        self.clone_buffer_slots_to(first, source, first, count)
    }

    /// The same, from slot `first` of this ring on.
    pub(crate) fn clone_buffer_slots_to(
        &self,
        first: u32,
        source: &Self,
        source_first: u32,
        count: u32,
    ) -> io::Result<()> {
        self.clone_with(source, |clone| {
            clone.flags |= CLONE_DST_REPLACE;
            clone.src_off = source_first;
            clone.dst_off = first;
            clone.nr = count;
        })
    }

    fn clone_with(&self, source: &Self, fill: impl FnOnce(&mut io_uring_clone_buffers)) -> io::Result<()> {
        let mut clone = io_uring_clone_buffers::default();
        clone.src_fd = u32::try_from(source.raw()).expect("file descriptors are not negative");
        fill(&mut clone);
        // SAFETY: one structure, which names no other memory.
        unsafe { self.register(IoringRegisterOp::RegisterCloneBuffers, (&raw const clone).cast(), 1) }?;
        Ok(())
    }

    /// Registers the fixed files, slot 0 first (`IORING_REGISTER_FILES`, Linux 5.1).
    pub(crate) fn register_files(&self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: `fds.len()` descriptors, all of which are open, being borrowed.
        unsafe { self.register(IoringRegisterOp::RegisterFiles, fds.as_ptr().cast(), fds.len() as u32) }?;
        Ok(())
    }

    /// Makes the kernel signal `eventfd` at every completion (`IORING_REGISTER_EVENTFD`, Linux 5.2).
    pub(crate) fn register_eventfd(&self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let fd = eventfd.as_raw_fd();
        // SAFETY: one descriptor, which is open, being borrowed.
        unsafe { self.register(IoringRegisterOp::RegisterEventfd, (&raw const fd).cast(), 1) }?;
        Ok(())
    }

    /// Stops signalling the eventfd (`IORING_UNREGISTER_EVENTFD`). False: there was none.
    pub(crate) fn unregister_eventfd(&self) -> io::Result<bool> {
        // SAFETY: the operation takes no argument.
        match unsafe { self.register(IoringRegisterOp::UnregisterEventfd, ptr::null(), 0) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(nix::libc::ENXIO) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the kernel accepts `fd` as an eventfd. Tried with a ring that does nothing else.
    pub(crate) fn takes_eventfd(fd: BorrowedFd<'_>) -> io::Result<bool> {
        let mut params = io_uring_params::default();
        params.flags = IoringSetupFlags::R_DISABLED;
        match Self::setup(1, &mut params)?.register_eventfd(fd) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Limits the io-wq workers of this ring's submitters (`IORING_REGISTER_IOWQ_MAX_WORKERS`, Linux 5.15).
    pub(crate) fn limit_workers(&self, bounded: u32, unbounded: u32) -> io::Result<()> {
        let mut limits = [bounded, unbounded];
        // SAFETY: two words, which the kernel replaces by the former limits; the local outlives the call.
        unsafe { self.register(IoringRegisterOp::RegisterIowqMaxWorkers, (&raw mut limits).cast_const().cast(), 2) }?;
        Ok(())
    }

    /// Registers the restrictions (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10). Only once, and only before `enable`.
    pub(crate) fn restrict(&self, restrictions: &[Restriction]) -> io::Result<()> {
        // SAFETY: `len()` elements of the kernel's layout, which name no other memory.
        unsafe {
            self.register(
                IoringRegisterOp::RegisterRestrictions,
                restrictions.as_ptr().cast(),
                restrictions.len() as u32,
            )
        }?;
        Ok(())
    }

    /// Lets the ring run (`IORING_REGISTER_ENABLE_RINGS`, Linux 5.10).
    pub(crate) fn enable(&self) -> io::Result<()> {
        // SAFETY: the operation takes no argument.
        unsafe { self.register(IoringRegisterOp::RegisterEnableRings, ptr::null(), 0) }?;
        Ok(())
    }

    /// Wakes the SQ thread (`IORING_ENTER_SQ_WAKEUP`).
    pub(crate) fn wake_sq_thread(&self) -> io::Result<()> {
        self.enter(0, IoringEnterFlags::SQ_WAKEUP)?;
        Ok(())
    }

    /// Consumes up to `entries` SQEs. Returns the number of SQEs that the kernel consumed.
    pub(crate) fn submit(&self, entries: u32) -> io::Result<u32> {
        self.enter(entries, IoringEnterFlags::empty())
    }

    /// Never waits for completions: on a ring whose `cq.head` a guest can write, `min_complete > 0` can make the
    /// calling thread spin in the kernel, unkillably (seen on Linux 6.18).
    fn enter(&self, to_submit: u32, flags: IoringEnterFlags) -> io::Result<u32> {
        loop {
            // SAFETY: the call passes no pointer. The restrictions, the fixed files and the fixed buffers limit what
            // the SQEs in the ring can reach.
            match unsafe { rustix::io_uring::io_uring_enter(&self.0, to_submit, 0, flags) } {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

/// The tag of a file whose release the kernel does not report.
pub(crate) const UNTAGGED: u64 = 0;

/// Makes `files` the fixed files of `ring`, which has none, each with its tag (`IORING_REGISTER_FILES2`, Linux 5.13). A
/// kernel that counts references for each file separately (Linux 6.13) posts a completion with the tag when it releases
/// the file.
pub(crate) fn register_tagged_files<'f>(
    ring: BorrowedFd<'_>,
    files: impl IntoIterator<Item = (BorrowedFd<'f>, u64)>,
) -> io::Result<()> {
    let (fds, tags): (Vec<i32>, Vec<u64>) = files.into_iter().map(|(file, tag)| (file.as_raw_fd(), tag)).unzip();
    let mut table = io_uring_rsrc_register::default();
    table.nr = fds.len() as u32;
    table.data = io_uring_ptr::new(fds.as_ptr().cast_mut().cast());
    table.tags = io_uring_ptr::new(tags.as_ptr().cast_mut().cast());
    let size_bytes = size_of_val(&table) as u32;
    // SAFETY: one structure, with its size in place of a count. It points to descriptors, which are open because they
    // are borrowed, and to as many tags; the kernel reads both during the call, after which the lists are freed.
    unsafe {
        rustix::io_uring::io_uring_register(
            ring,
            IoringRegisterOp::RegisterFiles2,
            (&raw const table).cast(),
            size_bytes,
        )
    }?;
    Ok(())
}

impl AsFd for RingFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
