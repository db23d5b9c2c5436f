//! The repository's Linux driver in a stock Debian guest, instead of the kernel's own `virtio_blk`.

use std::{fs::File, process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{self, BlockDriver, KernelSeries, LinuxGuest, LinuxGuestConfig, fio, interrupts};
use ringpass_tests::needs::Need;

const MIB: u64 = 1 << 20;

fn main() -> ExitCode {
    harness::run(vec![
        test("the_driver_builds_without_warnings_for_each_kernel_of_debian", all_kernels(), warnings),
        test("a_disk_of_qemu_is_an_ordinary_disk_for_the_driver", linux_guest::needs(), ordinary_disk),
        test("few_vectors_intx_and_small_virtqueues_are_enough_for_the_driver", linux_guest::needs(), few_vectors),
    ])
}

/// Runs a step, prints its name and time, and adds the name to a failure.
fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| name.to_owned());
    eprintln!("  {:5.1} s  {name}", start.elapsed().as_secs_f64());
    result
}

fn all_kernels() -> Vec<Need> {
    let kits = KernelSeries::ALL.into_iter().flat_map(BlockDriver::needs);
    linux_guest::needs().into_iter().chain(kits).collect()
}

fn warnings() -> Result<()> {
    for series in KernelSeries::ALL {
        let driver = BlockDriver::of(series)?;
        ensure!(driver.warnings().is_empty(), "{series}:\n{}", driver.warnings());
    }
    Ok(())
}

/// A guest with the driver and a disk that QEMU itself serves.
fn boot_on_qemu(
    directory: &tempfile::TempDir,
    series: KernelSeries,
    device: &str,
    parameters: &str,
) -> Result<LinuxGuest> {
    let file = directory.path().join("disk");
    File::create(&file)?.set_len(64 * MIB)?;
    LinuxGuest::boot(&LinuxGuestConfig {
        kernel: series,
        block_driver: Some(BlockDriver::of(series)?),
        block_driver_parameters: parameters.to_owned(),
        block_nodes: vec![format!("file,node-name=file,filename={},discard=unmap", file.display())],
        devices: vec![format!("virtio-blk-pci,drive=file,{device}")],
        ..LinuxGuestConfig::default()
    })
}

fn ordinary_disk() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let device = "num-queues=3,config-wce=on,serial=ordinary-1,queue_reset=off";
    let mut guest = boot_on_qemu(&directory, KernelSeries::Linux6_1, device, "poll_queues=1")?;
    step("the driver says what the disk is", || {
        let said = guest.run("dmesg | grep ringpass_blk; cat /sys/block/vda/serial; ls /sys/block/vda/mq | wc -l")?;
        ensure!(said.contains("an ordinary disk: it is not a ringpass device"), "{said}");
        ensure!(said.ends_with("ordinary-12\n"), "{said}");
        Ok(())
    })?;
    step("fio with every engine", || {
        for (engine, options) in [
            ("psync", "--rw=randwrite --bs=512 --size=256k"),
            ("libaio", "--rw=randrw --bsrange=4k-256k --size=16m --iodepth=32"),
            ("io_uring", "--rw=randwrite --bs=4k --size=8m --iodepth=64 --numjobs=1"),
        ] {
            guest.run(&fio::verify(engine, "/dev/vda", options))?;
        }
        Ok(())
    })?;
    step("fio polls", || polls(&mut guest))?;
    step("a file system, discards and zeroes", || {
        guest
            .run(
                "set -e
                mkfs.ext4 -q /dev/vda
                mount /dev/vda /mnt
                dd if=/dev/urandom of=/mnt/a bs=1M count=8 conv=fsync 2>/dev/null
                cp /mnt/a /mnt/b
                sync
                echo 3 >/proc/sys/vm/drop_caches
                cmp /mnt/a /mnt/b
                umount /mnt
                e2fsck -fn /dev/vda
                blkdiscard -f --zeroout --offset 2097152 --length 4194304 /dev/vda
                dd if=/dev/vda bs=1M skip=2 count=4 2>/dev/null | cmp -n 4194304 - /dev/zero
                blkdiscard -f /dev/vda",
            )
            .map(drop)
    })?;
    step("the write cache is turned off and on", || {
        let seen = guest.run(
            "cd /sys/block/vda
            cat cache_type queue/write_cache
            echo write through >cache_type
            cat cache_type queue/write_cache
            echo write back >cache_type
            cat cache_type",
        )?;
        ensure!(seen == "write back\nwrite back\nwrite through\nwrite through\nwrite back\n", "{seen}");
        Ok(())
    })?;
    step("the module is unloaded and loaded", || {
        guest
            .run(&format!(
                "set -e
                {}
                rmmod ringpass_blk
                [ ! -e /dev/vda ]
                load-module ringpass_blk fastpath=0
                {}",
                fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=4m --iodepth=16"),
                fio::verify("libaio", "/dev/vda", "--rw=randwrite --bs=4k --size=4m --iodepth=16"),
            ))
            .map(drop)
    })?;
    guest.shut_down()
}

/// The third queue is polled: it has no interrupt, and takes the requests that fio polls for.
fn polls(guest: &mut LinuxGuest) -> Result<()> {
    let counts = |guest: &mut LinuxGuest| -> Result<[u64; 2]> {
        let requests = guest.run("cat /sys/block/vda/ringpass/queue2/virtqueue_requests")?.trim().parse()?;
        Ok([interrupts::sum(guest, "virtio0")?, requests])
    };
    for (options, polls) in [("--hipri", true), ("", false)] {
        // fio writes 256 blocks, and reads them again.
        let options = format!("--rw=randwrite --bs=4k --size=1m --iodepth=1 {options}");
        let before = counts(guest)?;
        guest.run(&fio::verify("io_uring", "/dev/vda", &options))?;
        let after = counts(guest)?;
        let [interrupts, requests] = [after[0] - before[0], after[1] - before[1]];
        let expected = if polls { interrupts < 64 && requests > 500 } else { interrupts > 256 && requests < 16 };
        ensure!(expected, "{options}: {interrupts} interrupts, {requests} requests on the polled queue");
    }
    Ok(())
}

/// Two CPUs and three queues: the virtio core lets queues share a vector, or the line.
fn few_vectors() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for (device, vectors) in [
        ("num-queues=3,vectors=2", &["virtio0-config", "virtio0-virtqueues"][..]),
        ("num-queues=3,vectors=0", &["virtio0"]),
        ("num-queues=2,packed=on", &["virtio0-config", "virtio0-req.0", "virtio0-req.1"]),
        // Without indirect descriptors a request of more than six pieces does not fit.
        (
            "num-queues=2,queue-size=8,seg-max-adjust=off,indirect_desc=off",
            &["virtio0-config", "virtio0-req.0", "virtio0-req.1"],
        ),
    ] {
        let mut guest = boot_on_qemu(&directory, KernelSeries::Linux6_12, device, "")?;
        step(device, || {
            for cpu in [0, 1] {
                let before = interrupts::sum(&mut guest, "virtio0")?;
                let options = "--rw=randwrite --bs=64k --size=2m --iodepth=16 --mem=mmap";
                guest.run(&format!("taskset -c {cpu} {}", fio::verify("io_uring", "/dev/vda", options)))?;
                ensure!(interrupts::sum(&mut guest, "virtio0")? > before, "no interrupts are counted");
            }
            let names: Vec<_> = interrupts::of(&mut guest, "virtio0")?.into_iter().map(|(name, _)| name).collect();
            ensure!(names == vectors, "{names:?}");
            Ok(())
        })?;
        guest.shut_down()?;
    }
    Ok(())
}
