//! Brokers and front-ends vanish under load and come back. The guest loses, repeats and tears no write.

use std::{path::Path, process::ExitCode, sync::Arc, thread, time::Duration};

use anyhow::{Result, ensure};
use ringpass_test_utils::wait_until;
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, HEADER_BYTES, NO_STATUS, SECTOR_BYTES, header},
        descriptor::Descriptor,
        event::Eventfds,
        load::{Load, LoadOptions, RunningLoad},
        ram::Ram,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        shared::InflightRegion,
        vring::{DriverVring, VringLayout},
    },
    harness::{self, Test, test},
    needs::Need,
    seed::Seed,
    stuck_disk::{StuckDisk, StuckKind},
};
use rustix::process::Signal;
use tempfile::TempDir;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 16 << 20;
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 128;

fn main() -> ExitCode {
    let needs = |more: Vec<Need>| more.into_iter().chain(broker_process::needs()).collect::<Vec<Need>>();
    let mut tests: Vec<Test> = [DiskKind::Ext4Direct, DiskKind::Ext4PageCache, DiskKind::Loop]
        .map(|kind| {
            let name = format!("a_broker_killed_at_random_moments_loses_and_repeats_nothing_on_{kind}");
            test(name, needs(kind.needs()), move || killed_brokers(kind))
        })
        .into();
    tests.extend([
        test(
            "a_front_end_that_disconnects_under_load_and_reconnects_loses_nothing",
            needs(DiskKind::Ext4Direct.needs()),
            vanishing_front_ends,
        ),
        test(
            "a_restarted_broker_answers_at_once_and_executes_nothing_before_the_old_io_has_ended",
            needs(StuckDisk::needs()),
            slow_io,
        ),
        test(
            "a_killed_broker_whose_io_hangs_in_a_worker_leaves_the_socket_to_its_successor",
            needs(StuckDisk::needs()),
            hanging_worker,
        ),
    ]);
    harness::run(tests)
}

/// Two queues under load, and the in-flight region that their front-end keeps across connections.
struct Loaded {
    ram: Ram,
    loads: Vec<RunningLoad>,
    vrings: Vec<(VringLayout, Arc<Eventfds>)>,
    region: InflightRegion,
}

impl Loaded {
    fn start(socket: &Path, seed: Seed) -> Result<(Self, FrontEnd)> {
        let mut ram = TestRam::new(2, 8 << 20)?;
        let front_end = FrontEnd::connect(socket, &ram.ram, Options::default())?;
        let region = front_end.new_inflight_region(QUEUES, QUEUE_SIZE)?;
        let mut vrings = Vec::new();
        let mut loads = Vec::new();
        let blocks = DISK_BYTES / 4096 / u64::from(QUEUES);
        for index in 0..QUEUES {
            let options = LoadOptions {
                indirect: true,
                unaligned: index == 1,
                write_zeroes_percent: 3,
                flush_percent: 1,
                ..LoadOptions::new(u64::from(index) * blocks, blocks, 32, seed.derive(index))
            };
            let mut load = ram.load(&front_end, index, QUEUE_SIZE, options)?;
            vrings.push((load.vring().layout(), load.vring().eventfds().clone()));
            loads.push(RunningLoad::start(load));
        }
        Ok((Self { ram: ram.ram, loads, vrings, region }, front_end))
    }

    /// Reconnects as QEMU does: sets the in-flight region first, then starts each vring at its used index.
    fn reconnect(&self, socket: &Path) -> Result<FrontEnd> {
        let front_end = FrontEnd::connect(socket, &self.ram, Options::default())?;
        front_end.set_inflight_region(&self.region)?;
        for (index, (layout, eventfds)) in (0u16..).zip(&self.vrings) {
            front_end.start_vring(index, layout, eventfds, layout.used_idx(&self.ram)?)?;
        }
        Ok(front_end)
    }

    fn has_failed(&self) -> bool {
        self.loads.iter().any(RunningLoad::has_failed)
    }

    /// Waits for some more requests of a random load, and then for a random time.
    fn wait_a_little(&self, rng: &mut fastrand::Rng) {
        self.loads[rng.usize(..self.loads.len())].wait_for_progress(rng.u64(..400));
        thread::sleep(Duration::from_micros(rng.u64(..2000)));
    }

