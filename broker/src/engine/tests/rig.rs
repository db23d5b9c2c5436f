//! An engine with a disk, and the guest's RAM.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ringpass_test_utils::PATIENCE;
use ringpass_test_utils::blk::SECTOR_BYTES;
use ringpass_test_utils::ram::Ram;
use tempfile::NamedTempFile;

use super::block_driver::BlockDriver;
use super::driver::{device_memory, vring};
use crate::disk::{DirectIo, Disk, DiskConfig};
use crate::engine::{AttachConfig, DiskSource, Engine, EngineConfig, EngineControl};
use crate::vhost_user::{Device, DeviceMemory};
use crate::virtio_blk::{BlkConfig, BlkParameters, DiscardLimits, WriteZeroesLimits};
use crate::virtqueue::DirtyLog;

pub(super) const SECTOR: u64 = SECTOR_BYTES;
pub(super) const RAM_BYTES: u64 = 32 << 20;
pub(super) const DISK_BYTES: u64 = 16 << 20;
/// RAM for a test's own use.
pub(super) const SPARE_GPA: u64 = 24 << 20;

/// What a test wants.
#[derive(Clone)]
pub(super) struct Options {
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) workers: usize,
    pub(super) poll_time: Duration,
    pub(super) direct_io: DirectIo,
    /// What direct I/O takes at least, if that is to be more than it really is.
    pub(super) direct_block_bytes: Option<u32>,
    pub(super) disk_bytes: u64,
    pub(super) read_only: bool,
    pub(super) attach: Option<AttachConfig>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            workers: 1,
            poll_time: Duration::from_micros(32),
            direct_io: DirectIo::Off,
            direct_block_bytes: None,
            disk_bytes: DISK_BYTES,
            read_only: false,
            attach: None,
        }
    }
}

/// How often the engine asked for its disk and gave it back.
#[derive(Debug, Default)]
pub(super) struct SourceCalls {
    pub(super) requests: AtomicU32,
    pub(super) releases: AtomicU32,
}

struct Source {
    calls: Arc<SourceCalls>,
    file: std::fs::File,
}

impl DiskSource for Source {
    fn request(&mut self) {
        self.calls.requests.fetch_add(1, Ordering::SeqCst);
    }

    fn stop_waiting(&mut self) {}

    fn release(&mut self, _is_wanted: &dyn Fn() -> bool) {
        self.calls.releases.fetch_add(1, Ordering::SeqCst);
    }

    fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.file.metadata()?.len())
    }
}

/// An engine, its disk, and the guest's RAM.
pub(super) struct Rig {
    pub(super) engine: Engine,
    pub(super) image: NamedTempFile,
    pub(super) ram: Ram,
    pub(super) calls: Arc<SourceCalls>,
    pub(super) options: Options,
    log_file: NamedTempFile,
}

impl Rig {
    /// An engine that has the guest's memory, but no disk, and whose queues are not started.
    pub(super) fn without_disk(options: Options) -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().write_all_at(&contents(0, 0, options.disk_bytes / SECTOR), 0).unwrap();
        let calls = Arc::new(SourceCalls::default());
        let source = Source { calls: calls.clone(), file: image.reopen().unwrap() };
        let mut engine = Engine::new(config(&options), |_: EngineControl| -> io::Result<Box<dyn DiskSource>> {
            Ok(Box::new(source))
        })
        .unwrap();
        let ram = Ram::in_two_regions(RAM_BYTES).unwrap();
        engine.set_memory(device_memory(&ram));
        Self { engine, image, ram, calls, options, log_file: NamedTempFile::new().unwrap() }
    }

    /// The same, with its disk.
    pub(super) fn new(options: Options) -> Self {
        let rig = Self::without_disk(options);
        rig.engine.control().set_disk(&rig.open_disk());
        rig
    }

    /// A mapping of the guest's RAM for the device.
    pub(super) fn device_memory(&self) -> Arc<DeviceMemory> {
        device_memory(&self.ram)
    }

    pub(super) fn open_disk(&self) -> Arc<Disk> {
        let mut config = DiskConfig::new(self.image.path());
        config.direct_io = self.options.direct_io;
        config.read_only = self.options.read_only;
        config.lock_wait = Some(PATIENCE);
        let disk = Disk::open(&config).unwrap();
        Arc::new(match self.options.direct_block_bytes {
            Some(block_bytes) => disk.with_direct_block(block_bytes),
            None => disk,
        })
    }

    /// A driver for a queue, which is not started yet.
    pub(super) fn driver(&self, index: u16) -> BlockDriver {
        BlockDriver::new(index, vring(&self.ram, index, self.options.queue_size))
    }

    /// Starts and enables a queue.
    pub(super) fn start(&mut self, driver: &BlockDriver) {
        self.engine.start_queue(driver.index, driver.setup(0, None), driver.eventfds());
        self.engine.set_enabled(driver.index, true);
    }

    /// A driver for a queue that runs.
    pub(super) fn running(&mut self, index: u16) -> BlockDriver {
        let driver = self.driver(index);
        self.start(&driver);
        driver
    }

    /// A log over all of RAM, kept in the rig.
    pub(super) fn dirty_log(&mut self) -> Arc<DirtyLog> {
        let bytes = RAM_BYTES / 4096 / 8;
        self.log_file.as_file().set_len(bytes).unwrap();
        Arc::new(DirtyLog::from_fd(self.log_file.reopen().unwrap().into(), 0, bytes).unwrap())
    }

    /// The pages that are marked in that log.
    pub(super) fn marked_pages(&self) -> Vec<u64> {
        let log = std::fs::read(self.log_file.path()).unwrap();
        (0..RAM_BYTES / 4096).filter(|page| log[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
    }

    /// Clears that log.
    pub(super) fn clear_log(&self) {
        self.log_file.as_file().write_all_at(&[0; (RAM_BYTES / 4096 / 8) as usize], 0).unwrap();
    }

    /// What is on the disk.
    pub(super) fn on_disk(&self, sector: u64, len_bytes: u64) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes as usize];
        self.image.as_file().read_exact_at(&mut bytes, sector * SECTOR).unwrap();
        bytes
    }
}

pub(super) fn config(options: &Options) -> EngineConfig {
    let device = BlkConfig::new(BlkParameters {
        size_bytes: options.disk_bytes,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        read_only: options.read_only,
        num_queues: options.queues,
        queue_size: options.queue_size,
        serial: "engine-test".parse().unwrap(),
        discard: Some(DiscardLimits { max_sectors: 1 << 16, alignment_sectors: 8 }),
        write_zeroes: Some(WriteZeroesLimits { max_sectors: 1 << 16, may_unmap: true }),
    })
    .unwrap();
    EngineConfig {
        device,
        poll_time: options.poll_time,
        workers: Some(options.workers),
        cpus: Vec::new(),
        attach: options.attach.clone(),
        ring_host: None,
    }
}

/// The content of a sector that was written for the `generation`th time.
pub(super) fn content(generation: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    let mut rng = fastrand::Rng::with_seed(generation << 40 ^ sector);
    rng.fill(&mut bytes);
    bytes
}

/// Many sectors of content.
pub(super) fn contents(generation: u64, sector: u64, sectors: u64) -> Vec<u8> {
    (sector..sector + sectors).flat_map(|sector| content(generation, sector)).collect()
}
