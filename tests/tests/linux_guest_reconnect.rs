//! A test kills the broker of a running guest and starts it again. The guest loses nothing and notices at most a pause.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_tests::broker_process::{self, BrokerProcess};
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::linux_guest::{self, LinuxGuest, LinuxGuestConfig, VhostUserDisk, fio};
use ringpass_tests::needs::Need;
use ringpass_tests::seed::Seed;

const DISK_BYTES: u64 = 32 << 20;
/// How long fio may take for its last run.
const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    harness::run(vec![
        test("a_guest_loses_tears_and_repeats_no_write_when_the_broker_is_killed_at_any_moment", needs(), kills),
        test("a_restart_with_other_options_says_so_and_the_guest_continues_after_a_right_one", needs(), other_options),
    ])
}

fn needs() -> Vec<Need> {
    [linux_guest::needs(), broker_process::needs(), DiskKind::Ext4Direct.needs()].into_iter().flatten().collect()
}

fn other_options() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
    let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
    let socket = directory.path().join("broker.sock");
    let start =
        |options: &[&str]| BrokerProcess::start(&socket, disk.path(), &[&["--direct-io", "off"], options].concat());

    let mut broker = start(&["--num-queues", "4"])?;
    let device = VhostUserDisk { queues: 4, reconnect: true, ..VhostUserDisk::new("disk", &socket) };
    let config = LinuxGuestConfig { disks: vec![device], ..LinuxGuestConfig::default() };
    let mut guest = broker.explain(LinuxGuest::boot(&config))?;
    guest.run("dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct")?;
    broker.kill()?;
    // This request waits for the server.
    let job = guest.spawn("dd if=/dev/zero of=/dev/vda bs=4k count=16 oflag=direct")?;
    for (options, said) in [
        (&["--num-queues", "4", "--logical-block-size", "4096"][..], "(--logical-block-size 512)"),
        (&["--num-queues", "4", "--read-only"], "without --read-only)"),
    ] {
        broker = start(options)?;
        broker.wait_for_log(said)?;
        ensure!(!broker.has_logged("vring starts") && !guest.has_ended(job)?, "{options:?}: {}", broker.log());
        broker.kill()?;
    }
    let mut broker = start(&["--num-queues", "4"])?;
    broker.explain(guest.wait(job, LIMIT))?;
    broker.kill()?;
    // QEMU asks for the number of queues first, and QEMU 7.2 does not connect again after a wrong answer: only the log
    // tells the operator.
    let broker = start(&["--num-queues", "2"])?;
    broker.wait_for_log("it left on learning that the device has 2 queues")?;
    ensure!(!broker.has_logged("vring starts"), "{}", broker.log());
    Ok(())
}

fn kills() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let mut rng = seed.rng();
    let disk = TestDisk::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
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
        // Sometimes the test kills the next broker before it has served a front-end.
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
