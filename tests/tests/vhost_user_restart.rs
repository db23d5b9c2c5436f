//! An operator restarts a server under a running guest. The device is as the guest knows it, or the server executes
//! nothing for the guest.

use std::{fs::File, process::ExitCode};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::{BlkDriver, SECTOR_BYTES},
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        shared::InflightRegion,
    },
    harness::{self, test},
    needs::Need,
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

const DISK_BYTES: u64 = 4 << 20;
const AS_BEFORE: [&str; 4] = ["--num-queues", "4", "--serial", "disk-7"];
/// Offset of `writeback` in the configuration space.
const WRITEBACK: usize = 32;

fn main() -> ExitCode {
    let needs =
        || -> Vec<Need> { broker_process::needs().into_iter().chain(DiskKind::Ext4PageCache.needs()).collect() };
    let named = |name: &str, run: fn() -> Result<()>| test(name, needs(), run);
    harness::run(vec![
        named("a_server_restarted_with_other_options_executes_nothing_and_names_the_option", other_options),
        named("a_restarted_server_reports_a_disk_that_grew_and_refuses_a_smaller_one", other_size),
        named("the_next_front_end_sees_the_size_of_an_image_resized_without_a_front_end", resized_between),
        named("the_write_cache_that_one_guest_turned_off_is_on_for_the_next_front_end", write_cache),
    ])
}

/// A guest with one queue, and the in-flight region that its front-end keeps.
struct Guest {
    ram: TestRam,
    driver: BlkDriver,
    region: InflightRegion,
}

impl Guest {
    fn start(rig: &Rig) -> Result<(Self, FrontEnd)> {
        let mut ram = TestRam::new(1, 4 << 20)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let region = front_end.new_inflight_region(3, 128)?;
        let driver = ram.driver(&front_end, 0, 64 << 10)?;
        Ok((Self { ram, driver, region }, front_end))
    }

    /// Makes a write available, which the next server finds.
    fn publish_write(&mut self, sector: u64, byte: u8) -> Result<()> {
        let data = self.driver.put_data(&[byte; 512])?;
        let chain = [self.driver.put_header(VIRTIO_BLK_T_OUT, sector)?, data, self.driver.put_status()?];
        self.driver.vring().add(&chain)?;
        self.driver.vring().publish()?;
        Ok(())
    }

    /// Reconnects as QEMU does.
    fn reconnect(&mut self, rig: &Rig) -> Result<FrontEnd> {
        let front_end = FrontEnd::connect(&rig.socket(), &self.ram.ram, Options::default())?;
        front_end.set_inflight_region(&self.region)?;
        let (layout, eventfds) = (self.driver.vring().layout(), self.driver.vring().eventfds().clone());
        front_end.start_vring(0, &layout, &eventfds, layout.used_idx(&self.ram.ram)?)?;
        Ok(front_end)
    }

    /// Checks that a server with these arguments executes nothing for the guest, and says so.
    fn is_refused(&mut self, rig: &Rig, arguments: &[&str], said: &str) -> Result<()> {
        let used_idx = self.driver.vring().used_idx()?;
        let before = std::fs::read(rig.disk().path())?;
        let mut broker = rig.broker(arguments)?;
        for _ in 0..2 {
            ensure!(
                self.reconnect(rig).is_err(),
                "{arguments:?}: the server serves a guest that knows another disk\n{}",
                broker.log()
            );
        }
        broker.wait_for_log(said).with_context(|| format!("{arguments:?}"))?;
        broker.wait_for_log("The server executes nothing for it")?;
        ensure!(self.driver.vring().used_idx()? == used_idx, "{arguments:?}: a request was answered");
        broker.terminate()?;
        ensure!(std::fs::read(rig.disk().path())? == before, "{arguments:?}: the disk was written");
        Ok(())
    }

    /// Checks that the server executes the published write and the next request.
    fn goes_on(&mut self, broker: &BrokerProcess, sector: u64, byte: u8) -> Result<()> {
        let vring = self.driver.vring();
        if vring.used_idx()? == vring.next_used() {
            broker.explain(vring.wait_for_call(std::time::Duration::from_secs(30)))?;
        }
        ensure!(vring.take_used()?.is_some() && self.driver.status()? == 0, "status {}", self.driver.status()?);
        ensure!(broker.explain(self.driver.read(sector, 512))? == [byte; 512], "the write did not reach the disk");
        Ok(())
    }
}

