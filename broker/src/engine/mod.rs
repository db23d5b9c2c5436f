//! The engine: executes the queues of a virtio-blk device on io_uring.
//!
//! [`Engine`] is the [`Device`](crate::vhost_user::Device) that a vhost-user session drives. Worker threads share its
//! queues, each with an io_uring of its own; two workers share nothing on the way of a request.
//!
//! From the outside to the inside, each importing only what stands below it:
//!
//! - `handle`, `device`: the engine, and as the session drives it. `control`, `disk_release`, `mode`: as other threads
//!   use it.
//! - `thread`, `worker`: a worker's thread and its poll iteration; `worker/` has what it does with its parts.
//! - `queues`, `vring`, `queue_life`: the worker's queues, and the life of each. `deferred`: answers that it owes.
//! - `execution`: operations under way, whatever they came from.
//! - `command`: what the workers are asked for. `attach`: queues that become rings, if the device offers that
//!   ([`AttachConfig`]).
//! - `ring`, `writer`, `poll`, `timer`, `token`, `eventfd`, `counters`, `reply`, `alignment`: leaves. `shape`: what
//!   the engine takes of the machine.
//!
//! The engine never registers the guest's memory with the kernel for virtqueues: nothing is pinned except for the time
//! of a request. Each request holds the memory table that it was taken with, so a front-end may change the table at
//! any time.
//!
//! A worker that panics ends the process, and so does a disk that turns out to be of no use. A front-end notices that
//! and can connect to a new process, which takes the requests up again; a device that hangs would help no one.

mod alignment;
mod attach;
mod cache_line;
mod command;
mod control;
mod counters;
mod deferred;
mod device;
mod disk_release;
mod error;
mod eventfd;
mod execution;
mod fatal;
mod handle;
mod mode;
mod poll;
mod queue_life;
mod queues;
mod reply;
mod ring;
mod shape;
mod source;
mod thread;
mod timer;
mod token;
mod vring;
mod worker;
mod writer;

pub use attach::{AttachConfig, KindStatus, OperatorMode, Refused, RingCounts, RingKind, RingStatus, RingsStatus};
pub use control::EngineControl;
pub use counters::{Counter, QueueCounters};
pub use error::EngineError;
pub use handle::{Engine, EngineConfig};
pub use mode::ModeError;
pub use shape::EngineShape;
pub use source::DiskSource;
pub use thread::check_cpus;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use execution::block_locks::BlockLocks;

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
    /// Queues that stopped, or were held, without a command of the front-end.
    stopped_queues: LogLimits,
    serial: Serial,
    /// Which requests may change which blocks of the disk, where the guest's blocks are finer than those of direct I/O.
    block_locks: BlockLocks,
    /// Not used on the way of a request: workers have their own copy of what they need.
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
        // The thread that changes it answers the driver afterwards, and the driver sends what depends on it after that.
        self.write_through.load(Ordering::Acquire)
    }

    fn device(&self) -> MutexGuard<'_, BlkConfig> {
        // A thread that panicked while it held this left a whole configuration: each change is one assignment.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
