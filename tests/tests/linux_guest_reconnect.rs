//! The broker of a running guest is killed and started again: the guest loses nothing and notices a pause at most.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_tests::broker_process::{self, BrokerProcess};
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::linux_guest::{self, LinuxGuest, LinuxGuestConfig, VhostUserDisk, fio};
use ringpass_tests::needs::Need;
use ringpass_tests::seed::Seed;

const DISK_BYTES: u64 = 32 << 20;
/// How long fio may take for the run that is under way at the end.
const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    harness::run(vec![test(
        "no_write_is_lost_torn_or_done_twice_when_the_broker_is_killed_at_any_moment",
        needs(),
        kills,
    )])
}

fn needs() -> Vec<Need> {
    [linux_guest::needs(), broker_process::needs(), DiskKind::Ext4Direct.needs()].into_iter().flatten().collect()
}

fn kills() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut rng = seed.rng();
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let directory = tempfile::tempdir().context("making a directory for a socket")?;
    let socket = directory.path().join("broker.sock");
    let start = || BrokerProcess::start(&socket, disk.path(), &["--num-queues", "2"]);

    let mut broker = start()?;
    let device = VhostUserDisk { reconnect: true, ..VhostUserDisk::new("disk", &socket) };
    let config = LinuxGuestConfig { disks: vec![device], ..LinuxGuestConfig::default() };
    let mut guest = broker.explain(LinuxGuest::boot(&config))?;
    let options = "--rw=randwrite --bsrange=4k-32k --bs_unaligned=0 --size=8m --iodepth=16";
    let job = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;

    let kills = budget(20, 1000);
    for kill in 0..kills {
        let went_on = guest.let_run(Duration::from_millis(rng.u64(0..1000)));
        broker.explain(went_on).with_context(|| format!("before kill {kill}"))?;
        broker.kill()?;
        guest.let_run(Duration::from_millis(rng.u64(0..200)))?;
        broker = start()?;
        // Now and then the next one is killed before it has served anybody.
        if rng.u8(0..8) != 0 {
            broker.wait_for_log("vring starts").with_context(|| format!("after kill {kill}"))?;
        }
        ensure!(!guest.has_ended(job)?, "fio has ended after kill {kill}: {:?}", guest.wait_output(job, LIMIT)?);
    }
    guest.run(fio::STOP)?;
    let said = broker.explain(guest.wait(job, LIMIT))?;
    eprintln!("{kills} kills in {} runs of fio", said.lines().count());
    guest.shut_down()?;
    ensure!(broker.terminate()?.success(), "{}", broker.log());
    Ok(())
}