fn other_options() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let mut broker = rig.broker(&AS_BEFORE)?;
    let (mut guest, front_end) = Guest::start(&rig)?;
    guest.driver.write(0, &[1; 512])?;
    broker.kill()?;
    drop(front_end);
    guest.publish_write(8, 7)?;
    let other = |changed: &[&'static str]| [&AS_BEFORE[..], changed].concat();
    for (arguments, said) in [
        (
            other(&["--logical-block-size", "4096"]),
            "logical block: 512 bytes before the restart, 4096 bytes now (--logical-block-size 512)",
        ),
        // Fewer queues than the in-flight region has.
        (
            vec!["--num-queues", "2", "--serial", "disk-7"],
            "queues in use: 3 before the restart, 2 now (--num-queues 3 or more)",
        ),
        (vec!["--num-queues", "4"], "serial number: \"disk-7\" before the restart, \"\" now (--serial \"disk-7\")"),
        (
            other(&["--read-only"]),
            "access: read-write before the restart, read-only now (start the server without --read-only)",
        ),
        (other(&["--queue-size", "64"]), "segments of a request: 126 before the restart, 62 now"),
    ] {
        guest.is_refused(&rig, &arguments, said)?;
    }
    // The front-end uses three queues, so a device with three is enough. A device with more of anything is enough too.
    for (sector, arguments) in [
        (8, ["--num-queues", "3", "--serial", "disk-7", "--queue-size", "256"]),
        (16, ["--num-queues", "8", "--serial", "disk-7", "--queue-size", "512"]),
    ] {
        let mut broker = rig.broker(&arguments)?;
        let front_end = broker.explain(guest.reconnect(&rig))?;
        guest.goes_on(&broker, sector, 7)?;
        broker.kill()?;
        drop(front_end);
        guest.publish_write(sector + 8, 7)?;
    }
    Ok(())
}

fn other_size() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let image = File::options().write(true).open(rig.disk().path())?;
    let mut broker = rig.broker(&AS_BEFORE)?;
    let (mut guest, front_end) = Guest::start(&rig)?;
    broker.kill()?;
    drop(front_end);
    guest.publish_write(8, 7)?;
    image.set_len(DISK_BYTES / 2)?;
    guest.is_refused(&rig, &AS_BEFORE, "size of the disk: 4194304 bytes before the restart, 2097152 bytes now")?;

    image.set_len(DISK_BYTES * 2)?;
    for _ in 0..2 {
        let mut broker = rig.broker(&AS_BEFORE)?;
        let front_end = broker.explain(guest.reconnect(&rig))?;
        // QEMU would not look before the device runs. It must also get the new size if the server is killed before it
        // tells.
        if guest.driver.vring().used_idx()? == guest.driver.vring().next_used() {
            broker.explain(guest.driver.vring().wait_for_call(std::time::Duration::from_secs(30)))?;
        }
        broker.kill()?;
        drop(front_end);
    }
    let broker = rig.broker(&AS_BEFORE)?;
    let front_end = broker.explain(guest.reconnect(&rig))?;
    front_end.connection().tell_u64(vhost::vhost_user::message::FrontendReq::SET_STATUS, 0xf)?;
    let told = front_end.backend().context("a channel")?.receive()?.context("the channel is closed")?;
    ensure!(told.request == 2, "the server sends request {} instead of a change of the configuration", told.request);
    let sectors = u64::from_le_bytes(front_end.connection().config(8)?.try_into().expect("eight bytes"));
    ensure!(sectors == DISK_BYTES * 2 / SECTOR_BYTES, "{sectors} sectors");
    guest.goes_on(&broker, 8, 7)
}

fn resized_between() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let _broker = rig.broker(&[])?;
    let ram = TestRam::new(1, 4 << 20)?;
    let image = File::options().write(true).open(rig.disk().path())?;
    for size_bytes in [DISK_BYTES, 2 * DISK_BYTES, DISK_BYTES / 2] {
        image.set_len(size_bytes)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let sectors = u64::from_le_bytes(front_end.connection().config(8)?.try_into().expect("eight bytes"));
        ensure!(sectors == size_bytes / SECTOR_BYTES, "{sectors} sectors of {size_bytes} bytes");
    }
    Ok(())
}

fn write_cache() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let broker = rig.broker(&[])?;
    let is_on = |front_end: &FrontEnd| Ok::<_, anyhow::Error>(front_end.connection().config(60)?[WRITEBACK] == 1);
    let (mut guest, front_end) = Guest::start(&rig)?;
    ensure!(is_on(&front_end)?);
    front_end.connection().set_config(WRITEBACK as u32, &[0])?;
    ensure!(!is_on(&front_end)?);
    drop(front_end);
    // The same guest reconnects: its front-end gives the region back.
    let front_end = broker.explain(guest.reconnect(&rig))?;
    ensure!(!is_on(&front_end)?, "the cache is on, although the guest turned it off");
    guest.driver.write(0, &[1; 512])?;
    drop(front_end);
    ensure!(!broker.has_logged("the write cache is on"), "{}", broker.log());

    // Another guest connects, without a region.
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    ensure!(is_on(&front_end)?, "the cache is off for a guest that did not turn it off");
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    broker.explain(driver.write(0, &[2; 512]))?;
    broker.wait_for_log("the write cache is on: the guest of the previous front-end had turned it off")
}
