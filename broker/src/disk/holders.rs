//! Which processes and kernel users hold a disk, from `/proc` and `/sys`, for the messages of refusals.

use std::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::{AtFlags, OFlags, Statx, StatxFlags, statx};

use super::block_device::{BlockDevice, DeviceNumber, Sysfs};
use super::byte_range::ByteRange;
use crate::processes::{self, Process, ProcessName};

/// The processes that hold an OFD lock on any of these parts of `file`, this process included.
pub(super) fn lock_holders(file: impl AsFd, parts: &[ByteRange]) -> Vec<ProcessName> {
    let Ok(wanted) = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO) else {
        return Vec::new();
    };
    processes::all().filter(|process| holds_lock(process, &wanted, parts)).map(|process| process.name()).collect()
}

fn holds_lock(process: &Process, wanted: &Statx, parts: &[ByteRange]) -> bool {
    process.open_files().any(|fd| {
        process.file_info(fd).is_some_and(|info| has_ofd_lock(&info, wanted.stx_ino, parts))
            && process.file_stat(fd).is_some_and(|found| is_same_file(&found, wanted))
    })
}

/// Whether a `/proc/PID/fdinfo/FD` shows an OFD lock on one of these parts of an inode of that number. On some file
/// systems (btrfs) the device number in that line differs from the number that `stat` returns, so the caller compares
/// the files.
fn has_ofd_lock(info: &str, inode: u64, parts: &[ByteRange]) -> bool {
    info.lines()
        .filter_map(|line| ofd_lock(line.strip_prefix("lock:")?))
        .any(|(locked, range)| locked == inode && parts.iter().any(|part| part.overlaps(range)))
}

/// The inode and the range of a line like `1: OFDLCK ADVISORY  WRITE -1 fe:00:655367 0 EOF`.
fn ofd_lock(line: &str) -> Option<(u64, ByteRange)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    if fields.next()? != "OFDLCK" {
        return None;
    }
    let inode = fields.nth(3)?.rsplit(':').next()?.parse().ok()?;
    let start = fields.next()?.parse().ok()?;
    let last: Option<u64> = fields.next()?.parse().ok();
    Some((inode, ByteRange { start, end: last.map_or(u64::MAX, |last| last.saturating_add(1)) }))
}

fn is_same_file(a: &Statx, b: &Statx) -> bool {
    (a.stx_ino, a.stx_dev_major, a.stx_dev_minor) == (b.stx_ino, b.stx_dev_major, b.stx_dev_minor)
}

/// What makes a block device unavailable.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceUse {
    /// A file system is mounted on the device, on a partition of it, or on the disk that the device is a partition of.
    Mounted {
        /// The device's name in the kernel.
        device: String,
        /// The mount point, in the broker's mount namespace.
        mount_point: PathBuf,
    },
    /// The device is swap space.
    Swap {
        /// The device node.
        path: PathBuf,
    },
    /// Another block device is built on this device: RAID, LVM, encryption.
    PartOf {
        /// The device's name in the kernel.
        device: String,
        /// The name of the upper device.
        upper: String,
    },
    /// A process has the device open. The kernel does not tell whether that open is exclusive.
    OpenIn(ProcessName),
    /// A process has the device open for reading. A process that only reads (udev, a monitor) does not claim the
    /// device.
    ReadBy(ProcessName),
}

impl fmt::Display for DeviceUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { device, mount_point } => write!(f, "{device} is mounted on {mount_point:?}"),
            Self::Swap { path } => write!(f, "{path:?} is swap space"),
            Self::PartOf { device, upper } => write!(f, "{device} is part of /dev/{upper}"),
            Self::OpenIn(process) => write!(f, "open in {process}"),
            Self::ReadBy(process) => write!(f, "open for reading in {process}"),
        }
    }
}

/// The uses of the device, its partitions, and the disk that it is a partition of: a claim on one bars the others.
pub(super) fn device_uses(number: DeviceNumber) -> Vec<DeviceUse> {
    let family = family(number);
    let named = |number: DeviceNumber| family.iter().find(|device| device.number == number);
    let mut uses = mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
        .filter_map(|mount| {
            // A btrfs mount has a number of its own, so only its source identifies the device.
            let device = named(mount.number).or_else(|| named(DeviceNumber::of_path(&mount.source)?))?;
            Some(DeviceUse::Mounted { device: device.name.clone(), mount_point: mount.point })
        })
        .collect::<Vec<_>>();
    uses.extend(swaps(&fs::read_to_string("/proc/swaps").unwrap_or_default()).filter_map(|path| {
        named(DeviceNumber::of_path(&path)?)?;
        Some(DeviceUse::Swap { path })
    }));
    for device in &family {
        uses.extend(device.holders().map(|upper| DeviceUse::PartOf { device: device.name.clone(), upper }));
    }
    uses.extend(processes::all().filter_map(|process| {
        let opened = process
            .open_files()
            .filter(|&fd| process.file_stat(fd).and_then(|found| named(DeviceNumber::of_node(&found)?)).is_some())
            .filter_map(|fd| Opened::from_file_info(&process.file_info(fd)?))
            .max()?;
        match opened {
            Opened::NameOnly => None,
            Opened::ForReading => Some(DeviceUse::ReadBy(process.name())),
            Opened::ForWriting => Some(DeviceUse::OpenIn(process.name())),
        }
    }));
    uses
}

