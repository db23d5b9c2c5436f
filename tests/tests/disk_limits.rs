//! The limits that a process has on the growth of files and on pinned memory. Each test is a child process of its own,
//! because they change the whole process.

use std::{
    env,
    fs::{self, Permissions},
    io,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use io_uring::IoUring;
use memmap2::{Advice, MmapMut};
use nix::{
    libc,
    sys::resource::{Resource, getrlimit, setrlimit},
};
use ringpass_broker::{
    disk::{Disk, DiskConfig},
    limits::{Memlock, MemlockError, cap_file_growth},
};
use ringpass_tests::{
    disks::{DiskKind, TestDisk},
    harness::{self, test},
    needs::Need,
};
use rustix::thread::CapabilitySet;

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 4 * MIB;
/// A user without processes on this machine, so that none of its memory is pinned.
const USER: u32 = 0x5249_4e47;

/// Set for the child process: its task. Its argument is the disk.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_LIMITS";

fn main() -> ExitCode {
    if let Ok(task) = env::var(CHILD_VARIABLE) {
        return match child(&task) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let file = || DiskKind::Ext4PageCache.needs();
    let pinning = || [Need::root(), Need::io_uring()];
    harness::run(vec![
        test("a_file_cannot_grow_beyond_the_disk", file(), || in_child(DiskKind::Ext4PageCache, "grow")),
        test("a_hard_limit_below_the_disk_is_refused", file(), || in_child(DiskKind::Ext4PageCache, "hard-too-low")),
        test("a_block_device_needs_no_limit", DiskKind::Loop.needs(), || in_child(DiskKind::Loop, "device")),
        test("the_kernel_agrees_with_the_memlock_check", pinning(), || as_user("pin")),
        test("the_soft_memlock_limit_is_raised_as_far_as_needed", pinning(), || as_user("raise")),
        test("a_process_with_the_capability_is_exempt", [ipc_lock(), Need::io_uring()], || {
            finish(Command::new(env::current_exe()?).env(CHILD_VARIABLE, "exempt"))
        }),
    ])
}

fn child(task: &str) -> Result<()> {
    match task {
        "grow" => grow(open_disk()?),
        "hard-too-low" => hard_too_low(open_disk()?),
        "device" => device(open_disk()?),
        "pin" => pin(),
        "raise" => raise(),
        "exempt" => exempt(),
        _ => bail!("unknown task {task}"),
    }
}

fn open_disk() -> Result<Disk> {
    Ok(Disk::open(&DiskConfig::new(env::args_os().nth(1).context("a path")?))?)
}

fn in_child(kind: DiskKind, task: &str) -> Result<()> {
    let made = TestDisk::new(kind, SIZE_BYTES)?;
    finish(Command::new(env::current_exe()?).arg(made.path()).env(CHILD_VARIABLE, task))?;
    if kind != DiskKind::Loop {
        ensure!(fs::metadata(made.path())?.len() == SIZE_BYTES, "the file has another size");
    }
    Ok(())
}

/// Runs a task in a process of an ordinary user. Its program is a copy, because such a user may not reach the build
/// directory.
fn as_user(task: &str) -> Result<()> {
    let directory = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir()?;
    let program: PathBuf = directory.path().join("limits-test");
    fs::copy(env::current_exe()?, &program)?;
    finish(Command::new(&program).env(CHILD_VARIABLE, task).uid(USER).gid(USER))
}

fn finish(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn grow(disk: Disk) -> Result<()> {
    let (_, hard_before) = getrlimit(Resource::RLIMIT_FSIZE)?;
    cap_file_growth(&disk)?;
    ensure!(getrlimit(Resource::RLIMIT_FSIZE)? == (SIZE_BYTES, hard_before));
    let page = memory(4096)?;
    let refused = rustix::io::pwrite(&disk, &page, SIZE_BYTES);
    ensure!(refused == Err(rustix::io::Errno::FBIG), "a write past the end: {refused:?}");
    // Writes up to the end of the disk still work.
    let written = rustix::io::pwrite(&disk, &page, SIZE_BYTES - 4096)?;
    ensure!(written == 4096);
    Ok(())
}

fn hard_too_low(disk: Disk) -> Result<()> {
    setrlimit(Resource::RLIMIT_FSIZE, SIZE_BYTES / 2, SIZE_BYTES / 2)?;
    let message = cap_file_growth(&disk).err().context("no refusal")?.to_string();
    ensure!(message.contains("(RLIMIT_FSIZE) is 2097152 bytes, but the disk has 4194304"), "{message}");
    ensure!(message.contains("`ulimit -H -f 4096`"), "{message}");
    ensure!(getrlimit(Resource::RLIMIT_FSIZE)? == (SIZE_BYTES / 2, SIZE_BYTES / 2), "the refusal changed the limit");
    Ok(())
}

fn device(disk: Disk) -> Result<()> {
    let before = getrlimit(Resource::RLIMIT_FSIZE)?;
    cap_file_growth(&disk)?;
    ensure!(getrlimit(Resource::RLIMIT_FSIZE)? == before);
    Ok(())
}

/// Pins `memory` as a fixed buffer of a new ring.
fn pinned_in_ring(memory: &mut [u8]) -> io::Result<IoUring> {
    let ring = IoUring::new(8)?;
    let buffer = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
    // SAFETY: the pages stay pinned, and so valid for the kernel, as long as the ring exists; nothing is submitted.
    unsafe { ring.submitter().register_buffers(&[buffer]) }?;
    Ok(ring)
}

/// The memory is whole small pages: the kernel charges all of a huge page.
fn memory(bytes: u64) -> Result<MmapMut> {
    let pages = MmapMut::map_anon(usize::try_from(bytes)?)?;
    pages.advise(Advice::NoHugePage)?;
    Ok(pages)
}

fn pin() -> Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, 8 * MIB, 8 * MIB)?;
    let before = Memlock::current()?;
    ensure!(!before.exempt && before.pinned_by.is_empty(), "{before:?}");
    ensure!(before.soft_bytes == Some(8 * MIB) && before.hard_bytes == Some(8 * MIB), "{before:?}");

    let mut first = memory(4 * MIB)?;
    let _first = pinned_in_ring(&mut first)?;
    let after = Memlock::current()?;
    ensure!(after.pinned_bytes() == 4 * MIB, "{after:?}");
    ensure!(after.pinned_by[0].pid == std::process::id(), "{after:?}");

    // The check and the kernel allow memory up to the limit less a ring's own memory, which newer kernels charge too.
    let mut second = memory(4 * MIB - 64 * 1024)?;
    after.check(second.len() as u64)?;
    drop(pinned_in_ring(&mut second).context("the kernel refuses what the check allows")?);

    let mut third = memory(4 * MIB + 4096)?;
    let error = after.check(third.len() as u64).err().context("no refusal")?;
    let message = error.to_string();
    let expected = format!("have already pinned 4 MiB (limits-test[{}] 4 MiB)", std::process::id());
    ensure!(message.contains("pinning needs 4100 KiB, RLIMIT_MEMLOCK is 8 MiB and "), "{message}");
    ensure!(message.contains(&expected), "{expected:?} is missing in: {message}");
    ensure!(message.contains("only root can raise it: LimitMEMLOCK=9M"), "{message}");
    ensure!(message.contains("--memlock=8392704`"), "{message}");
    let refused = pinned_in_ring(&mut third).err().context("the kernel allows what the check refuses")?;
    ensure!(refused.raw_os_error() == Some(libc::ENOMEM), "{refused}");
    Ok(())
}

fn raise() -> Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, MIB, 8 * MIB)?;
    let mut limits = Memlock::current()?;
    limits.raise_soft(4096)?;
    ensure!(getrlimit(Resource::RLIMIT_MEMLOCK)? == (MIB, 8 * MIB), "a sufficient limit was changed");
    limits.raise_soft(5 * MIB + 1)?;
    ensure!(getrlimit(Resource::RLIMIT_MEMLOCK)? == (5 * MIB + 4096, 8 * MIB));
    ensure!(Memlock::current()? == limits);
    let refused = limits.raise_soft(9 * MIB);
    ensure!(matches!(refused, Err(MemlockError::TooLow { .. })), "{refused:?}");
    ensure!(getrlimit(Resource::RLIMIT_MEMLOCK)? == (5 * MIB + 4096, 8 * MIB), "the refusal changed the limit");
    Ok(())
}

