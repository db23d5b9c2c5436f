//! A guest in this process that runs the workload: RAM of any shape in a memfd, a device in direct mode, and queues whose
//! rings are in that RAM or in a window.

use std::{
    fmt,
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use ringpass_broker::{
    direct::{DirectConfig, DirectDevice, DirectQueue, QueueConfig, QueuePlacement, SubmissionConfig},
    disk::Disk,
    memory::{GuestMemory, RegionConfig, Sharing},
    ring::{RingConfig, RingWindow},
};
use ringpass_guest::{GuestRam, RamAllocator, RamArea, RamRegion, RamRing};
use ringpass_guest_abi::{
    Cqe, DriverRing, FixedAddressing, MappedRing, RingMemory, Sqe, rings_area_bytes, sqes_area_bytes,
};
use ringpass_restrictions::{Access, CompiledPolicy, Policy};
use ringpass_workload::{ProcessEnv, RingQueue, hostile::Extent};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long a queue may take to end.
const END_LIMIT: Duration = Duration::from_secs(30);

/// What a guest's RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// The pages of an ordinary memfd.
    Small,
    /// Huge pages of 2 MiB (`MFD_HUGETLB`).
    Huge,
}

/// The RAM of a guest, for its owner: one memfd with the regions one behind the other.
#[derive(Debug)]
pub struct RamFile {
    file: Arc<File>,
    regions: Vec<Extent>,
}

impl RamFile {
    /// RAM full of zeros.
    ///
    /// # Errors
    ///
    /// The kernel has no memory for it.
    pub fn new(regions: &[Extent], pages: PageSize) -> Result<Self> {
        let flags = match pages {
            PageSize::Small => MemfdFlags::CLOEXEC,
            PageSize::Huge => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let fd = memfd_create("guest-ram", flags).context("cannot make a memfd")?;
        ftruncate(&fd, regions.iter().map(|region| region.len_bytes).sum()).context("cannot size a memfd")?;
        Ok(Self { file: Arc::new(File::from(fd)), regions: regions.to_vec() })
    }

    /// The regions.
    pub fn regions(&self) -> &[Extent] {
        &self.regions
    }

    /// The regions for a broker.
    pub fn for_broker(&self) -> Vec<RegionConfig> {
        let config = |(region, file_offset_bytes): (&Extent, u64)| RegionConfig {
            gpa: region.gpa,
            len_bytes: region.len_bytes,
            file: self.file.clone(),
            file_offset_bytes,
        };
        self.with_offsets().map(config).collect()
    }

    /// A mapping for the guest.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn map(&self) -> Result<Arc<GuestRam>> {
        let region = |(region, offset_bytes): (&Extent, u64)| RamRegion {
            gpa: region.gpa,
            len_bytes: region.len_bytes,
            file: self.file.as_fd(),
            offset_bytes,
        };
        let regions: Vec<RamRegion<'_>> = self.with_offsets().map(region).collect();
        // SAFETY: the memfd keeps its length. Bytes of the mapping are only borrowed through the one allocator, by
        // workloads, which borrow a buffer while no request names it; the tests reach the file by `read` and `write`
        // only while no workload runs.
        Ok(Arc::new(unsafe { GuestRam::map(&regions) }?))
    }

