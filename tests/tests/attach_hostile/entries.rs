//! Forbidden entries that a hostile driver puts into its ring.

use anyhow::{Context, Result, ensure};
use nix::libc::{EACCES, EBADF, EFAULT, EFBIG, EINVAL, EISDIR, EOPNOTSUPP};
use ringpass_guest_abi::{SEGMENT_BOUNDARY_BYTES, Sqe};
use ringpass_tests::{
    canaries::pattern,
    disks::DiskKind,
    front_end::attach::{RingDriver, bench::Bench},
};

const DISK_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;
const READ_FIXED: u8 = 4;
const WRITE_FIXED: u8 = 5;
const FIXED_FILE: u8 = 1;

/// The kernel refuses each entry that is not a fixed read or write of this disk and this memory.
pub(crate) fn forbidden() -> Result<()> {
    let mut bench = Bench::new(DiskKind::Ext4PageCache, DISK_BYTES, 2, &[])?;
    let mut driver = bench.attached(1)?;
    let result = each_forbidden(&mut driver);
    bench.broker.explain(result)?;
    let disk = bench.rig.disk_file()?.metadata()?.len();
    ensure!(disk == DISK_BYTES, "the disk has {disk} bytes now");
    Ok(())
}

fn each_forbidden(driver: &mut RingDriver) -> Result<()> {
    let expected = pattern(3, BLOCK_BYTES as usize);
    driver.write(0, &expected)?;
    let good = driver.sqe(false, 1, BLOCK_BYTES, 0, 10)?;
    let with = |change: &dyn Fn(&mut Sqe)| {
        let mut sqe = good;
        change(&mut sqe);
        sqe
    };
    let mut check = |what: &str, sqe: Sqe, allowed: &[i32]| -> Result<i32> {
        let res = driver.perform(sqe).with_context(|| what.to_owned())?;
        ensure!(allowed.contains(&-res), "{what}: {res}, allowed are the errors {allowed:?}");
        Ok(res)
    };

    let mut refused = 0;
    for opcode in (0..=u8::MAX).filter(|opcode| ![READ_FIXED, WRITE_FIXED].contains(opcode)) {
        // The kernel looks at whether it knows an operation before it looks at the restrictions.
        let sqe = with(&|sqe| sqe.opcode = opcode);
        refused += u32::from(check(&format!("operation {opcode}"), sqe, &[EACCES, EINVAL])? == -EACCES);
    }
    ensure!(refused >= 50, "only {refused} operations are forbidden");
    for flags in (0..=u8::MAX).filter(|&flags| flags != FIXED_FILE) {
        let sqe = with(&|sqe| sqe.flags = flags);
        // Some flags make no sense for a read, and the kernel checks that first.
        check(&format!("flags {flags:#x}"), sqe, &[EACCES, EINVAL, EOPNOTSUPP])?;
    }
    for fd in [1, 2, 3, 1000, i32::MAX, -1, i32::MIN] {
        check(&format!("fixed file {fd}"), with(&|sqe| sqe.fd = fd), &[EBADF, EISDIR])?;
    }
    // The token of the ring's end is fixed file 1, a directory. A read of no bytes finds nothing to refuse.
    let empty = |sqe: &mut Sqe| (sqe.fd, sqe.len_bytes) = (1, 0);
    check("a read of no bytes of fixed file 1", with(&empty), &[0])?;
    let write = |sqe: &mut Sqe| {
        empty(sqe);
        sqe.opcode = WRITE_FIXED;
    };
    check("a write of no bytes to fixed file 1", with(&write), &[EBADF])?;
    check("a read of fixed file 1", with(&|sqe| sqe.fd = 1), &[EISDIR])?;
    check("a write to fixed file 1", with(&|sqe| (sqe.fd, sqe.opcode) = (1, WRITE_FIXED)), &[EBADF])?;
    check("a read of no bytes of fixed file 2", with(&|sqe| (sqe.fd, sqe.len_bytes) = (2, 0)), &[EBADF])?;
    for buf_index in [1, 2, 16383, 16384, u16::MAX] {
        check(&format!("buffer {buf_index}"), with(&|sqe| sqe.buf_index = buf_index), &[EFAULT])?;
    }
    let ram_end = good.addr - driver_gpa(&good) + (16 << 20);
    let stack = (&raw const refused).addr() as u64;
    for addr in [0, 4096, driver_gpa(&good), ram_end, ram_end - 1, u64::MAX - 4095, stack, 1 << 47] {
        check(&format!("address {addr:#x}"), with(&|sqe| sqe.addr = addr), &[EFAULT])?;
    }
    for len_bytes in [17 << 20, 1 << 30, i32::MAX as u32, u32::MAX] {
        check(&format!("length {len_bytes}"), with(&|sqe| sqe.len_bytes = len_bytes), &[EFAULT, EINVAL])?;
    }
    // What follows the slot is RAM of the guest, too, but no SQE reaches that far: a slot bounds the work of one SQE.
    let slot_end = (good.addr / SEGMENT_BOUNDARY_BYTES + 1) * SEGMENT_BOUNDARY_BYTES;
    let beyond_bytes = u32::try_from(slot_end - good.addr)? + BLOCK_BYTES;
    ensure!(good.addr + u64::from(beyond_bytes) < ram_end, "the RAM ends with the slot");
    check("a read beyond the slot", with(&|sqe| sqe.len_bytes = beyond_bytes), &[EFAULT])?;
    check("other credentials", with(&|sqe| sqe.personality = 7), &[EINVAL])?;
    for off_bytes in [DISK_BYTES, 1 << 40, i64::MAX as u64 - 8191] {
        let sqe = with(&|sqe| (sqe.opcode, sqe.off_bytes) = (WRITE_FIXED, off_bytes));
        check(&format!("a write at {off_bytes:#x}"), sqe, &[EFBIG, EINVAL])?;
    }
    // RWF_APPEND.
    check("a write that appends", with(&|sqe| (sqe.opcode, sqe.rw_flags) = (WRITE_FIXED, 0x10)), &[EFBIG])?;
    ensure!(driver.read(0, BLOCK_BYTES)? == expected, "the ring no longer reads what the disk holds");
    Ok(())
}

/// The guest-physical address of a request's memory.
fn driver_gpa(sqe: &Sqe) -> u64 {
    // The base is a multiple of 1 GiB, and the RAM of the bench ends below that.
    sqe.addr % (1 << 30)
}
