//! The engine on a disk that does not answer: which operations wait for hanging I/O, and which do not.

use std::{
    io,
    os::unix::net::UnixStream,
    process::ExitCode,
    sync::{Arc, mpsc::channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_broker::{
    disk::Disk,
    engine::{DiskSource, Engine, EngineConfig},
    vhost_user::{Device, PeerWatch, QueueEventfds},
    virtio_blk::{BlkConfig, BlkParameters},
    virtqueue::{DirtyLog, InflightFile, InflightQueue, InflightRegion, QueueSetup},
};
use ringpass_tests::{
    front_end::{
        blk::{BlkDriver, NO_STATUS, SECTOR_BYTES},
        event::Eventfds,
        ram::{Ram, RamRegion},
        shared,
        vring::{DriverVring, VringLayout},
    },
    harness::{self, test},
    stuck_disk::{self, StuckDisk, StuckKind},
};
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::{virtio_blk::VIRTIO_BLK_T_OUT, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use vm_memory::GuestAddress;

const SIZE_BYTES: u64 = 4 << 20;
const QUEUE_SIZE: u16 = 64;
const RAM_BYTES: u64 = 8 << 20;
const BLOCK_BYTES: usize = 4096;
/// Longer than any step takes that does not wait for the disk.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a test watches that something does not happen. If it happened later, the test would miss it, not fail.
const WATCH: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let mut tests = vec![
        test(
            "reads_and_other_queues_go_on_while_writes_of_a_file_hang",
            StuckDisk::needs(),
            reads_go_on_beside_hanging_writes,
        ),
        test(
            "a_front_end_that_migrates_does_not_wait_for_io_of_the_front_end_before",
            StuckDisk::needs(),
            a_migration_beside_io_left_behind,
        ),
    ];
    for kind in [StuckKind::File, StuckKind::LoopDevice] {
        tests.push(test(format!("a_stop_waits_for_the_queues_own_io_only_{kind}"), StuckDisk::needs(), move || {
            a_stop_waits_for_its_own_io(kind)
        }));
        tests.push(test(
            format!("an_abandoned_queue_starts_again_only_after_its_io_and_completes_it_once_{kind}"),
            StuckDisk::needs(),
            move || an_abandoned_queue_comes_back(kind),
        ));
        tests.push(test(
            format!("a_queue_whose_stop_nobody_waits_for_starts_again_only_after_its_io_{kind}"),
            StuckDisk::needs(),
            move || a_stop_that_nobody_waits_for(kind),
        ));
        tests.push(test(format!("a_shutdown_waits_for_hanging_io_{kind}"), StuckDisk::needs(), move || {
            a_shutdown_waits(kind)
        }));
    }
    harness::run(tests)
}

/// The engine has its disk from the start and never needs another.
struct NoSource;

impl DiskSource for NoSource {
    fn request(&mut self) {}

    fn stop_waiting(&mut self) {}

    fn release(&mut self, _is_wanted: &dyn Fn() -> bool) {}

    fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        Ok(SIZE_BYTES)
    }
}

/// An engine with one worker for two queues, and their drivers.
struct Machine {
    // The engine drops first. Its drop does not wait, and its threads end when the disk's drop has thawed it.
    engine: Engine,
    disk: StuckDisk,
    ram: Ram,
    drivers: [BlkDriver; 2],
    inflight: InflightFile,
}

impl Machine {
    fn new(kind: StuckKind) -> Result<Self> {
        let disk = StuckDisk::new(kind, SIZE_BYTES)?;
        let opened = Arc::new(Disk::open(&disk.config_waiting())?);
        let device = BlkConfig::new(
            BlkParameters::new(opened.size_bytes())
                .logical_block_bytes(opened.logical_block_bytes())
                .physical_block_bytes(opened.physical_block_bytes())
                .num_queues(2)
                .queue_size(QUEUE_SIZE),
        )?;
        let config = EngineConfig::new(device).workers(1);
        let mut engine = Engine::new(config, |_| -> io::Result<Box<dyn DiskSource>> { Ok(Box::new(NoSource)) })?;
        engine.control().set_disk(&opened);
        let ram = Ram::single(RAM_BYTES)?;
        engine.set_memory(Arc::new(ram.memory().clone()));
        let mut arena = ram.regions()[0].arena();
        let mut driver = || -> Result<BlkDriver> {
            let layout = VringLayout::take(&mut arena, QUEUE_SIZE)?;
            let vring = DriverVring::new(&ram, layout, true, Eventfds::new()?)?;
            BlkDriver::new(vring, &mut arena, 1 << 16)
        };
        let drivers = [driver()?, driver()?];
        let inflight = InflightRegion::create(2, QUEUE_SIZE)?;
        let mut machine = Self { engine, disk, ram, drivers, inflight };
        machine.start(0)?;
        machine.start(1)?;
        Ok(machine)
    }

    fn inflight(&self, index: u16) -> Result<InflightQueue> {
        let fd = self.inflight.fd.try_clone()?;
        let region = InflightRegion::from_fd(fd, 0, self.inflight.size_bytes, 2, QUEUE_SIZE)?;
        region.queue(index).context("a region of two queues")
    }

    /// Starts a queue as a front-end that knows only the in-flight region.
    fn start(&mut self, index: u16) -> Result<()> {
        let inflight = self.inflight(index)?;
        let vring = self.drivers[usize::from(index)].vring();
        let layout = vring.layout();
        let setup = QueueSetup {
            size: layout.size,
            desc_table: GuestAddress(layout.desc_gpa),
            avail_ring: GuestAddress(layout.avail_gpa),
            used_ring: GuestAddress(layout.used_gpa),
            next_avail: vring.used_idx()?,
            driver_features: 1 << VIRTIO_RING_F_EVENT_IDX,
            used_log_gpa: None,
            inflight: Some(inflight),
        };
        let eventfds = vring.eventfds();
        let eventfds = QueueEventfds {
            kick: Some(eventfds.kick().to_eventfd()?),
            call: Some(eventfds.call().to_eventfd()?),
            err: None,
        };
        self.engine.start_queue(index, setup, eventfds);
        self.engine.set_enabled(index, true);
        Ok(())
    }

    /// Sends a write of this byte and waits until the engine has taken it.
    fn send_write(&mut self, index: u16, block: u64, byte: u8) -> Result<()> {
        let driver = &mut self.drivers[usize::from(index)];
        let header = driver.put_header(VIRTIO_BLK_T_OUT, block * BLOCK_BYTES as u64 / SECTOR_BYTES)?;
        let data = driver.put_data(&[byte; BLOCK_BYTES])?;
        let status = driver.put_status()?;
        let head = driver.vring().add(&[header, data, status])?;
        driver.vring().publish()?;
        let end = Instant::now() + LIMIT;
        while !self.inflight_heads(index)?.contains(&head) {
            ensure!(Instant::now() < end, "the engine does not take the write");
            std::thread::yield_now();
        }
        self.disk.wait_for_hanging_write(|| stuck_disk::has_hanging_thread(std::process::id()))
    }

    /// The heads that the in-flight region has for a queue.
    fn inflight_heads(&self, index: u16) -> Result<Vec<u16>> {
        let region = shared::InflightRegion::new(
            VhostUserInflight::new(self.inflight.size_bytes, 0, 2, QUEUE_SIZE),
            self.inflight.fd.try_clone()?,
        );
        region.heads(index)
    }

    fn used_idx(&mut self, index: usize) -> Result<u16> {
        self.drivers[index].vring().used_idx()
    }

    fn wait_for_used(&mut self, index: usize) -> Result<()> {
        let driver = &mut self.drivers[index];
        driver.vring().wait_for_call(LIMIT)?;
        driver.vring().take_used()?.context("something is used")?;
        ensure!(driver.status()? == 0, "status {}", driver.status()?);
        Ok(())
    }
}

fn reads_go_on_beside_hanging_writes() -> Result<()> {
    let mut machine = Machine::new(StuckKind::File)?;
    machine.disk.freeze()?;
    machine.send_write(0, 0, 1)?;
    for block in 1..50 {
        let read = machine.drivers[1].read(block * 8, BLOCK_BYTES as u32)?;
        ensure!(read == [StuckDisk::INITIAL_BYTE; BLOCK_BYTES], "block {block}");
    }
    ensure!(machine.used_idx(0)? == 0, "the write has ended on a frozen file system");
    machine.disk.thaw()?;
    machine.wait_for_used(0)?;
    ensure!(machine.drivers[1].read(0, BLOCK_BYTES as u32)? == [1; BLOCK_BYTES]);
    Ok(())
}

fn a_stop_waits_for_its_own_io(kind: StuckKind) -> Result<()> {
    let mut machine = Machine::new(kind)?;
    machine.disk.freeze()?;
    machine.send_write(0, 0, 1)?;
    ensure!(machine.engine.stop_queue(1) == Some(0), "the other queue stops");
    let Machine { mut engine, disk, mut drivers, .. } = machine;
    let (stopped, is_stopped) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let next_avail = engine.stop_queue(0).unwrap();
            let _ = stopped.send(next_avail);
        });
        let early = is_stopped.recv_timeout(WATCH);
        disk.thaw()?;
        ensure!(early.is_err(), "the queue stopped with a write in flight");
        let next_avail = is_stopped.recv_timeout(LIMIT).context("the queue does not stop")?;
        ensure!(next_avail == 1);
        ensure!(drivers[0].vring().used_idx()? == 1 && drivers[0].status()? == 0, "the write is not completed");
        Ok(())
    })
}

