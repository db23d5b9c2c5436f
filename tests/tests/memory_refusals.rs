//! The messages when guest RAM cannot be pinned or mapped: limits, privileges, huge pages, addresses.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Command, ExitCode},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, setrlimit};
use ringpass_broker::{
    direct::SubmissionConfig,
    disk::{DirectIo, Disk, DiskConfig},
    memory::{GuestMemory, IOVA_BASE, PinnedMemory, Sharing},
    ring::{RingConfig, SqThreadConfig},
};
use ringpass_tests::{
    harness::{self, test},
    huge_pages::{self, HUGE_PAGE_BYTES},
    needs::Need,
    process_guest::{PageSize, Place, ProcessGuest, RamFile},
    ram_piece::{DISK_BYTES, PIECE_BYTES, Piece},
    seed::Seed,
};
use ringpass_workload::hostile::Extent;
use rustix::{
    mm::{MapFlags, ProtFlags},
    thread::CapabilitySet,
};

const MIB: u64 = 1 << 20;
const RING: RingConfig = RingConfig { sq_entries: 64, cq_entries: 128 };
/// A user without processes on this machine, so that none of its memory is pinned.
const USER: u32 = 0x5249_4e48;

/// Set for a child process: its task.
const CHILD_VARIABLE: &str = "RINGPASS_TEST_MEMORY";

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
    harness::run(vec![
        test(
            "the_refusal_tells_an_ordinary_user_which_memlock_limit_a_guest_needs",
            [Need::root(), Need::io_uring()],
            || in_child("memlock", Some(USER)),
        ),
        test(
            "the_refusal_names_a_full_memlock_limit_even_if_it_cannot_see_what_fills_it",
            [Need::root(), Need::io_uring()],
            || in_child("unseen", Some(USER + 1)),
        ),
        test(
            "the_refusal_names_other_privileges_as_the_reason_why_a_pin_is_not_shared",
            [Need::root(), Need::io_uring()],
            || in_child("privileges", None),
        ),
        test("the_refusal_names_a_lack_of_huge_pages", [Need::io_uring(), huge_pages::supported()], lack_of_huge_pages),
        test("the_refusal_names_an_occupied_address", [Need::io_uring()], || in_child("occupied", None)),
    ])
}

const fn extent(gpa: u64, len_bytes: u64) -> Extent {
    Extent { gpa, len_bytes }
}

fn sq_thread() -> SubmissionConfig {
    SubmissionConfig::SqThread(SqThreadConfig::new(Duration::from_millis(2)))
}

fn lack_of_huge_pages() -> Result<()> {
    let (_image, disk) = own_disk()?;
    let len_bytes = (huge_pages::free()? + 8) * HUGE_PAGE_BYTES;
    let ram = RamFile::new(&[extent(0, len_bytes)], PageSize::Huge)?;
    let error = ProcessGuest::new(&disk, ram, sq_thread()).err().context("no refusal")?;
    let message = format!("{error:#}");
    let beginning =
        format!("the memory at guest-physical 0x0 ({len_bytes:#x} bytes, /memfd:guest-ram (deleted)) cannot");
    ensure!(message.starts_with(&beginning), "{message}");
    ensure!(message.contains("with huge pages, check HugePages_Free in /proc/meminfo"), "{message}");
    Ok(())
}

fn in_child(task: &str, user: Option<u32>) -> Result<()> {
    // The program is a copy, because an ordinary user may not reach the build directory.
    let directory = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir()?;
    let program: PathBuf = directory.path().join("memory-test");
    fs::copy(env::current_exe()?, &program)?;
    let mut command = Command::new(&program);
    command.env(CHILD_VARIABLE, task);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn child(task: &str) -> Result<()> {
    match task {
        "memlock" => memlock(),
        "occupied" => occupied(),
        "privileges" => privileges(),
        "unseen" => unseen(),
        _ => bail!("unknown task {task}"),
    }
}

/// A disk in a file that belongs to this process's user.
fn own_disk() -> Result<(tempfile::NamedTempFile, Arc<Disk>)> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(DISK_BYTES)?;
    let disk = Disk::open(&DiskConfig::new(image.path()).direct_io(DirectIo::Off))?;
    Ok((image, Arc::new(disk)))
}

fn guest_works(disk: &Arc<Disk>, ram_bytes: u64) -> Result<()> {
    let ram = RamFile::new(&[extent(0, ram_bytes)], PageSize::Small)?;
    let mut guest = ProcessGuest::new(disk, ram, sq_thread())?;
    let mut queue = guest.attach(RING, Place::GuestRam)?;
    let area = guest.allocator().allocate(PIECE_BYTES)?;
    Piece::new(&queue, area, 0, Seed::fixed(1))?.use_all(&mut queue)?;
    queue.close()?;
    Ok(())
}

fn memlock() -> Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, 8 * MIB, 8 * MIB)?;
    let (_image, disk) = own_disk()?;
    let message = guest_works(&disk, 16 * MIB).err().context("16 MiB are not refused")?.to_string();
    ensure!(message.starts_with("pinning needs 16 MiB, RLIMIT_MEMLOCK is 8 MiB"), "{message}");
    ensure!(message.contains("The hard limit is 8 MiB, so only root can raise it"), "{message}");
    ensure!(message.contains("LimitMEMLOCK=16M in a systemd unit"), "{message}");
    ensure!(message.contains("--memlock=16777216`"), "{message}");
    guest_works(&disk, 4 * MIB).context("4 MiB")
}

/// The limit has exactly enough room for the guest's RAM. Rings count too, and the kernel does not tell how much.
fn unseen() -> Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, MIB, MIB)?;
    let memory = GuestMemory::new(RamFile::new(&[extent(0, MIB)], PageSize::Small)?.for_broker())?;
    let message = PinnedMemory::pin(&memory, Sharing::Clone).err().context("no refusal")?.to_string();
    ensure!(message.starts_with("the kernel would not pin 1 MiB: Cannot allocate memory"), "{message}");
    ensure!(message.contains("RLIMIT_MEMLOCK is 1024 KiB and counts for all processes of this user"), "{message}");
    Ok(())
}

fn privileges() -> Result<()> {
    let memory = GuestMemory::new(RamFile::new(&[extent(0, MIB)], PageSize::Small)?.for_broker())?;
    let pinned = PinnedMemory::pin(&memory, Sharing::Clone)?;
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, sets)?;
    let more = RamFile::new(&[extent(2 * MIB, MIB)], PageSize::Small)?.for_broker();
    let larger = memory.with_region(more.into_iter().next().context("one region")?)?;
    let message = pinned.changed_to(&larger).err().context("no refusal")?.to_string();
    ensure!(message.starts_with("the memory was pinned with other privileges than this process has now"), "{message}");
    ensure!(message.ends_with("drop privileges before pinning"), "{message}");
    Ok(())
}

fn occupied() -> Result<()> {
    let (_image, disk) = own_disk()?;
    let address = IOVA_BASE + 8 * MIB;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: the range is free, or the call fails; the mapping is never used.
    let mapped = unsafe { rustix::mm::mmap_anonymous(address as *mut _, 4096, ProtFlags::READ, flags) }?;
    let message = guest_works(&disk, 16 * MIB).err().context("no refusal")?.to_string();
    ensure!(message.contains("is occupied in this process"), "{message}");
    ensure!(message.contains(&format!("virtual address {IOVA_BASE:#x}")), "{message}");
    // SAFETY: mapped above, and never used.
    unsafe { rustix::mm::munmap(mapped, 4096) }?;
    guest_works(&disk, 16 * MIB).context("once the address is free")
}
