//! The guest's memory while it is pinned, and the rings over it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::discards::{DiscardWatch, Discarded};
use super::order::{BuildOrder, Built};
use super::{AttachConfig, LiveRing, Refused};
use crate::direct::{DirectDevice, QueueConfig, QueuePlacement};
use crate::disk::Disk;
use crate::limits::Memlock;
use crate::memory::{GuestMemory, MemoryError, RegionConfig};
use crate::ring::{RingConfig, RingEnd, RingError, StillRunning};
use crate::vhost_user::DeviceMemory;

/// How often is looked whether memory that leaves is pinned still, and how long.
const DRAIN_LOOK: Duration = Duration::from_micros(200);
/// Longer than an ordinary request takes; one that takes longer is waited for with its ring.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// How long what is pinned may take to go before the guest's memory is pinned: the kernel takes rings apart later. With I/O that
/// hangs it does not go, and is pinned beside the other.
const SETTLE: Duration = Duration::from_millis(500);
/// How long is waited for the end of a ring at a time.
const PATIENCE: Duration = Duration::from_secs(10);

/// The guest's memory, pinned, and the rings over it.
#[derive(Debug)]
pub(super) struct Pinned {
    device: DirectDevice,
    watch: DiscardWatch,
}

impl Pinned {
    /// Pins `memory` for rings on `disk`, for as long as that is wanted.
    pub(super) fn new(
        config: &AttachConfig,
        disk: &Arc<Disk>,
        memory: &DeviceMemory,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, Refused> {
        // What is pinned is measured, and what ended a moment ago must not end meanwhile. Nor may the guest's memory count twice
        // against RLIMIT_MEMLOCK.
        let end = Instant::now() + SETTLE;
        let is_pinned = || Memlock::pinned_by_this_process().is_ok_and(|bytes| bytes > 0);
        while is_pinned() && is_wanted() && Instant::now() < end {
            thread::sleep(DRAIN_LOOK);
        }
        let regions = regions(memory);
        let memory = GuestMemory::new(regions.clone()).map_err(|error| refused(&error.into()))?;
        let watch = DiscardWatch::new(&regions).map_err(|error| {
            refused(&RingError::System { what: "looking at a file of guest memory", source: error })
        })?;
        let policy = config.policy.clone();
        let device = DirectDevice::new_while(disk.clone(), &memory, policy, config.direct, is_wanted)
            .map_err(|error| refused(&error))?;
        Ok(Self { device, watch })
    }

    /// How much is pinned, in bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        self.device.memory().len_bytes()
    }

    /// Whether a ring is there that was not closed.
    pub(super) fn has_open_rings(&self) -> bool {
        let is_open = |end: &RingEnd| matches!(end.wait(Duration::ZERO), Err(StillRunning::Open));
        self.device.ends().iter().any(is_open)
    }

    /// The rings that have not ended.
    pub(super) fn ends(&self) -> Vec<RingEnd> {
        self.device.ends()
    }

    /// What the front-end has discarded.
    pub(super) fn look_for_discards(&mut self) -> Option<Discarded> {
        self.watch.look()
    }

    /// Makes a ring.
    pub(super) fn make_ring(&mut self, order: BuildOrder) -> Result<Built, Refused> {
        let BuildOrder { geometry, epoch, call, call_generation, .. } = order;
        let doorbell = eventfd().map_err(|error| refused(&error))?;
        let config = QueueConfig {
            ring: RingConfig { sq_entries: geometry.sq_entries(), cq_entries: geometry.cq_entries() },
            placement: QueuePlacement::GuestRam {
                rings_gpa: geometry.rings(epoch.area()).gpa(),
                sqes_gpa: geometry.sqes(epoch.area()).gpa(),
            },
            doorbell: Some(eventfd_of(&doorbell).map_err(|error| refused(&error))?),
            completion: call,
        };
        let others = self.device.ends();
        match self.device.attach(config) {
            Ok(queue) => {
                // Pinned by now, whether for all rings or for this one.
                self.watch.expect_all();
                Ok(Built { ring: LiveRing { epoch, queue, doorbell }, call_generation })
            }
            Err(error) => {
                // The driver gets its areas back with the refusal. A ring that failed half-way has no I/O, so it ends soon.
                let ends = self.device.ends();
                ends.iter().filter(|end| !others.iter().any(|other| other.is_same(end))).for_each(await_end);
                Err(refused(&error))
            }
        }
    }

