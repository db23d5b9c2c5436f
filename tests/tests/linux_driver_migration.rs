//! Live migration of a guest with the repository's driver: its rings end while QEMU logs dirty pages, and come back from
//! the broker of the destination.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::kernel_log;
use ringpass_tests::linux_guest::{
    BlockDriver, IncomingGuest, LinuxGuest, LinuxGuestConfig, cached, fio, memory,
    on_rings::{AWAIT_RINGS, ServedDisk, Serving, Ways, needs},
};

const LIMIT: Duration = Duration::from_secs(60);
/// The broker has taken the ring away. Its successor at the destination says when the driver can ask for another one.
const AWAIT_NO_RINGS: &str = "until [ $(cat /sys/block/vda/ringpass/queue1/mode) = virtqueue ]; do usleep 20000; done";

fn main() -> ExitCode {
    harness::run(vec![test(
        "a_guest_on_rings_migrates_under_load_and_gets_rings_from_the_other_broker",
        needs(),
        migrations,
    )])
}

/// A guest that can migrate: with one CPU, and so with two queues.
fn config(served: &ServedDisk) -> Result<LinuxGuestConfig> {
    let config = LinuxGuestConfig::default();
    Ok(LinuxGuestConfig {
        memory_mib: 256,
        cpus: 1,
        disks: vec![served.device()],
        block_driver: Some(BlockDriver::of(config.kernel)?),
        // With this, only the device writes to pages of the page cache.
        kernel_arguments: vec!["init_on_alloc=0".to_owned()],
        ..config
    })
}

fn migrations() -> Result<()> {
    let mut served = ServedDisk::serve(Serving { queues: 2, ..Serving::default() })?;
    let mut guest = served.boot(config(&served)?)?;
    guest.run(cached::FILL)?;
    guest.spawn(cached::HOLD)?;
    let count = budget(3, 30);
    for number in 1..=count {
        let destination = served.destination()?;
        guest = served
            .broker
            .explain(destination.broker.explain(migrate(guest, &destination)))
            .with_context(|| format!("migration {number}"))?;
        // The broker of the source has released the disk and serves no front-end.
        served.end()?;
        served = destination;
    }
    // The consoles of the sources are gone, and the guest's own log is not.
    let log = guest.run("dmesg")?;
    ensure!(!log.lines().any(kernel_log::is_trouble), "{log}");
    ensure!(!log.contains("not given it back") && !log.contains("I/O error"), "{log}");
    guest.shut_down()?;
    served.end()
}

fn migrate(mut guest: LinuxGuest, destination: &ServedDisk) -> Result<LinuxGuest> {
    let target = IncomingGuest::start(&config(destination)?)?;
    // fio must not empty the page cache at the start of each run.
    let options = "--rw=randwrite --bsrange=4k-64k --offset=32m --size=4m --iodepth=4 --rate=2m --invalidate=0";
    let load = guest.spawn(&fio::verify_until_stopped("libaio", "/dev/vda", options))?;
    Ways::await_more(&mut guest, "vda", |ways| ways.ring > 20).context("before the migration")?;
    let changes = guest.spawn(memory::CHANGE_AND_VERIFY)?;
    guest.wait_for_text(changes, "begins", LIMIT)?;

    let mut migration = guest.migrate_to(target, LIMIT)?;
    migration.hold_near_the_end(LIMIT)?;
    migration.source().run(AWAIT_NO_RINGS).context("the rings end while dirty pages are logged")?;
    // Blocks come to pages that QEMU has sent.
    let ways = Ways::during(migration.source(), "vda", |guest| guest.run(cached::READ).map(drop))?;
    ensure!(ways.ring == 0 && ways.virtqueue > 20, "during the migration: {ways:?}");
    let mut guest = migration.finish(LIMIT)?;

    let start = Instant::now();
    guest.run(AWAIT_RINGS).context("the rings come back")?;
    eprintln!("  rings after {} ms at the destination", start.elapsed().as_millis());
    Ways::await_more(&mut guest, "vda", |ways| ways.ring > 20).context("after the migration")?;
    guest.run(memory::STOP)?;
    guest.wait(changes, LIMIT)?;
    guest.run(fio::STOP)?;
    let said = guest.wait(load, LIMIT)?;
    ensure!(said.contains("is verified"), "{said}");
    let looked = guest.run(cached::LOOK)?;
    ensure!(looked == "0 sectors were read\n", "the guest did not look at its page cache: {looked}");
    let run = fio::verify("psync", "/dev/vda", "--rw=randrw --bs=4k --offset=48m --size=2m");
    let ways = Ways::during(&mut guest, "vda", |guest| guest.run(&run).map(drop))?;
    ensure!(ways.ring > 500 && ways.virtqueue < ways.ring / 4, "after the migration: {ways:?}");
    // The next migration is to find an empty page cache.
    guest.run("echo 3 >/proc/sys/vm/drop_caches")?;
    Ok(guest)
}
