//! Front-ends that shorten files after they have sent them to the server.

use std::{fs::File, os::unix::process::ExitStatusExt, process::ExitCode};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, HEADER_BYTES},
        descriptor::Descriptor,
        event::Eventfds,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        shared::InflightRegion,
        vring::VringLayout,
    },
    harness::{self, Test, test},
};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use vhost::vhost_user::message::VhostUserLog;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

const DISK_BYTES: u64 = 1 << 20;
const REGION_BYTES: u64 = 4 << 20;
/// Where [`TestRam`] has its second region.
const SECOND_GPA: u64 = REGION_BYTES + (1 << 20);

type Body = fn(&Rig, BrokerProcess) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, DiskKind, Body); 6] = [
        ("a_server_whose_vrings_are_in_lost_memory_names_the_region_and_ends", DiskKind::Ext4Direct, lost_rings),
        ("a_server_whose_request_is_in_lost_memory_names_the_region_and_ends", DiskKind::Ext4Direct, lost_header),
        ("only_the_request_whose_data_is_in_lost_memory_fails_with_direct_io", DiskKind::Ext4Direct, lost_data),
        ("only_the_request_whose_data_is_in_lost_memory_fails_in_the_page_cache", DiskKind::Ext4PageCache, lost_data),
        ("a_server_works_without_a_lost_in_flight_region", DiskKind::Ext4Direct, lost_inflight_region),
        ("a_server_works_without_a_lost_dirty_log", DiskKind::Ext4Direct, lost_log),
    ];
    let tests: Vec<Test> = tests
        .into_iter()
        .map(|(name, kind, body)| {
            let needs = kind.needs().into_iter().chain(broker_process::needs());
            test(name, needs, move || {
                let rig = Rig::new(kind, DISK_BYTES)?;
                let broker = rig.broker(&["--num-queues", "2"])?;
                body(&rig, broker)
            })
        })
        .collect();
    harness::run(tests)
}

fn connect(rig: &Rig) -> Result<(TestRam, FrontEnd)> {
    let ram = TestRam::new(2, REGION_BYTES)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    Ok((ram, front_end))
}

/// Shortens the file of the second region to nothing.
fn shorten(ram: &TestRam) -> Result<()> {
    Ok(ram.ram.regions()[1].file().set_len(0)?)
}

/// A file that no seal protects.
fn unsealed(len_bytes: u64) -> Result<File> {
    let file = File::from(memfd_create("ringpass-test-unsealed", MemfdFlags::CLOEXEC)?);
    file.set_len(len_bytes)?;
    Ok(file)
}

fn lost_rings(rig: &Rig, broker: BrokerProcess) -> Result<()> {
    let (mut ram, front_end) = connect(rig)?;
    let layout = VringLayout::take(&mut ram.arenas[1], 128)?;
    let eventfds = Eventfds::new()?;
    front_end.start_vring(0, &layout, &eventfds, 0)?;
    shorten(&ram)?;
    eventfds.kick().signal()?;
    ensure_named_and_ended(rig, broker)
}

fn lost_header(rig: &Rig, broker: BrokerProcess) -> Result<()> {
    let (mut ram, front_end) = connect(rig)?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    driver.read(0, 4096)?;
    shorten(&ram)?;
    let status = driver.put_status()?;
    let vring = driver.vring();
    vring.add(&[Descriptor::readable(SECOND_GPA, HEADER_BYTES), status])?;
    vring.publish()?;
    ensure_named_and_ended(rig, broker)
}

fn ensure_named_and_ended(rig: &Rig, mut broker: BrokerProcess) -> Result<()> {
    let status = broker.wait()?;
    let log = broker.log();
    ensure!(status.signal() == Some(Signal::BUS.as_raw()), "{status}\n{log}");
    let line = format!("ringpass: the guest memory from guest address {SECOND_GPA:#x} on is lost (SIGBUS)");
    ensure!(log.contains(&line), "the log does not name the lost memory:\n{log}");
    // The next server can have the disk.
    let broker = rig.broker(&[])?;
    let (mut ram, front_end) = connect(rig)?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    broker.explain(driver.read(0, 4096).map(drop))
}

fn lost_data(rig: &Rig, broker: BrokerProcess) -> Result<()> {
    let (mut ram, front_end) = connect(rig)?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    driver.write(0, &[0x5a; 4096])?;
    shorten(&ram)?;
    for (kind, data) in [
        (VIRTIO_BLK_T_IN, Descriptor::writable(SECOND_GPA, 4096)),
        (VIRTIO_BLK_T_OUT, Descriptor::readable(SECOND_GPA, 4096)),
    ] {
        let answer = broker.explain(driver.request(kind, 0, &[data]))?;
        ensure!(u32::from(answer.status) == VIRTIO_BLK_S_IOERR, "{answer:?}");
        let found = broker.explain(driver.read(0, 4096))?;
        ensure!(found == [0x5a; 4096], "the block has changed");
    }
    Ok(())
}

/// Reads and writes, and checks that the server logs `said` once.
fn ensure_goes_on(driver: &mut BlkDriver, broker: &BrokerProcess, said: &str) -> Result<()> {
    for round in 0..100 {
        driver.write(0, &[round; 4096])?;
        ensure!(driver.read(0, 4096)? == [round; 4096], "round {round}");
    }
    broker.wait_for_log(said)?;
    let lines = broker.log().lines().filter(|line| line.contains(said)).count();
    ensure!(lines == 1, "the server logs the loss {lines} times");
    Ok(())
}

fn lost_inflight_region(rig: &Rig, broker: BrokerProcess) -> Result<()> {
    let (mut ram, front_end) = connect(rig)?;
    let (description, _sealed) = front_end.connection().inflight_fd(2, 128)?;
    let file = unsealed(description.mmap_size)?;
    let region = InflightRegion::new(description, file.try_clone()?.into());
    front_end.set_inflight_region(&region)?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    driver.read(0, 4096)?;
    file.set_len(0)?;
    broker.explain(ensure_goes_on(&mut driver, &broker, "memory of the front-end's in-flight region is lost"))?;
    broker.explain(front_end.stop_vring(0).map(drop).context("cannot stop the vring"))
}

fn lost_log(rig: &Rig, broker: BrokerProcess) -> Result<()> {
    let (mut ram, front_end) = connect(rig)?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    let file = unsealed(4096)?;
    front_end.connection().set_log_base(&VhostUserLog::new(4096, 0), &file)?;
    front_end.set_logging(true)?;
    driver.read(0, 4096)?;
    file.set_len(0)?;
    broker.explain(ensure_goes_on(&mut driver, &broker, "memory of the front-end's dirty log is lost"))?;
    broker.explain(front_end.set_logging(false).context("the end of logging"))
}
