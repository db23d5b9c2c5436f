//! Block devices and files as disks: their sizes and blocks, and the refusals that need a real device.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::disk::{self, Disk, DiskConfig};
use ringpass_tests::{
    disks::{DiskKind, LoopDevice, TestDisk, ZramDevice},
    harness::{self, Test, test},
    needs::{Need, find_program},
};

const SIZE_BYTES: u64 = 4 << 20;

fn main() -> ExitCode {
    let mut tests: Vec<Test> = DiskKind::ALL
        .map(|kind| {
            test(format!("a_disk_reports_the_size_and_blocks_of_{kind}"), kind.needs(), move || size_and_blocks(kind))
        })
        .into();
    tests.extend([
        test("the_refusal_of_a_mounted_device_names_the_mount", mount_needs(), a_mounted_device),
        test("a_write_protected_device_is_refused_for_writing", loop_and("blockdev", "util-linux"), write_protected),
        test("a_device_that_is_not_set_up_is_refused", DiskKind::Zram.needs(), not_set_up),
        test("a_device_with_a_partial_block_is_refused", DiskKind::Loop.needs(), partial_block),
        test("test_disks_leave_nothing_behind", DiskKind::Loop.needs(), nothing_behind),
    ]);
    harness::run(tests)
}

fn loop_and(program: &'static str, package: &'static str) -> Vec<Need> {
    DiskKind::Loop.needs().into_iter().chain([Need::program(program, package)]).collect()
}

fn mount_needs() -> Vec<Need> {
    loop_and("mkfs.ext4", "e2fsprogs").into_iter().chain([Need::program("mount", "mount")]).collect()
}

fn size_and_blocks(kind: DiskKind) -> Result<()> {
    let made = TestDisk::new(kind, SIZE_BYTES)?;
    let disk = Disk::open(&made.config())?;
    ensure!(disk.size_bytes() == SIZE_BYTES, "size {}", disk.size_bytes());
    ensure!(disk.is_direct_io() == (kind != DiskKind::Ext4PageCache), "direct I/O {}", disk.is_direct_io());
    let is_device = matches!(kind, DiskKind::Loop | DiskKind::Zram);
    ensure!((disk.kind() == disk::DiskKind::BlockDevice) == is_device, "kind {:?}", disk.kind());
    let logical_bytes = disk.logical_block_bytes();
    match kind {
        DiskKind::Zram => ensure!(logical_bytes == 4096, "logical block {logical_bytes}"),
        DiskKind::Loop | DiskKind::Ext4PageCache => ensure!(logical_bytes == 512, "logical block {logical_bytes}"),
        DiskKind::Ext4Direct => ensure!(logical_bytes.is_power_of_two(), "logical block {logical_bytes}"),
    }
    ensure!(disk.physical_block_bytes() >= logical_bytes, "physical block {}", disk.physical_block_bytes());
    smallest_io_works(&disk)
}

/// Writes and reads one logical block at the disk's end, in a buffer with exactly the promised alignment.
fn smallest_io_works(disk: &Disk) -> Result<()> {
    let block_bytes = disk.logical_block_bytes() as usize;
    let mut memory = vec![0u8; 4 * block_bytes];
    // The address is aligned to one block, and not to two.
    let aligned = memory.as_ptr().align_offset(2 * block_bytes) + block_bytes;
    let buffer = &mut memory[aligned..aligned + block_bytes];
    let offset = disk.size_bytes() - block_bytes as u64;
    buffer.fill(0xa5);
    ensure!(rustix::io::pwrite(disk, &*buffer, offset)? == block_bytes);
    buffer.fill(0);
    ensure!(rustix::io::pread(disk, &mut *buffer, offset)? == block_bytes);
    ensure!(buffer.iter().all(|&byte| byte == 0xa5), "the read returned other data");
    Ok(())
}

fn refusal(config: &DiskConfig) -> Result<String> {
    match Disk::open(config) {
        Ok(_) => bail!("{:?} was not refused", config.path),
        Err(error) => Ok(error.to_string()),
    }
}

fn ensure_has(message: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(message.contains(part), "{part:?} is missing in: {message}");
    }
    Ok(())
}

fn run(name: &str, arguments: &[&Path]) -> Result<()> {
    let program = find_program(name).with_context(|| format!("no program {name}"))?;
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A mount point. The drop unmounts it.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &[&self.0]) {
            eprintln!("{error:#}");
        }
    }
}

fn a_mounted_device() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, 16 << 20)?;
    let mount_point = made.directory().context("a loop device has a directory")?.join("mount point");
    fs::create_dir(&mount_point)?;
    run("mkfs.ext4", &["-q".as_ref(), made.path()])?;
    run("mount", &[made.path(), &mount_point])?;
    let _mount = Mount(mount_point.clone());
    let message = refusal(&DiskConfig::new(made.path()))?;
    ensure_has(&message, &["is in use: ", " is mounted on ", mount_point.to_str().context("a plain path")?])?;
    // A reader does no harm to a mounted device.
    Disk::open(&DiskConfig::new(made.path()).read_only(true))?;
    Ok(())
}

fn write_protected() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, SIZE_BYTES)?;
    run("blockdev", &["--setro".as_ref(), made.path()])?;
    let message = refusal(&DiskConfig::new(made.path()))?;
    ensure_has(&message, &["is write-protected: open it read-only", "`blockdev --setrw /dev/loop"])?;
    Disk::open(&DiskConfig::new(made.path()).read_only(true))?;
    run("blockdev", &["--setrw".as_ref(), made.path()])?;
    Disk::open(&made.config())?;
    Ok(())
}

fn not_set_up() -> Result<()> {
    let device = ZramDevice::new(None)?;
    let message = refusal(&DiskConfig::new(device.path()))?;
    ensure_has(&message, &["has a size of zero bytes: the device has no medium, or is not set up yet"])
}

fn partial_block() -> Result<()> {
    let made = TestDisk::new(DiskKind::Ext4PageCache, SIZE_BYTES + 512)?;
    let device = LoopDevice::new(made.path(), &["--sector-size=4096"])?;
    let message = refusal(&DiskConfig::new(device.path()))?;
    ensure_has(&message, &["not a multiple of its 4096-byte blocks", "Change the size of the device"])
}

fn nothing_behind() -> Result<()> {
    let made = TestDisk::new(DiskKind::Loop, SIZE_BYTES)?;
    let name = made.path().file_name().context("a device name")?.to_owned();
    let backing_file = Path::new("/sys/block").join(name).join("loop/backing_file");
    let directory = made.directory().context("a loop device has a directory")?.to_owned();
    // Another test program may take the same device at once, with a file of its own.
    let is_ours = || fs::read_to_string(&backing_file).is_ok_and(|file| Path::new(&file).starts_with(&directory));
    ensure!(is_ours() && directory.exists());
    let caught = std::panic::catch_unwind(move || {
        let _made = made;
        std::panic::resume_unwind(Box::new("a test failed"));
    });
    ensure!(caught.is_err());
    ensure!(!is_ours(), "the loop device is still set up");
    ensure!(!directory.exists(), "the file is still there");
    Ok(())
}
