//! The repository's Linux driver in a stock Debian guest, on the rings of `ringpass serve`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::kernel_log;
use ringpass_tests::linux_guest::{
    KernelSeries, LinuxGuest, LinuxGuestConfig, fio, interrupts,
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
    step("the operator takes the rings away until the driver asks no more", || {
        let log = guest.run("dmesg -c | grep ringpass_blk")?;
        ensure!(!log.contains("protocol"), "{log}");
        served.set_mode("virtqueue")?;
        guest.run("until [ $(dmesg | grep -c 'asks again when the device says so') -ge 2 ]; do usleep 50000; done")?;
        served.set_mode("auto")?;
        served.broker.explain(guest.run(AWAIT_RINGS)).map(drop)
    })?;
    guest.run(fio::STOP)?;
    served.broker.explain(guest.wait(job, LIMIT))?;
    step("hot-unplug under load, and plug", || {
        let job = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
        let before = statistic(&mut guest, "ring_requests")?;
        while statistic(&mut guest, "ring_requests")? < before + 100 {
            ensure!(!guest.has_ended(job)?, "fio has ended: {:?}", guest.wait_output(job, LIMIT)?);
            guest.let_run(Duration::from_millis(20))?;
        }
        guest.unplug("disk")?;
        let ended = guest.wait_output(job, LIMIT)?;
        ensure!(ended.status != 0, "fio has noticed nothing: {ended:?}");
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
    let counts = |guest: &mut LinuxGuest| -> Result<[u64; 3]> {
        // The 16th number is that of the flushes.
        let flushes = guest.run("awk '{ print $16 }' /sys/block/vda/stat")?.trim().parse()?;
        Ok([statistic(guest, "ring_requests")?, statistic(guest, "durable_writes")?, flushes])
    };
    let cached = |guest: &mut LinuxGuest, mode: &str| -> Result<[u64; 3]> {
        let seen =
            guest.run(&format!("cd /sys/block/vda && echo {mode} >cache_type && cat cache_type queue/write_cache"))?;
        ensure!(seen == format!("{mode}\n{mode}\n"), "{mode}: {seen}");
        let before = counts(guest)?;
        guest.run(&run)?;
        let after = counts(guest)?;
        Ok([after[0] - before[0], after[1] - before[1], after[2] - before[2]])
    };
    // fio writes 512 blocks, and reads them again.
    let [ring, durable, flushes] = cached(guest, "write through")?;
    ensure!(ring > 1000 && durable > 500 && flushes == 0, "off: {ring} on rings, {durable} durable, {flushes} flushes");
    let [ring, durable, _] = cached(guest, "write back")?;
    ensure!(ring > 1000 && durable == 0, "on: {ring} on rings, {durable} durable");
    // Both ways at once: what the device does is what the block layer knows.
    let modes = guest.run(
        "cd /sys/block/vda
        for round in 1 2 3 4 5; do
            for mode in through back through back; do echo write $mode >cache_type & done
            wait
            cat cache_type >/tmp/device
            cat queue/write_cache >/tmp/kernel
            cmp /tmp/device /tmp/kernel || exit
        done
        echo write back >cache_type
        cat cache_type",
    )?;
    ensure!(modes == "write back\n", "{modes}");
    Ok(())
}

fn polled() -> Result<()> {
    let served = ServedDisk::new()?;
    let parameters = "poll_queues=1".to_owned();
    let mut guest =
        served.boot(LinuxGuestConfig { block_driver_parameters: parameters, ..LinuxGuestConfig::default() })?;
    // fio writes 256 blocks, and reads them again.
    let options = "--rw=randwrite --bs=4k --size=1m --iodepth=1";
    let interrupting = fio::verify("psync", "/dev/vda", options);
    let polling = fio::verify("io_uring", "/dev/vda", &format!("--hipri {options}"));
    for round in ["after the boot", "after the suspend"] {
        let counted = interrupts_and_requests(&mut guest, &interrupting)?;
        ensure!(counted[0] > 256 && counted[1] < 16, "{round}, without polling: {counted:?}");
        let counted = served.broker.explain(interrupts_and_requests(&mut guest, &polling))?;
        ensure!(counted[0] < 64 && counted[1] > 500, "{round}, with polling: {counted:?}");
        let names: Vec<_> = interrupts::of(&mut guest, DEVICE)?.into_iter().map(|(name, _)| name).collect();
        ensure!(names == ["config", "req.0", "req.1"].map(|name| format!("{DEVICE}-{name}")), "{names:?}");
        if round == "after the boot" {
            step("the guest is suspended to memory and wakes up", || suspend(&served, &mut guest))?;
        }
    }
    // Whatever the driver, this guest cannot be switched off any more after that.
    let console = guest.console();
    ensure!(!console.lines().any(kernel_log::is_trouble), "{console}");
    drop(guest);
    served.end()
}

/// The disk in `/proc/interrupts`.
const DEVICE: &str = "virtio0";

/// How many interrupts of the disk, and requests on the ring of the polled queue, a script makes.
fn interrupts_and_requests(guest: &mut LinuxGuest, script: &str) -> Result<[u64; 2]> {
    let count = |guest: &mut LinuxGuest| -> Result<[u64; 2]> {
        let requests = guest.run("cat /sys/block/vda/ringpass/queue2/ring_requests")?.trim().parse()?;
        Ok([interrupts::sum(guest, DEVICE)?, requests])
    };
    let before = count(guest)?;
    guest.run(script)?;
    let after = count(guest)?;
    Ok([after[0] - before[0], after[1] - before[1]])
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
