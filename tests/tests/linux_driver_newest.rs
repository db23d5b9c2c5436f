//! The repository's Linux driver on the newest kernel of Debian, on the rings of `ringpass serve`.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use ringpass_tests::{
    harness::{self, test},
    linux_guest::{
        BlockDriver, KernelSeries, LinuxGuestConfig, fio,
        on_rings::{ServedDisk, needs, statistic},
    },
};

fn main() -> ExitCode {
    let needs = needs().into_iter().chain(BlockDriver::needs(KernelSeries::Newest));
    harness::run(vec![test("debians_newest_kernel_reads_and_writes_over_rings", needs, newest)])
}

fn newest() -> Result<()> {
    let served = ServedDisk::new()?;
    let mut guest = served.boot(LinuxGuestConfig { kernel: KernelSeries::Newest, ..LinuxGuestConfig::default() })?;
    for (engine, options) in [
        ("io_uring", "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=8m --iodepth=32"),
        ("psync", "--rw=randwrite --bs=512 --size=128k"),
    ] {
        served.broker.explain(guest.run(&fio::verify(engine, "/dev/vda", options)))?;
    }
    guest.run(
        "set -e
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/a bs=1M count=4 conv=fsync 2>/dev/null
        umount /mnt
        e2fsck -fn /dev/vda",
    )?;
    let (rings, virtqueues) = (statistic(&mut guest, "ring_requests")?, statistic(&mut guest, "virtqueue_requests")?);
    ensure!(rings > 800 && virtqueues < rings / 4, "{rings} over rings, {virtqueues} over virtqueues");
    // The driver gives its queues back before it resets the device.
    guest.run("rmmod ringpass_blk")?;
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(!log.contains("not given") && !log.contains("protocol"), "{log}");
    guest.shut_down()?;
    served.end()
}
