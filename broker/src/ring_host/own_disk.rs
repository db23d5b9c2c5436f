//! The disk for whose rings a ring process is there.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, fstat};

use crate::disk::DiskKind;
use crate::ring::RingError;

/// The disk of a ring process. The process refuses every other file, whatever has taken its engine over.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnDisk {
    pub(super) kind: DiskKind,
    /// Device and inode (`stat(2)`).
    identity: (u64, u64),
}

impl OwnDisk {
    pub(super) fn of(disk: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = fstat(disk)?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let kind = if is_device { DiskKind::BlockDevice } else { DiskKind::RegularFile };
        Ok(Self { kind, identity: (stat.st_dev, stat.st_ino) })
    }

    /// Refuses another file.
    pub(super) fn check(&self, disk: BorrowedFd<'_>) -> Result<(), RingError> {
        let looking = "looking at the disk";
        let other = Self::of(disk).map_err(|source| RingError::System { what: looking, source })?;
        if other.identity == self.identity {
            return Ok(());
        }
        Err(RingError::System { what: looking, source: io::Error::other("it is not the disk of this ring process") })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_same_file_is_taken_and_another_one_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = OwnDisk::of(file.as_file().as_fd()).unwrap();
        assert_eq!(own.kind, DiskKind::RegularFile);
        own.check(file.reopen().unwrap().as_fd()).unwrap();
        let refused = own.check(tempfile::tempfile().unwrap().as_fd()).unwrap_err().to_string();
        assert!(refused.contains("not the disk of this ring process"), "{refused}");
    }
}
