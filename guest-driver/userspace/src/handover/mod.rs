//! How a broker process gives a guest *process* its device.
//!
//! One message over a connected UNIX stream socket: a line of JSON, the [`Setup`], and with its first byte the file
//! descriptors (`SCM_RIGHTS`): one per memory region, then a doorbell and a completion eventfd per queue. Nothing
//! behind the line is consumed: the connection can carry more.

mod setup;
mod socket;

use std::os::fd::{AsFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

pub use setup::{QueueSetup, RegionSetup, Setup, SetupError};
pub use socket::{HandoverError, LINE_BYTES_MAX, receive, send};

use crate::RamRegion;

/// The eventfds of one queue.
#[derive(Debug)]
pub struct QueueEvents {
    /// The guest writes to it to ring the doorbell.
    pub doorbell: EventFd,
    /// Signalled by the host kernel at completions.
    pub completion: EventFd,
}

/// All that a guest process gets.
#[derive(Debug)]
pub struct Handover {
    /// What the device is like.
    pub setup: Setup,
    /// The file of each region of [`Setup::regions`].
    pub memory: Vec<OwnedFd>,
    /// The events of each queue of [`Setup::queues`].
    pub events: Vec<QueueEvents>,
}

impl Handover {
    /// The regions with their files, for [`GuestRam::map`](crate::GuestRam::map).
    pub fn regions(&self) -> Vec<RamRegion<'_>> {
        let regions = self.setup.regions.iter().zip(&self.memory);
        regions
            .map(|(&RegionSetup { gpa, len_bytes, offset_bytes }, file)| RamRegion {
                gpa,
                len_bytes,
                file: file.as_fd(),
                offset_bytes,
            })
            .collect()
    }
}
