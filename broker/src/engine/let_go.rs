//! Letting go of the disk, so that others can have it.
//!
//! The lock and the claim belong to the disk's open file description, and go with the last reference to it. The kernel
//! has one for each ring that has the disk as its fixed file. A request that has completed can keep that reference for
//! some milliseconds after the file was unregistered. So a worker answers when the kernel has said that the reference
//! is gone, and its answer carries the worker's own reference: whoever collects the answers of all workers closes the
//! disk ([`Disk::close`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attach::BuilderCommand;
use super::command::{Command, LetGo};
use super::control::EngineControl;
use super::orders::end_process;
use super::reply::{Pending, Reply};
use super::ring::Release;
use super::worker::Worker;
use crate::disk::Disk;

/// How long a front-end that gives the disk up waits for I/O that a former one has left behind: longer than an ordinary
/// request takes. That I/O may hang, and then whoever wants the disk waits for its lock.
const FORMER_IO_PATIENCE: Duration = Duration::from_secs(1);

impl EngineControl {
    /// Has the workers and the builder let go of the disk, and closes it; no queue may run. When this returns, others
    /// can have the disk, with two exceptions: the answer is not wanted any more, or I/O hangs that a former front-end
    /// has left behind.
    pub(super) fn give_disk_up(&self, is_wanted: impl Fn() -> bool) {
        let workers = self.begin_order(|reply| Command::GiveUpDisk { reply });
        let builder = self.attach.as_ref().map(|attach| {
            let (done, pending) = Pending::new();
            attach.command(BuilderCommand::SetDisk { disk: None, done });
            pending
        });
        // Held until everybody has answered, so that the last reference is dropped here.
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
fn disk_of(pending: Pending<LetGo>, is_wanted: impl Fn() -> bool) -> Result<Option<Arc<Disk>>, NotLetGo> {
    match pending.next_while(&is_wanted) {
        Some(LetGo::Now(disk)) => return Ok(disk),
        Some(LetGo::AfterFormerIo) => {}
        // A worker that has ended holds nothing.
        None if is_wanted() => return Ok(None),
        None => return Err(NotLetGo),
    }
    let end = Instant::now() + FORMER_IO_PATIENCE;
    match pending.next_while(|| is_wanted() && Instant::now() < end) {
        Some(LetGo::Now(disk)) => Ok(disk),
        _ => {
            tracing::warn!(
                "the disk stays locked: I/O that a former front-end has left behind is under way. The destination of a \
                 migration waits until that I/O has ended"
            );
            Err(NotLetGo)
        }
    }
}

/// Closes what is the same disk, if nobody else has it.
pub(super) fn close(disks: Vec<Arc<Disk>>) {
    disks.into_iter().filter_map(Arc::into_inner).for_each(Disk::close);
}

/// A disk that a worker has left.
#[derive(Debug)]
pub(super) struct FormerDisk {
    disk: Arc<Disk>,
    release: Release,
}

impl Worker<'_> {
    pub(super) fn give_up_disk(&mut self, reply: Reply<LetGo>) {
        self.endings.next_disk = None;
        if self.slots.occupied() > 0 {
            // The queues of the front-end that gives the disk up have stopped: this I/O is a former one's.
            let _ = reply.send(LetGo::AfterFormerIo);
        }
        self.endings.disk = Some(reply);
    }

    /// Lets the disk go if it is to go and no request is under way, and takes the next one.
    pub(super) fn settle_disk(&mut self) {
        if self.endings.disk.is_none() || self.slots.occupied() > 0 {
            return;
        }
        self.unregister_disk();
        if !self.has_left_disk() {
            return;
        }
        let disk = self.former_disk.take().map(|former| former.disk);
        if let Some(reply) = self.endings.disk.take() {
            // If the answer is not wanted any more, the disk is closed here.
            let _ = reply.send(LetGo::Now(disk));
        }
        if let Some(disk) = self.endings.next_disk.take() {
            self.take_disk(disk);
            // Queues may wait for it.
            self.is_unsettled = true;
        }
    }

    /// The end of the worker: leaves the disk, and gives it.
    pub(super) fn leave_disk(&mut self) -> Option<Arc<Disk>> {
        self.unregister_disk();
        while !self.has_left_disk() {
            self.ring.submit_and_wait();
            self.reap();
        }
        self.former_disk.take().map(|former| former.disk)
    }

    /// The kernel has told of the release of the former disk.
    pub(super) fn disk_is_released(&mut self) {
        if let Some(former) = &mut self.former_disk {
            former.release = Release::Done;
        }
        self.is_unsettled = true;
    }

    fn has_left_disk(&self) -> bool {
        self.former_disk.as_ref().is_none_or(|former| former.release == Release::Done)
    }

    /// No request may be under way.
    fn unregister_disk(&mut self) {
        let Some(in_use) = self.disk.take() else { return };
        match self.ring.unregister_disk() {
            Ok(release) => self.former_disk = Some(FormerDisk { disk: in_use.disk, release }),
            // Its lock would stay in force, and the destination of a migration would wait for ever.
            Err(error) => {
                end_process(&format_args!("the disk cannot be unregistered from a worker's io_uring: {error}"))
            }
        }
    }
}
