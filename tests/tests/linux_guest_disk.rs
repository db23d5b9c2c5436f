//! An unmodified Linux guest, and the firmware before it, on a disk of `ringpass serve`.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::broker_process::{self, BrokerProcess};
use ringpass_tests::disks::{DiskKind, TestDisk};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    self, FirmwareGuest, KernelSeries, LinuxGuest, LinuxGuestConfig, VhostUserDisk, fio,
};
use ringpass_tests::needs::Need;
use ringpass_tests::seed::Seed;
use rustix::process::Signal;
use serde_json::json;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(90);

fn main() -> ExitCode {
    harness::run(vec![
        test("the_firmware_boots_from_the_disk_and_writes_it", needs(), firmware),
        test(
            "a_guest_uses_the_disk_with_file_systems_resets_hot_plug_pauses_a_resize_and_a_balloon",
            needs(),
            whole_life,
        ),
        test("a_guest_with_eight_cpus_gets_a_queue_for_each_by_default", needs(), default_queues),
        test("an_older_guest_uses_a_disk_and_cannot_write_a_read_only_one", needs(), older_guest),
    ])
}

fn needs() -> Vec<Need> {
    [linux_guest::needs(), broker_process::needs(), DiskKind::Ext4Direct.needs()].into_iter().flatten().collect()
}

/// A disk and the broker that serves it.
struct Served {
    broker: BrokerProcess,
    disk: TestDisk,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new(size_bytes: u64, arguments: &[&str]) -> Result<Self> {
        let disk = TestDisk::new(DiskKind::Ext4Direct, size_bytes)?;
        Self::serve(disk, arguments)
    }

    fn serve(disk: TestDisk, arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory for a socket")?;
        let socket = directory.path().join("broker.sock");
        let broker = BrokerProcess::start(&socket, disk.path(), arguments)?;
        Ok(Self { broker, disk, _directory: directory })
    }

    fn device(&self, id: &str) -> VhostUserDisk {
        VhostUserDisk::new(id, self.broker.socket())
    }

    /// Ends the broker, and checks that it does so soon and with success.
    fn end(mut self) -> Result<()> {
        let status = self.broker.terminate()?;
        ensure!(status.success(), "the broker: {status}\n{}", self.broker.log());
        Ok(())
    }
}

/// Runs a step, prints its name and time, and adds the name to a failure.
fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| name.to_owned());
    eprintln!("  {:5.1} s  {name}", start.elapsed().as_secs_f64());
    result
}

fn firmware() -> Result<()> {
    let disk = TestDisk::new(DiskKind::Ext4Direct, MIB)?;
    let content = FirmwareGuest::disk_content()?;
    File::options().write(true).open(disk.path())?.write_all_at(&content, 0)?;
    let served = Served::serve(disk, &["--num-queues", "1"])?;
    let device = VhostUserDisk { queues: 1, properties: vec!["bootindex=0".to_owned()], ..served.device("disk") };
    let config = LinuxGuestConfig { disks: vec![device], ..LinuxGuestConfig::default() };
    let guest = served.broker.explain(FirmwareGuest::boot(&config, Duration::from_secs(30)))?;
    drop(guest);

    let sectors = &content[512..];
    let mut written = vec![0; sectors.len()];
    File::open(served.disk.path())?.read_exact_at(&mut written, FirmwareGuest::written_offset_bytes())?;
    ensure!(written == sectors, "the sectors that the boot sector wrote are not those that it read");
    served.end()
}

fn whole_life() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let served = Served::new(128 * MIB, &["--num-queues", "2", "--serial", "ringpass-1", "--max-size", "1G"])?;
    let device = served.device("disk");
    let config = LinuxGuestConfig {
        disks: vec![device.clone()],
        devices: vec!["virtio-balloon-pci,id=balloon".to_owned()],
        ..LinuxGuestConfig::default()
    };
    let explained = |result: Result<()>| served.broker.explain(result);
    let mut booted = served.broker.explain(LinuxGuest::boot(&config))?;
    let guest = &mut booted;
    explained(step("what the guest sees of the disk", || appearance(guest)))?;
    explained(step("a file system under fio", || file_system(guest)))?;
    explained(step("a reset", || reset(guest)))?;
    explained(step("poll queues", || poll_queues(guest)))?;
    explained(step("hot-unplug and hot-plug", || hot_plug(guest, &device)))?;
    explained(step("discard and write zeroes", || discard(guest, &served)))?;
    explained(step("stop and cont under fio", || pauses(guest, seed)))?;
    explained(step("a balloon under fio", || balloon(guest)))?;
    explained(step("a resize", || resize(guest, &served)))?;
    booted.shut_down()?;
    served.end()
}

