//! The guest's memory while it is pinned, and the rings over it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::attachment::LiveRing;
use super::builder_command::{BuildRequest, Built};
use super::config::AttachConfig;
use super::discards::{DiscardWatch, Discarded};
use super::refusal::Refused;
use super::ring_executor::RingExecutor;
use crate::direct::{DirectDevice, QueueConfig, QueuePlacement};
use crate::disk::Disk;
use crate::limits::Memlock;
use crate::memory::{GuestMemory, MemoryError, RegionConfig};
use crate::ring::{RingConfig, RingEnd, RingError, RingGauge, StillRunning};
use crate::vhost_user::DeviceMemory;

/// The time between two looks at whether leaving memory is still pinned.
const DRAIN_LOOK: Duration = Duration::from_micros(200);
/// The longest wait until leaving memory is pinned no more. An ordinary request takes less; for a longer one the
/// builder ends the ring, and waits for the end of the ring.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// The longest wait for earlier pins to go before the guest's memory is pinned: the kernel takes rings apart some time
/// after their close. Pins of I/O that hangs do not go, and the guest's memory is pinned beside them.
const SETTLE: Duration = Duration::from_millis(500);
/// The longest wait for the end of a ring at a time.
const PATIENCE: Duration = Duration::from_secs(10);

/// The guest's memory, pinned, and the rings over it.
#[derive(Debug)]
pub(super) struct Pinned {
    device: DirectDevice,
    watch: DiscardWatch,
}

impl Pinned {
    /// Pins `memory` for rings on `disk`. Gives up when `is_wanted` says no.
    pub(super) fn new(
        config: &AttachConfig,
        disk: &Arc<Disk>,
        memory: &DeviceMemory,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, Refused> {
        // Pinning measures what the process has pinned, so an earlier pin must not go meanwhile. Nor may the guest's
        // memory count twice against RLIMIT_MEMLOCK.
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

    /// The length of the pinned memory in bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        self.device.memory().len_bytes()
    }

    /// Whether a ring exists that was not closed.
    pub(super) fn has_open_rings(&self) -> bool {
        let is_open = |end: &RingEnd| matches!(end.wait(Duration::ZERO), Err(StillRunning::Open));
        self.device.ends().iter().any(is_open)
    }

    /// The rings that have not ended.
    pub(super) fn ends(&self) -> Vec<RingEnd> {
        self.device.ends()
    }

    /// Looks whether the front-end has discarded memory.
    pub(super) fn look_for_discards(&mut self) -> Option<Discarded> {
        self.watch.look()
    }

    /// Makes a ring, and what counts its outstanding requests.
    pub(super) fn make_ring(&mut self, request: BuildRequest) -> Result<(Built, RingGauge), Refused> {
        let BuildRequest { geometry, epoch, call, call_generation, .. } = request;
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
        // A ring that the guard cannot watch is closed.
        let attached = self.device.attach(config).and_then(|queue| {
            let gauge = queue.gauge()?;
            Ok((queue, gauge))
        });
        match attached {
            Ok((queue, gauge)) => {
                // The memory is pinned by now, whether for all rings or for this one.
                self.watch.expect_all();
                let ring = LiveRing { epoch, executor: RingExecutor::Kernel(queue), doorbell };
                Ok((Built { ring, call_generation }, gauge))
            }
            Err(error) => {
                // The refusal gives the driver its areas back. A ring that was made in part has no I/O, so it ends
                // soon.
                let ends = self.device.ends();
                ends.iter().filter(|end| !others.iter().any(|other| other.is_same(end))).for_each(await_end);
                Err(refused(&error))
            }
        }
    }

    /// Takes all memory but `regions` from the rings that run. False: the rings must end, because they may still use
    /// other memory.
    pub(super) fn keep_only(&mut self, regions: &[RegionConfig]) -> bool {
        let had = self.device.memory();
        let left: Vec<_> = regions.iter().filter(|region| had.has_region(region)).cloned().collect();
        if left.is_empty() {
            // The areas of every ring have left, too.
            return false;
        }
        match self.follow(&left, &|| true) {
            Ok(()) if self.await_drain() => return true,
            Ok(()) => tracing::warn!(
                "rings end: their I/O uses memory that the front-end takes away, for longer than {DRAIN_PATIENCE:?} (new rings \
                 follow without it)"
            ),
            Err(error) => tracing::warn!("rings end: memory that leaves cannot be taken from them: {error}"),
        }
        false
    }

    /// Gives the rings that run these regions in place of their former ones. Gives up pinning when `is_wanted` says no.
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

    /// Waits until the requests that were under way have ended, and with them their pins. False: the requests take
    /// long, or the kernel does not tell.
    fn await_drain(&self) -> bool {
        let end = Instant::now() + DRAIN_PATIENCE;
        loop {
            match self.device.has_drained() {
                Ok(true) => return true,
                Ok(false) if Instant::now() < end => thread::sleep(DRAIN_LOOK),
                Ok(false) => return false,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell whether I/O in leaving memory has ended");
                    return false;
                }
            }
        }
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

fn await_end(end: &RingEnd) {
    // The ring closer logs an end that takes long.
    while end.wait(PATIENCE).is_err() {}
}

/// What the driver gets for an error.
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
