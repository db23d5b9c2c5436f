//! Whether a block device keeps protection information (an integrity profile) beside its blocks.
//!
//! On such a device a read or write can name a buffer for that information, at any address of the ring's creator
//! (`attr_ptr`, Linux 6.14). The kernel checks only the device: it refuses the attribute on all other devices, and on
//! regular files (`FMODE_HAS_METADATA`).

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::fstat;

use super::DiskKind;
use super::block_device::DeviceNumber;

/// The name of the device's profile, if it has one: `integrity/format` (`Documentation/ABI/stable/sysfs-block`).
///
/// # Errors
///
/// sysfs does not know the device, or does not answer.
pub(super) fn profile(file: impl AsFd, kind: DiskKind) -> io::Result<Option<String>> {
    match kind {
        DiskKind::RegularFile => Ok(None),
        DiskKind::BlockDevice => {
            let device = DeviceNumber::from_raw(fstat(file)?.st_rdev);
            profile_in(&PathBuf::from(format!("/sys/dev/block/{device}")))
        }
    }
}

fn profile_in(device: &Path) -> io::Result<Option<String>> {
    // A partition has the profile of its disk.
    let is_partition = device.join("partition").try_exists()?;
    let disk = if is_partition { device.canonicalize()?.join("..") } else { device.canonicalize()? };
    match fs::read_to_string(disk.join("integrity/format")) {
        Ok(format) => Ok(Some(format.trim().to_owned()).filter(|format| format != "none")),
        // The kernel was built without integrity support. An old kernel also has no such file on devices without a
        // profile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(format: Option<&str>) -> tempfile::TempDir {
        let device = tempfile::tempdir().unwrap();
        if let Some(format) = format {
            fs::create_dir(device.path().join("integrity")).unwrap();
            fs::write(device.path().join("integrity/format"), format).unwrap();
        }
        device
    }

    #[test]
    fn a_device_has_the_profile_that_sysfs_names() {
        for (format, expected) in [
            (Some("T10-DIF-TYPE1-CRC\n"), Some("T10-DIF-TYPE1-CRC")),
            (Some("nop\n"), Some("nop")),
            (Some("none\n"), None),
            (None, None),
        ] {
            assert_eq!(profile_in(device(format).path()).unwrap().as_deref(), expected, "{format:?}");
        }
    }

    #[test]
    fn a_partition_has_the_profile_of_its_disk() {
        let disk = device(Some("EXT-DIF-TYPE1-CRC64\n"));
        let partition = disk.path().join("nvme0n1p1");
        fs::create_dir(&partition).unwrap();
        fs::write(partition.join("partition"), "1\n").unwrap();
        assert_eq!(profile_in(&partition).unwrap().as_deref(), Some("EXT-DIF-TYPE1-CRC64"));
    }

    #[test]
    fn a_device_that_sysfs_does_not_know_is_an_error() {
        let gone = device(None).path().join("8:99");
        assert_eq!(profile_in(&gone).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_regular_file_has_no_profile() {
        assert_eq!(profile(tempfile::tempfile().unwrap(), DiskKind::RegularFile).unwrap(), None);
    }
}