fn an_abandoned_queue_comes_back(kind: StuckKind) -> Result<()> {
    let mut machine = Machine::new(kind)?;
    machine.disk.freeze()?;
    machine.send_write(0, 0, 1)?;
    machine.engine.abandon();
    ensure!(machine.inflight_heads(0)?.len() == 1, "the in-flight region does not have the write");

    // The next front-end has other mappings and the same in-flight region.
    let file = Arc::new(machine.ram.regions()[0].file().try_clone()?);
    let ram = Ram::new([RamRegion::of_file(file, 0, 0, RAM_BYTES)?])?;
    machine.engine.set_memory(Arc::new(ram.memory().clone()));
    machine.start(0)?;
    machine.start(1)?;
    if kind == StuckKind::File {
        let read = machine.drivers[1].read(80, BLOCK_BYTES as u32)?;
        ensure!(read == [StuckDisk::INITIAL_BYTE; BLOCK_BYTES], "a queue without I/O in flight does not run");
    }
    the_old_write_ends_once(machine)
}

/// Checks queue 0, which was started again while its write of block 0 hangs.
fn the_old_write_ends_once(mut machine: Machine) -> Result<()> {
    std::thread::sleep(WATCH);
    ensure!(
        machine.drivers[0].status()? == NO_STATUS,
        "the engine executed the write again before the old one had ended"
    );
    machine.disk.thaw()?;
    machine.wait_for_used(0)?;
    // If the engine executed the write again, the used ring would have it twice.
    machine.drivers[0].write(8, &[2; BLOCK_BYTES])?;
    ensure!(machine.used_idx(0)? == 2, "used index {}", machine.used_idx(0)?);
    ensure!(machine.inflight_heads(0)?.is_empty());
    ensure!(machine.drivers[0].read(0, BLOCK_BYTES as u32)? == [1; BLOCK_BYTES]);
    ensure!(machine.engine.stop_queue(0) == Some(3));
    Ok(())
}