/// How a process has a file open, from its `/proc/PID/fdinfo/FD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Opened {
    /// The descriptor names the file without having it open (`O_PATH`), as our own does while we open the disk.
    NameOnly,
    ForReading,
    ForWriting,
}

impl Opened {
    fn from_file_info(info: &str) -> Option<Self> {
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).ok()?);
        Some(if flags.contains(OFlags::PATH) {
            Self::NameOnly
        } else if flags & OFlags::RWMODE == OFlags::RDONLY {
            Self::ForReading
        } else {
            Self::ForWriting
        })
    }
}

/// The device, its partitions, and the disk that the device is a partition of.
fn family(number: DeviceNumber) -> Vec<BlockDevice> {
    let Some(device) = Sysfs::default().device(number) else {
        return vec![BlockDevice { number, name: number.to_string(), sysfs: PathBuf::new() }];
    };
    let others = device.partitions().chain(device.whole_disk()).collect::<Vec<_>>();
    [device].into_iter().chain(others).collect()
}

struct Mount {
    number: DeviceNumber,
    point: PathBuf,
    source: PathBuf,
}

/// The lines of `/proc/PID/mountinfo` (`proc_pid_mountinfo(5)`).
fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount> {
    mountinfo.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ');
        let number = DeviceNumber::parse(mount.nth(2)?)?;
        let point = unescape(mount.nth(1)?).into();
        let source = unescape(file_system.split(' ').nth(1)?).into();
        Some(Mount { number, point, source })
    })
}

/// The first column of `/proc/swaps`, after the heading.
pub(super) fn swaps(swaps: &str) -> impl Iterator<Item = PathBuf> {
    swaps.lines().skip(1).filter_map(|line| Some(unescape(line.split_ascii_whitespace().next()?).into()))
}

/// Undoes the kernel's escapes: space, tab, newline and backslash of a path are three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_ofd_lock_is_found_in_fdinfo() {
        let held = "pos:\t0\nflags:\t0100002\nlock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:655367 0 EOF\n";
        let all = &[ByteRange::ALL];
        assert!(has_ofd_lock(held, 655_367, all));
        assert!(!has_ofd_lock(held, 655_368, all));
        assert!(!has_ofd_lock(&held.replace("OFDLCK", "POSIX "), 655_367, all));
        assert!(!has_ofd_lock(&held.replace("1: OFDLCK", "1: -> OFDLCK"), 655_367, all));
        assert!(!has_ofd_lock("pos:\t0\n", 655_367, all));
    }

    #[test]
    fn an_ofd_lock_on_another_part_of_the_file_does_not_count() {
        let held = "lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:655367 512 1023\n";
        assert!(has_ofd_lock(held, 655_367, &[ByteRange::new(1023, Some(1))]));
        assert!(!has_ofd_lock(held, 655_367, &[ByteRange::new(0, Some(512)), ByteRange::new(1024, None)]));
    }

    #[test]
    fn the_flags_of_a_descriptor_tell_how_the_file_is_open() {
        let opened = |flags| Opened::from_file_info(&format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t7\n"));
        assert_eq!(opened("012000000"), Some(Opened::NameOnly));
        assert_eq!(opened("02100000"), Some(Opened::ForReading));
        assert_eq!(opened("02100002"), Some(Opened::ForWriting));
        assert_eq!(opened("02100001"), Some(Opened::ForWriting));
        assert_eq!(Opened::from_file_info("pos:\t0\n"), None);
    }

    #[test]
    fn mountinfo_yields_device_mount_point_and_source() {
        let text = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                    36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                    broken line\n";
        let mounts = mounts(text).collect::<Vec<_>>();
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].number, DeviceNumber { major: 254, minor: 0 });
        assert_eq!(mounts[0].source, Path::new("/dev/vda"));
        assert_eq!(mounts[1].point, Path::new("/mnt 2"));
    }

    #[test]
    fn swaps_yields_the_paths() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/zram0    partition\t524284\t\t0\t\t100\n";
        assert_eq!(swaps(text).collect::<Vec<_>>(), [Path::new("/dev/zram0")]);
    }
}