    /// Reads the bytes at `gpa`, past the guest's mapping.
    ///
    /// # Errors
    ///
    /// The bytes are not all in one region.
    pub fn read(&self, gpa: u64, len_bytes: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len_bytes)?];
        self.file.read_exact_at(&mut bytes, self.offset_bytes(gpa, len_bytes)?)?;
        Ok(bytes)
    }

    /// Writes `bytes` to `gpa`, past the guest's mapping.
    ///
    /// # Errors
    ///
    /// The bytes are not all in one region.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.file.write_all_at(bytes, self.offset_bytes(gpa, bytes.len() as u64)?)?)
    }

    fn with_offsets(&self) -> impl Iterator<Item = (&Extent, u64)> {
        self.regions.iter().scan(0, |end_bytes, region| {
            let offset_bytes = *end_bytes;
            *end_bytes += region.len_bytes;
            Some((region, offset_bytes))
        })
    }

    fn offset_bytes(&self, gpa: u64, len_bytes: u64) -> Result<u64> {
        let holds = |region: &Extent| region.gpa <= gpa && gpa + len_bytes <= region.gpa + region.len_bytes;
        let (region, offset_bytes) =
            self.with_offsets().find(|(region, _)| holds(region)).with_context(|| format!("no RAM at {gpa:#x}"))?;
        Ok(offset_bytes + gpa - region.gpa)
    }
}

/// The place of a queue's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the guest's RAM.
    GuestRam,
    /// In pages of the kernel.
    Window,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestRam => "guest_ram",
            Self::Window => "window",
        })
    }
}

/// A guest and its device.
#[derive(Debug)]
pub struct ProcessGuest {
    device: DirectDevice,
    ram: RamFile,
    allocator: RamAllocator,
}

impl ProcessGuest {
    /// A guest with the built-in policy, and its RAM pinned.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn new(disk: &Arc<Disk>, ram: RamFile, submission: SubmissionConfig) -> Result<Self> {
        let access = if disk.is_read_only() { Access::ReadOnly } else { Access::ReadWrite };
        let policy = Policy::direct(access).compile(&ringpass_broker::kernel::support()?)?;
        Self::with_policy(disk, ram, submission, policy)
    }

    /// A guest with any policy.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn with_policy(
        disk: &Arc<Disk>,
        ram: RamFile,
        submission: SubmissionConfig,
        policy: CompiledPolicy,
    ) -> Result<Self> {
        let memory = GuestMemory::new(ram.for_broker())?;
        let config = DirectConfig::new(submission, Sharing::Clone);
        let device = DirectDevice::new(disk.clone(), &memory, policy, config)?;
        let allocator = ram.map()?.allocator()?;
        Ok(Self { device, ram, allocator })
    }

    /// The device, for changes that a front-end makes.
    pub fn device(&self) -> &DirectDevice {
        &self.device
    }

    /// How SQEs name the RAM.
    pub fn addressing(&self) -> FixedAddressing {
        self.device.memory().addressing()
    }

    /// The RAM.
    pub fn ram(&self) -> &RamFile {
        &self.ram
    }

    /// Hands out the RAM.
    pub fn allocator(&mut self) -> &mut RamAllocator {
        &mut self.allocator
    }

    /// Attaches a queue. A ring in guest RAM gets the first free pieces of RAM.
    ///
    /// # Errors
    ///
    /// There is no room in RAM, or the kernel refuses.
    pub fn attach(&mut self, ring: RingConfig, place: Place) -> Result<GuestQueue> {
        let (doorbell, interrupts) = (eventfd()?, eventfd()?);
        let areas = match place {
            Place::Window => None,
            Place::GuestRam => Some((
                self.allocator.allocate(rings_area_bytes(ring.cq_entries)).context("the rings area")?,
                self.allocator.allocate(sqes_area_bytes(ring.sq_entries)).context("the SQE area")?,
            )),
        };
        let placement = match &areas {
            None => QueuePlacement::Window,
            Some((rings, sqes)) => QueuePlacement::GuestRam { rings_gpa: rings.gpa(), sqes_gpa: sqes.gpa() },
        };
        let queue = self.device.attach(
            QueueConfig::new(ring, placement).doorbell(doorbell.try_clone()?).completion(interrupts.try_clone()?),
        )?;
        let layout = *queue.layout();
        let extent = |area: &RamArea| Extent { gpa: area.gpa(), len_bytes: area.len_bytes() };
        let extents = areas.iter().flat_map(|(rings, sqes)| [extent(rings), extent(sqes)]).collect();
        let memory = match areas {
            Some((rings, sqes)) => QueueMemory::Ram(RamRing::new(rings, sqes, &layout)?),
            None => QueueMemory::in_window(queue.window().context("a queue in a window has a window")?),
        };
        let ring = RingQueue::new(DriverRing::new(memory, layout).context("the layout")?, queue.addressing());
        Ok(GuestQueue { queue, ring, areas: extents, doorbell, interrupts })
    }
}