/// The front-end sent a stop and a start and closed the connection. The engine gives up the stop, and the start
/// follows.
fn a_stop_that_nobody_waits_for(kind: StuckKind) -> Result<()> {
    let mut machine = Machine::new(kind)?;
    machine.disk.freeze()?;
    machine.send_write(0, 0, 1)?;
    let (ours, theirs) = UnixStream::pair()?;
    machine.engine.set_peer(Some(PeerWatch::new(&ours)?));
    drop(theirs);
    ensure!(machine.engine.stop_queue(0).is_none(), "the queue stopped with a write in flight");

    machine.start(0)?;
    the_old_write_ends_once(machine)
}

fn a_migration_beside_io_left_behind() -> Result<()> {
    let mut machine = Machine::new(StuckKind::File)?;
    machine.disk.freeze()?;
    machine.send_write(0, 0, 1)?;
    machine.engine.abandon();

    // The next front-end starts only the other queue.
    machine.engine.set_memory(Arc::new(machine.ram.memory().clone()));
    machine.start(1)?;
    machine.drivers[1].read(80, BLOCK_BYTES as u32)?;
    let log_bytes = RAM_BYTES / 4096 / 8;
    let log = tempfile::tempfile()?;
    log.set_len(log_bytes)?;
    machine.engine.set_dirty_log(Some(Arc::new(DirtyLog::from_fd(log.into(), 0, log_bytes)?)));
    let Machine { mut engine, disk, .. } = machine;
    let (stopped, is_stopped) = channel();
    std::thread::scope(|scope| {
        let engine = &mut engine;
        scope.spawn(move || stopped.send(engine.stop_queue(1)));
        let early = is_stopped.recv_timeout(LIMIT);
        let is_locked = Disk::open(&disk.config()).is_err();
        disk.thaw()?;
        ensure!(early.context("the queue waits for the write that was left behind")? == Some(1));
        ensure!(is_locked, "the disk is free with a write in flight");
        anyhow::Ok(())
    })?;
    drop(Disk::open(&disk.config_waiting()).context("the disk is not let go of")?);
    Ok(())
}

fn a_shutdown_waits(kind: StuckKind) -> Result<()> {
    let mut machine = Machine::new(kind)?;
    machine.disk.freeze()?;
    machine.send_write(0, 0, 7)?;
    let Machine { engine, disk, mut drivers, .. } = machine;
    let (ended, has_ended) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            engine.shutdown();
            let _ = ended.send(());
        });
        let early = has_ended.recv_timeout(WATCH);
        disk.thaw()?;
        ensure!(early.is_err(), "the engine ended with a write in flight");
        has_ended.recv_timeout(LIMIT).context("the engine does not end")?;
        ensure!(drivers[0].vring().used_idx()? == 1 && drivers[0].status()? == 0, "the write is not completed");
        drop(Disk::open(&disk.config_waiting())?);
        Ok(())
    })
}
