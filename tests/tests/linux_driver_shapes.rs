//! Requests of all sizes and shapes on rings: from 512 bytes to 4 MiB, in many pieces of memory, mixed with flushes,
//! durable writes, discards and zeroes. What the block layer must refuse stays refused.

use std::{process::ExitCode, time::Duration, time::Instant};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::linux_guest::{
    LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{ServedDisk, Serving, Ways, needs},
    programs::Programs,
};
use ringpass_tests::seed::Seed;

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    harness::run(vec![test("requests_of_every_shape_are_right_on_rings_to_the_last_byte", needs(), shapes)])
}

/// Runs a step with most of its requests on rings, and prints its name and time.
fn step(guest: &mut LinuxGuest, name: &str, work: impl FnOnce(&mut LinuxGuest) -> Result<()>) -> Result<Ways> {
    let start = Instant::now();
    let ways = Ways::during(guest, "vda", work).with_context(|| name.to_owned())?;
    eprintln!("  {:5.1} s  {name}: {ways:?}", start.elapsed().as_secs_f64());
    Ok(ways)
}

fn shapes() -> Result<()> {
    let programs = Programs::build()?;
    let served = ServedDisk::serve(Serving { size_bytes: 128 << 20, ..Serving::default() })?;
    let config = LinuxGuestConfig { programs: vec![programs.scattered_io()], ..LinuxGuestConfig::default() };
    let mut guest = served.boot(config)?;
    let all = (|| {
        sizes(&mut guest)?;
        flushes(&mut guest)?;
        discards(&mut guest)?;
        pieces(&mut guest)
    })();
    served.broker.explain(all)?;
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(!log.contains("protocol") && !log.contains("its ring has ended"), "{log}");
    guest.shut_down()?;
    served.end()
}

fn sizes(guest: &mut LinuxGuest) -> Result<()> {
    for (size, count, least) in [("512", 256, 500), ("4k", 512, 1000), ("64k", 128, 250), ("1m", 32, 0), ("4m", 8, 0)] {
        // The buffers begin in the middle of a page.
        let options =
            format!("--rw=randwrite --bs={size} --number_ios={count} --size=64m --iodepth=8 --iomem_align=512");
        let run = fio::verify("libaio", "/dev/vda", &options);
        let ways = step(guest, size, |guest| guest.run(&run).map(drop))?;
        ensure!(ways.ring >= least, "{size}: {ways:?}");
    }
    let options = "--rw=randrw --bsrange=512-1m --bs_unaligned=0 --blockalign=512 --size=32m --iodepth=16";
    let run = fio::verify("io_uring", "/dev/vda", options);
    let ways = step(guest, "all sizes at odd places", |guest| guest.run(&run).map(drop))?;
    ensure!(ways.ring > 20, "{ways:?}");
    Ok(())
}

fn flushes(guest: &mut LinuxGuest) -> Result<()> {
    for (name, more) in [
        ("with fsync", "--fsync=8"),
        ("with fdatasync", "--fdatasync=8"),
        ("with O_DSYNC", "--sync=dsync"),
        ("with O_SYNC", "--sync=sync"),
    ] {
        let options = format!("--rw=randwrite --bsrange=4k-32k --bs_unaligned=0 --size=2m --iodepth=8 {more}");
        let run = fio::verify("libaio", "/dev/vda", &options);
        let ways = step(guest, name, |guest| guest.run(&run).map(drop))?;
        ensure!(ways.ring > 100 && ways.virtqueue > 10, "{name}: {ways:?}");
    }
    Ok(())
}

fn discards(guest: &mut LinuxGuest) -> Result<()> {
    let load = fio::verify_until_stopped("io_uring", "/dev/vda", "--rw=randwrite --bs=16k --size=8m --iodepth=16");
    let load = guest.spawn(&load)?;
    let run = fio::verify("psync", "/dev/vda", "--rw=trimwrite --bs=32k --offset=64m --size=4m");
    let ways = step(guest, "discards and writes beside a load", |guest| guest.run(&run).map(drop))?;
    ensure!(ways.ring > 256 && ways.virtqueue >= 128, "{ways:?}");
    let zeroes = "set -e
        for start in 64 68 72 76; do
            dd if=/dev/urandom of=/dev/vda bs=1M seek=$start count=4 oflag=direct 2>/dev/null
            blkdiscard -f --zeroout --offset $((start * 1048576 + 512)) --length 2097152 /dev/vda
            dd if=/dev/vda of=/tmp/read bs=512 skip=$((start * 2048 + 1)) count=4096 iflag=direct 2>/dev/null
            cmp -n 2097152 /tmp/read /dev/zero
        done";
    step(guest, "zeroes beside a load", |guest| guest.run(zeroes).map(drop))?;
    guest.run(fio::STOP)?;
    let said = guest.wait(load, LIMIT)?;
    ensure!(said.contains("is verified"), "{said}");
    Ok(())
}

fn pieces(guest: &mut LinuxGuest) -> Result<()> {
    let mut rng = Seed::from_env_or_random().rng();
    let rounds = budget(60, 3000);
    let ways = step(guest, "pieces in random order", |guest| {
        let runs: Vec<_> = [0, 32]
            .into_iter()
            .map(|mib| {
                let (offset, length) = (mib << 20, 32 << 20);
                let seed = rng.u32(..);
                guest.spawn(&format!("scattered-io /dev/vda {offset} {length} {rounds} {seed}"))
            })
            .collect::<Result<_>>()?;
        for run in runs {
            let said = guest.wait(run, budget(LIMIT, 60 * LIMIT))?;
            eprint!("         {said}");
        }
        Ok(())
    })?;
    ensure!(ways.ring > rounds && ways.sqes > 2 * ways.ring && ways.virtqueue > 10, "{ways:?}");
    Ok(())
}