fn eventfd() -> Result<EventFd> {
    Ok(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?)
}

/// A queue of a [`ProcessGuest`], from both sides.
#[derive(Debug)]
pub struct GuestQueue {
    queue: DirectQueue,
    ring: RingQueue<QueueMemory>,
    areas: Vec<Extent>,
    doorbell: EventFd,
    interrupts: EventFd,
}

impl GuestQueue {
    /// The driver's side.
    pub fn ring(&mut self) -> &mut RingQueue<QueueMemory> {
        &mut self.ring
    }

    /// Both sides, for changes that a front-end makes while the driver works.
    pub fn split(&mut self) -> (&DirectQueue, &mut RingQueue<QueueMemory>) {
        (&self.queue, &mut self.ring)
    }

    /// The environment that a workload needs besides the ring. Only one workload at a time runs on a queue.
    ///
    /// # Errors
    ///
    /// No more files can be open.
    pub fn env(&self, buffers: RamArea) -> Result<ProcessEnv> {
        Ok(ProcessEnv::new(buffers, self.doorbell.try_clone()?, self.interrupts.try_clone()?))
    }

    /// The guest RAM of the ring. A ring in a window has none.
    pub fn areas(&self) -> &[Extent] {
        &self.areas
    }

    /// The address of the ring's window in this process, if the ring is in a window.
    pub fn window_address(&self) -> Option<u64> {
        self.queue.window().map(|window| window.rings().as_ptr().addr() as u64)
    }

    /// Closes the queue and waits for its end. Returns how long that took.
    ///
    /// # Errors
    ///
    /// The queue does not end.
    pub fn close(self) -> Result<Duration> {
        let Self { queue, ring, .. } = self;
        // While a window is mapped, its ring does not end.
        drop(ring);
        Ok(queue.close().wait(END_LIMIT)?)
    }
}

/// The memory of a ring, as a driver in this process reaches it.
#[derive(Debug)]
pub enum QueueMemory {
    /// In guest RAM.
    Ram(RamRing),
    /// In a window.
    Window {
        /// The ring in it.
        ring: MappedRing,
        /// Keeps the window mapped.
        window: Arc<RingWindow>,
    },
}

impl QueueMemory {
    /// The ring in this window.
    pub fn in_window(window: Arc<RingWindow>) -> Self {
        let (rings, sqes) = (window.rings(), window.sqes());
        // SAFETY: both areas are mapped for as long as the window, which is kept beside the ring, and no code makes
        // references to them.
        let ring = unsafe { MappedRing::new(rings, window.rings_bytes(), sqes, window.sqes_bytes()) };
        Self::Window { ring, window }
    }

    fn inner(&self) -> &dyn RingMemory {
        match self {
            Self::Ram(ring) => ring,
            Self::Window { ring, .. } => ring,
        }
    }
}

impl RingMemory for QueueMemory {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.inner().load_relaxed(offset_bytes)
    }

    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.inner().load_acquire(offset_bytes)
    }

    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.inner().store_relaxed(offset_bytes, value);
    }

    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.inner().store_release(offset_bytes, value);
    }

    fn full_fence(&self) {
        self.inner().full_fence();
    }

    fn write_sqe(&self, slot: u32, sqe: &Sqe) {
        self.inner().write_sqe(slot, sqe);
    }

    fn read_cqe(&self, offset_bytes: u32) -> Cqe {
        self.inner().read_cqe(offset_bytes)
    }
}
