//! The set-up of a device before it executes requests: memory, in-flight region, queues.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::super::Error;
use super::super::memory::Region;
use super::super::virtqueue::Vring;
use super::Shared;

/// The in-flight region, in which a device records the requests that it has taken.
pub(super) struct Inflight {
    description: VhostUserInflight,
    file: File,
}

impl std::fmt::Debug for Inflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Inflight").field(&self.file).finish()
    }
}

impl Shared {
    /// Sends everything that follows the negotiation. `base` is the index at which each queue starts.
    pub(super) fn set_up(&self, frontend: &mut Frontend, base: impl Fn(usize) -> u16) -> Result<(), Error> {
        for region in self.memory.regions() {
            add_region(frontend, &region)?;
        }
        if let Some(Inflight { description, file }) = &self.inflight {
            frontend
                .set_inflight_fd(description, file.as_raw_fd())
                .map_err(Error::protocol("giving the in-flight region"))?;
        }
        self.start_queues(frontend, base)
    }

    pub(super) fn start_queues(&self, frontend: &mut Frontend, base: impl Fn(usize) -> u16) -> Result<(), Error> {
        for (index, vring) in self.vrings.iter().enumerate() {
            let user = |gpa: u64| {
                let regions = self.memory.regions();
                let region = regions.iter().find(|region| (region.gpa..region.gpa + region.len_bytes).contains(&gpa));
                region.map_or(0, |region| region.user_address() + (gpa - region.gpa))
            };
            let addresses = VringConfigData {
                queue_max_size: vring.size,
                queue_size: vring.size,
                flags: 0,
                desc_table_addr: user(vring.desc_gpa),
                used_ring_addr: user(vring.used_gpa),
                avail_ring_addr: user(vring.avail_gpa),
                log_addr: None,
            };
            let failed = || Error::protocol("setting a queue up");
            frontend.set_vring_num(index, vring.size).map_err(failed())?;
            frontend.set_vring_base(index, base(index)).map_err(failed())?;
            frontend.set_vring_addr(index, &addresses).map_err(failed())?;
            frontend.set_vring_call(index, &vring.call()).map_err(failed())?;
            frontend.set_vring_kick(index, &vring.kick).map_err(failed())?;
        }
        for index in 0..self.vrings.len() {
            frontend.set_vring_enable(index, true).map_err(Error::protocol("enabling a queue"))?;
        }
        Ok(())
    }
}

pub(super) fn new_inflight(frontend: &mut Frontend, vrings: &[Arc<Vring>]) -> Result<Inflight, Error> {
    let size = vrings.iter().map(|vring| vring.size).max().unwrap_or(1);
    let wanted =
        VhostUserInflight { num_queues: vrings.len() as u16, queue_size: size, ..VhostUserInflight::default() };
    let (description, file) =
        frontend.get_inflight_fd(&wanted).map_err(Error::protocol("asking for an in-flight region"))?;
    Ok(Inflight { description, file })
}

pub(super) fn describe(region: &Region) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.gpa,
        memory_size: region.len_bytes,
        userspace_addr: region.user_address(),
        mmap_offset: 0,
        mmap_handle: region.file.as_raw_fd(),
    }
}

pub(super) fn add_region(frontend: &mut Frontend, region: &Region) -> Result<(), Error> {
    frontend.add_mem_region(&describe(region)).map(drop).map_err(Error::protocol("adding a memory region"))
}
