//! Rings on every kind of disk that the host can have, with partitions and file systems.

use std::{process::ExitCode, time::Duration, time::Instant};

use anyhow::{Context, Result, ensure};
use ringpass_tests::disks::DiskKind;
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    BlockDriver, LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{self, AWAIT_RINGS, ServedDisk, Serving, Ways},
};
use ringpass_tests::needs::Need;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// The disks of the guest, in this order.
const DISKS: [(&str, DiskKind); 3] =
    [("vda", DiskKind::Ext4PageCache), ("vdb", DiskKind::Loop), ("vdc", DiskKind::Zram)];

fn main() -> ExitCode {
    let kinds = DISKS.into_iter().flat_map(|(_, kind)| kind.needs());
    let needs = on_rings::needs().into_iter().chain(kinds).collect::<Vec<Need>>();
    harness::run(vec![test(
        "a_guest_has_rings_on_files_and_block_devices_with_partitions_and_file_systems",
        needs,
        disks,
    )])
}

/// Runs a step that uses a disk over its rings, and prints its name and time.
fn step(
    guest: &mut LinuxGuest,
    name: &str,
    disk: &str,
    work: impl FnOnce(&mut LinuxGuest) -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    let ways = Ways::during(guest, disk, work).with_context(|| format!("{name} on {disk}"))?;
    eprintln!("  {:5.1} s  {name} on {disk}: {ways:?}", start.elapsed().as_secs_f64());
    ensure!(ways.ring > 100 && ways.virtqueue < ways.ring, "{name} on {disk}: {ways:?}");
    Ok(())
}

fn disks() -> Result<()> {
    let mut served = Vec::new();
    for (_, kind) in DISKS {
        let direct_io = if kind == DiskKind::Ext4PageCache { "off" } else { "on" };
        // No other mode gives rings of a file in the page cache.
        let arguments = ["--mode", "direct", "--direct-io", direct_io];
        let serving = Serving { kind, size_bytes: 96 * MIB, ..Serving::default() };
        served.push(ServedDisk::serve(serving.with(&arguments)).with_context(|| kind.to_string())?);
    }
    let config = LinuxGuestConfig::default();
    let mut guest = LinuxGuest::boot(&LinuxGuestConfig {
        disks: served.iter().zip(DISKS).map(|(served, (name, _))| served.device_called(name)).collect(),
        block_driver: Some(BlockDriver::of(config.kernel)?),
        ..config
    })?;
    for (served, (name, _)) in served.iter().zip(DISKS) {
        served.broker.explain(guest.run(&AWAIT_RINGS.replace("vda", name)))?;
    }
    let logs = || served.iter().map(|served| served.broker.log()).collect::<Vec<_>>().join("\n");
    use_disks(&mut guest).with_context(logs)?;
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(!log.contains("protocol") && !log.contains("its ring has ended"), "{log}");
    guest.shut_down()?;
    served.into_iter().try_for_each(ServedDisk::end)
}

fn use_disks(guest: &mut LinuxGuest) -> Result<()> {
    let seen = guest.run("cat /sys/block/vd[abc]/queue/logical_block_size")?;
    ensure!(seen == "512\n512\n4096\n", "{seen}");
    let jobs = DISKS.map(|(disk, _)| {
        let options = "--rw=randrw --bsrange=4k-64k --bs_unaligned=0 --size=16m --iodepth=16";
        (disk, guest.spawn(&fio::verify("io_uring", &format!("/dev/{disk}"), options)))
    });
    for (disk, job) in jobs {
        step(guest, "fio beside the other disks", disk, |guest| {
            let job = job?;
            guest.wait(job, LIMIT)?;
            guest.run(&fio::verify(
                "libaio",
                &format!("/dev/{disk}"),
                "--rw=randwrite --bs=8k --size=4m --iodepth=8",
            ))?;
            Ok(())
        })?;
    }
    step(guest, "ext4", "vda", |guest| guest.run(&exercise("/dev/vda", "mkfs.ext4 -q", "e2fsck -fn")).map(drop))?;
    step(guest, "ext4 on a partition", "vdb", |guest| {
        guest.run(PARTITION)?;
        guest.run(&exercise("/dev/vdb1", "mkfs.ext4 -q", "e2fsck -fn")).map(drop)
    })?;
    step(guest, "ext4", "vdc", |guest| guest.run(&exercise("/dev/vdc", "mkfs.ext4 -q", "e2fsck -fn")).map(drop))
}

/// A table with one partition, which begins at sector 63, as those of old did, and has 80 MiB.
const PARTITION: &str = "set -e
    dd if=/dev/zero of=/dev/vdb bs=512 count=63 oflag=direct 2>/dev/null
    printf '\\000\\000\\000\\000\\203\\000\\000\\000\\077\\000\\000\\000\\000\\200\\002\\000' >/tmp/entry
    dd if=/dev/zero of=/tmp/table bs=512 count=1 2>/dev/null
    dd if=/tmp/entry of=/tmp/table bs=1 seek=446 conv=notrunc 2>/dev/null
    printf '\\125\\252' | dd of=/tmp/table bs=1 seek=510 conv=notrunc 2>/dev/null
    dd if=/tmp/table of=/dev/vdb bs=512 count=1 oflag=direct 2>/dev/null
    blockdev --rereadpt /dev/vdb
    until [ -e /dev/vdb1 ]; do usleep 20000; done
    [ $(cat /sys/block/vdb/vdb1/start) = 63 ]";

/// Makes a file system, uses it in many ways at once, and checks it.
fn exercise(device: &str, make: &str, check: &str) -> String {
    let files = fio::verify("io_uring", "/mnt/fio", "--rw=randwrite --bs=4k --size=8m --iodepth=16 --fsync=64");
    let cached =
        fio::verify("psync", "/mnt/cached", "--rw=randwrite --bsrange=1k-64k --size=8m --direct=0 --fdatasync=64");
    format!(
        "set -e
        {make} {device}
        mount {device} /mnt
        mkdir /mnt/many
        {files} &
        files=$!
        {cached} &
        cached=$!
        for number in $(seq 200); do
            seq $number >/mnt/many/$number
            [ $((number % 3)) != 0 ] || rm /mnt/many/$((number - 1))
        done
        dd if=/dev/urandom of=/tmp/data bs=64k count=128 2>/dev/null
        cp /tmp/data /mnt/data
        wait $files
        wait $cached
        rm /mnt/fio /mnt/cached
        cp /mnt/data /mnt/copy
        fstrim /mnt
        umount /mnt
        mount {device} /mnt
        cmp /tmp/data /mnt/data
        cmp /tmp/data /mnt/copy
        for number in 199 200; do seq $number | cmp - /mnt/many/$number; done
        umount /mnt
        {check} {device}
        rm /tmp/data"
    )
}
