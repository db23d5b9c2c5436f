//! The message by which a broker process passes a device to a guest *process*.
//!
//! The broker sends one message over a connected UNIX stream socket: a line of JSON, the [`Setup`]. The first byte
//! carries the file descriptors (`SCM_RIGHTS`): one for each memory region, then a doorbell and a completion eventfd
//! for each queue. The receiver consumes nothing after the line, so the connection can carry further messages.

mod setup;
mod socket;

use std::os::fd::{AsFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

pub use setup::{QueueSetup, RegionSetup, Setup, SetupError};
pub use socket::{HandoverError, LINE_BYTES_MAX, receive, send};

use crate::ram::RamRegion;

/// The eventfds of one queue.
#[derive(Debug)]
pub struct QueueEvents {
    /// The guest writes to this eventfd to ring the doorbell.
    pub doorbell: EventFd,
    /// The host kernel signals completions through this eventfd.
    pub completion: EventFd,
}

/// Everything that a guest process receives.
#[derive(Debug)]
pub struct Handover {
    /// The description of the device.
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
