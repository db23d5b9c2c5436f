//! A guest in this process that works request by request, on a device whose parts the test holds one by one. It is for
//! tests of what happens when the parts are dropped. (The verifying workload is for all other tests.)

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::{
    direct::{DirectConfig, DirectDevice, DirectQueue, QueueConfig, QueuePlacement, SubmissionConfig},
    disk::{Disk, DiskConfig, LogicalBlock},
    memory::{GuestMemory, RegionConfig, Sharing},
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_guest::{GuestRam, RamRegion};
use ringpass_guest_abi::{Cqe, DriverRing, FixedAddressing, RingLayout, Sqe};
use ringpass_restrictions::{Access, Policy};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::process_guest::QueueMemory;

/// Guest RAM, in bytes, from guest-physical address 0.
pub const RAM_BYTES: u64 = 4 << 20;
/// The guest-physical address of the first buffer. The rings are below it.
pub const BUFFERS_GPA: u64 = 1 << 20;
/// Size of each ring.
pub const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };
/// Bytes from one ring's areas to the next's.
const RING_STRIDE_BYTES: u64 = 16 << 10;
/// Bytes from a rings area to its SQE area.
const SQES_OFFSET_BYTES: u64 = 8 << 10;

/// Both ways of submission. The SQ thread sleeps soon.
pub const SUBMISSIONS: [SubmissionConfig; 2] =
    [SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(1))), SubmissionConfig::Doorbell];

/// A guest's RAM: a memfd, which the test can read after every mapping of it is gone.
#[derive(Debug)]
pub struct Ram(File);

impl Ram {
    /// RAM full of zeros, [`RAM_BYTES`] of it.
    ///
    /// # Errors
    ///
    /// The kernel has no memory for it.
    pub fn new() -> Result<Self> {
        Self::with_len(RAM_BYTES)
    }

    /// `len_bytes` of RAM.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_len(len_bytes: u64) -> Result<Self> {
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len_bytes)?;
        Ok(Self(File::from(fd)))
    }

    /// The RAM of another process, by a path that leads to its memfd.
    ///
    /// # Errors
    ///
    /// The path does not lead to a memfd.
    pub fn open(path: &str) -> Result<Self> {
        Ok(Self(File::options().read(true).write(true).open(path).with_context(|| format!("cannot open {path}"))?))
    }

    /// The path for [`open`](Self::open) in a child process.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// The RAM for the broker, and a weak reference that tells whether the broker still holds the RAM.
    ///
    /// # Errors
    ///
    /// The kernel refuses to map it.
    pub fn for_broker(&self) -> Result<(GuestMemory, Weak<File>)> {
        let file = Arc::new(self.0.try_clone()?);
        let held = Arc::downgrade(&file);
        let region = RegionConfig { gpa: 0, len_bytes: self.0.metadata()?.len(), file, file_offset_bytes: 0 };
        Ok((GuestMemory::new([region])?, held))
    }

    /// Reads the bytes at `gpa`.
    ///
    /// # Errors
    ///
    /// There is no such RAM.
    pub fn bytes(&self, gpa: u64, len_bytes: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len_bytes];
        self.0.read_exact_at(&mut bytes, gpa)?;
        Ok(bytes)
    }

    /// Fills `len_bytes` at `gpa` with `byte`.
    ///
    /// # Errors
    ///
    /// There is no such RAM.
    pub fn fill(&self, gpa: u64, len_bytes: usize, byte: u8) -> Result<()> {
        Ok(self.0.write_all_at(&vec![byte; len_bytes], gpa)?)
    }

    /// The `u32` at `gpa` now.
    ///
    /// # Errors
    ///
    /// There is no such RAM.
    pub fn word(&self, gpa: u64) -> Result<u32> {
        Ok(u32::from_ne_bytes(*self.bytes(gpa, 4)?.first_chunk().context("four bytes")?))
    }

    /// The number of SQEs that the kernel has consumed from ring `index`.
    ///
    /// # Errors
    ///
    /// As for [`word`](Self::word).
    pub fn consumed(&self, index: u64, layout: &RingLayout) -> Result<u32> {
        self.word(rings_gpa(index) + u64::from(layout.sq_head_offset))
    }

    /// The completions that the kernel has posted. The guest must not have reaped any.
    ///
    /// # Errors
    ///
    /// As for [`word`](Self::word), or there were more than the CQ holds.
    pub fn completions(&self, queue: CompletionQueue) -> Result<Vec<Cqe>> {
        let count = self.word(queue.tail_gpa)?;
        ensure!(count <= RING.cq_entries, "{count} completions in a CQ of {}", RING.cq_entries);
        let bytes = self.bytes(queue.cqes_gpa, count as usize * size_of::<Cqe>())?;
        let words = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok()).map(u64::from_ne_bytes);
        let words: Vec<u64> = words.collect();
        Ok(words.chunks_exact(2).filter_map(|pair| pair.try_into().ok()).map(Cqe::from_words).collect())
    }

    /// A mapping of the guest's own.
    fn map(&self) -> Result<Arc<GuestRam>> {
        let region = RamRegion { gpa: 0, len_bytes: self.0.metadata()?.len(), file: self.0.as_fd(), offset_bytes: 0 };
        // SAFETY: the memfd keeps its length, and code reads and writes this mapping only as the ring's words and
        // entries, and nothing borrows its bytes.
        Ok(Arc::new(unsafe { GuestRam::map(&[region]) }?))
    }
}

/// The place of a ring's completions in guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct CompletionQueue {
    /// The CQ tail.
    pub tail_gpa: u64,
    /// The first CQE.
    pub cqes_gpa: u64,
}

