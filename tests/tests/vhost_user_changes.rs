//! A front-end changes things while the device runs: eventfds, memory, the state of vrings, and resets.

use std::{os::fd::AsFd, process::ExitCode, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES},
        descriptor::Descriptor,
        event::{Event, Eventfds},
        load::{BLOCK_BYTES, Load, LoadOptions, RunningLoad},
        ram::{Ram, RamRegion},
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        vring::{DriverVring, VringLayout},
    },
    harness::{self, Test, test},
    seed::Seed,
};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::{
    virtio_blk::VIRTIO_BLK_T_IN,
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    },
};
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 16 << 20;
const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES;

type Body = fn(&mut Bench) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Body); 12] = [
        ("a_queue_is_served_while_its_call_and_kick_eventfds_change_under_load", eventfds_change),
        ("a_queue_without_a_call_eventfd_is_served", no_call),
        ("a_queue_without_a_kick_eventfd_is_polled", no_kick),
        ("a_queue_works_after_kicks_with_nothing_available", spurious_kicks),
        ("a_disabled_vring_executes_nothing_until_it_is_enabled", disabled),
        ("a_front_end_disables_and_enables_vrings_under_load", enable_under_load),
        ("a_front_end_stops_and_starts_vrings_under_load", stop_under_load),
        ("a_front_end_adds_and_removes_hundreds_of_memory_slots_under_load", memory_slots),
        ("a_front_end_replaces_the_memory_table_under_load", memory_tables),
        ("a_vring_that_its_driver_sets_up_wrongly_stops_alone_and_a_new_set_up_revives_it", broken_ring),
        ("a_reset_stops_every_vring_and_the_device_starts_again", reset_device),
        ("the_device_keeps_its_status_and_a_status_of_zero_resets_it", status),
    ];
    let tests: Vec<Test> = tests
        .into_iter()
        .map(|(name, body)| {
            let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
            test(name, needs, move || Bench::run(body))
        })
        .collect();
    harness::run(tests)
}

/// A front-end with two queues, of which none is started.
struct Bench {
    rig: Rig,
    ram: TestRam,
    front_end: FrontEnd,
    seed: Seed,
}

impl Bench {
    fn run(body: Body) -> Result<()> {
        let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
        let broker = rig.broker(&["--num-queues", "2"])?;
        let ram = TestRam::new(2, 8 << 20)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let mut bench = Self { rig, ram, front_end, seed: Seed::from_env_or_random() };
        broker.explain(body(&mut bench))
    }

    fn options(&self) -> LoadOptions {
        LoadOptions { indirect: true, ..LoadOptions::new(0, BLOCKS / 2, 16, self.seed) }
    }

    /// Starts a load on queue 0 and the first half of the disk.
    fn start_load(&mut self) -> Result<(RunningLoad, VringLayout, Arc<Eventfds>)> {
        let options = self.options();
        let mut load = self.ram.load(&self.front_end, 0, 128, options)?;
        let (layout, eventfds) = (load.vring().layout(), load.vring().eventfds().clone());
        Ok((RunningLoad::start(load), layout, eventfds))
    }

    fn finish(&self, load: RunningLoad) -> Result<()> {
        load.finish()?.check_disk(&self.rig.disk_file()?)
    }
}

fn eventfds_change(bench: &mut Bench) -> Result<()> {
    let (load, _layout, eventfds) = bench.start_load()?;
    let connection = bench.front_end.connection();
    for round in 0..harness::budget(1000, 50_000) {
        if load.has_failed() {
            break;
        }
        let event = Event::new()?;
        if round % 2 == 0 {
            connection.set_vring_fd(FrontendReq::SET_VRING_CALL, 0, Some(event.as_fd()))?;
            eventfds.change_call(event)?;
        } else {
            connection.set_vring_fd(FrontendReq::SET_VRING_KICK, 0, Some(event.as_fd()))?;
            eventfds.change_kick(event)?;
        }
        // The test pauses only sometimes, so that changes also follow one another at once.
        if round % 8 == 0 {
            load.wait_for_progress(1);
        }
    }
    load.wait_for_progress(100);
    bench.finish(load)
}

fn no_call(bench: &mut Bench) -> Result<()> {
    let vring = bench.ram.vring(&bench.front_end, 128)?;
    bench.front_end.start_vring(0, &vring.layout(), vring.eventfds(), 0)?;
    let connection = bench.front_end.connection();
    connection.set_vring_fd(FrontendReq::SET_VRING_CALL, 0, None)?;
    run_spinning(bench, vring)
}

fn no_kick(bench: &mut Bench) -> Result<()> {
    let vring = bench.ram.vring(&bench.front_end, 128)?;
    bench.front_end.start_vring(0, &vring.layout(), vring.eventfds(), 0)?;
    bench.front_end.connection().set_vring_fd(FrontendReq::SET_VRING_KICK, 0, None)?;
    run_spinning(bench, vring)
}

