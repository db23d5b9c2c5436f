//! The engine as other threads see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::Shared;
use super::attach::{Attach, BuilderCommand, RingsStatus};
use super::command::{Command, CommandSender};
use super::counters::QueueCounters;
use super::fatal::end_process;
use super::reply::{Pending, Reply};
use crate::disk::Disk;
use crate::virtio_blk::{BlkConfigError, GuestErrors};

/// Which queues the front-end has started, for operators.
#[derive(Clone, Debug)]
pub(super) struct StartedQueues(Arc<[AtomicBool]>);

impl StartedQueues {
    pub(super) fn new(queues: usize) -> Self {
        Self((0..queues).map(|_| AtomicBool::new(false)).collect())
    }

    pub(super) fn set(&self, index: u16, is_started: bool) {
        self.0[usize::from(index)].store(is_started, Ordering::Relaxed);
    }

    pub(super) fn set_none(&self) {
        self.0.iter().for_each(|is_started| is_started.store(false, Ordering::Relaxed));
    }
}

/// A handle to an engine for other threads: gives it the disk, reads its counters.
#[derive(Clone, Debug)]
pub struct EngineControl {
    pub(super) workers: Arc<[CommandSender]>,
    pub(super) counters: Arc<[Arc<QueueCounters>]>,
    pub(super) started: StartedQueues,
    pub(super) shared: Arc<Shared>,
    pub(super) attach: Option<Attach>,
}

impl EngineControl {
    /// Gives the engine its disk; requests are executed from now on. If it has one already, nothing changes.
    ///
    /// True: the disk has another size than the driver was told of. If that size is of no use at all, the process ends.
    pub fn set_disk(&self, disk: &Arc<Disk>) -> bool {
        let has_changed = self.set_size_bytes(disk.size_bytes()).unwrap_or_else(|error| {
            // Another process has had the disk since the guest learned its size. With a capacity beyond the disk's end, writes
            // would make it grow.
            end_process(&format_args!("the disk's new size is of no use: {error}"))
        });
        forgo_access_times(disk);
        // Before a worker can ask for a ring.
        self.command_builder(|done| BuilderCommand::SetDisk { disk: Some(disk.clone()), done });
        self.order_all(|reply| Command::SetDisk { disk: disk.clone(), reply });
        has_changed
    }

    /// Sends a command to the ring builder, if the device has one, and waits until it is carried out.
    pub(super) fn command_builder(&self, command: impl FnOnce(Reply<()>) -> BuilderCommand) {
        if let Some(attach) = &self.attach {
            let (done, pending) = Pending::new();
            attach.command(command(done));
            pending.wait();
        }
    }

    /// What each queue's ring does, if the device offers rings.
    pub fn rings(&self) -> Option<RingsStatus> {
        self.attach.as_ref().map(|attach| attach.rings.status())
    }

    /// True: the capacity is another one now.
    pub(super) fn set_size_bytes(&self, size_bytes: u64) -> Result<bool, BlkConfigError> {
        // Held until the workers know, so that they learn of two changes in their order.
        let mut device = self.shared.device();
        let has_changed = device.set_size_bytes(size_bytes)?;
        if has_changed {
            let limits = device.request_limits();
            if let Some(attach) = &self.attach {
                attach.set_disk_size(size_bytes);
            }
            self.order_all(|reply| Command::SetLimits { limits, reply });
        }
        Ok(has_changed)
    }

    /// What each queue has done.
    pub fn counters(&self) -> &[Arc<QueueCounters>] {
        &self.counters
    }

    /// Whether the front-end has started a queue.
    pub fn is_started(&self, index: u16) -> bool {
        self.started.0.get(usize::from(index)).is_some_and(|is_started| is_started.load(Ordering::Relaxed))
    }

    /// What the guest has done wrong.
    pub fn guest_errors(&self) -> &GuestErrors {
        &self.shared.guest_errors
    }

    /// Sends a command about one queue to its worker.
    pub(super) fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        let (index, workers) = (usize::from(index), self.workers.len());
        self.workers[index % workers].send(command(index / workers));
    }

    pub(super) fn send_to_all(&self, command: impl Fn() -> Command) {
        for worker in self.workers.iter() {
            worker.send(command());
        }
    }

    /// Sends a command to all workers and waits until it is in force everywhere.
    fn order_all(&self, command: impl Fn(Reply<()>) -> Command) {
        for pending in self.begin_order(command) {
            // A worker that has ended holds nothing.
            pending.wait();
        }
    }

    /// Sends a command to all workers. Each of them answers when it is in force.
    pub(super) fn begin_order<T>(&self, command: impl Fn(Reply<T>) -> Command) -> Vec<Pending<T>> {
        let workers = self.workers.iter();
        let begun = workers.map(|worker| {
            let (reply, pending) = Pending::new();
            worker.send(command(reply));
            pending
        });
        begun.collect()
    }
}

/// Saves the kernel a look at the inode in each read: the time of a guest's last read is of no use.
fn forgo_access_times(disk: &Disk) {
    // Only the owner of a file may do that (open(2), `O_NOATIME`); it works as well without.
    let _ = fcntl_getfl(disk).and_then(|flags| fcntl_setfl(disk, flags | OFlags::NOATIME));
}
