//! A guest with the repository's driver boots again under load: by the reset button, by itself, and by kexec.

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, budget, test};
use ringpass_tests::linux_guest::{
    LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{AWAIT_RINGS, ServedDisk, Serving, Ways, needs},
    programs::{Programs, boot_files},
};

const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 128;
/// The places of the kernel and the initramfs on the disk, behind what fio writes.
const KERNEL_MIB: u64 = 40;
const INITRAMFS_MIB: u64 = 64;

fn main() -> ExitCode {
    harness::run(vec![test("a_guest_boots_again_under_load_in_every_way_and_gets_rings_again", needs(), boots)])
}

/// A way to boot again.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// The guest's kernel learns nothing of it.
    ResetButton,
    Reboot,
    /// A new kernel from the disk. Nothing resets the device before that kernel's driver does.
    Kexec,
}

fn boots() -> Result<()> {
    let programs = Programs::build()?;
    let served = ServedDisk::serve(Serving { size_bytes: DISK_MIB * MIB, ..Serving::default() })?;
    let config = LinuxGuestConfig { programs: vec![programs.kexec()], ..LinuxGuestConfig::default() };
    let (kernel, initramfs) = boot_files(&config)?;
    let lengths_mib = [&kernel, &initramfs].map(|content| (content.len() as u64).div_ceil(MIB));
    ensure!(KERNEL_MIB + lengths_mib[0] <= INITRAMFS_MIB && INITRAMFS_MIB + lengths_mib[1] <= DISK_MIB);
    served.write(&kernel, KERNEL_MIB * MIB)?;
    served.write(&initramfs, INITRAMFS_MIB * MIB)?;

    let mut guest = served.boot(config)?;
    let sum = format!("dd if=/dev/vda bs=1M skip={KERNEL_MIB} iflag=direct 2>/dev/null | md5sum");
    let before = served.broker.explain(guest.run(&sum))?;
    // What is behind the length of a file on the disk is zero, which both formats allow.
    let load_files = format!(
        "set -e
        dd if=/dev/vda of=/tmp/kernel bs=1M skip={KERNEL_MIB} count={} iflag=direct 2>/dev/null
        dd if=/dev/vda of=/tmp/initramfs bs=1M skip={INITRAMFS_MIB} count={} iflag=direct 2>/dev/null",
        lengths_mib[0], lengths_mib[1]
    );
    for round in 0..budget(1, 20) {
        for way in [Way::ResetButton, Way::Reboot, Way::Kexec] {
            let start = Instant::now();
            let result = boot_again(&mut guest, way, &load_files);
            served.broker.explain(result).with_context(|| format!("{way:?}, round {round}"))?;
            let after = served.broker.explain(guest.run(&sum))?;
            ensure!(after == before, "{way:?}: {before} is {after} now");
            eprintln!("  {:5.1} s  {way:?}", start.elapsed().as_secs_f64());
        }
    }
    let console = guest.console();
    ensure!(!console.contains("not given it back"), "{console}");
    guest.shut_down()?;
    served.end()
}

/// Boots again in the middle of requests, and looks whether everything works afterwards.
fn boot_again(guest: &mut LinuxGuest, way: Way, load_files: &str) -> Result<()> {
    if let Way::Kexec = way {
        guest.run(load_files)?;
    }
    let options = "--rw=randrw --bsrange=4k-64k --bs_unaligned=0 --size=16m --iodepth=32";
    guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
    Ways::await_more(guest, "vda", |ways| ways.ring > 100)?;
    match way {
        Way::ResetButton => guest.reset()?,
        Way::Reboot => guest.boot_again_by("reboot -f")?,
        Way::Kexec => {
            guest.boot_again_by("kexec /tmp/kernel /tmp/initramfs")?;
        }
    }
    guest.run(AWAIT_RINGS)?;
    let options = "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=4m --iodepth=16";
    let run = fio::verify("libaio", "/dev/vda", options);
    let ways = Ways::during(guest, "vda", |guest| guest.run(&run).map(drop))?;
    ensure!(ways.ring > 100 && ways.virtqueue < ways.ring / 4, "{ways:?}");
    Ok(())
}