fn run_spinning(bench: &mut Bench, vring: DriverVring) -> Result<()> {
    let options = LoadOptions { spin: true, ..bench.options() };
    let mut load = Load::new(vring, &mut bench.ram.arenas, options)?;
    for _ in 0..harness::budget(20, 200) {
        load.run(100)?;
        // The pause lets a device sleep that would wait for kicks.
        thread::sleep(Duration::from_millis(5));
    }
    load.check_disk(&bench.rig.disk_file()?)
}

fn spurious_kicks(bench: &mut Bench) -> Result<()> {
    let mut idle = bench.ram.driver(&bench.front_end, 1, 4096)?;
    let (load, _layout, eventfds) = bench.start_load()?;
    let idle_kick = idle.vring().eventfds().kick();
    let target = load.completed() + harness::budget(3_000, 100_000);
    while load.completed() < target && !load.has_failed() {
        for _ in 0..100 {
            idle_kick.signal()?;
            eventfds.kick().signal()?;
        }
        thread::yield_now();
    }
    ensure!(idle.vring().take_used()?.is_none(), "a chain that was never available was used");
    idle.read(0, 4096)?;
    bench.finish(load)
}

/// Sends a read without waiting for it.
fn send_read(driver: &mut BlkDriver) -> Result<()> {
    let chain =
        [driver.put_header(VIRTIO_BLK_T_IN, 0)?, Descriptor::writable(driver.data_gpa(), 4096), driver.put_status()?];
    driver.vring().add(&chain)?;
    driver.vring().publish_quietly()?;
    driver.vring().kick()
}

/// Checks that the device uses nothing, for longer than a request takes.
fn ensure_unserved(driver: &mut BlkDriver) -> Result<()> {
    thread::sleep(Duration::from_millis(50));
    ensure!(driver.vring().take_used()?.is_none(), "a request was executed");
    Ok(())
}

fn ensure_served(driver: &mut BlkDriver) -> Result<()> {
    driver.vring().wait_for_call(Duration::from_secs(20))?;
    ensure!(driver.vring().take_used()?.is_some() && driver.status()? == 0, "status {}", driver.status()?);
    Ok(())
}

fn disabled(bench: &mut Bench) -> Result<()> {
    let mut driver = bench.ram.driver(&bench.front_end, 0, 4096)?;
    driver.read(0, 4096)?;
    let connection = bench.front_end.connection();
    for _ in 0..3 {
        connection.set_vring(FrontendReq::SET_VRING_ENABLE, 0, 0)?;
        send_read(&mut driver)?;
        ensure_unserved(&mut driver)?;
        // The driver does not kick again.
        connection.set_vring(FrontendReq::SET_VRING_ENABLE, 0, 1)?;
        ensure_served(&mut driver)?;
    }
    Ok(())
}

fn enable_under_load(bench: &mut Bench) -> Result<()> {
    let (load, _layout, _eventfds) = bench.start_load()?;
    let connection = bench.front_end.connection();
    for _ in 0..harness::budget(200, 10_000) {
        if load.has_failed() {
            break;
        }
        connection.set_vring(FrontendReq::SET_VRING_ENABLE, 0, 0)?;
        connection.set_vring(FrontendReq::SET_VRING_ENABLE, 0, 1)?;
        load.wait_for_progress(3);
    }
    bench.finish(load)
}

fn stop_under_load(bench: &mut Bench) -> Result<()> {
    let (load, layout, eventfds) = bench.start_load()?;
    for _ in 0..harness::budget(200, 10_000) {
        if load.has_failed() {
            break;
        }
        let base = bench.front_end.stop_vring(0)?;
        let used = layout.used_idx(&bench.ram.ram)?;
        ensure!(base == used, "stopped at {base} with {used} used: requests are still in flight");
        bench.front_end.start_vring(0, &layout, &eventfds, base)?;
        load.wait_for_progress(3);
    }
    bench.finish(load)
}

fn memory_slots(bench: &mut Bench) -> Result<()> {
    /// With the regions of the bench, no more regions than any back-end of this kind takes.
    const SLOTS: u64 = 400;
    const SLOT_BYTES: u64 = 64 << 10;
    let mut driver = bench.ram.driver(&bench.front_end, 1, 4096)?;
    driver.write(DISK_BYTES / SECTOR_BYTES - 8, &[0x6b; 4096])?;
    let (load, _layout, _eventfds) = bench.start_load()?;
    let connection = bench.front_end.connection();
    for round in 0..harness::budget(2, 30) {
        let slots = (0..SLOTS).map(|slot| RamRegion::new((1 << 32) + 2 * slot * SLOT_BYTES, SLOT_BYTES));
        let slots = slots.collect::<Result<Vec<_>>>()?;
        for (index, slot) in slots.iter().enumerate() {
            connection.add_mem_reg(&slot.message(), slot.file())?;
            if index % 40 == 0 {
                let buffer = Descriptor::writable(slot.gpa() + 0x1000, 4096);
                let answer = driver.request(VIRTIO_BLK_T_IN, DISK_BYTES / SECTOR_BYTES - 8, &[buffer])?;
                ensure!(answer.status == 0, "round {round}, slot {index}: {answer:?}");
                let ram = Ram::new([slot.clone()])?;
                let mut found = [0; 4096];
                ram.memory().read_slice(&mut found, GuestAddress(slot.gpa() + 0x1000))?;
                ensure!(found == [0x6b; 4096], "round {round}: slot {index} has other data");
            }
        }
        let mut slots = slots;
        let mut rng = bench.seed.derive(round).rng();
        rng.shuffle(&mut slots);
        for slot in &slots {
            connection.rem_mem_reg(&slot.message(), Some(slot.file()))?;
        }
        ensure!(!load.has_failed(), "the load has failed");
    }
    driver.read(0, 4096).context("after all slots are gone")?;
    bench.finish(load)
}

