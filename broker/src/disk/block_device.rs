//! Block devices as sysfs shows them (`Documentation/ABI/stable/sysfs-block`).

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Statx, major, minor, stat};

use super::byte_range::ByteRange;

/// The unit of sizes and offsets of the block layer.
const SECTOR_BYTES: u64 = 512;

/// The number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceNumber {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl DeviceNumber {
    pub(super) fn from_raw(device: u64) -> Self {
        Self { major: major(device), minor: minor(device) }
    }

    pub(super) fn of_node(found: &Statx) -> Option<Self> {
        let is_block_device = FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice;
        is_block_device.then_some(Self { major: found.stx_rdev_major, minor: found.stx_rdev_minor })
    }

    pub(super) fn of_path(path: &Path) -> Option<Self> {
        let found = stat(path).ok()?;
        let is_block_device = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
        is_block_device.then(|| Self::from_raw(found.st_rdev))
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Where sysfs is mounted; tests have a tree of their own.
#[derive(Clone, Debug)]
pub(super) struct Sysfs(PathBuf);

impl Default for Sysfs {
    fn default() -> Self {
        Self("/sys".into())
    }
}

impl Sysfs {
    #[cfg(test)]
    pub(super) fn at(root: &Path) -> Self {
        Self(root.to_owned())
    }

    pub(super) fn device(&self, number: DeviceNumber) -> Option<BlockDevice> {
        BlockDevice::at(fs::canonicalize(self.0.join(format!("dev/block/{number}"))).ok()?)
    }

    /// The loop devices that are set up.
    pub(super) fn loop_devices(&self) -> impl Iterator<Item = BlockDevice> + use<> {
        let devices = self.0.join("block");
        entry_names(&devices)
            .filter(|name| name.starts_with("loop"))
            .filter_map(move |name| BlockDevice::at(fs::canonicalize(devices.join(name)).ok()?))
            .filter(BlockDevice::is_loop)
    }
}

/// A block device: a whole disk, or a partition.
#[derive(Clone, Debug)]
pub(super) struct BlockDevice {
    pub(super) number: DeviceNumber,
    /// The name in the kernel.
    pub(super) name: String,
    pub(super) sysfs: PathBuf,
}

impl BlockDevice {
    /// The device of a directory of sysfs.
    fn at(sysfs: PathBuf) -> Option<Self> {
        let number = DeviceNumber::parse(&fs::read_to_string(sysfs.join("dev")).ok()?)?;
        let name = sysfs.file_name()?.to_str()?.to_owned();
        Some(Self { number, name, sysfs })
    }

    /// Where devtmpfs has the node: an exclamation mark stands for a slash.
    pub(super) fn node(&self) -> PathBuf {
        Path::new("/dev").join(self.name.replace('!', "/"))
    }

    /// The disk that this device is a partition of.
    pub(super) fn whole_disk(&self) -> Option<Self> {
        if self.is_partition() { Self::at(self.sysfs.parent()?.to_owned()) } else { None }
    }

    pub(super) fn partitions(&self) -> impl Iterator<Item = Self> + use<> {
        let dir = self.sysfs.clone();
        entry_names(&dir).filter_map(move |name| Self::at(dir.join(name))).filter(Self::is_partition)
    }

    fn is_partition(&self) -> bool {
        self.sysfs.join("partition").exists()
    }

    /// The part of the whole disk that this partition is.
    pub(super) fn partition_window(&self) -> Option<ByteRange> {
        let bytes = |name| self.number_in(name)?.checked_mul(SECTOR_BYTES);
        Some(ByteRange::new(bytes("start")?, Some(bytes("size")?)))
    }

    /// The devices that this one is built on: RAID, LVM, encryption.
    pub(super) fn slaves(&self) -> Vec<Self> {
        let slaves = self.sysfs.join("slaves");
        let dirs = entry_names(&slaves).filter_map(|name| fs::canonicalize(slaves.join(name)).ok());
        dirs.filter_map(Self::at).collect()
    }

    /// The devices that are built on this one.
    pub(super) fn holders(&self) -> impl Iterator<Item = String> + use<> {
        entry_names(&self.sysfs.join("holders"))
    }

    /// Whether this is a loop device that is set up.
    pub(super) fn is_loop(&self) -> bool {
        self.sysfs.join("loop/backing_file").exists()
    }

    /// The path of the file behind a loop device, as the kernel sees it from this process's root: in another mount
    /// namespace, and when the file has moved, it can lead elsewhere.
    pub(super) fn backing_path(&self) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStringExt;
        let mut path = fs::read(self.sysfs.join("loop/backing_file")).ok()?;
        if path.last() == Some(&b'\n') {
            path.pop();
        }
        Some(std::ffi::OsString::from_vec(path).into())
    }

    /// What changes when the device is set up anew, over other storage or another part of it.
    pub(super) fn incarnation(&self) -> String {
        let attributes = ["diskseq", "loop/offset", "loop/sizelimit", "start"].map(|name| self.attribute(name));
        let slaves = self.slaves().into_iter().map(|slave| slave.name).collect::<Vec<_>>();
        format!("{} {attributes:?} {slaves:?}", self.number)
    }

    fn attribute(&self, name: &str) -> Option<String> {
        Some(fs::read_to_string(self.sysfs.join(name)).ok()?.trim().to_owned())
    }

    fn number_in(&self, name: &str) -> Option<u64> {
        self.attribute(name)?.parse().ok()
    }
}

pub(super) fn entry_names(dir: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok())
}
