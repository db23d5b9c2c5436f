//! The disk that a worker's requests go to: its registration in the io_uring, and its release.
//!
//! The lock and the claim on the disk belong to its open file description and go with the last reference to that. The kernel holds
//! one for each io_uring that has the disk as its fixed file. A request that has completed can keep that reference for some
//! milliseconds after the file was unregistered. So a worker answers only when the kernel has said that the reference is gone, and its
//! answer carries the worker's own reference.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::Execution;
use crate::disk::{Disk, DiskKind};
use crate::engine::alignment::Alignment;
use crate::engine::command::Waker;
use crate::engine::fatal::end_process;
use crate::engine::poll::PollPolicy;
use crate::engine::ring::Release;
use crate::engine::writer::Writer;

/// The disk that requests go to.
#[derive(Debug)]
pub(in crate::engine) struct DiskInUse {
    /// Held for its lock; requests name it as the io_uring's fixed file.
    pub(super) disk: Arc<Disk>,
    /// What buffers must keep to. `None`: any will do.
    pub(super) alignment: Option<Alignment>,
}

/// A disk that the worker has left.
#[derive(Debug)]
pub(super) struct FormerDisk {
    disk: Arc<Disk>,
    release: Release,
}

impl Execution<'_> {
    #[inline]
    pub(in crate::engine) fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// What direct I/O demands of buffers, if the disk is used with it.
    #[inline]
    pub(in crate::engine) fn alignment(&self) -> Option<Alignment> {
        self.disk.as_ref().and_then(|disk| disk.alignment)
    }

    /// Executes requests on `disk` from now on, unless there is a disk already. `waker` wakes the worker, and `poll` is how long the
    /// writer thread polls, if one is needed.
    pub(in crate::engine) fn take_disk(
        &mut self,
        disk: Arc<Disk>,
        guest_block_bytes: u32,
        waker: Waker,
        poll: PollPolicy,
    ) {
        if self.disk.is_some() {
            return;
        }
        if let Err(error) = self.ring.register_disk(disk.as_fd(), disk.page_cache()) {
            end_process(&format_args!("the disk cannot be registered in a worker's io_uring: {error}"));
        }
        let alignment = disk.direct_alignment().map(|direct| Alignment {
            address_mask: direct.memory_bytes as usize - 1,
            read_block_bytes: direct.read_block_bytes,
            write_block_bytes: direct.write_block_bytes,
            is_coarser_than_guest: direct.write_block_bytes > guest_block_bytes,
        });
        // The kernel does the writes to a file one after the other anyway. Those to a block device it does side by side,
        // and a write that waits for the device must not hold up the others.
        let is_written = disk.kind() == DiskKind::RegularFile && alignment.is_none() && !disk.is_read_only();
        if is_written && self.writer.is_none() {
            // Now and not with the first write, which would wait for the thread.
            match Writer::start(self.slots.room(), poll, waker) {
                Ok(writer) => self.writer = Some(writer),
                Err(error) => tracing::warn!(%error, "no thread for writes into the page cache: they are slower"),
            }
        }
        self.disk = Some(DiskInUse { disk, alignment });
    }

    /// Begins to let go of the disk. No request may be under way.
    pub(in crate::engine) fn unregister_disk(&mut self) {
        let Some(in_use) = self.disk.take() else { return };
        match self.ring.unregister_disk() {
            Ok(release) => self.former_disk = Some(FormerDisk { disk: in_use.disk, release }),
            // Its lock would stay in force, and the destination of a migration would wait for ever.
            Err(error) => {
                end_process(&format_args!("the disk cannot be unregistered from a worker's io_uring: {error}"))
            }
        }
    }

    /// The kernel has told of the release of the former disk.
    pub(in crate::engine) fn disk_is_released(&mut self) {
        if let Some(former) = &mut self.former_disk {
            former.release = Release::Done;
        }
    }

    /// Whether the kernel holds nothing of a former disk.
    pub(in crate::engine) fn has_left_disk(&self) -> bool {
        self.former_disk.as_ref().is_none_or(|former| former.release == Release::Done)
    }

    /// The former disk, which the kernel holds no more.
    pub(in crate::engine) fn take_former_disk(&mut self) -> Option<Arc<Disk>> {
        self.former_disk.take().map(|former| former.disk)
    }
}