fn memory_tables(bench: &mut Bench) -> Result<()> {
    let (load, _layout, _eventfds) = bench.start_load()?;
    let connection = bench.front_end.connection();
    let more = (0..6).map(|slot| RamRegion::new((1 << 32) + (slot << 20), 1 << 20)).collect::<Result<Vec<_>>>()?;
    for round in 0..harness::budget(200, 5_000) {
        if load.has_failed() {
            break;
        }
        let extra = &more[..round % (more.len() + 1)];
        let mut regions: Vec<&RamRegion> = bench.ram.ram.regions().iter().chain(extra).collect();
        let turn = round % regions.len();
        regions.rotate_left(turn);
        let table: Vec<_> = regions.iter().map(|region| (region.message(), region.file())).collect();
        connection.set_mem_table(&table)?;
        load.wait_for_progress(3);
    }
    bench.finish(load)
}

/// A driver sets up its vring wrongly, and the front-end passes that on.
fn broken_ring(bench: &mut Bench) -> Result<()> {
    let connection = bench.front_end.connection();
    let mut other = bench.ram.driver(&bench.front_end, 1, 4096)?;
    let vring = bench.ram.vring(&bench.front_end, 128)?;
    let right = vring.layout();
    let end_of_ram = bench.ram.ram.regions()[1].gpa() + (8 << 20);
    let wrong = [
        VringLayout { size: 15, ..right },
        VringLayout { desc_gpa: right.desc_gpa + 8, ..right },
        VringLayout { avail_gpa: right.avail_gpa + 1, ..right },
        VringLayout { used_gpa: right.used_gpa + 2, ..right },
        // All of this vring except its last entries is in RAM.
        VringLayout { used_gpa: end_of_ram - 64, ..right },
    ];
    let err = Event::new()?;
    connection.set_vring_fd(FrontendReq::SET_VRING_ERR, 0, Some(err.as_fd()))?;
    for layout in wrong {
        bench.front_end.start_vring(0, &layout, vring.eventfds(), 0)?;
        ensure!(err.wait(Duration::from_secs(20))?, "{layout:?}: the error eventfd is not signalled");
        err.take()?;
        other.read(0, 4096).with_context(|| format!("{layout:?}: another ring"))?;
        let next_avail = bench.front_end.stop_vring(0)?;
        ensure!(next_avail == 0, "{layout:?}: it has stopped at {next_avail}");
    }
    bench.front_end.start_vring(0, &right, vring.eventfds(), 0)?;
    let mut driver = BlkDriver::new(vring, &mut bench.ram.arenas[0], 4096)?;
    driver.read(0, 4096).map(drop)
}

fn reset_device(bench: &mut Bench) -> Result<()> {
    let connection = bench.front_end.connection();
    for _ in 0..5 {
        let mut drivers = Vec::new();
        for index in 0..2 {
            let mut driver = bench.ram.driver(&bench.front_end, index, 4096)?;
            driver.read(0, 4096)?;
            drivers.push(driver);
        }
        connection.tell(FrontendReq::RESET_DEVICE, &[], &[])?;
        for driver in &mut drivers {
            send_read(driver)?;
            ensure_unserved(driver)?;
        }
        connection.set_features(bench.front_end.features())?;
    }
    Ok(())
}

fn status(bench: &mut Bench) -> Result<()> {
    let connection = bench.front_end.connection();
    let current = || connection.ask_u64(FrontendReq::GET_STATUS);
    ensure!(current()? == 0, "a new device has status {:#x}", current()?);
    let steps =
        [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK];
    let mut status = 0;
    for step in steps {
        status |= u64::from(step);
        connection.tell_u64(FrontendReq::SET_STATUS, status)?;
        ensure!(current()? == status, "status {:#x} instead of {status:#x}", current()?);
    }
    let mut driver = bench.ram.driver(&bench.front_end, 0, 4096)?;
    driver.read(0, 4096)?;
    connection.tell_u64(FrontendReq::SET_STATUS, 0)?;
    ensure!(current()? == 0, "status {:#x} after a reset", current()?);
    send_read(&mut driver)?;
    ensure_unserved(&mut driver)
}
