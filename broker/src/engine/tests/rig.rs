//! An engine with a disk, and a guest with drivers for its queues.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ringpass_test_utils::PATIENCE;
use ringpass_test_utils::blk::{HEADER_BYTES, NO_STATUS, SECTOR_BYTES, header, range};
use ringpass_test_utils::descriptor::{DESCRIPTOR_BYTES, Descriptor};
use ringpass_test_utils::ram::Ram;
use ringpass_test_utils::vring::{DriverVring, Used};
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{device_memory, eventfds, features, indirect_tables_gpa, setup, vring};
use crate::disk::{DirectIo, Disk, DiskConfig};
use crate::engine::{AttachConfig, DiskSource, Engine, EngineConfig, EngineControl};
use crate::vhost_user::{Device, DeviceMemory, QueueEventfds};
use crate::virtio_blk::{BlkConfig, BlkParameters, DiscardLimits, WriteZeroesLimits};
use crate::virtqueue::{DirtyLog, InflightQueue, QueueSetup};

pub(super) const SECTOR: u64 = SECTOR_BYTES;
/// Requests of one queue that can be outstanding.
pub(super) const DEPTH_MAX: u16 = 128;
pub(super) const RAM_BYTES: u64 = 32 << 20;
pub(super) const DISK_BYTES: u64 = 16 << 20;
/// RAM for a test's own use.
pub(super) const SPARE_GPA: u64 = 24 << 20;

/// Where the places for requests begin. One of them lies across the boundary of the two regions.
const PLACES_GPA: u64 = 8 << 20;
/// Header, status and data of a request.
const PLACE_BYTES: u64 = 0x6000;
const STATUS_OFFSET: u64 = 0x800;
const DATA_OFFSET: u64 = 0x1000;
/// Room for an indirect table.
const TABLE_BYTES: u64 = 128 * DESCRIPTOR_BYTES;

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

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Which one.
    pub(super) head: u16,
    /// `VIRTIO_BLK_S_*`.
    pub(super) status: u8,
    /// What was read.
    pub(super) data: Vec<u8>,
    /// The length in the used ring.
    pub(super) used_bytes: u32,
}

/// A virtio-blk driver on one queue.
pub(super) struct BlockDriver {
    pub(super) index: u16,
    pub(super) vring: DriverVring,
    /// Numbers of the free places.
    places: Vec<u64>,
    /// The features that it accepted of the device.
    pub(super) blk_features: u64,
    /// Its chains are in indirect tables.
    pub(super) indirect: bool,
    /// By head: the number of the place, and how much is read.
    outstanding: HashMap<u16, (u64, u32)>,
    /// The data is cut into buffers of this length.
    pub(super) segment_bytes: u32,
    /// The data begins this far behind a page boundary.
    pub(super) misalignment_bytes: u64,
    /// Where the data is, if not in the request's own place: for one request at a time.
    pub(super) data_gpa: Option<u64>,
    /// Waits for interrupts, and does not poll.
    pub(super) by_interrupt: bool,
    /// Chains added since the last kick.
    added: u16,
}

impl BlockDriver {
    pub(super) fn new(index: u16, vring: DriverVring) -> Self {
        Self {
            index,
            vring,
            places: (0..DEPTH_MAX.into()).rev().collect(),
            blk_features: u64::MAX,
            indirect: false,
            outstanding: HashMap::new(),
            segment_bytes: u32::MAX,
            misalignment_bytes: 0,
            data_gpa: None,
            by_interrupt: false,
            added: 0,
        }
    }

    /// The set-up of its queue.
    pub(super) fn setup(&self, next_avail: u16, inflight: Option<InflightQueue>) -> QueueSetup {
        let driver_features = features(&self.vring, self.blk_features);
        QueueSetup { driver_features, ..setup(&self.vring, next_avail, inflight) }
    }

    /// The eventfds of its queue.
    pub(super) fn eventfds(&self) -> QueueEventfds {
        eventfds(&self.vring)
    }

    /// The first page of the place that the next request gets, and the last one got if none is outstanding.
    pub(super) fn place_pages(&self) -> u64 {
        self.place_gpa(*self.places.last().expect("a free place")) / 4096
    }

    /// How many requests are outstanding.
    pub(super) fn depth(&self) -> usize {
        self.outstanding.len()
    }

