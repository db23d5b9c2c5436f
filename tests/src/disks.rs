//! Disks for the end-to-end tests: files and block devices that belong to one test and vanish with it.

use std::{
    env,
    ffi::OsStr,
    fmt, fs,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use ringpass_broker::disk::{DirectIo, DiskConfig, LogicalBlock};

use crate::needs::{Need, find_program};

/// Environment variable: a directory on a real disk for the files of test disks, instead of the build directory.
pub const DIRECTORY_VARIABLE: &str = "RINGPASS_TEST_DISK_DIR";

/// Where the kernel makes and removes zram devices (`Documentation/admin-guide/blockdev/zram.rst`).
const ZRAM_CONTROL: &str = "/sys/class/zram-control";

/// The name of a disk's file in its directory.
const FILE_NAME: &str = "disk.img";

/// The kinds of disk on which the tests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskKind {
    /// A file with direct I/O. Its file system is the one of the build directory: ext4 as a rule, see
    /// [`TestDisk::file_system`].
    Ext4Direct,
    /// A file on the same file system, through the page cache.
    Ext4PageCache,
    /// A loop device over such a file: 512-byte blocks.
    Loop,
    /// A zram device: 4096-byte blocks.
    Zram,
}

impl DiskKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Ext4Direct, Self::Ext4PageCache, Self::Loop, Self::Zram];

    /// What [`TestDisk::new`] needs of the machine.
    pub fn needs(self) -> Vec<Need> {
        let directory = || {
            Need::new("a directory on a disk", || {
                let directory = directory()?;
                let file_system = file_system(&directory)?;
                let message = format!("{directory:?} is on {file_system}; set {DIRECTORY_VARIABLE} to one on a disk");
                ensure!(file_system != "tmpfs", message);
                Ok(())
            })
        };
        match self {
            Self::Ext4Direct | Self::Ext4PageCache => vec![directory()],
            Self::Loop => {
                vec![directory(), Need::root(), Need::file("/dev/loop-control"), Need::program("losetup", "mount")]
            }
            Self::Zram => vec![
                Need::root(),
                Need::new("zram devices", || {
                    ensure!(Path::new(ZRAM_CONTROL).exists(), "{ZRAM_CONTROL} does not exist: `modprobe zram`");
                    Ok(())
                }),
            ],
        }
    }
}

impl fmt::Display for DiskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4Direct => "ext4-direct",
            Self::Ext4PageCache => "ext4-page-cache",
            Self::Loop => "loop",
            Self::Zram => "zram",
        })
    }
}

/// The reason why this machine cannot have a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable(pub String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// A disk full of zeros that belongs to one test. The drop removes it.
///
/// Drop it after everything that has it open. The drop waits a while for block devices.
#[derive(Debug)]
pub struct TestDisk {
    kind: DiskKind,
    path: PathBuf,
    file_system: Option<&'static str>,
    // The fields drop in this order: a loop device before its file.
    _loop_device: Option<LoopDevice>,
    _zram_device: Option<ZramDevice>,
    directory: Option<tempfile::TempDir>,
}

impl TestDisk {
    /// Makes a disk of `size_bytes`, which must be a multiple of 4096. All blocks of a file are written.
    ///
    /// # Errors
    /// The machine cannot have it: not root, no such driver, no space.
    pub fn new(kind: DiskKind, size_bytes: u64) -> Result<Self, Unavailable> {
        let mut disk = Self {
            kind,
            path: PathBuf::new(),
            file_system: None,
            _loop_device: None,
            _zram_device: None,
            directory: None,
        };
        if kind == DiskKind::Zram {
            let device = ZramDevice::new(Some(size_bytes))?;
            disk.path = device.path();
            disk._zram_device = Some(device);
            return Ok(disk);
        }
        let (directory, file, file_system) = written_file(size_bytes)?;
        disk.directory = Some(directory);
        disk.file_system = Some(file_system);
        if kind == DiskKind::Loop {
            let device = LoopDevice::new(&file, &[])?;
            disk.path = device.path().to_owned();
            disk._loop_device = Some(device);
        } else {
            disk.path = file;
        }
        Ok(disk)
    }

    /// The file or the device node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of the disk.
    pub fn kind(&self) -> DiskKind {
        self.kind
    }

    /// The type of the file system that has the file (also the one behind a loop device). None for zram.
    pub fn file_system(&self) -> Option<&'static str> {
        self.file_system
    }

    /// A directory of this disk for further files of the test, on the same file system. None for zram.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_ref().map(tempfile::TempDir::path)
    }

    /// The file behind a loop device.
    pub fn backing_file(&self) -> Option<PathBuf> {
        let directory = self.directory.as_ref().filter(|_| self.kind == DiskKind::Loop)?;
        Some(directory.path().join(FILE_NAME))
    }

    /// The configuration with which a broker opens the disk: read-write, with direct I/O except for
    /// [`DiskKind::Ext4PageCache`], and with the blocks that direct I/O takes, so that rings can have it. It waits for
    /// the lock, which a closed ring may hold for another second.
    pub fn config(&self) -> DiskConfig {
        let direct_io = if self.kind == DiskKind::Ext4PageCache { DirectIo::Off } else { DirectIo::On };
        let lock_wait = Some(Duration::from_secs(10));
        DiskConfig::new(&self.path).direct_io(direct_io).logical_block(LogicalBlock::DirectIo).lock_wait(lock_wait)
    }
}