fn appearance(guest: &mut LinuxGuest) -> Result<()> {
    let seen = guest.run(
        "set -e
        cd /sys/block/vda
        echo $(cat size) sectors, $(ls mq | wc -l) queues, $(cat queue/write_cache), serial $(cat serial)
        echo logical $(cat queue/logical_block_size), read-only $(cat ro), discard $(cat queue/discard_granularity)",
    )?;
    ensure!(
        seen == "262144 sectors, 2 queues, write back, serial ringpass-1\nlogical 512, read-only 0, discard 4096\n",
        "{seen}"
    );
    Ok(())
}

fn file_system(guest: &mut LinuxGuest) -> Result<()> {
    let mut script = "set -e\nmkfs.ext4 -q /dev/vda\nmkdir -p /mnt\nmount /dev/vda /mnt\n".to_owned();
    for engine in ["libaio", "io_uring", "psync"] {
        let target = format!("/mnt/{engine}");
        script.push_str(&fio::verify(engine, &target, "--rw=randwrite --bs=4k --size=8m --iodepth=16 --fsync=256"));
        script.push('\n');
        script.push_str(&fio::verify(engine, &target, "--rw=randrw --bsrange=4k-64k --size=16m --iodepth=4"));
        script.push('\n');
    }
    script.push_str("cd /mnt\ndd if=/dev/urandom of=data bs=1M count=4 2>/dev/null\nmd5sum data >sums\ncd /\numount /mnt\ne2fsck -fn /dev/vda\n");
    guest.run(&script).map(drop)
}

fn reset(guest: &mut LinuxGuest) -> Result<()> {
    guest.run("mount /dev/vda /mnt && echo unfinished >/mnt/late && sync")?;
    guest.reset()?;
    // The mount replays the journal, because the reset came while the file system was in use.
    guest
        .run(
            "set -e\nmount /dev/vda /mnt\ncd /mnt\nmd5sum -c -s sums\ncat late\ncd /\numount /mnt\ne2fsck -fn /dev/vda",
        )
        .map(drop)
}

fn poll_queues(guest: &mut LinuxGuest) -> Result<()> {
    let fio = fio::verify("io_uring", "/dev/vda", "--hipri=1 --rw=randrw --bs=4k --size=8m --iodepth=8");
    let seen = guest.run(&format!(
        "set -e
        rmmod virtio_blk
        load-module virtio_blk poll_queues=1
        {fio}
        cat /sys/block/vda/queue/io_poll
        rmmod virtio_blk
        load-module virtio_blk"
    ))?;
    ensure!(seen == "1\n", "{seen}");
    Ok(())
}

