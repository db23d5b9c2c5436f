//! A guest in this process, its disk, and its device.

use std::fs::File;
use std::io::Write;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use ringpass_guest_abi::{Cqe, DriverRing, MappedRing, Sqe};
use ringpass_restrictions::{Access, Policy};
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::super::*;
use crate::disk::{DirectIo, DiskConfig};
use crate::memory::Sharing;
use crate::ring::{RingConfig, SqThreadConfig};

/// Longer than any step takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const MIB: u64 = 1 << 20;
pub(super) const RAM_BYTES: u64 = 2 * MIB;
pub(super) const RINGS_GPA: u64 = 0;
pub(super) const SQES_GPA: u64 = MIB / 2;
pub(super) const BUFFER_GPA: u64 = MIB;
pub(super) const RING: RingConfig = RingConfig { sq_entries: 8, cq_entries: 16 };

/// A guest in this process, its disk, and its device.
pub(super) struct Setup {
    pub(super) device: DirectDevice,
    pub(super) memory: GuestMemory,
    pub(super) doorbell: EventFd,
    pub(super) content: Vec<u8>,
    _image: tempfile::NamedTempFile,
}

pub(super) fn memfd(len_bytes: u64) -> Arc<File> {
    let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len_bytes).unwrap();
    Arc::new(File::from(fd))
}

impl Setup {
    pub(super) fn new(submission: SubmissionConfig) -> Self {
        Self::with(submission, Sharing::Clone)
    }

    pub(super) fn with(submission: SubmissionConfig, sharing: Sharing) -> Self {
        let mut image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..64 * 4096u32).map(|at| (at / 4096 * 7 + at) as u8).collect();
        image.write_all(&content).unwrap();
        let config = DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(image.path()) };
        let disk = Arc::new(Disk::open(&config).unwrap());
        let region = RegionConfig { gpa: 0, len_bytes: RAM_BYTES, file: memfd(RAM_BYTES), file_offset_bytes: 0 };
        let memory = GuestMemory::new([region]).unwrap();
        let policy = Policy::direct(Access::ReadWrite).compile(&crate::kernel::support().unwrap()).unwrap();
        let config = DirectConfig { submission, workers: IoWorkers::default(), sharing };
        let device = DirectDevice::new(disk, &memory, policy, config).unwrap();
        Self { device, memory, doorbell: EventFd::new(EFD_CLOEXEC).unwrap(), content, _image: image }
    }

    pub(super) fn attach(&self, placement: QueuePlacement, completion: Option<EventFd>) -> DirectQueue {
        let doorbell = Some(self.doorbell.try_clone().unwrap());
        self.device.attach(QueueConfig { ring: RING, placement, doorbell, completion }).unwrap()
    }

    pub(super) fn in_guest_ram(&self) -> (DirectQueue, DriverRing<MappedRing>) {
        let queue = self.attach(QueuePlacement::GuestRam { rings_gpa: RINGS_GPA, sqes_gpa: SQES_GPA }, None);
        let layout = *queue.layout();
        let area = |gpa, len_bytes| NonNull::new(self.memory.host_address(gpa, len_bytes).unwrap()).unwrap();
        let (rings, sqes) = (area(RINGS_GPA, layout.rings_bytes), area(SQES_GPA, layout.sqes_bytes));
        // SAFETY: both areas lie in the guest's RAM, which stays mapped for as long as `self.memory`.
        let memory = unsafe { MappedRing::new(rings, layout.rings_bytes, sqes, layout.sqes_bytes) };
        let ring = DriverRing::new(memory, layout).unwrap();
        (queue, ring)
    }

    /// Reads the first block to `gpa`.
    pub(super) fn read_into(&self, ring: &mut DriverRing<MappedRing>, gpa: u64) -> Cqe {
        let address = self.memory.addressing().resolve(gpa, 4096).unwrap();
        self.perform(ring, &Sqe::read_fixed(address, 4096, 0, 1))
    }

    /// Reads one block into the buffer and returns its completion and what the buffer then holds.
    pub(super) fn read(&self, ring: &mut DriverRing<MappedRing>, block: u64) -> (Cqe, Vec<u8>) {
        let address = self.memory.addressing().resolve(BUFFER_GPA, 4096).unwrap();
        let cqe = self.perform(ring, &Sqe::read_fixed(address, 4096, block * 4096, block));
        let mut buffer = vec![0; 4096];
        vm_memory::Bytes::read_slice(self.memory.mapped(), &mut buffer, vm_memory::GuestAddress(BUFFER_GPA)).unwrap();
        (cqe, buffer)
    }

    pub(super) fn perform(&self, ring: &mut DriverRing<MappedRing>, sqe: &Sqe) -> Cqe {
        ring.push(sqe).unwrap();
        if ring.publish() {
            self.doorbell.write(1).unwrap();
        }
        let started = Instant::now();
        loop {
            if let Some(cqe) = ring.reap() {
                return cqe;
            }
            assert!(started.elapsed() < PATIENCE, "no completion");
            std::thread::yield_now();
        }
    }

    pub(super) fn check_reads(&self, ring: &mut DriverRing<MappedRing>) {
        for block in [0, 63, 17, 17, 40] {
            let (cqe, buffer) = self.read(ring, block);
            assert_eq!((cqe.user_data, cqe.res), (block, 4096));
            assert_eq!(buffer, &self.content[block as usize * 4096..][..4096]);
        }
    }
}

pub(super) fn sq_thread() -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig { idle: Duration::from_millis(1), cpu: None })
}
