//! The whole device in one process: the server, the engine, a disk image, and a third-party front-end and driver.

use std::error::Error;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use memmap2::MmapMut;
use ringpass_broker::disk::{Disk, DiskConfig};
use ringpass_broker::engine::{DiskSource, Engine, EngineConfig, EngineControl};
use ringpass_broker::vhost_user::{Server, ServerError, ServerHandle};
use ringpass_broker::virtio_blk::{BlkConfig, BlkParameters};
use rustix::fs::MemfdFlags;
use virtio_driver::{VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

const DISK_BYTES: u64 = 4 << 20;
const BLOCK_BYTES: usize = 4096;
const QUEUES: usize = 2;
const QUEUE_SIZE: u16 = 64;

/// A disk source that has the disk from the beginning.
struct FixedDisk;

impl DiskSource for FixedDisk {
    fn request(&mut self) {}

    fn stop_waiting(&mut self) {}

    fn release(&mut self, _is_wanted: &dyn Fn() -> bool) {}

    fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn Error + Send + Sync>> {
        Ok(DISK_BYTES)
    }
}

struct Rig {
    directory: tempfile::TempDir,
    handle: ServerHandle,
    thread: JoinHandle<Result<(), ServerError>>,
}

impl Rig {
    fn start() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = directory.path().join("disk.img");
        std::fs::File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
        let device = BlkConfig::new(
            BlkParameters::new(DISK_BYTES)
                .physical_block_bytes(4096)
                .num_queues(QUEUES as u16)
                .queue_size(QUEUE_SIZE)
                .serial("device-test".parse().unwrap()),
        )
        .unwrap();
        let config = EngineConfig::new(device).workers(QUEUES);
        let source = |_: EngineControl| -> io::Result<Box<dyn DiskSource>> { Ok(Box::new(FixedDisk)) };
        let mut engine = Engine::new(config, source).unwrap();
        engine.control().set_disk(&Arc::new(Disk::open(&DiskConfig::new(&image)).unwrap()));

        let server = Server::bind(&directory.path().join("socket")).unwrap();
        let handle = server.handle();
        let thread = thread::spawn(move || {
            let result = server.run(&mut engine);
            engine.shutdown();
            result
        });
        Self { directory, handle, thread }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Ends the server and returns the content of the image.
    fn stop(self) -> Vec<u8> {
        self.handle.stop();
        self.thread.join().unwrap().unwrap();
        let mut content = vec![0; DISK_BYTES as usize];
        std::fs::File::open(self.directory.path().join("disk.img")).unwrap().read_exact_at(&mut content, 0).unwrap();
        content
    }
}

/// A front-end with its driver, and one buffer of a block for each entry of a queue.
struct Client {
    transport: Box<VirtioBlkTransport>,
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    buffers: MmapMut,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::MQ.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(socket.to_str().unwrap(), features).unwrap());
        assert_eq!(u64::from(transport.get_config().unwrap().capacity) * 512, DISK_BYTES);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, QUEUES, QUEUE_SIZE).unwrap();
        // This driver starts with interrupts off.
        queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
        let file = rustix::fs::memfd_create("device-test-buffers", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, (BLOCK_BYTES * usize::from(QUEUE_SIZE)) as u64).unwrap();
        // SAFETY: the file is ours, has this length for as long as it lives, and only the device writes to it, between
        // the submission of a request and its completion, when no code of this process accesses the buffer.
        let buffers = unsafe { MmapMut::map_mut(&file) }.unwrap();
        transport.map_mem_region(buffers.as_ptr() as usize, buffers.len(), file.as_raw_fd(), 0).unwrap();
        Self { transport, queues, buffers }
    }

    /// Submits one request for each of these blocks on a queue at once, and waits for all.
    fn all(
        &mut self,
        queue: usize,
        blocks: &[u64],
        mut submit: impl FnMut(&mut VirtioBlkQueue<'static, usize>, u64, &mut [u8], usize),
    ) {
        for (slot, (block, buffer)) in blocks.iter().zip(self.buffers.chunks_mut(BLOCK_BYTES)).enumerate() {
            submit(&mut self.queues[queue], block * BLOCK_BYTES as u64, buffer, slot);
        }
        self.transport.get_submission_notifier(queue).notify().unwrap();
        let mut waiting = blocks.len();
        while waiting > 0 {
            self.transport.get_completion_fd(queue).read().unwrap();
            for completion in self.queues[queue].completions() {
                assert_eq!(completion.ret, 0, "request {}", completion.context);
                waiting -= 1;
            }
        }
    }

    fn write(&mut self, queue: usize, blocks: &[u64], generation: u8) {
        self.all(queue, blocks, |queue, offset, buffer, slot| {
            buffer.copy_from_slice(&content(offset / BLOCK_BYTES as u64, generation));
            queue.write(offset, buffer, slot).unwrap();
        });
        self.all(queue, &[0], |queue, _, _, slot| queue.flush(slot).unwrap());
    }

    fn verify(&mut self, queue: usize, blocks: &[u64], generation: u8) {
        self.all(queue, blocks, |queue, offset, buffer, slot| {
            buffer.fill(0);
            queue.read(offset, buffer, slot).unwrap();
        });
        for (block, buffer) in blocks.iter().zip(self.buffers.chunks(BLOCK_BYTES)) {
            assert!(buffer == content(*block, generation), "block {block}");
        }
    }
}

fn content(block: u64, generation: u8) -> [u8; BLOCK_BYTES] {
    std::array::from_fn(|at| (block as u8).wrapping_mul(31) ^ (at / 8) as u8 ^ generation.wrapping_mul(77))
}

#[test]
fn data_of_one_front_end_reaches_the_disk_and_the_next_front_end() {
    let rig = Rig::start();
    // As many requests at once as the ring has room for, with three descriptors each.
    let of_queue = |queue: u64| -> Vec<u64> { (0..20).map(|number| number * 7 + queue).collect() };

    let mut first = Client::connect(&rig.socket());
    for queue in 0..QUEUES {
        for generation in [1, 2] {
            first.write(queue, &of_queue(queue as u64), generation);
            first.verify(queue, &of_queue(queue as u64), generation);
        }
    }
    drop(first);

    let mut second = Client::connect(&rig.socket());
    for queue in 0..QUEUES {
        second.verify(QUEUES - 1 - queue, &of_queue(queue as u64), 2);
    }
    drop(second);

    let image = rig.stop();
    for block in (0..QUEUES as u64).flat_map(of_queue) {
        let start = block as usize * BLOCK_BYTES;
        assert!(image[start..start + BLOCK_BYTES] == content(block, 2), "block {block} in the image");
    }
}

#[test]
fn the_device_serves_the_next_front_end_after_one_leaves_with_requests_under_way() {
    let rig = Rig::start();
    for round in 0..10 {
        let mut client = Client::connect(&rig.socket());
        let blocks: Vec<u64> = (0..20).collect();
        for (slot, (block, buffer)) in blocks.iter().zip(client.buffers.chunks_mut(BLOCK_BYTES)).enumerate() {
            buffer.copy_from_slice(&content(*block, round));
            client.queues[0].write(block * BLOCK_BYTES as u64, buffer, slot).unwrap();
        }
        client.transport.get_submission_notifier(0).notify().unwrap();
    }
    let mut last = Client::connect(&rig.socket());
    last.write(0, &[0, 1, 2], 99);
    last.verify(1, &[0, 1, 2], 99);
    rig.stop();
}