    /// Takes from the rings that run what is not among `regions`. False: they must end, for it may still be in use.
    pub(super) fn has_lost_all_but(&mut self, regions: &[RegionConfig]) -> bool {
        let had = self.device.memory();
        let left: Vec<_> = regions.iter().filter(|region| had.has_region(region)).cloned().collect();
        if left.is_empty() {
            // Nor is there a ring that has its areas.
            return false;
        }
        match self.follow(&left, &|| true) {
            Ok(()) if self.await_drain() => return true,
            Ok(()) => tracing::warn!(
                "rings end, because their I/O keeps memory for longer than {DRAIN_PATIENCE:?} that the front-end takes away"
            ),
            Err(error) => tracing::warn!("rings end, because memory cannot be taken from them: {error}"),
        }
        false
    }

    /// Gives the rings that run these regions for what they had, if it is wanted until that is pinned.
    pub(super) fn follow(
        &mut self,
        regions: &[RegionConfig],
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), RingError> {
        self.device.set_memory_while(regions.iter().cloned(), is_wanted)?;
        let looking = RingError::system("looking at a file of guest memory");
        self.watch.set_regions(regions).map_err(looking)?;
        self.watch.expect_all();
        Ok(())
    }

    /// Waits until requests that were under way have ended and with them what they kept pinned. False: they take long, or
    /// that cannot be told.
    fn await_drain(&self) -> bool {
        let end = Instant::now() + DRAIN_PATIENCE;
        loop {
            match self.device.has_drained() {
                Ok(true) => return true,
                Ok(false) if Instant::now() < end => thread::sleep(DRAIN_LOOK),
                Ok(false) => return false,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell whether I/O in memory that leaves has ended");
                    return false;
                }
            }
        }
    }
}

/// The regions of a table, for pinning.
pub(super) fn regions(memory: &DeviceMemory) -> Vec<RegionConfig> {
    let region = |region: &vm_memory::GuestRegionMmap<()>| {
        // The session makes them of files only.
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

fn await_end(end: &RingEnd) {
    // The thread that waits for it tells of one that takes long.
    while end.wait(PATIENCE).is_err() {}
}

/// What a driver is told of an error.
pub(super) fn refused(error: &RingError) -> Refused {
    let code = match error {
        RingError::AreaInUse { .. } | RingError::Memory(MemoryError::NotWanted) => ErrorCode::Busy,
        RingError::Memory(MemoryError::Memlock(_) | MemoryError::NoMemoryToPin { .. } | MemoryError::System { .. }) => {
            ErrorCode::Resources
        }
        RingError::Memory(_) => ErrorCode::Memory,
        RingError::FinerBlocks { .. } | RingError::IntegrityProfile { .. } | RingError::UnsafePolicy { .. } => {
            ErrorCode::Mode
        }
        RingError::Create { source, .. } if source.raw_os_error() == Some(nix::libc::EFAULT) => ErrorCode::Memory,
        _ => ErrorCode::Resources,
    };
    Refused { code, why: error.to_string() }
}

fn eventfd() -> Result<EventFd, RingError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(RingError::system("making the eventfd of a doorbell"))
}

fn eventfd_of(eventfd: &EventFd) -> Result<EventFd, RingError> {
    eventfd.try_clone().map_err(RingError::system("duplicating the eventfd of a doorbell"))
}