impl CompletionQueue {
    /// The completion queue of ring `index`.
    pub fn new(index: u64, layout: &RingLayout) -> Self {
        let at = |offset_bytes: u32| rings_gpa(index) + u64::from(offset_bytes);
        Self { tail_gpa: at(layout.cq_tail_offset), cqes_gpa: at(layout.cqes_offset) }
    }
}

/// The address of the rings area of ring `index`.
pub fn rings_gpa(index: u64) -> u64 {
    index * RING_STRIDE_BYTES
}

/// A device on this disk with this memory.
///
/// # Errors
///
/// The disk cannot be opened, or the kernel refuses.
pub fn device(disk: &DiskConfig, memory: &GuestMemory, submission: SubmissionConfig) -> Result<DirectDevice> {
    let disk = Disk::open(&disk.clone().logical_block(LogicalBlock::DirectIo))?;
    let access = if disk.is_read_only() { Access::ReadOnly } else { Access::ReadWrite };
    let policy = Policy::direct(access).compile(&ringpass_broker::kernel::support()?)?;
    let config = DirectConfig::new(submission, Sharing::Clone);
    Ok(DirectDevice::new(Arc::new(disk), memory, policy, config)?)
}

/// The guest's side of one queue.
#[derive(Debug)]
pub struct Driver {
    ring: DriverRing<QueueMemory>,
    addressing: FixedAddressing,
    doorbell: EventFd,
    /// The kernel signals this eventfd at completions.
    pub completion: EventFd,
}

/// Attaches a queue of `device` with a [`RING`], as ring `index` in `ram` or in a window. Returns the queue and its
/// driver.
///
/// # Errors
///
/// The kernel refuses.
pub fn attach(device: &DirectDevice, ram: &Ram, index: u64, window: bool) -> Result<(DirectQueue, Driver)> {
    if window {
        return attach_window(device, RING);
    }
    let (rings_gpa, sqes_gpa) = (rings_gpa(index), rings_gpa(index) + SQES_OFFSET_BYTES);
    attach_as(device, RING, QueuePlacement::GuestRam { rings_gpa, sqes_gpa }, |queue| {
        Ok(QueueMemory::Ram(ram.map()?.allocator()?.ring(rings_gpa, queue.layout(), sqes_gpa)?))
    })
}

/// A queue of `device` with a ring of any size in a window, and its driver.
///
/// # Errors
///
/// The kernel refuses.
pub fn attach_window(device: &DirectDevice, ring: RingConfig) -> Result<(DirectQueue, Driver)> {
    attach_as(device, ring, QueuePlacement::Window, |queue| {
        queue.window().map(QueueMemory::in_window).context("the queue has no window")
    })
}

fn attach_as(
    device: &DirectDevice,
    ring: RingConfig,
    placement: QueuePlacement,
    memory: impl FnOnce(&DirectQueue) -> Result<QueueMemory>,
) -> Result<(DirectQueue, Driver)> {
    let doorbell = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let completion = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let queue = device.attach(
        QueueConfig::new(ring, placement).doorbell(doorbell.try_clone()?).completion(completion.try_clone()?),
    )?;
    let ring = DriverRing::new(memory(&queue)?, *queue.layout()).context("the layout")?;
    let addressing = queue.addressing();
    Ok((queue, Driver { ring, addressing, doorbell, completion }))
}

impl Driver {
    /// The layout of the ring.
    pub fn layout(&self) -> RingLayout {
        *self.ring.layout()
    }

    /// Puts a request into the SQ. Returns false if there is no room.
    ///
    /// # Errors
    ///
    /// The buffer has no address in SQEs.
    pub fn push(&mut self, write: bool, gpa: u64, len_bytes: u32, offset_bytes: u64, user_data: u64) -> Result<bool> {
        let address = self.addressing.resolve(gpa, len_bytes).context("the buffer")?;
        let build = if write { Sqe::write_fixed } else { Sqe::read_fixed };
        Ok(self.ring.push(&build(address, len_bytes, offset_bytes, user_data)).is_ok())
    }

    /// Publishes the requests, and rings the doorbell if the ring says so.
    ///
    /// # Errors
    ///
    /// The doorbell is broken.
    pub fn submit(&mut self) -> Result<()> {
        if self.ring.publish() {
            self.doorbell.write(1)?;
        }
        Ok(())
    }

    /// Rings the doorbell in any case.
    ///
    /// # Errors
    ///
    /// The doorbell is broken.
    pub fn ring_doorbell(&self) -> Result<()> {
        Ok(self.doorbell.write(1)?)
    }

    /// Takes the next completion, if there is one.
    pub fn reap(&mut self) -> Option<Cqe> {
        self.ring.reap()
    }

    /// Submits one request and waits for its completion.
    ///
    /// # Errors
    ///
    /// There is no completion within 10 s.
    pub fn run(&mut self, write: bool, gpa: u64, len_bytes: u32, offset_bytes: u64) -> Result<i32> {
        ensure!(self.push(write, gpa, len_bytes, offset_bytes, 0)?, "the ring is full");
        self.submit()?;
        let mut result = None;
        within(Duration::from_secs(10), || {
            result = self.reap();
            result.is_some()
        });
        Ok(result.context("no completion within 10 s")?.res)
    }
}

/// Tries until `attempt` is true. Returns false if that takes longer than `limit`.
pub fn within(limit: Duration, mut attempt: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    while !attempt() {
        if start.elapsed() >= limit {
            return false;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
    true
}
