//! Locks on a part of a storage, by processes that use the storage through loop devices.
//!
//! All these locks are read locks, so that the process need not have the file open for writing: it may be more than the
//! disk of one guest. A read lock on the part itself keeps out the write lock of a process that serves the whole file.
//! Among each other the users of parts have *marks*: read locks far behind the end of any file, in a place for each way of
//! use. A process sets its marks and then looks for the marks with which its own do not go together. So of two that
//! start at the same time at least one sees the other.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::byte_range::ByteRange;
use super::ofd::{Kind, any_lock, conflicting_process, set, unlock};
use super::{DiskError, ProcessName, holders};

/// The bytes on which QEMU has locks for what it does with an image (`block/file-posix.c`): for each of its permissions
/// `p` a read lock on byte 100 + p while it has the permission, and on byte 200 + p while others must not have it. It
/// refuses to open an image if another process has locked the counterpart.
const QEMU_BYTES: ByteRange = ByteRange { start: 100, end: 204 };
/// In QEMU's words: this process writes.
const QEMU_WRITES: ByteRange = ByteRange { start: 101, end: 102 };
/// In QEMU's words: no other process may write.
const QEMU_NO_OTHER_WRITES: ByteRange = ByteRange { start: 201, end: 202 };

/// The bytes of the file itself: no file reaches the marks.
pub(super) const DATA: ByteRange = ByteRange { start: 0, end: 1 << 62 };
/// The length of the place for the marks of one way of use: one EiB, longer than any file.
const PLACE_BYTES: u64 = 1 << 60;

/// What a process does with a part of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It only reads. Others may read as well.
    Reads,
    /// It writes, and is the only process that uses this part.
    Writes,
    /// It writes to pieces of this part that other writers of the same kind leave alone.
    WritesPieces,
}

/// Where a process that uses this part in this way has its marks.
pub(super) fn marks(part: ByteRange, how: Use) -> ByteRange {
    let place = DATA.end
        + match how {
            Use::Reads => 0,
            Use::Writes => PLACE_BYTES,
            Use::WritesPieces => 2 * PLACE_BYTES,
        };
    let at = |offset: u64| place + offset.min(PLACE_BYTES);
    ByteRange { start: at(part.start), end: at(part.end) }
}

/// Locks a part of a file, which must be open for reading. Returns false, without any lock, if another process uses the
/// part in a way that conflicts.
///
/// Users of other parts can lock theirs at the same time. So they share QEMU's bytes, wherever their parts are: each locks
/// there what QEMU would, and a writer asks for the locks that only QEMU has.
pub(super) fn try_lock(file: &OwnedFd, path: &Path, part: ByteRange, how: Use) -> Result<bool, DiskError> {
    // A process that waits for the part must not be in the way of others at each try.
    if has_conflict(file, part, how) {
        return Ok(false);
    }
    let is_locked = lock_and_look(file, path, part, how);
    if !matches!(is_locked, Ok(true)) {
        unlock(file);
    }
    is_locked
}

fn lock_and_look(file: &OwnedFd, path: &Path, part: ByteRange, how: Use) -> Result<bool, DiskError> {
    let for_qemu = [QEMU_NO_OTHER_WRITES, QEMU_WRITES].into_iter().take(if how == Use::Reads { 1 } else { 2 });
    for range in own_bytes(part).into_iter().chain(for_qemu).chain([marks(part, how)]) {
        if !set(file, path, Kind::Read, range)? {
            return Ok(false);
        }
    }
    Ok(!has_conflict(file, part, how))
}

fn has_conflict(file: &OwnedFd, part: ByteRange, how: Use) -> bool {
    own_bytes(part).into_iter().any(|range| any_lock(file, Kind::Read, range))
        || barred(part, how).into_iter().any(|range| any_lock(file, Kind::Write, range))
}

/// The bytes of the part itself.
fn own_bytes(part: ByteRange) -> Vec<ByteRange> {
    ByteRange { end: part.end.min(DATA.end), ..part }.without(QEMU_BYTES).collect()
}

/// Where no other process may have a lock.
fn barred(part: ByteRange, how: Use) -> Vec<ByteRange> {
    // The bytes that QEMU locks and the users of parts do not.
    let qemu_only = || QEMU_BYTES.without(QEMU_WRITES).flat_map(|range| range.without(QEMU_NO_OTHER_WRITES));
    match how {
        Use::Reads => [Use::Writes, Use::WritesPieces].map(|other| marks(part, other)).into(),
        Use::Writes => own_bytes(part).into_iter().chain(qemu_only()).collect(),
        Use::WritesPieces => {
            [Use::Reads, Use::Writes].map(|other| marks(part, other)).into_iter().chain(qemu_only()).collect()
        }
    }
}

