//! The guest's memory while it is pinned, and the rings over it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::attachment::LiveRing;
use super::builder_command::{BuildRequest, Built};
use super::discards::{DiscardWatch, Discarded};
use super::refusal::Refused;
use super::ring_executor::RingExecutor;
use crate::direct::check_disk;
use crate::disk::Disk;
use crate::memory::RegionConfig;
use crate::ring::{RingConfig, RingEnd, RingError, StillRunning};
use crate::ring_host::{DRAIN_PATIENCE, NewRing, PinError, RingClient, RingOwner};
use crate::vhost_user::DeviceMemory;

/// The guest's memory, pinned by the ring host, and the rings over it.
#[derive(Debug)]
pub(super) struct Pinned {
    disk: Arc<Disk>,
    regions: Vec<RegionConfig>,
    /// The rings that may not have ended.
    rings: Vec<RingEnd>,
    watch: DiscardWatch,
}

impl Pinned {
    /// Has `memory` pinned for rings on `disk`. Gives up when `is_wanted` says no.
    pub(super) fn new(
        host: &mut RingClient,
        disk: &Arc<Disk>,
        memory: &DeviceMemory,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Self, Refused> {
        check_disk(disk).map_err(|error| Refused::from(&error))?;
        let regions = regions(memory);
        let watch = DiscardWatch::new(&regions).map_err(not_looked_at)?;
        match host.pin(disk.as_fd(), &regions, is_wanted) {
            Ok(()) => Ok(Self { disk: Arc::clone(disk), regions, rings: Vec::new(), watch }),
            Err(PinError::Refused(refused)) => Err(refused),
            Err(PinError::NotWanted) => {
                Err(Refused { code: ErrorCode::Busy, why: "guest memory is not to be pinned any more".into() })
            }
        }
    }

    /// The length of the pinned memory in bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len_bytes).sum()
    }

    /// Whether a ring exists that was not closed.
    pub(super) fn has_open_rings(&self) -> bool {
        let is_open = |end: &RingEnd| matches!(end.wait(Duration::ZERO), Err(StillRunning::Open));
        self.rings.iter().any(is_open)
    }

    /// Unpins the memory. A ring that still runs keeps its memory until it ends. Returns the rings that have not ended.
    pub(super) fn unpin(self, host: &mut RingClient) -> impl Iterator<Item = RingEnd> + use<> {
        host.unpin();
        self.rings.into_iter().filter(|end| !end.has_ended())
    }

    /// Looks whether the front-end has discarded memory.
    pub(super) fn look_for_discards(&mut self) -> Option<Discarded> {
        self.watch.look()
    }

    /// Has a ring made.
    pub(super) fn make_ring(&mut self, host: &mut RingClient, request: BuildRequest) -> Result<Built, Refused> {
        let BuildRequest { queue, attachment, geometry, epoch, call, call_generation, .. } = request;
        let doorbell = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(RingError::system("making the eventfd of a doorbell"))
            .map_err(|error| Refused::from(&error))?;
        let config = RingConfig { sq_entries: geometry.sq_entries(), cq_entries: geometry.cq_entries() };
        let ring = NewRing {
            config,
            rings_gpa: geometry.rings(epoch.area()).gpa(),
            sqes_gpa: geometry.sqes(epoch.area()).gpa(),
            doorbell: &doorbell,
            call: call.as_ref(),
        };
        let owner = RingOwner { queue, attachment: attachment.0, cq_entries: config.cq_entries };
        let ring = host.make_ring(&ring, owner)?;
        self.rings.retain(|end| !end.has_ended());
        self.rings.push(ring.end());
        // What lies under the disk stays locked until the ring's last I/O has ended.
        let disk = Arc::clone(&self.disk);
        ring.end().on_end(move || drop(disk));
        // The memory is pinned by now, whether for all rings or for this one.
        self.watch.expect_all();
        let ring = LiveRing { epoch, executor: RingExecutor::Kernel(ring), doorbell };
        Ok(Built { ring, call_generation })
    }

    /// Takes all memory but `regions` from the rings that run. False: the rings must end, because they may still use
    /// other memory.
    pub(super) fn keep_only(&mut self, host: &mut RingClient, regions: &[RegionConfig]) -> bool {
        let left: Vec<_> = regions.iter().filter(|region| self.has_region(region)).cloned().collect();
        if left.is_empty() {
            // The areas of every ring have left, too.
            return false;
        }
        match self.follow(host, &left, &|| true) {
            Ok(()) if host.await_drain() => return true,
            Ok(()) => tracing::warn!(
                "rings end: their I/O uses memory that the front-end takes away, for longer than {DRAIN_PATIENCE:?} (new rings \
                 follow without it)"
            ),
            Err(PinError::Refused(refused)) => {
                tracing::warn!("rings end: memory that leaves cannot be taken from them: {}", refused.why);
            }
            Err(PinError::NotWanted) => {}
        }
        false
    }

    /// Gives the rings that run these regions in place of their former ones. Gives up pinning when `is_wanted` says no.
    pub(super) fn follow(
        &mut self,
        host: &mut RingClient,
        regions: &[RegionConfig],
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), PinError> {
        host.set_memory(regions, is_wanted)?;
        self.regions = regions.to_vec();
        self.watch.set_regions(regions).map_err(|error| PinError::Refused(not_looked_at(error)))?;
        self.watch.expect_all();
        Ok(())
    }

    fn has_region(&self, region: &RegionConfig) -> bool {
        self.regions.iter().any(|own| own.is_same(region))
    }
}

/// The regions of a table, for pinning.
pub(super) fn regions(memory: &DeviceMemory) -> Vec<RegionConfig> {
    let region = |region: &vm_memory::GuestRegionMmap<()>| {
        // The session maps regions of files only.
        let file = region.file_offset()?;
        Some(RegionConfig {
            gpa: region.start_addr().0,
            len_bytes: region.len(),
            file: file.arc().clone(),
            file_offset_bytes: file.start(),
        })
    };
    memory.iter().filter_map(region).collect()
}

fn not_looked_at(source: std::io::Error) -> Refused {
    Refused::from(&RingError::System { what: "looking at a file of guest memory", source })
}
