//! What injected code tries to make the image grow.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use io_uring::opcode;
use nix::libc;
use ringpass_tests::{disks::DiskKind, front_end::attach::bench::Bench};
use rustix::io::Errno;

use crate::{
    attempts::{DISK_BYTES, Place, Taken, assert_is},
    ring::{Entry, Ring},
    tracee::Tracee,
};

const PAGE_BYTES: u64 = 4096;
/// The opcode, which the crate `io_uring` does not have in all versions (`<linux/io_uring.h>`).
const FTRUNCATE: u8 = 55;

/// The number of the descriptor through which a process writes its disk.
fn disk_fd(pid: u32, image: &Path) -> Result<i32> {
    let image = image.canonicalize()?;
    let process = format!("/proc/{pid}");
    for entry in fs::read_dir(format!("{process}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("{process}/fdinfo/{number}"))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).context("no flags")?;
        let is_written = i32::from_str_radix(flags.trim(), 8)? & (libc::O_ACCMODE | libc::O_PATH) == libc::O_RDWR;
        if is_written && fs::read_link(entry.path()).is_ok_and(|target| target == image) {
            return Ok(number.parse()?);
        }
    }
    anyhow::bail!("the process has not opened its disk")
}

/// What no process may do to the size of its disk by plain calls.
fn assert_no_growth(tracee: &Tracee, arguments: u64, fd: i32) -> Result<()> {
    let disk = u64::try_from(fd)?;
    // No limit, soft and hard.
    tracee.write(arguments, &[0xff; 16])?;
    let fsize = u64::from(libc::RLIMIT_FSIZE);
    let raised = tracee.call(libc::SYS_prlimit64, &[0, fsize, arguments, 0])?;
    assert_is(raised, Errno::PERM, "prlimit64(RLIMIT_FSIZE)")?;
    let data = tracee.map(1)?;
    for (what, number, arguments) in [
        ("pwrite64", libc::SYS_pwrite64, vec![disk, data, PAGE_BYTES, DISK_BYTES]),
        ("ftruncate", libc::SYS_ftruncate, vec![disk, 2 * DISK_BYTES]),
        ("fallocate", libc::SYS_fallocate, vec![disk, 0, 0, 2 * DISK_BYTES]),
    ] {
        let answer = tracee.call(number, &arguments)?;
        ensure!(matches!(answer, Err(Errno::FBIG | Errno::PERM)), "{what}: {answer:?}");
    }
    Ok(())
}

fn assert_size(image: &Path) -> Result<()> {
    let image_bytes = fs::metadata(image)?.len();
    ensure!(image_bytes == DISK_BYTES, "the image has {image_bytes} bytes");
    Ok(())
}

pub(crate) fn in_server() -> Result<()> {
    let taken = Taken::new(Place::Server)?;
    let fd = disk_fd(taken.pid, &taken.image())?;
    assert_no_growth(&taken.tracee, taken.arguments, fd)?;
    assert_size(&taken.image())?;
    taken.serves()
}

pub(crate) fn in_ring_process() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let mut driver = bench.attached(1)?;
    driver.write(0, &[0x5a; 4096])?;
    let pid = bench.broker.ring_process().context("the server has no ring process")?;
    let image = bench.rig.disk().path().to_owned();
    let fd = disk_fd(pid, &image)?;
    let tracee = Tracee::stop(pid)?;
    let arguments = tracee.map(1)?;
    assert_no_growth(&tracee, arguments, fd)?;

    let ring = Ring::new(&tracee)?;
    let data = tracee.map(1)?;
    let written = Entry { opcode: opcode::Write::CODE, fd, off: DISK_BYTES, addr: data, len: 4096, ..Entry::default() };
    assert_is(ring.execute(written)?, Errno::FBIG, "a write by a ring")?;
    let lengthened = Entry { opcode: FTRUNCATE, fd, off: 2 * DISK_BYTES, ..Entry::default() };
    // The second error is that of kernels before 6.9.
    let answer = ring.execute(lengthened)?;
    ensure!(matches!(answer, Err(Errno::FBIG | Errno::INVAL)), "ftruncate by a ring: {answer:?}");
    let allocated = Entry { opcode: opcode::Fallocate::CODE, fd, addr: 2 * DISK_BYTES, ..Entry::default() };
    assert_is(ring.execute(allocated)?, Errno::FBIG, "fallocate by a ring")?;
    assert_size(&image)?;
    drop(tracee);
    ensure!(driver.read(0, 4096)? == [0x5a; 4096]);
    Ok(())
}
