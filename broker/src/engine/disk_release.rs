//! Release of the disk by all workers and the ring builder, so that another process can have it.
//!
//! Each worker answers with its own reference once the kernel holds none for its io_uring (`execution/disk.rs`). The thread that
//! collects the answers closes the disk ([`Disk::close`]), which ends its lock and claim.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attach::BuilderCommand;
use super::command::{Command, DiskRelease};
use super::control::EngineControl;
use super::reply::Pending;
use crate::disk::Disk;

/// How long a front-end that gives the disk up waits for I/O that a former one has left behind: longer than an ordinary request
/// takes. That I/O may hang, and then the next process waits for the disk's lock.
const FORMER_IO_PATIENCE: Duration = Duration::from_secs(1);

impl EngineControl {
    /// Has the workers and the builder let go of the disk, and closes it; no queue may run. When this returns, another process can
    /// have the disk, with two exceptions: the caller does not want the answer any more, or I/O hangs that a former front-end has left
    /// behind.
    pub(super) fn release_disk(&self, is_wanted: impl Fn() -> bool) {
        let workers = self.begin_order(|reply| Command::ReleaseDisk { reply });
        let builder = self.attach.as_ref().map(|attach| {
            let (done, pending) = Pending::new();
            attach.command(BuilderCommand::SetDisk { disk: None, done });
            pending
        });
        // Held until all have answered, so that the last reference is dropped here.
        let mut disks = Vec::new();
        for pending in workers {
            match disk_of(pending, &is_wanted) {
                Ok(disk) => disks.extend(disk),
                Err(NotLetGo) => return,
            }
        }
        if builder.is_none_or(|pending| pending.wait_while(&is_wanted).is_some()) {
            close(disks);
        }
    }
}

/// A worker has not let go of the disk.
struct NotLetGo;

/// Waits until a worker has let go of the disk.
fn disk_of(pending: Pending<DiskRelease>, is_wanted: impl Fn() -> bool) -> Result<Option<Arc<Disk>>, NotLetGo> {
    match pending.next_while(&is_wanted) {
        Some(DiskRelease::Now(disk)) => return Ok(disk),
        Some(DiskRelease::AfterFormerIo) => {}
        // A worker that has ended holds nothing.
        None if is_wanted() => return Ok(None),
        None => return Err(NotLetGo),
    }
    let end = Instant::now() + FORMER_IO_PATIENCE;
    match pending.next_while(|| is_wanted() && Instant::now() < end) {
        Some(DiskRelease::Now(disk)) => Ok(disk),
        _ => {
            tracing::warn!(
                "the disk stays locked: I/O that a former front-end has left behind is under way. The destination of a \
                 migration waits until that I/O has ended"
            );
            Err(NotLetGo)
        }
    }
}

/// Closes the disk, of which these are the last references.
pub(super) fn close(disks: Vec<Arc<Disk>>) {
    disks.into_iter().filter_map(Arc::into_inner).for_each(Disk::close);
}
