//! The repository's Linux driver in a stock Debian guest, on the rings of `ringpass serve`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::kernel_log;
use ringpass_tests::linux_guest::{
    KernelSeries, LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{AWAIT_RINGS, ServedDisk, needs, statistic},
};
use ringpass_tests::seed::Seed;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    harness::run(vec![
        test("reads_and_writes_of_a_guest_go_over_rings_through_all_changes", needs(), whole_life),
        test("a_polled_queue_has_a_ring_and_never_an_interrupt_also_after_a_suspend", needs(), polled),
        test("a_guest_on_rings_loses_nothing_when_the_broker_is_killed_at_any_moment", needs(), kills),
    ])
}

/// Runs a step, prints its name and time, and adds the name to a failure.
fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| name.to_owned());
    eprintln!("  {:5.1} s  {name}", start.elapsed().as_secs_f64());
    result
}

/// A guest with the kernel of Debian 12.
fn older() -> LinuxGuestConfig {
    LinuxGuestConfig { kernel: KernelSeries::Linux6_1, ..LinuxGuestConfig::default() }
}

fn whole_life() -> Result<()> {
    let served = ServedDisk::new()?;
    let mut guest = served.boot(older())?;
    step("fio with every engine and size", || everything_over_rings(&mut guest))?;
    step("a file system, discards and zeroes", || file_system(&mut guest))?;
    step("writes are durable while the cache is off", || cache_off(&mut guest))?;
    let options = "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=16m --iodepth=32";
    let job = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
    step("the virtual machine is stopped and continues", || {
        for _ in 0..5 {
            guest.let_run(Duration::from_millis(200))?;
            guest.pause_and_resume()?;
        }
        served.broker.explain(guest.run(AWAIT_RINGS).map(drop))
    })?;
    step("a CPU goes offline and comes back", || {
        let cpu = "/sys/devices/system/cpu/cpu1/online";
        for _ in 0..3 {
            guest.run(&format!("echo 0 >{cpu} && usleep 300000 && echo 1 >{cpu} && usleep 200000"))?;
        }
        served.broker.explain(guest.run(AWAIT_RINGS).map(drop))
    })?;
    step("the operator takes the rings away, and gives them back", || {
        for _ in 0..3 {
            served.set_mode("virtqueue")?;
            let modes = guest.run("cat /sys/block/vda/ringpass/queue[12]/mode | sort -u")?;
            ensure!(modes == "virtqueue\n", "{modes}");
            let before = statistic(&mut guest, "ring_requests")?;
            guest.let_run(Duration::from_millis(300))?;
            let after = statistic(&mut guest, "ring_requests")?;
            ensure!(after == before, "{before} requests went over rings, and then {after}");
            served.set_mode("auto")?;
            served.broker.explain(guest.run(AWAIT_RINGS))?;
        }
        Ok(())
    })?;
    guest.run(fio::STOP)?;
    served.broker.explain(guest.wait(job, LIMIT))?;
    step("hot-unplug and plug", || {
        guest.unplug("disk")?;
        guest.run("[ ! -e /dev/vda ]")?;
        guest.plug(&served.device())?;
        guest.run("until [ -e /dev/vda ]; do usleep 20000; done")?;
        served.broker.explain(guest.run(AWAIT_RINGS))?;
        guest.run(&fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=4m --iodepth=16")).map(drop)
    })?;
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(!log.contains("not given") && !log.contains("protocol"), "{log}");
    guest.shut_down()?;
    served.end()
}

fn everything_over_rings(guest: &mut LinuxGuest) -> Result<()> {
    let before = (statistic(guest, "ring_requests")?, statistic(guest, "virtqueue_requests")?);
    for (engine, options) in [
        ("psync", "--rw=randwrite --bs=512 --size=128k"),
        ("libaio", "--rw=randrw --bsrange=4k-256k --bs_unaligned=0 --size=16m --iodepth=32"),
        ("io_uring", "--rw=randwrite --bs=4k --size=8m --iodepth=64"),
        ("io_uring", "--rw=randrw --bs=1m --size=32m --iodepth=8 --mem=mmap"),
    ] {
        guest.run(&fio::verify(engine, "/dev/vda", options))?;
    }
    let rings = statistic(guest, "ring_requests")? - before.0;
    let virtqueues = statistic(guest, "virtqueue_requests")? - before.1;
    eprintln!("          {rings} requests over rings, {virtqueues} over virtqueues");
    // Only requests of very many pieces go another way.
    ensure!(rings > 4000 && virtqueues < rings / 4, "{rings} over rings, {virtqueues} over virtqueues");
    Ok(())
}

fn file_system(guest: &mut LinuxGuest) -> Result<()> {
    guest
        .run(
            "set -e
            mkfs.ext4 -q /dev/vda
            mount /dev/vda /mnt
            dd if=/dev/urandom of=/mnt/a bs=1M count=16 conv=fsync 2>/dev/null
            cp /mnt/a /mnt/b
            sync
            echo 3 >/proc/sys/vm/drop_caches
            cmp /mnt/a /mnt/b
            umount /mnt
            e2fsck -fn /dev/vda
            blkdiscard -f --zeroout --offset 2097152 --length 4194304 /dev/vda
            dd if=/dev/vda bs=1M skip=2 count=4 iflag=direct 2>/dev/null | cmp -n 4194304 - /dev/zero
            blkdiscard -f /dev/vda",
        )
        .map(drop)
}

fn cache_off(guest: &mut LinuxGuest) -> Result<()> {
    let run = fio::verify("io_uring", "/dev/vda", "--rw=randwrite --bs=4k --size=2m --iodepth=16");
    let seen = guest.run(&format!(
        "cd /tmp
        disk=/sys/block/vda
        cat $disk/cache_type
        echo write through >$disk/cache_type
        cat $disk/cache_type $disk/queue/write_cache
        {run} || exit
        echo write back >$disk/cache_type
        cat $disk/cache_type"
    ))?;
    ensure!(seen == "write back\nwrite through\nwrite through\nwrite back\n", "{seen}");
    Ok(())
}

fn polled() -> Result<()> {
    let served = ServedDisk::new()?;
    let parameters = "poll_queues=1".to_owned();
    let mut guest =
        served.boot(LinuxGuestConfig { block_driver_parameters: parameters, ..LinuxGuestConfig::default() })?;
    let options = "--hipri --rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=4m --iodepth=16";
    let run = fio::verify("io_uring", "/dev/vda", options);
    served.broker.explain(guest.run(&run))?;
    step("the guest is suspended to memory and wakes up", || suspend(&served, &mut guest))?;
    served.broker.explain(guest.run(&run))?;
    let seen = guest.run("cd /sys/block/vda/ringpass/queue2 && cat interrupts ring_requests")?;
    let numbers: Vec<u64> = seen.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(numbers[0] == 0 && numbers[1] > 400, "{numbers:?}");
    // Whatever the driver, this guest cannot be switched off any more after that.
    let console = guest.console();
    ensure!(!console.lines().any(kernel_log::is_trouble), "{console}");
    drop(guest);
    served.end()
}

/// The driver gives its queues back before that, and gets rings again.
fn suspend(served: &ServedDisk, guest: &mut LinuxGuest) -> Result<()> {
    let sum = "dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | md5sum";
    let before = guest.run(sum)?;
    let job = guest.spawn("echo mem >/sys/power/state")?;
    let end = Instant::now() + LIMIT;
    while guest.qmp(json!({"execute": "query-status"}))?["status"] != "suspended" {
        ensure!(Instant::now() < end, "the guest is not suspended");
        guest.let_run(Duration::from_millis(50))?;
    }
    guest.qmp(json!({"execute": "system_wakeup"}))?;
    guest.wait(job, LIMIT)?;
    served.broker.explain(guest.run(AWAIT_RINGS))?;
    let after = guest.run(sum)?;
    ensure!(after == before, "before: {before}, after: {after}");
    guest.run(&fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=4m --iodepth=16")).map(drop)
}

fn kills() -> Result<()> {
    let mut rng = Seed::from_env_or_random().rng();
    let mut served = ServedDisk::new()?;
    let mut guest = served.boot(older())?;
    let options = "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=8m --iodepth=32";
    let job = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
    let kills: u64 = budget(10, 500);
    for kill in 0..kills {
        let went_on = guest.let_run(Duration::from_millis(rng.u64(0..1500)));
        served.broker.explain(went_on).with_context(|| format!("before kill {kill}"))?;
        served.broker.kill()?;
        guest.let_run(Duration::from_millis(rng.u64(0..200)))?;
        served.start_again()?;
        // Sometimes the test kills the next broker before there are rings.
        if rng.u8(0..4) != 0 {
            served.broker.wait_for_log(": Open")?;
            served.broker.explain(guest.run(AWAIT_RINGS)).with_context(|| format!("after kill {kill}"))?;
        }
        ensure!(!guest.has_ended(job)?, "fio has ended after kill {kill}: {:?}", guest.wait_output(job, LIMIT)?);
    }
    guest.run(fio::STOP)?;
    let said = served.broker.explain(guest.wait(job, LIMIT))?;
    guest.run(AWAIT_RINGS)?;
    let epoch: u64 = guest.run("cat /sys/block/vda/ringpass/queue1/epoch")?.trim().parse()?;
    let aside = statistic(&mut guest, "virtqueue_requests")?;
    eprintln!("{kills} kills in {} runs of fio, epoch {epoch}, {aside} requests over virtqueues", said.lines().count());
    ensure!(epoch > kills / 2, "the queue has seen {epoch} epochs in {kills} kills");
    // The driver gives its queues back before it resets the device.
    guest.run("rmmod ringpass_blk")?;
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(!log.contains("not given") && !log.contains("protocol"), "{log}");
    guest.shut_down()?;
    served.end()
}
