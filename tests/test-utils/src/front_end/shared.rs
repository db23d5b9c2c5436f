//! Files that the front-end shares with the back-end: the in-flight region and the log of dirty pages.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog};

use crate::ram::Ram;

/// Size of a page in the log (vhost-user, "Migration": `VHOST_LOG_PAGE`).
pub const LOG_PAGE_BYTES: u64 = 4096;

/// Length of a queue's header and of each entry in the in-flight region (vhost-user, "Inflight I/O tracking").
const INFLIGHT_ENTRY_BYTES: u64 = 16;
/// The parts of the queues begin at multiples of this, in all back-ends.
const INFLIGHT_QUEUE_ALIGNMENT_BYTES: u64 = 64;

/// The region in which the back-end records the requests in flight. The front-end keeps it across connections.
pub struct InflightRegion {
    description: VhostUserInflight,
    file: File,
}

impl InflightRegion {
    /// The region that `GET_INFLIGHT_FD` gave.
    pub fn new(description: VhostUserInflight, fd: OwnedFd) -> Self {
        Self { description, file: fd.into() }
    }

    /// The region's size and place in the file.
    pub fn description(&self) -> &VhostUserInflight {
        &self.description
    }

    /// The file, for `SET_INFLIGHT_FD`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The heads of the chains that are in flight in a queue.
    ///
    /// # Errors
    ///
    /// The region is shorter than the back-end said.
    pub fn heads(&self, queue: u16) -> Result<Vec<u16>> {
        let entries = u64::from(self.description.queue_size);
        let needed_bytes = INFLIGHT_ENTRY_BYTES * (entries + 1);
        let queue_bytes = needed_bytes.next_multiple_of(INFLIGHT_QUEUE_ALIGNMENT_BYTES);
        let queues_bytes = queue_bytes * u64::from(self.description.num_queues);
        ensure!(queues_bytes <= self.description.mmap_size, "{} bytes for these queues", self.description.mmap_size);
        let begin = self.description.mmap_offset + queue_bytes * u64::from(queue);
        let mut bytes = vec![0; usize::try_from(needed_bytes)?];
        self.file.read_exact_at(&mut bytes, begin).context("cannot read the in-flight region")?;
        let (_header, states) = bytes.split_at(INFLIGHT_ENTRY_BYTES as usize);
        let states = (0u16..).zip(states.chunks_exact(INFLIGHT_ENTRY_BYTES as usize));
        Ok(states.filter(|(_head, state)| state[0] != 0).map(|(head, _state)| head).collect())
    }
}

/// The bitmap of pages that the back-end wrote.
#[derive(Debug)]
pub struct DirtyPages {
    file: File,
    size_bytes: u64,
}

impl DirtyPages {
    /// A clean log for all of guest RAM.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn new(ram: &Ram) -> Result<Self> {
        let end = ram.regions().iter().map(|region| region.gpa() + region.len_bytes()).max().context("no RAM")?;
        // Words of 64 bits, as QEMU has them.
        let size_bytes = end.div_ceil(LOG_PAGE_BYTES).div_ceil(64) * 8;
        let file = File::from(memfd_create("ringpass-test-log", MemfdFlags::CLOEXEC)?);
        file.set_len(size_bytes)?;
        Ok(Self { file, size_bytes })
    }

    /// The log's size and place in its file.
    pub fn description(&self) -> VhostUserLog {
        VhostUserLog::new(self.size_bytes, 0)
    }

    /// The file, for `SET_LOG_BASE`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The pages that are marked now.
    ///
    /// # Errors
    ///
    /// The log cannot be read.
    pub fn marked(&self) -> Result<Vec<u64>> {
        let mut bytes = vec![0; usize::try_from(self.size_bytes)?];
        self.file.read_exact_at(&mut bytes, 0).context("cannot read the log")?;
        let bits = (0u64..).zip(bytes).flat_map(|(index, byte)| (0..8).map(move |bit| (8 * index + bit, byte >> bit)));
        Ok(bits.filter(|(_page, bit)| bit & 1 != 0).map(|(page, _bit)| page).collect())
    }

    /// Clears the log. Only while the back-end writes nothing.
    ///
    /// # Errors
    ///
    /// The log cannot be written.
    pub fn clear(&self) -> Result<()> {
        Ok(self.file.write_all_at(&vec![0; usize::try_from(self.size_bytes)?], 0)?)
    }
}