fn exempt() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    setrlimit(Resource::RLIMIT_MEMLOCK, 65536, hard)?;
    let mut limits = Memlock::current()?;
    ensure!(limits.exempt && limits.soft_bytes == Some(65536), "{limits:?}");
    limits.check(u64::MAX)?;
    limits.raise_soft(u64::MAX)?;
    ensure!(limits.soft_bytes == Some(65536), "a limit that does not count was changed");
    let mut pages = memory(4 * MIB)?;
    let _ring = pinned_in_ring(&mut pages).context("the kernel limits an exempt process")?;
    // Memory that no user is charged for does not count.
    let own = Memlock::current()?.pinned_by.into_iter().find(|process| process.pid == std::process::id());
    ensure!(own.is_none(), "{own:?}");
    Ok(())
}

/// `CAP_IPC_LOCK` in the initial user namespace, as root has it outside containers.
fn ipc_lock() -> Need {
    Need::new("CAP_IPC_LOCK", || {
        let effective = rustix::thread::capabilities(None)?.effective;
        ensure!(effective.contains(CapabilitySet::IPC_LOCK), "this process does not have it; run the tests as root");
        let users = fs::read_to_string("/proc/self/uid_map")?;
        let is_initial = users.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
        ensure!(is_initial, "this is a user namespace, where it does not count");
        Ok(())
    })
}
