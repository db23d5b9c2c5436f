//! The engine: executes the queues of a virtio-blk device on io_uring.
//!
//! [`Engine`] is the [`Device`](crate::vhost_user::Device) that a vhost-user session drives. Its queues are divided
//! among worker threads, each with an io_uring of its own; between two workers nothing is shared on the way of a
//! request.
//!
//! - `worker`: the loop of a thread. `poll`: when it polls and when it sleeps. `kicks`: what wakes it. `ring`: its
//!   io_uring.
//! - `vring`: the state of a queue. `slot`, `execute`: requests under way. `bounced`, `piece`, `bounce`: those that
//!   direct I/O does not take as they are. `blocks`, `block_locks`: those that change parts of its blocks.
//! - `shape`: what it takes of the machine.
//! - `handle`: the engine as the session sees it. `control`: as other threads see it.
//! - `command`, `orders`: what they ask of the workers, and what these do then. `let_go`: how the disk becomes free for
//!   others.
//! - `attach`, `interface`, `epochs`: queues that become rings, if the device offers that ([`AttachConfig`]).
//! - `reply`: answers to commands. `alignment`: what direct I/O demands.
//!
//! The guest's memory is never registered with the kernel: nothing is pinned but for the time of a request. Each
//! request holds the memory table that it was taken with, so a front-end may change the table at any time.
//!
//! A worker that panics ends the process. A front-end notices that and can connect to a new process, which takes the
//! requests up again; a device that hangs would help nobody. So does a disk that turns out to be of no use.

mod alignment;
mod attach;
mod block_locks;
mod blocks;
mod bounce;
mod bounced;
mod cache_line;
mod command;
mod control;
mod counters;
mod epochs;
mod error;
mod eventfd;
mod execute;
mod handle;
mod interface;
mod kicks;
mod let_go;
mod orders;
mod piece;
mod poll;
mod reply;
mod ring;
mod shape;
mod slot;
mod source;
mod thread;
mod token;
mod vring;
mod worker;
mod writer;

pub use attach::{AttachConfig, KindStatus, OperatorMode, Refused, RingCounts, RingKind, RingStatus, RingsStatus};
pub use control::EngineControl;
pub use counters::{Counter, QueueCounters};
pub use error::EngineError;
pub use handle::{Engine, EngineConfig};
pub use shape::EngineShape;
pub use source::DiskSource;
pub use thread::check_cpus;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use block_locks::BlockLocks;

use crate::log_limit::LogLimits;
use crate::virtio_blk::{BlkConfig, CacheMode, GuestErrors, Serial};

/// What all workers of a device look at.
#[derive(Debug)]
struct Shared {
    /// Each write is to be stable when it completes.
    write_through: AtomicBool,
    guest_errors: GuestErrors,
    /// Requests that the disk failed.
    disk_errors: LogLimits,
    /// Queues that became rings or virtqueues.
    mode_changes: LogLimits,
    /// Queues that stopped, or were held, without having been told to.
    stopped_queues: LogLimits,
    serial: Serial,
    /// Which requests may change which blocks of the disk, where the guest's blocks are finer than those of direct I/O.
    block_locks: BlockLocks,
    /// Not for the way of a request: workers have their own copy of what they need.
    device: Mutex<BlkConfig>,
}

impl Shared {
    fn new(device: BlkConfig, workers: usize) -> Self {
        Self {
            write_through: (!CacheMode::new().writeback()).into(),
            guest_errors: GuestErrors::new(),
            disk_errors: LogLimits::new(),
            mode_changes: LogLimits::new(),
            stopped_queues: LogLimits::new(),
            serial: *device.serial(),
            block_locks: BlockLocks::new(workers),
            device: Mutex::new(device),
        }
    }

    #[inline]
    fn is_write_through(&self) -> bool {
        // Whoever changes it answers the driver afterwards, and the driver sends what depends on it after that.
        self.write_through.load(Ordering::Acquire)
    }

    fn device(&self) -> MutexGuard<'_, BlkConfig> {
        // Whoever panicked while holding it left a whole configuration: each change of it is one assignment.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