/// The processes whose locks conflict with ours.
pub(super) fn holders(file: impl AsFd, part: ByteRange, how: Use) -> Vec<ProcessName> {
    let barred = barred(part, how);
    let by_reading = own_bytes(part).into_iter().map(|range| (Kind::Read, range));
    let by_place = barred.iter().map(|&range| (Kind::Write, range));
    let named = by_reading.chain(by_place).find_map(|(kind, range)| conflicting_process(&file, kind, range));
    // A lock on the whole file reaches behind its end, and so to the marks.
    named.map_or_else(|| holders::lock_holders(&file, &barred), |process| vec![process])
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::disk::lock;

    const MIB: u64 = 1 << 20;
    const WAYS: [Use; 3] = [Use::Reads, Use::Writes, Use::WritesPieces];

    struct Image(tempfile::NamedTempFile);

    impl Image {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(4 * MIB).unwrap();
            Self(file)
        }

        fn open_for_reading(&self) -> OwnedFd {
            File::open(self.0.path()).unwrap().into()
        }

        /// The description that has the lock, if there is no conflict.
        fn lock(&self, part: ByteRange, how: Use) -> Option<OwnedFd> {
            let file = self.open_for_reading();
            try_lock(&file, self.0.path(), part, how).unwrap().then_some(file)
        }

        fn lock_whole(&self, read_only: bool) -> Option<OwnedFd> {
            let file = File::options().read(true).write(true).open(self.0.path()).unwrap().into();
            lock::try_lock(&file, self.0.path(), read_only).unwrap().then_some(file)
        }

        /// A lock as QEMU has it on one of its bytes.
        fn lock_byte(&self, byte: u64) -> OwnedFd {
            let file = self.open_for_reading();
            assert!(set(&file, self.0.path(), Kind::Read, ByteRange::new(byte, Some(1))).unwrap());
            file
        }
    }

    fn parts() -> [ByteRange; 2] {
        [ByteRange::new(0, Some(MIB)), ByteRange::new(MIB, None)]
    }

    #[test]
    fn users_of_disjoint_parts_share_a_file() {
        let image = Image::new();
        let [first, second] = parts();
        for (how, other) in WAYS.iter().flat_map(|how| WAYS.map(|other| (*how, other))) {
            let _first = image.lock(first, how).unwrap();
            assert!(image.lock(second, other).is_some(), "{how:?} {other:?}");
        }
    }

    #[test]
    fn users_of_one_part_share_it_if_both_read_or_both_write_to_pieces() {
        let image = Image::new();
        for (how, other) in WAYS.iter().flat_map(|how| WAYS.map(|other| (*how, other))) {
            for held in [ByteRange::ALL, parts()[0], parts()[1], ByteRange::new(MIB - 512, Some(1024))] {
                let _held = image.lock(held, how).unwrap();
                let is_shared = how == other && how != Use::Writes;
                for part in [ByteRange::ALL, held, ByteRange::new(held.start, Some(512))] {
                    assert_eq!(image.lock(part, other).is_some(), is_shared, "{how:?} {other:?}");
                }
            }
        }
    }

    #[test]
    fn a_lock_on_a_part_and_a_lock_on_the_whole_file_keep_each_other_out() {
        let image = Image::new();
        for (part, how) in parts().iter().flat_map(|part| WAYS.map(|how| (*part, how))) {
            let held = image.lock(part, how).unwrap();
            assert!(image.lock_whole(false).is_none(), "{how:?}");
            assert_eq!(image.lock_whole(true).is_some(), how == Use::Reads, "{how:?}");
            drop(held);
            let held = image.lock_whole(false).unwrap();
            assert!(image.lock(part, how).is_none(), "{how:?}");
            drop(held);
            let _held = image.lock_whole(true).unwrap();
            assert_eq!(image.lock(part, how).is_some(), how == Use::Reads, "{how:?}");
        }
    }

    #[test]
    fn a_part_is_not_locked_for_writing_while_qemu_has_the_file() {
        let image = Image::new();
        for part in parts() {
            // Every user of an image in QEMU reads consistently.
            let qemu = image.lock_byte(100);
            assert!(image.lock(part, Use::Writes).is_none() && image.lock(part, Use::WritesPieces).is_none());
            drop(qemu);
            assert!(image.lock(part, Use::Writes).is_some());
        }
    }

    #[test]
    fn qemu_finds_the_lock_of_a_part_at_any_offset() {
        let image = Image::new();
        let other = image.open_for_reading();
        for (part, how) in parts().iter().flat_map(|part| WAYS.map(|how| (*part, how))) {
            let _held = image.lock(part, how).unwrap();
            assert!(any_lock(&other, Kind::Write, QEMU_NO_OTHER_WRITES), "a QEMU that would write");
            let is_writer = how != Use::Reads;
            assert_eq!(
                any_lock(&other, Kind::Write, QEMU_WRITES),
                is_writer,
                "a QEMU that lets no other process write"
            );
        }
    }

    #[test]
    fn a_refused_lock_leaves_nothing_locked() {
        let image = Image::new();
        let qemu = image.lock_byte(100);
        let refused = image.open_for_reading();
        assert!(!lock_and_look(&refused, image.0.path(), ByteRange::ALL, Use::Writes).unwrap());
        assert!(!try_lock(&refused, image.0.path(), ByteRange::ALL, Use::Writes).unwrap());
        unlock(&refused);
        drop(qemu);
        let reader = image.lock(ByteRange::ALL, Use::Reads).unwrap();
        assert!(image.lock_whole(false).is_none());
        drop(reader);
        assert!(image.lock_whole(false).is_some());
    }
}