fn hot_plug(guest: &mut LinuxGuest, device: &VhostUserDisk) -> Result<()> {
    let sum = guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null; dd if=/dev/vda bs=1M count=4 2>/dev/null | md5sum")?;
    guest.unplug(&device.id)?;
    guest.run("[ ! -e /dev/vda ]")?;
    guest.plug(device)?;
    let again = guest.run(
        "until [ -e /dev/vda ]; do usleep 20000; done
        dd if=/dev/vda bs=1M count=4 2>/dev/null | md5sum",
    )?;
    ensure!(again == sum, "before: {sum}, after: {again}");
    guest.run(&fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=4m --iodepth=16")).map(drop)
}

fn discard(guest: &mut LinuxGuest, served: &Served) -> Result<()> {
    let allocated_bytes = || fs::metadata(served.disk.path()).map(|found| found.blocks() * 512);
    for (what, frees) in [("", true), ("--zeroout", false)] {
        // Writes 8 MiB of data, and discards the middle.
        guest.run(
            "set -e
            dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
            dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null",
        )?;
        let before = allocated_bytes()?;
        guest.run(&format!(
            "set -e
            blkdiscard {what} --offset 2097152 --length 4194304 /dev/vda
            dd if=/dev/zero of=/tmp/data bs=1M seek=2 count=4 conv=notrunc 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            cmp -n 8388608 /tmp/data /dev/vda"
        ))?;
        let after = allocated_bytes()?;
        let freed = before.saturating_sub(after);
        ensure!(!frees || freed >= 4 * MIB, "the disk had {before} bytes in blocks, and {after} after the discard");
    }
    guest.run("blkdiscard /dev/vda && dd if=/dev/zero bs=1M count=128 2>/dev/null | cmp - /dev/vda").map(drop)
}

fn pauses(guest: &mut LinuxGuest, seed: Seed) -> Result<()> {
    let mut rng = seed.derive("pauses").rng();
    let job = guest.spawn(&fio::verify(
        "io_uring",
        "/dev/vda",
        "--rw=randwrite --bs=4k --size=16m --iodepth=32 --loops=2",
    ))?;
    let mut pauses = 0;
    while !guest.has_ended(job)? {
        guest.let_run(Duration::from_millis(rng.u64(1..150)))?;
        guest.pause_and_resume()?;
        pauses += 1;
    }
    guest.wait(job, LIMIT)?;
    ensure!(pauses >= 5, "{pauses} pauses are too few");
    Ok(())
}

fn balloon(guest: &mut LinuxGuest) -> Result<()> {
    guest.run("load-module virtio_balloon")?;
    let job =
        guest.spawn(&fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=16k --size=64m --iodepth=16 --loops=2"))?;
    let mut inflations = 0;
    while !guest.has_ended(job)? {
        for mib in [200, 500] {
            guest.qmp(json!({"execute": "balloon", "arguments": {"value": mib * MIB}}))?;
            let end = Instant::now() + LIMIT;
            loop {
                let now = guest.qmp(json!({"execute": "query-balloon"}))?["actual"].as_u64().unwrap_or(0);
                if now.abs_diff(mib * MIB) < 8 * MIB {
                    break;
                }
                ensure!(Instant::now() < end, "the guest has {now} bytes and is to have {mib} MiB");
                guest.let_run(Duration::from_millis(10))?;
            }
        }
        inflations += 1;
    }
    guest.wait(job, LIMIT)?;
    eprintln!("the balloon was inflated {inflations} times");
    Ok(())
}

fn resize(guest: &mut LinuxGuest, served: &Served) -> Result<()> {
    for mib in [160, 144] {
        File::options().write(true).open(served.disk.path())?.set_len(mib * MIB)?;
        let pid = rustix::process::Pid::from_raw(served.broker.pid() as i32).context("the broker's pid")?;
        rustix::process::kill_process(pid, Signal::HUP)?;
        let sectors = mib * MIB / 512;
        guest.run(&format!("until [ $(cat /sys/block/vda/size) = {sectors} ]; do usleep 20000; done"))?;
        let last = format!("--rw=write --bs=64k --offset={} --size=1m", (mib - 1) * MIB);
        guest.run(&fio::verify("psync", "/dev/vda", &last))?;
    }
    Ok(())
}

/// Neither QEMU nor the broker gets a number of queues.
fn default_queues() -> Result<()> {
    let cpus: u32 = 8;
    let served = Served::new(64 * MIB, &[])?;
    let device = VhostUserDisk { queues: 0, ..served.device("disk") };
    let config = LinuxGuestConfig { disks: vec![device], cpus, ..LinuxGuestConfig::default() };
    let mut guest = served.broker.explain(LinuxGuest::boot(&config))?;
    let queues = guest.run("ls /sys/block/vda/mq | wc -l")?;
    ensure!(queues.trim() == cpus.to_string(), "{cpus} CPUs and {} queues", queues.trim());
    for cpu in [0, cpus - 1] {
        guest.run(&format!("taskset -c {cpu} dd if=/dev/vda of=/dev/null bs=4k count=16 iflag=direct"))?;
    }
    guest.shut_down()?;
    served.end()
}

fn older_guest() -> Result<()> {
    let served = Served::new(64 * MIB, &["--num-queues", "2"])?;
    let content: Vec<u8> = (0..8 * MIB).map(|index| (index / 512 % 251) as u8).collect();
    let read_only = TestDisk::new(DiskKind::Ext4Direct, 8 * MIB)?;
    File::options().write(true).open(read_only.path())?.write_all_at(&content, 0)?;
    let read_only = Served::serve(read_only, &["--num-queues", "2", "--read-only"])?;
    let config = LinuxGuestConfig {
        kernel: KernelSeries::Linux6_1,
        disks: vec![served.device("disk"), read_only.device("fixed")],
        ..LinuxGuestConfig::default()
    };
    let mut guest = served.broker.explain(LinuxGuest::boot(&config))?;
    let fio = fio::verify("libaio", "/mnt/file", "--rw=randrw --bs=4k --size=8m --iodepth=16");
    guest.run(&format!(
        "set -e\nmkfs.ext4 -q /dev/vda\nmkdir -p /mnt\nmount /dev/vda /mnt\n{fio}\numount /mnt\ne2fsck -fn /dev/vda"
    ))?;

    let sum = guest.run("cat /sys/block/vdb/ro; md5sum </dev/vdb")?;
    let copy: PathBuf = served.disk.directory().context("a directory")?.join("copy");
    fs::write(&copy, &content)?;
    ensure!(guest.run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>&1; true")?.contains("not permitted"));
    ensure!(sum.starts_with("1\n"), "{sum}");
    ensure!(fs::read(read_only.disk.path())? == content, "the read-only disk has changed");
    guest.shut_down()?;
    read_only.end()?;
    served.end()
}
