//! The broker says that it has released a disk only when others can open it at once: the tests try once and do not
//! wait.

use std::{process::ExitCode, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_broker::disk::{Disk, DiskConfig, DiskLease, StartUp};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::{DiskKind, TestDisk},
    front_end::{
        attach::bench::{start_again, start_queue_zero, start_ring},
        blk::BlkDriver,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        shared::DirtyPages,
    },
    harness::{self, Test, test},
};

const DISK_BYTES: u64 = 16 << 20;
const ROUNDS: u16 = 40;
const SHUTDOWNS: u32 = 10;
const LEASES: u32 = 200;

fn main() -> ExitCode {
    let mut tests: Vec<Test> = Vec::new();
    for kind in DiskKind::ALL {
        let needs = || kind.needs().into_iter().chain(broker_process::needs()).collect::<Vec<_>>();
        let mut add = |name: &str, body: fn(DiskKind) -> Result<()>| {
            tests.push(test(format!("{name}_{kind}"), needs(), move || body(kind)));
        };
        add("the_disk_is_free_when_the_broker_answers_the_stop_of_the_last_queue_during_a_migration", |kind| {
            migrate(kind, &[])
        });
        add("the_broker_releases_a_shared_read_only_disk_when_the_last_queue_stops", share);
        add("the_disk_is_free_when_the_broker_has_ended", shut_down);
        add("the_disk_is_free_when_a_lease_that_waits_for_it_is_released", release_while_trying);
    }
    for kind in [DiskKind::Ext4Direct, DiskKind::Loop] {
        let needs = kind.needs().into_iter().chain(broker_process::needs());
        let name = format!("the_disk_is_free_when_the_broker_answers_the_stop_of_the_last_queue_after_rings_{kind}");
        tests.push(test(name, needs, move || migrate_from_rings(kind)));
    }
    harness::run(tests)
}

/// Opens the disk without waiting, as the destination of a migration does.
fn take(disk: &TestDisk) -> Result<Disk> {
    Disk::open(&disk.config()).context("the disk is not free")
}

fn start_logging(front_end: &FrontEnd, ram: &TestRam) -> Result<DirtyPages> {
    let log = DirtyPages::new(&ram.ram)?;
    front_end.connection().set_log_base(&log.description(), log.file())?;
    front_end.set_logging(true)?;
    Ok(log)
}

/// A guest migrates again and again. Each migration fails, and the guest continues here.
fn migrate(kind: DiskKind, arguments: &[&str]) -> Result<()> {
    let rig = Rig::new(kind, DISK_BYTES)?;
    let broker = rig.broker(&[&["--num-queues", "2"], arguments].concat())?;
    let mut ram = TestRam::new(1, 8 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut drivers: Vec<BlkDriver> = (0..2).map(|index| ram.driver(&front_end, index, 4096)).collect::<Result<_>>()?;
    for round in 0..ROUNDS {
        let _log = start_logging(&front_end, &ram)?;
        for driver in &mut drivers {
            driver.write(u64::from(round) * 8, &[round as u8; 4096])?;
            // The kernel flushes on threads of its own, and they can hold the file for longer than the flush takes.
            driver.flush()?;
        }
        let storage = rig.disk().backing_file().map(DiskConfig::new);
        if let Some(storage) = &storage {
            ensure!(Disk::open(storage).is_err_and(|error| error.is_busy()), "the file of the loop device is free");
        }
        for index in [1, 0] {
            front_end.stop_vring(index)?;
        }
        for config in [rig.disk().config()].into_iter().chain(storage) {
            broker.explain(
                Disk::open(&config).with_context(|| format!("{:?} is not free, round {round}", config.path)),
            )?;
        }
        front_end.set_logging(false)?;
        for (index, driver) in (0..).zip(&mut drivers) {
            start_again(&front_end, driver.vring(), index)?;
        }
    }
    Ok(())
}

/// The same with queues that are rings until the migration begins.
fn migrate_from_rings(kind: DiskKind) -> Result<()> {
    let rig = Rig::new(kind, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "3", "--mode", "direct"])?;
    for round in 0..8 {
        broker.explain(migrate_from_rings_once(&rig).with_context(|| format!("round {round}")))?;
    }
    Ok(())
}

fn migrate_from_rings_once(rig: &Rig) -> Result<()> {
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let _queue_zero = start_queue_zero(&front_end, &mut ram)?;
    for index in 1..3 {
        let mut driver = start_ring(&front_end, &mut ram, index)?;
        driver.attach()?;
        for request in 0..8 {
            driver.submit(driver.sqe(true, request, 4096, request * 4096, request)?)?;
        }
    }
    let _log = start_logging(&front_end, &ram)?;
    for index in [2, 1, 0] {
        front_end.stop_vring(index)?;
    }
    take(rig.disk()).map(drop)
}

/// Read-only brokers share the lock of a disk. The broker releases its own lock and does not wait for those of others.
fn share(kind: DiskKind) -> Result<()> {
    let rig = Rig::new(kind, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "1", "--read-only"])?;
    let other = rig.disk().config().read_only(true);
    let mut ram = TestRam::new(1, 4 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    for round in 0..ROUNDS {
        let sharing = Disk::open(&other)?;
        let _log = start_logging(&front_end, &ram)?;
        driver.read(0, 4096)?;
        driver.flush()?;
        front_end.stop_vring(0)?;
        drop(sharing);
        // Only a writer notices a shared lock.
        let writer = broker.explain(take(rig.disk()).with_context(|| format!("round {round}")))?;
        drop(writer);
        front_end.set_logging(false)?;
        start_again(&front_end, driver.vring(), 0)?;
    }
    Ok(())
}

fn shut_down(kind: DiskKind) -> Result<()> {
    let rig = Rig::new(kind, DISK_BYTES)?;
    for round in 0..SHUTDOWNS {
        let mut broker = rig.broker(&["--num-queues", "2"])?;
        let mut ram = TestRam::new(1, 8 << 20)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        for index in 0..2 {
            let mut driver = ram.driver(&front_end, index, 4096)?;
            driver.write(0, &[round as u8; 4096])?;
            driver.flush()?;
        }
        let status = broker.terminate()?;
        ensure!(status.success(), "the broker ended with {status}");
        drop(broker.explain(take(rig.disk()).with_context(|| format!("round {round}")))?);
        drop::<(FrontEnd, BrokerProcess)>((front_end, broker));
    }
    Ok(())
}

/// A lease that is released at any moment of its attempts keeps nothing of the disk.
fn release_while_trying(kind: DiskKind) -> Result<()> {
    let disk = TestDisk::new(kind, DISK_BYTES)?;
    let located = Arc::new(Disk::locate(&disk.config())?);
    // The lease drops the disk as soon as it has it.
    let lease = DiskLease::new(located, drop)?;
    lease.start_up(StartUp::Incoming)?;
    for round in 0..LEASES {
        lease.acquire();
        thread::sleep(Duration::from_micros(u64::from(round % 50) * 5));
        lease.release();
        drop(take(&disk).with_context(|| format!("round {round}"))?);
    }
    Ok(())
}
