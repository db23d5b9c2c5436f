//! The harness of the Linux guests: the guest itself, without a disk under test.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{self, IncomingGuest, LinuxGuest, LinuxGuestConfig, fio, memory};

fn main() -> ExitCode {
    harness::run(vec![
        test("a_guest_runs_scripts_in_parallel_and_reports_failures", linux_guest::needs(), scripts),
        test("a_guest_migrates_with_everything_that_its_cpu_writes", linux_guest::needs(), migration),
    ])
}

fn scripts() -> Result<()> {
    let mut guest = LinuxGuest::boot(&LinuxGuestConfig::default())?;
    ensure!(guest.run("echo to be; printf 'or not'")? == "to be\nor not\n");

    // Each script waits for the other.
    let waiting = guest.spawn("until [ -e /tmp/a ]; do usleep 10000; done; echo a; touch /tmp/b")?;
    let other = guest.spawn("touch /tmp/a; until [ -e /tmp/b ]; do usleep 10000; done; echo b")?;
    ensure!(guest.wait(other, Duration::from_secs(30))? == "b\n");
    ensure!(guest.wait(waiting, Duration::from_secs(30))? == "a\n");

    let failed = guest.run("echo this went wrong >&2; exit 3").expect_err("status 3").to_string();
    ensure!(failed == "a script ended with status 3:\nthis went wrong\n", "{failed}");

    // Runs the programs of the image, on a disk of the guest's own kernel.
    guest.run(
        "set -e
        load-module null_blk nr_devices=1 memory_backed=1 gb=1
        mkfs.ext4 -q /dev/nullb0
        e2fsck -fn /dev/nullb0
        for engine in psync libaio io_uring; do
            fio --name=$engine --ioengine=$engine --filename=/dev/nullb0 --direct=1 --rw=randwrite --bs=4k --size=4m \\
                --iodepth=8 --verify=crc32c --output-format=terse >/dev/null
        done
        blkdiscard --zeroout --length=16777216 /dev/nullb0",
    )?;

    // Writes blocks of an earlier run back while fio writes: such a block is whole and in its place, as if the later
    // write had been lost.
    let options = "--rw=randwrite --bs=4k --size=1m --iodepth=4";
    let run = fio::verify("libaio", "/dev/nullb0", options);
    let slow_run = fio::verify("libaio", "/dev/nullb0", &format!("{options} --rate_iops=200"));
    let lost = guest.spawn(&format!(
        "{run} || exit 99
        dd if=/dev/nullb0 of=/tmp/old bs=4k count=8 2>/dev/null
        until [ -e /tmp/enough ]; do
            dd if=/tmp/old of=/dev/nullb0 bs=4k count=8 oflag=direct conv=notrunc 2>/dev/null
        done &
        {slow_run}
        status=$?
        touch /tmp/enough
        exit $status"
    ))?;
    let lost = guest.wait_output(lost, Duration::from_secs(60))?;
    ensure!(lost.status == 1 && lost.text.contains("verify: bad header"), "{lost:?}");

    let endless = guest.spawn("echo before; sleep 1000")?;
    guest.wait_for_text(endless, "before\n", Duration::from_secs(30))?;
    let late = guest.wait(endless, Duration::ZERO).expect_err("it sleeps").to_string();
    ensure!(late.contains("it takes longer than 0ns") && late.contains("|before"), "{late}");

    guest.reset()?;
    ensure!(guest.run("ls /tmp/a 2>/dev/null || echo all is new")? == "all is new\n");
    guest.shut_down()
}

/// Without a disk: what is missing here, QEMU has lost.
fn migration() -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(60);
    let config = LinuxGuestConfig { memory_mib: 256, cpus: 1, ..LinuxGuestConfig::default() };
    let mut guest = LinuxGuest::boot(&config)?;
    let changes = guest.spawn(memory::CHANGE_AND_VERIFY)?;
    guest.wait_for_text(changes, "begins", LIMIT)?;
    let mut migration = guest.migrate_to(IncomingGuest::start(&config)?, LIMIT)?;
    migration.hold_near_the_end(LIMIT)?;
    let mut guest = migration.finish(LIMIT)?;
    guest.run(memory::STOP)?;
    guest.wait(changes, LIMIT)?;
    guest.shut_down()
}
