//! The repository's Linux driver with servers that give fewer queues or smaller rings than usual, and what the host's disk sees of
//! the driver's write cache.

use std::{fs, process::ExitCode};

use anyhow::{Context, Result, ensure};
use ringpass_tests::broker_process::BrokerProcess;
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    BlockDriver, LinuxGuest, LinuxGuestConfig, VhostUserDisk, fio,
    on_rings::{AWAIT_RINGS, ServedDisk, needs, statistic},
};

const QUEUES: u16 = 3;
const DISK_BYTES: u64 = 64 << 20;

fn main() -> ExitCode {
    let with_loop = needs().into_iter().chain(DiskKind::Loop.needs()).collect::<Vec<_>>();
    harness::run(vec![
        test("cpus_share_rings_when_there_are_fewer_queues", needs(), few_queues),
        test("requests_of_many_pieces_wait_for_room_in_a_ring_of_eight_entries", needs(), small_ring),
        test("the_hosts_disk_flushes_each_write_while_the_write_cache_is_off", with_loop, durable),
    ])
}

fn few_queues() -> Result<()> {
    let served = ServedDisk::new()?;
    let mut guest = served.boot(LinuxGuestConfig { cpus: 4, ..LinuxGuestConfig::default() })?;
    let run = fio::verify("io_uring", "/dev/vda", "--rw=randwrite --bs=4k --size=1m --iodepth=16");
    let mut used = Vec::new();
    for cpu in 0..4 {
        let count = "cat /sys/block/vda/ringpass/queue[12]/ring_requests";
        let before = guest.run(count)?;
        served.broker.explain(guest.run(&format!("taskset -c {cpu} {run}")))?;
        let after = guest.run(count)?;
        let grown: Vec<u64> = before
            .lines()
            .zip(after.lines())
            .map(|(before, after)| Ok(after.parse::<u64>()? - before.parse::<u64>()?))
            .collect::<Result<_>>()?;
        used.push(grown);
    }
    eprintln!("requests on the two rings, for each CPU: {used:?}");
    for queue in 0..2 {
        // fio writes 256 blocks, and reads them again.
        let users = used.iter().filter(|grown| grown[queue] > 400).count();
        ensure!(users == 2, "{users} CPUs use ring {queue}: {used:?}");
    }
    guest.shut_down()?;
    served.end()
}

/// A disk, its broker with these arguments, and a guest whose queues have rings.
fn boot(kind: DiskKind, arguments: &[&str]) -> Result<(LinuxGuest, BrokerProcess, TestDisk, tempfile::TempDir)> {
    let disk = TestDisk::new(kind, DISK_BYTES)?;
    let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
    let queues = QUEUES.to_string();
    let arguments = [&["--num-queues", &queues], arguments].concat();
    let broker = BrokerProcess::start(&directory.path().join("broker.sock"), disk.path(), &arguments)?;
    let config = LinuxGuestConfig::default();
    let properties = vec!["config-wce=on".to_owned()];
    let device = VhostUserDisk { queues: QUEUES, properties, ..VhostUserDisk::new("disk", broker.socket()) };
    let driver = BlockDriver::of(config.kernel)?;
    let booted = LinuxGuest::boot(&LinuxGuestConfig { disks: vec![device], block_driver: Some(driver), ..config });
    let mut guest = broker.explain(booted)?;
    broker.explain(guest.run(AWAIT_RINGS))?;
    Ok((guest, broker, disk, directory))
}

fn small_ring() -> Result<()> {
    let (mut guest, mut broker, _disk, _directory) = boot(DiskKind::Ext4Direct, &["--sq-entries-max", "8"])?;
    let entries = guest.run("cat /sys/block/vda/ringpass/queue1/entries")?;
    ensure!(entries.starts_with("8 "), "{entries}");
    for options in [
        "--rw=randwrite --bs=4k --size=4m --iodepth=64",
        "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=16m --iodepth=32",
        // The block layer merges what waits for room: requests of several bios, whose pieces the ring takes one after another.
        "--rw=write --bsrange=4k-64k --bs_unaligned=0 --size=16m --iodepth=64",
    ] {
        broker.explain(guest.run(&fio::verify("io_uring", "/dev/vda", options)))?;
    }
    let mut numbers = ["ring_requests", "ring_sqes", "fallbacks"].map(|name| statistic(&mut guest, name)).into_iter();
    let mut number = || numbers.next().context("a number")?;
    let (requests, sqes, fallbacks) = (number()?, number()?, number()?);
    eprintln!("{requests} requests of {sqes} SQEs, {fallbacks} requests of more pieces than the ring has entries");
    // How many pieces a buffer has is the guest's memory allocator's choice.
    ensure!(requests > 2048 && sqes > requests, "{requests}, {sqes}, {fallbacks}");
    guest.shut_down()?;
    ensure!(broker.terminate()?.success(), "{}", broker.log());
    Ok(())
}

/// The flushes that a disk of the host has had.
fn flushes(disk: &TestDisk) -> Result<u64> {
    let name = disk.path().file_name().context("a device node")?.to_string_lossy().into_owned();
    let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).context("cannot read the disk's statistics")?;
    // Documentation/block/stat.rst of Linux: the 16th number.
    stat.split_whitespace().nth(15).context("the kernel counts no flushes")?.parse().context("a number")
}

fn durable() -> Result<()> {
    let (mut guest, mut broker, disk, _directory) = boot(DiskKind::Loop, &[])?;
    let mut flushes_with_cache = |mode: &str| -> Result<u64> {
        guest.run(&format!("echo {mode} >/sys/block/vda/cache_type"))?;
        let before = flushes(&disk)?;
        // fio writes 512 blocks, one after the other, and sends no flush.
        broker.explain(guest.run(&fio::verify("psync", "/dev/vda", "--rw=randwrite --bs=4k --size=2m")))?;
        Ok(flushes(&disk)? - before)
    };
    let (on, off) = (flushes_with_cache("write back")?, flushes_with_cache("write through")?);
    eprintln!("512 writes make {on} flushes of the host's disk with the write cache, and {off} without");
    ensure!(on < 16 && off >= 512, "{on} flushes with the write cache, {off} without");
    guest.shut_down()?;
    ensure!(broker.terminate()?.success(), "{}", broker.log());
    Ok(())
}
