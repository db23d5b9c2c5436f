//! The OFD lock on a disk. [`part_lock`] has the locks on the storage behind it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::byte_range::ByteRange;
use super::ofd::{Kind, any_lock, conflicting_process, set, unlock};
use super::part_lock::{self, Use};
use super::{DiskError, ProcessName, holders};

/// Locks the whole file for this open file description: for reading if `read_only`, else for writing. Returns false,
/// without any lock, if a conflicting lock exists.
pub(super) fn try_lock(file: &OwnedFd, path: &Path, read_only: bool) -> Result<bool, DiskError> {
    if !read_only {
        return set(file, path, Kind::Write, ByteRange::ALL);
    }
    let is_locked = try_lock_for_reading(file, path);
    if !matches!(is_locked, Ok(true)) {
        unlock(file);
    }
    is_locked
}

fn try_lock_for_reading(file: &OwnedFd, path: &Path) -> Result<bool, DiskError> {
    for range in [part_lock::DATA, part_lock::marks(ByteRange::ALL, Use::Reads)] {
        if !set(file, path, Kind::Read, range)? {
            return Ok(false);
        }
    }
    Ok(!writers_of_parts().iter().any(|&range| any_lock(file, Kind::Write, range)))
}

/// Where the writers of parts have their marks.
fn writers_of_parts() -> [ByteRange; 2] {
    [Use::Writes, Use::WritesPieces].map(|how| part_lock::marks(ByteRange::ALL, how))
}

/// Whether another open file description has a lock that conflicts with ours.
pub(super) fn is_locked_by_another(file: &OwnedFd, read_only: bool) -> bool {
    if read_only {
        any_lock(file, Kind::Read, part_lock::DATA)
            || writers_of_parts().iter().any(|&range| any_lock(file, Kind::Write, range))
    } else {
        any_lock(file, Kind::Write, ByteRange::ALL)
    }
}

/// The processes whose lock conflicts with ours.
pub(super) fn holders(file: impl AsFd, read_only: bool) -> Vec<ProcessName> {
    let kind = if read_only { Kind::Read } else { Kind::Write };
    if let Some(process) = conflicting_process(&file, kind, ByteRange::ALL) {
        return vec![process];
    }
    if read_only {
        holders::lock_holders(file, &writers_of_parts())
    } else {
        holders::lock_holders(file, &[ByteRange::ALL])
    }
}