    fn finish(self) -> Result<Vec<Load>> {
        self.loads.into_iter().map(RunningLoad::finish).collect()
    }
}

fn killed_brokers(kind: DiskKind) -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut rng = seed.derive("moments").rng();
    let rig = Rig::new(kind, DISK_BYTES)?;
    let arguments = ["--num-queues", "2"];
    let mut broker = rig.broker(&arguments)?;
    let (loaded, mut front_end) = Loaded::start(&rig.socket(), seed)?;
    for _ in 0..harness::budget(20, 350) {
        loaded.wait_a_little(&mut rng);
        broker.kill()?;
        if loaded.has_failed() {
            break;
        }
        drop(front_end);
        broker = rig.broker(&arguments)?;
        front_end = broker.explain(loaded.reconnect(&rig.socket()))?;
    }
    for load in broker.explain(loaded.finish())? {
        load.check_disk(&rig.disk_file()?)?;
    }
    drop(front_end);
    Ok(())
}

fn vanishing_front_ends() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut rng = seed.derive("moments").rng();
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    let (loaded, mut front_end) = Loaded::start(&rig.socket(), seed)?;
    let fds = broker.usage()?.fds;
    for _ in 0..harness::budget(40, 2000) {
        loaded.wait_a_little(&mut rng);
        if loaded.has_failed() {
            break;
        }
        drop(front_end);
        front_end = broker.explain(loaded.reconnect(&rig.socket()))?;
    }
    let loads = broker.explain(loaded.finish())?;
    for load in &loads {
        load.check_disk(&rig.disk_file()?)?;
    }
    broker.wait_for_fds(fds)?;
    drop(front_end);
    Ok(())
}

/// A driver that sends requests and does not wait for them.
struct SlowDriver {
    driver: BlkDriver,
    region: InflightRegion,
}

fn slow_io() -> Result<()> {
    let disk = StuckDisk::new(StuckKind::LoopDevice, 4 << 20)?;
    let directory = TempDir::new()?;
    let socket = directory.path().join("vhost.sock");
    let arguments = ["--direct-io", "on"];
    let mut broker = BrokerProcess::start(&socket, disk.path(), &arguments)?;
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(&socket, &ram.ram, Options::default())?;
    let region = front_end.new_inflight_region(1, QUEUE_SIZE)?;
    let mut slow = SlowDriver { driver: ram.driver(&front_end, 0, 64 << 10)?, region };

    disk.freeze()?;
    let written = vec![0xa7; 4096];
    let data = slow.driver.put_data(&written)?;
    let chain = [slow.driver.put_header(VIRTIO_BLK_T_OUT, 8)?, data, slow.driver.put_status()?];
    let head = slow.driver.vring().add(&chain)?;
    slow.driver.vring().publish()?;
    wait_until("the write is in flight", || Ok(slow.region.heads(0)? == [head]))?;
    disk.wait_for_hanging_write(|| broker.has_hanging_thread())?;
    broker.signal(Signal::KILL)?;
    broker.wait()?;
    drop(front_end);

    // The driver sends a second request while no broker runs.
    let vring = slow.driver.vring();
    let (read_header, read_data, read_status) = (256 << 10, 260 << 10, 272 << 10);
    let memory = ram.ram.memory();
    memory.write_slice(&header(VIRTIO_BLK_T_IN, 16), GuestAddress(read_header))?;
    memory.write_obj(NO_STATUS, GuestAddress(read_status))?;
    vring.add(&[
        Descriptor::readable(read_header, HEADER_BYTES),
        Descriptor::writable(read_data, 4096),
        Descriptor::writable(read_status, 1),
    ])?;
    vring.publish()?;

    let broker = BrokerProcess::start(&socket, disk.path(), &arguments)?;
    let answered = answers_and_executes_nothing(&socket, &ram.ram, &mut slow);
    disk.thaw()?;
    let front_end = broker.explain(answered)?;
    let vring = slow.driver.vring();
    broker.explain(both_are_executed(vring))?;
    ensure!(slow.driver.status()? == 0, "status {} of the write", slow.driver.status()?);
    let status: u8 = memory.read_obj(GuestAddress(read_status))?;
    ensure!(status == 0, "status {status} of the read");
    ensure!(slow.region.heads(0)?.is_empty(), "in flight: {:?}", slow.region.heads(0)?);
    ensure!(slow.driver.read(8, 4096)? == written, "the write did not reach the disk");
    ensure!(slow.driver.read(16, 4096)? == vec![StuckDisk::INITIAL_BYTE; 4096], "the write reached too far");
    drop(front_end);
    Ok(())
}

