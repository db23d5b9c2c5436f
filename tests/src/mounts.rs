//! File systems of a test's own, on loop devices with sectors of a chosen size.

use std::{
    ffi::OsStr,
    fmt,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    disks::{DiskKind, LoopDevice, TestDisk},
    needs::{Need, find_program},
};

/// The smallest device on which mkfs.xfs makes a file system.
const DEVICE_BYTES: u64 = 320 << 20;

/// A type of file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4, which reports the demands of direct I/O.
    Ext4,
    /// XFS, whose files can share extents. It reports different demands for reads and for writes.
    Xfs,
    /// btrfs, which reports no demands.
    Btrfs,
}

impl FileSystem {
    /// What [`Mounted::new`] needs of the machine.
    pub fn needs(self) -> Vec<Need> {
        let (program, package) = match self {
            Self::Ext4 => ("mkfs.ext4", "e2fsprogs"),
            Self::Xfs => ("mkfs.xfs", "xfsprogs"),
            Self::Btrfs => ("mkfs.btrfs", "btrfs-progs"),
        };
        let known = Need::new(format!("the file system {self}"), move || {
            let known = std::fs::read_to_string("/proc/filesystems")?;
            ensure!(
                known.split_whitespace().any(|name| name == self.to_string()),
                "this kernel has none: `modprobe {self}`"
            );
            Ok(())
        });
        DiskKind::Loop
            .needs()
            .into_iter()
            .chain([Need::program(program, package), Need::program("mount", "mount"), known])
            .collect()
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        })
    }
}

/// An empty file system. The drop unmounts it, so all its files must be closed by then.
#[derive(Debug)]
pub struct Mounted {
    mount_point: TempDir,
    // These fields drop in this order, after the file system was unmounted.
    _device: LoopDevice,
    _backing: TestDisk,
}

impl Mounted {
    /// Makes a file system on a device with sectors of this size.
    ///
    /// # Errors
    ///
    /// The machine cannot have it.
    pub fn new(file_system: FileSystem, sector_bytes: u32) -> Result<Self> {
        let backing = TestDisk::new(DiskKind::Ext4PageCache, 4096)?;
        // The file has no blocks yet: it takes only as much space as the test writes.
        File::options().write(true).open(backing.path())?.set_len(DEVICE_BYTES)?;
        let device = LoopDevice::new(backing.path(), &[&format!("--sector-size={sector_bytes}")])?;
        let make = format!("mkfs.{file_system}");
        let options: &[&str] = if file_system == FileSystem::Xfs { &["-q", "-m", "reflink=1"] } else { &["-q"] };
        run(&make, options.iter().map(OsStr::new).chain([device.path().as_os_str()]))?;
        let mount_point = TempDir::with_prefix("ringpass-mount-")?;
        run("mount", [device.path(), mount_point.path()])?;
        Ok(Self { mount_point, _device: device, _backing: backing })
    }

    /// Makes a file of written zeroes in the file system.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn image(&self, name: &str, size_bytes: u64) -> Result<PathBuf> {
        let path = self.mount_point.path().join(name);
        let file = File::create_new(&path)?;
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0), size_bytes), &mut &file)?;
        file.sync_all()?;
        Ok(path)
    }

    /// The root of the file system.
    pub fn path(&self) -> &Path {
        self.mount_point.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The ring of a killed broker has the image open until the ring ends, a little after the process.
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(error) = run("umount", [self.path()]) {
            if Instant::now() > end {
                return eprintln!("{} stays mounted: {error:#}", self.path().display());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs a program of the system.
///
/// # Errors
///
/// It fails, with what it wrote.
pub fn run<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Result<()> {
    let mut command = Command::new(find_program(name).with_context(|| format!("no program {name}"))?);
    command.args(arguments);
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
