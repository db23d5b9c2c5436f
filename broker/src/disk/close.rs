//! Closing a disk so that others can open it at once.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

use super::{Disk, DiskKind, ofd};

/// How long a claim may outlive the last close. The claim normally ends with that close, unless another process looked
/// at our descriptors in /proc at that moment: its short-lived reference is then the last one.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);
const CLAIM_LOOK: Duration = Duration::from_millis(1);

impl Disk {
    /// Releases the lock and the claim and closes the disk: others can open the disk when this returns. No I/O may be
    /// under way, and no ring may have the disk registered. (Dropping a disk keeps lock and claim until the last I/O of
    /// such a ring has ended.)
    ///
    /// On a block device this writes the page cache to the device, as every last close does.
    pub fn close(self) {
        let node = self.is_claimed().then(|| node(self.file.as_fd()));
        ofd::unlock(&self.file);
        drop(self.file);
        // The lock on what lies under the disk comes last: who gets it finds the disk free.
        let _storage_lock = self.storage_lock;
        match node {
            Some(Ok(node)) => await_claim(&node, &self.path),
            Some(Err(error)) => tracing::debug!(%error, path = ?self.path, "cannot check whether the claim is gone"),
            None => {}
        }
    }

    /// Whether the disk was opened with a claim (`O_EXCL`).
    fn is_claimed(&self) -> bool {
        self.kind == DiskKind::BlockDevice && !self.read_only
    }
}

/// The node of an open device, as an `O_PATH` descriptor.
fn node(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    open(path_of(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

fn path_of(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Waits until the device can be claimed, or another process has claimed it.
fn await_claim(node: &OwnedFd, path: &std::path::Path) {
    let end = Instant::now() + CLAIM_PATIENCE;
    loop {
        // For reading: udev ignores the close of such a descriptor.
        match open(
            path_of(node.as_fd()),
            OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Ok(_claimed) => return,
            Err(Errno::BUSY) if Instant::now() < end => thread::sleep(CLAIM_LOOK),
            Err(error) => {
                tracing::debug!(%error, ?path, "another process has claimed the disk since it was closed");
                return;
            }
        }
    }
}