/// A write hangs in a thread of the process itself. The process cannot end, and its files stay open, even the socket on
/// which it listens.
fn hanging_worker() -> Result<()> {
    let disk = StuckDisk::new(StuckKind::File, 4 << 20)?;
    let directory = TempDir::new()?;
    let socket = directory.path().join("vhost.sock");
    let arguments = ["--direct-io", "on"];
    let mut old = BrokerProcess::start(&socket, disk.path(), &arguments)?;
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(&socket, &ram.ram, Options::default())?;
    let region = front_end.new_inflight_region(1, QUEUE_SIZE)?;
    let mut driver = ram.driver(&front_end, 0, 64 << 10)?;
    disk.freeze()?;
    let written = vec![0xa7; 4096];
    let data = driver.put_data(&written)?;
    let chain = [driver.put_header(VIRTIO_BLK_T_OUT, 8)?, data, driver.put_status()?];
    driver.vring().add(&chain)?;
    driver.vring().publish()?;
    wait_until("a worker hangs", || old.has_hanging_thread())?;
    old.signal(Signal::KILL)?;

    let new = BrokerProcess::start(&socket, disk.path(), &arguments);
    let served = new.as_ref().map_err(|error| anyhow::anyhow!("{error:#}")).and_then(|_| {
        let front_end = FrontEnd::connect(&socket, &ram.ram, Options::default())?;
        ensure!(old.is_running()?, "the old broker has ended, so the test shows nothing");
        Ok(front_end)
    });
    disk.thaw()?;
    let new = new?;
    let successor = new.explain(served)?;
    old.wait()?;
    drop(front_end);
    successor.set_inflight_region(&region)?;
    let (layout, eventfds) = (driver.vring().layout(), driver.vring().eventfds().clone());
    successor.start_vring(0, &layout, &eventfds, layout.used_idx(&ram.ram)?)?;
    if driver.vring().used_idx()? == driver.vring().next_used() {
        new.explain(driver.vring().wait_for_call(Duration::from_secs(30)))?;
    }
    ensure!(driver.vring().take_used()?.is_some() && driver.status()? == 0, "status {}", driver.status()?);
    new.explain(driver.read(8, 4096)).and_then(|found| {
        ensure!(found == written, "the write did not reach the disk");
        Ok(())
    })
}

/// Checks that the new broker answers all messages and executes nothing while the first broker's write hangs.
fn answers_and_executes_nothing(socket: &Path, ram: &Ram, slow: &mut SlowDriver) -> Result<FrontEnd> {
    let front_end = FrontEnd::connect(socket, ram, Options::default())?;
    let capacity = u64::from_le_bytes(front_end.connection().config(8)?.try_into().expect("eight bytes"));
    ensure!(capacity == (4 << 20) / SECTOR_BYTES, "capacity {capacity}");
    front_end.set_inflight_region(&slow.region)?;
    let heads = slow.region.heads(0)?;
    let vring = slow.driver.vring();
    let (layout, eventfds) = (vring.layout(), vring.eventfds().clone());
    let base = layout.used_idx(ram)?;
    front_end.start_vring(0, &layout, &eventfds, base)?;
    // The vring would not stop before the broker has the disk, because the broker must first execute the recorded
    // requests.
    vring.kick()?;
    // Longer than a request takes that the broker executes at once.
    thread::sleep(Duration::from_millis(200));
    ensure!(vring.used_idx()? == base, "the broker executed a request before the old I/O had ended");
    ensure!(slow.region.heads(0)? == heads, "the broker took a request before the old I/O had ended");
    ensure!(front_end.connection().config(8)?.len() == 8);
    Ok(front_end)
}

fn both_are_executed(vring: &mut DriverVring) -> Result<()> {
    for _ in 0..2 {
        vring.wait_for_call(Duration::from_secs(30))?;
        ensure!(vring.take_used()?.is_some());
    }
    ensure!(vring.take_used()?.is_none(), "a request was executed twice");
    Ok(())
}