    /// Whether one more request of this length fits.
    pub(super) fn has_room(&self, len_bytes: u32) -> bool {
        let buffers = 2 + len_bytes.div_ceil(self.segment_bytes.min(len_bytes).max(1)) as usize;
        !self.places.is_empty() && self.vring.has_room(if self.indirect { 1 } else { buffers })
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.vring.ram().memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn place_gpa(&self, place: u64) -> u64 {
        PLACES_GPA + (u64::from(self.index) * u64::from(DEPTH_MAX) + place) * PLACE_BYTES
    }

    fn data_at(&self, place: u64) -> u64 {
        self.data_gpa.unwrap_or(self.place_gpa(place) + DATA_OFFSET) + self.misalignment_bytes
    }

    /// Makes a request available, without a kick.
    fn add(&mut self, kind: u32, sector: u64, out: &[u8], in_bytes: u32) -> u16 {
        let place = self.places.pop().expect("a free place");
        let (header_gpa, data) = (self.place_gpa(place), self.data_at(place));
        let status_gpa = header_gpa + STATUS_OFFSET;
        self.write(header_gpa, &header(kind, sector));
        self.write(status_gpa, &[NO_STATUS]);
        self.write(data, out);
        let mut chain = vec![Descriptor::readable(header_gpa, HEADER_BYTES)];
        let (len_bytes, buffer): (u32, fn(u64, u32) -> Descriptor) =
            if out.is_empty() { (in_bytes, Descriptor::writable) } else { (out.len() as u32, Descriptor::readable) };
        let mut offset = 0;
        while offset < len_bytes {
            let part_bytes = self.segment_bytes.min(len_bytes - offset);
            chain.push(buffer(data + u64::from(offset), part_bytes));
            offset += part_bytes;
        }
        chain.push(Descriptor::writable(status_gpa, 1));
        if self.indirect {
            let table_gpa = indirect_tables_gpa(&self.vring) + place * TABLE_BYTES;
            chain = vec![self.vring.write_indirect_table(table_gpa, &chain).unwrap()];
        }
        let head = self.vring.add(&chain).unwrap();
        self.vring.publish_quietly().unwrap();
        self.outstanding.insert(head, (place, in_bytes));
        self.added += 1;
        head
    }

    pub(super) fn add_read(&mut self, sector: u64, sectors: u64) -> u16 {
        self.add(VIRTIO_BLK_T_IN, sector, &[], (sectors * SECTOR) as u32)
    }

    pub(super) fn add_write(&mut self, sector: u64, data: &[u8]) -> u16 {
        self.add(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    pub(super) fn add_flush(&mut self) -> u16 {
        self.add(VIRTIO_BLK_T_FLUSH, 0, &[], 0)
    }

    pub(super) fn add_write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> u16 {
        self.add(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, sectors, unmap.into()), 0)
    }

    /// Kicks for what was added, if the device wants that.
    pub(super) fn kick(&mut self) {
        let added = std::mem::take(&mut self.added);
        if added > 0 {
            self.vring.kick_if_wanted(self.vring.next_avail().wrapping_sub(added)).unwrap();
        }
    }

    /// Waits for the next request that ends.
    pub(super) fn wait(&mut self) -> Outcome {
        self.kick();
        let next_used =
            if self.by_interrupt { DriverVring::next_used_by_call } else { DriverVring::next_used_by_spinning };
        let used = next_used(&mut self.vring, PATIENCE).unwrap();
        self.outcome(used)
    }

    /// A request that has ended.
    pub(super) fn poll(&mut self) -> Option<Outcome> {
        let used = self.vring.take_used().unwrap()?;
        Some(self.outcome(used))
    }

    fn outcome(&mut self, used: Used) -> Outcome {
        let (place, in_bytes) = self.outstanding.remove(&used.head).expect("an outstanding request");
        let mut data = vec![0; in_bytes as usize];
        let memory = self.vring.ram().memory();
        memory.read_slice(&mut data, GuestAddress(self.data_at(place))).unwrap();
        let status = memory.read_obj(GuestAddress(self.place_gpa(place) + STATUS_OFFSET)).unwrap();
        self.places.push(place);
        Outcome { head: used.head, status, data, used_bytes: used.len_bytes }
    }

    /// One request from its beginning to its end, while no other is outstanding.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], in_bytes: u32) -> Outcome {
        let head = self.add(kind, sector, out, in_bytes);
        let outcome = self.wait();
        assert_eq!(outcome.head, head, "another request came back");
        outcome
    }

    pub(super) fn read(&mut self, sector: u64, sectors: u64) -> Outcome {
        self.request(VIRTIO_BLK_T_IN, sector, &[], (sectors * SECTOR) as u32)
    }

    pub(super) fn write_data(&mut self, sector: u64, data: &[u8]) -> Outcome {
        self.request(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    pub(super) fn flush(&mut self) -> Outcome {
        self.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0)
    }

    pub(super) fn id(&mut self) -> Outcome {
        self.id_in(20)
    }

    /// The ID in a buffer of this length.
    pub(super) fn id_in(&mut self, room_bytes: u32) -> Outcome {
        self.request(VIRTIO_BLK_T_GET_ID, 0, &[], room_bytes)
    }

    pub(super) fn add_discard(&mut self, sector: u64, sectors: u32) -> u16 {
        self.add(VIRTIO_BLK_T_DISCARD, 0, &range(sector, sectors, 0), 0)
    }

    pub(super) fn discard(&mut self, sector: u64, sectors: u32) -> Outcome {
        self.request(VIRTIO_BLK_T_DISCARD, 0, &range(sector, sectors, 0), 0)
    }

    pub(super) fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Outcome {
        self.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, sectors, unmap.into()), 0)
    }

    /// A request of an unknown kind.
    pub(super) fn nonsense(&mut self) -> Outcome {
        self.request(0xdead, 0, &[], 0)
    }
}
