//! What the host changes under a guest with the repository's driver while it does I/O: the size of the disk, and the
//! guest's memory.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{AWAIT_RINGS, ServedDisk, Serving, Ways, needs},
};
use serde_json::json;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);
const PLUGGED_MIB: u64 = 256;

fn main() -> ExitCode {
    harness::run(vec![test("a_guest_on_rings_gets_another_disk_size_and_more_memory_under_load", needs(), changes)])
}

/// Runs a step, prints its name and time, and adds the name to a failure.
fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| name.to_owned());
    eprintln!("  {:5.1} s  {name}", start.elapsed().as_secs_f64());
    result
}

fn changes() -> Result<()> {
    let mut served = ServedDisk::serve(Serving::default().with(&["--max-size", "1G"]))?;
    let mut guest = served.boot(LinuxGuestConfig {
        memory_mib: 256,
        memory_max_mib: Some(1024),
        // User memory comes from plugged memory first.
        kernel_arguments: vec!["memhp_default_state=online_movable".to_owned()],
        ..LinuxGuestConfig::default()
    })?;
    let options = "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=16m --iodepth=16";
    let load = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
    step("the disk changes its size", || resize(&mut served, &mut guest))?;
    let plugged = step("memory is plugged", || plug_memory(&mut guest));
    served.broker.explain(plugged)?;
    let used = step("requests use the new memory", || use_memory(&mut guest));
    served.broker.explain(used)?;
    ensure!(!guest.has_ended(load)?, "fio has ended: {:?}", guest.wait_output(load, LIMIT)?);
    guest.run(fio::STOP)?;
    let said = served.broker.explain(guest.wait(load, LIMIT))?;
    ensure!(said.contains("is verified"), "{said}");
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(!log.contains("protocol") && !log.contains("its ring has ended"), "{log}");
    guest.shut_down()?;
    served.end()
}

fn resize(served: &mut ServedDisk, guest: &mut LinuxGuest) -> Result<()> {
    for mib in [96, 128, 80, 160] {
        served.resize(mib * MIB)?;
        let sectors = mib * MIB / 512;
        let size = format!("until [ $(cat /sys/block/vda/size) = {sectors} ]; do usleep 20000; done");
        served.broker.explain(guest.run(&size).map(drop)).with_context(|| format!("{mib} MiB"))?;
        let last = format!("--rw=write --bs=64k --offset={} --size=1m", (mib - 1) * MIB);
        let run = fio::verify("psync", "/dev/vda", &last);
        let ways = Ways::during(guest, "vda", |guest| served.broker.explain(guest.run(&run).map(drop)))?;
        ensure!(ways.ring >= 32, "{mib} MiB: {ways:?}");
        let read = format!("dd if=/dev/vda bs=1M skip={} iflag=direct 2>/dev/null | wc -c", mib - 1);
        let count = guest.run(&read)?;
        ensure!(count.trim() == MIB.to_string(), "{mib} MiB: {count}");
    }
    Ok(())
}

fn memory_mib(guest: &mut LinuxGuest) -> Result<u64> {
    let kib = guest.run("awk '/^MemTotal/ {print $2}' /proc/meminfo")?;
    Ok(kib.trim().parse::<u64>()? >> 10)
}

fn plug_memory(guest: &mut LinuxGuest) -> Result<()> {
    let before_mib = memory_mib(guest)?;
    let object = json!({"qom-type": "memory-backend-memfd", "id": "more", "size": PLUGGED_MIB * MIB, "share": true});
    guest.qmp(json!({"execute": "object-add", "arguments": object}))?;
    guest.qmp(json!({"execute": "device_add", "arguments": {"driver": "pc-dimm", "id": "dimm", "memdev": "more"}}))?;
    let end = Instant::now() + LIMIT;
    while memory_mib(guest)? < before_mib + PLUGGED_MIB - 8 {
        ensure!(Instant::now() < end, "the guest has {} MiB", memory_mib(guest)?);
        guest.let_run(Duration::from_millis(50))?;
    }
    Ok(())
}

/// The free pages of the guest's zone for movable memory, which is the plugged memory.
const FREE: &str = "awk '/zone *Movable/ {found=1} found && /pages free/ {print $3; exit}' /proc/zoneinfo";

fn use_memory(guest: &mut LinuxGuest) -> Result<()> {
    let free_pages = |text: String| text.trim().parse::<u64>().with_context(|| format!("{text:?}"));
    let before = free_pages(guest.run(FREE)?)?;
    ensure!(before > PLUGGED_MIB * 256 / 2, "{before} free pages in the plugged memory");
    // Its buffers have 64 MiB.
    let options = "--rw=randwrite --bs=1m --offset=32m --size=32m --iodepth=64 --mem=mmap --loops=3 --rate=16m";
    let job = guest.spawn(&fio::verify("libaio", "/dev/vda", options))?;
    let mut least = before;
    let ways = Ways::during(guest, "vda", |guest| {
        while !guest.has_ended(job)? {
            least = least.min(free_pages(guest.run(FREE)?)?);
            guest.let_run(Duration::from_millis(100))?;
        }
        guest.wait(job, LIMIT).map(drop)
    })?;
    eprintln!("  {} MiB of the plugged memory in use, {ways:?}", (before - least) / 256);
    ensure!(before - least > 32 * 256, "{before} pages were free, and never less than {least}");
    ensure!(ways.ring > 100, "{ways:?}");
    guest.run(AWAIT_RINGS).map(drop)
}