/// A file of zeros in a directory of its own, and the type of its file system.
fn written_file(size_bytes: u64) -> Result<(tempfile::TempDir, PathBuf, &'static str), Unavailable> {
    let parent = directory().map_err(unavailable("finding a directory"))?;
    let file_system = file_system(&parent).map_err(unavailable("asking for the file system"))?;
    if file_system == "tmpfs" {
        return Err(Unavailable(format!("{parent:?} is on tmpfs; set {DIRECTORY_VARIABLE} to a directory on a disk")));
    }
    let directory = tempfile::Builder::new()
        .prefix("ringpass-disk-")
        .tempdir_in(&parent)
        .map_err(unavailable("making a directory"))?;
    let path = directory.path().join(FILE_NAME);
    let write = || {
        let mut file = File::create_new(&path)?;
        io::copy(&mut io::repeat(0).take(size_bytes), &mut file)?;
        file.sync_all()
    };
    write().map_err(unavailable("writing the disk's file"))?;
    Ok((directory, path, file_system))
}

/// The directory of the test program, which is usually on a disk, unlike `/tmp`.
fn directory() -> io::Result<PathBuf> {
    if let Some(directory) = env::var_os(DIRECTORY_VARIABLE).filter(|directory| !directory.is_empty()) {
        return fs::canonicalize(directory);
    }
    let program = env::current_exe()?;
    Ok(program.parent().unwrap_or(Path::new("/")).to_owned())
}

fn file_system(directory: &Path) -> io::Result<&'static str> {
    // The magic numbers of statfs(2).
    Ok(match rustix::fs::statfs(directory)?.f_type as u32 {
        0xef53 => "ext4",
        0x5846_5342 => "XFS",
        0x9123_683e => "btrfs",
        0xf2f5_2010 => "F2FS",
        0x2fc1_2fc1 => "ZFS",
        0x794c_7630 => "overlayfs",
        0x6969 => "NFS",
        0x0102_1994 => "tmpfs",
        _ => "another file system",
    })
}

/// A loop device of this test.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Sets up an unused loop device over `file`; `options` are further ones of `losetup(8)`.
    ///
    /// # Errors
    /// Not root, no loop driver, or `losetup` fails.
    pub fn new(file: &Path, options: &[&str]) -> Result<Self, Unavailable> {
        // losetup looks for an unused device and takes it. It tries again if another process was faster.
        let mut arguments: Vec<&OsStr> = ["--find", "--show", "--direct-io=off"].iter().map(OsStr::new).collect();
        arguments.extend(options.iter().map(OsStr::new));
        arguments.push(file.as_os_str());
        let path = system_program("losetup", &arguments)?;
        Ok(Self { path: path.trim().into() })
    }

    /// The device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // If the device is still open, its last close detaches it.
        if let Err(error) = system_program("losetup", &["--detach".as_ref(), self.path.as_os_str()]) {
            eprintln!("{} is left behind: {error}", self.path.display());
        }
    }
}

/// A zram device of this test, which is always a new device.
#[derive(Debug)]
pub struct ZramDevice {
    number: u32,
}

impl ZramDevice {
    /// Makes a device. Without a size it exists, but cannot be used yet.
    ///
    /// # Errors
    /// Not root, no zram driver, or no device node appears.
    pub fn new(size_bytes: Option<u64>) -> Result<Self, Unavailable> {
        // Reading the file makes a device, and gives its number.
        let number = fs::read_to_string(format!("{ZRAM_CONTROL}/hot_add"))
            .map_err(unavailable("making a zram device (as root, with the zram module)"))?;
        let number = number.trim().parse().map_err(unavailable("reading the number of the zram device"))?;
        let device = Self { number };
        if let Some(size_bytes) = size_bytes {
            fs::write(format!("/sys/block/zram{number}/disksize"), size_bytes.to_string())
                .map_err(unavailable("setting the size of the zram device"))?;
        }
        let is_node = || fs::metadata(device.path()).is_ok_and(|found| found.file_type().is_block_device());
        if !within(Duration::from_secs(5), is_node) {
            return Err(Unavailable(format!("{} does not appear: no devtmpfs on /dev", device.path().display())));
        }
        Ok(device)
    }

    /// The device node.
    pub fn path(&self) -> PathBuf {
        format!("/dev/zram{}", self.number).into()
    }
}

impl Drop for ZramDevice {
    fn drop(&mut self) {
        // The device is busy while a process has it open, for example an ending ring or udev.
        let remove = || fs::write(format!("{ZRAM_CONTROL}/hot_remove"), self.number.to_string()).is_ok();
        if !within(Duration::from_secs(10), remove) {
            eprintln!("{} is left behind: it is still in use", self.path().display());
        }
    }
}

/// Tries until `attempt` is true or the time is up.
fn within(limit: Duration, mut attempt: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if attempt() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a program of the system, and returns its output.
fn system_program(name: &str, arguments: &[&OsStr]) -> Result<String, Unavailable> {
    let program = find_program(name).ok_or_else(|| Unavailable(format!("there is no program `{name}`")))?;
    let output = Command::new(program).args(arguments).output().map_err(unavailable(name))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(Unavailable(format!("{name} {arguments:?}: {}", message.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn unavailable<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> Unavailable + use<'_, E> {
    move |error| Unavailable(format!("{what}: {error}"))
}
