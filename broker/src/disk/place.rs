//! Refuses files that are not disks, or that cannot be written, by what the kernel reports of them. No write is tried:
//! a write waits while the file system is frozen.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};

use super::error::query_error;
use super::holders::swaps;
use super::{DiskConfig, DiskError};

/// `f_type` of file systems whose files the kernel generates (`<linux/magic.h>`).
const KERNEL_FILE_SYSTEMS: [(u32, &str); 13] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x6367_7270, "cgroup2"),
    (0x0027_e0eb, "cgroup"),
    (0x6265_6570, "configfs"),
    (0x7363_6673, "securityfs"),
    (0xde5e_81e4, "efivarfs"),
    (0x6165_676c, "pstore"),
    (0xcafe_4a11, "bpf"),
    (0x4249_4e4d, "binfmt_misc"),
    (0xf97c_ff8c, "selinuxfs"),
];

/// hugetlbfs, also memfds with huge pages: its files have no write(2).
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// Refuses a regular file that is not a disk, or that is to be written and cannot be.
pub(super) fn check(file: impl AsFd, config: &DiskConfig) -> Result<(), DiskError> {
    let path = config.path.clone();
    let file_system = fstatfs(&file).map_err(|errno| query_error(&config.path, "the file system", errno))?;
    // The width of the field differs between architectures; its 32 bits do not.
    let magic = file_system.f_type as u32;
    if let Some(&(_, name)) = KERNEL_FILE_SYSTEMS.iter().find(|(known, _)| *known == magic) {
        return Err(DiskError::KernelFile { path, file_system: name });
    }
    if config.read_only {
        return Ok(());
    }
    if magic == HUGETLBFS_MAGIC {
        let why = "files of hugetlbfs can only be mapped, not written";
        return Err(DiskError::NotWritable { path, why, change: "put the image on another file system" });
    }
    // Other file systems have no seals.
    if fcntl_get_seals(&file).is_ok_and(|seals| seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)) {
        return Err(DiskError::NotWritable { path, why: "it is sealed (F_SEAL_WRITE)", change: "copy it to a file" });
    }
    if is_swap(&file) {
        let change = "free it with `swapoff`";
        return Err(DiskError::NotWritable { path, why: "it is in use as swap space (/proc/swaps)", change });
    }
    Ok(())
}

fn is_swap(file: impl AsFd) -> bool {
    let Ok(own) = fstat(file) else { return false };
    let list = fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps(&list).any(|path| fs::metadata(path).is_ok_and(|swap| (swap.dev(), swap.ino()) == (own.st_dev, own.st_ino)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;
    use crate::disk::Disk;
    use crate::skipped::skipped;

    fn refusal(path: impl Into<PathBuf>, read_only: bool) -> String {
        Disk::locate(&DiskConfig { read_only, ..DiskConfig::new(path) }).unwrap_err().to_string()
    }

    #[test]
    fn kernel_files_are_refused_as_disks() {
        for (path, file_system) in [("/proc/self/status", "proc"), ("/sys/kernel/uevent_seqnum", "sysfs")] {
            // Read-only, because write permission to these files differs between machines.
            let text = refusal(path, true);
            assert!(text.contains(&format!("is a kernel file ({file_system})")), "{text}");
        }
    }

    #[test]
    fn a_sealed_file_is_refused_for_writing_only() {
        let file = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 1 << 20).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Disk::locate(&DiskConfig::new(&path)).unwrap();
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let text = refusal(&path, false);
        assert!(text.contains("cannot be written: it is sealed") && text.contains("open it read-only"), "{text}");
        Disk::locate(&DiskConfig { read_only: true, ..DiskConfig::new(&path) }).unwrap();
    }

    #[test]
    fn files_on_huge_pages_are_refused_for_writing_only() {
        let Ok(file) = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) else {
            return skipped(
                "disk::place::tests::files_on_huge_pages_are_refused_for_writing_only",
                "this kernel has no huge pages",
            );
        };
        // As long as any huge page, without allocating one.
        ftruncate(&file, 1 << 30).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let text = refusal(&path, false);
        assert!(
            text.contains("files of hugetlbfs can only be mapped") && text.contains("another file system"),
            "{text}"
        );
    }
}
