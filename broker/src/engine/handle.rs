//! The engine: its start, its end, and its way to the workers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io};

use super::attach::{Attach, AttachConfig, BuilderCommand, SharedRings, Workers, builder, ring_watch};
use super::command::{Command, CommandSender, WorkerSenders, command_channel};
use super::control::{EngineControl, StartedQueues};
use super::counters::QueueCounters;
use super::disk_release;
use super::execution::bounce::BouncePool;
use super::execution::slot::Slots;
use super::poll::PollPolicy;
use super::reply::{Pending, Reply};
use super::ring::RingPolicy;
use super::shape::EngineShape;
use super::source::DiskSource;
use super::thread::{Place, start};
use super::vring::Vring;
use super::worker::WorkerParts;
use super::{EngineError, Shared};
use crate::disk::Disk;
use crate::ring_host::RingHost;
use crate::vhost_user::{DeviceMemory, PeerWatch};
use crate::virtio_blk::{BlkConfig, CacheMode};

/// What an engine is to be.
#[derive(Debug)]
#[non_exhaustive]
pub struct EngineConfig {
    /// The device as its driver sees it.
    pub device: BlkConfig,
    /// How long a worker that has nothing to do polls before it sleeps. Zero: it does not poll.
    pub poll_time: Duration,
    /// How many workers there are; at most one for each queue. `None`: one for each queue, at most as many as there are
    /// CPUs for this process.
    pub workers: Option<usize>,
    /// The CPU of each worker. Empty: wherever the kernel puts them. If there are more workers than CPUs, several
    /// share one.
    pub cpus: Vec<usize>,
    /// How queues become rings of their drivers. `None`: the device does not offer that.
    pub attach: Option<AttachConfig>,
    /// What makes these rings. `None`: threads of the engine's own process ([`RingHost::in_threads`]).
    pub ring_host: Option<RingHost>,
}

impl EngineConfig {
    /// Workers that do not poll, one for each queue but at most one for each CPU, anywhere; no rings.
    pub fn new(device: BlkConfig) -> Self {
        Self { device, poll_time: Duration::ZERO, workers: None, cpus: Vec::new(), attach: None, ring_host: None }
    }

    /// Sets [`poll_time`](Self#structfield.poll_time).
    #[must_use]
    pub fn poll_time(self, poll_time: Duration) -> Self {
        Self { poll_time, ..self }
    }

    /// Sets [`workers`](Self#structfield.workers).
    #[must_use]
    pub fn workers(self, workers: impl Into<Option<usize>>) -> Self {
        Self { workers: workers.into(), ..self }
    }

    /// Sets [`cpus`](Self#structfield.cpus).
    #[must_use]
    pub fn cpus(self, cpus: Vec<usize>) -> Self {
        Self { cpus, ..self }
    }

    /// Sets [`attach`](Self#structfield.attach).
    #[must_use]
    pub fn attach(self, attach: impl Into<Option<AttachConfig>>) -> Self {
        Self { attach: attach.into(), ..self }
    }

    /// Sets [`ring_host`](Self#structfield.ring_host).
    #[must_use]
    pub fn ring_host(self, host: impl Into<Option<RingHost>>) -> Self {
        Self { ring_host: host.into(), ..self }
    }
}

/// Executes the queues of a device.
///
/// Dropped, it takes nothing more; its threads end when the I/O under way has ended. [`shutdown`](Self::shutdown) waits
/// for that.
pub struct Engine {
    pub(super) control: EngineControl,
    threads: Vec<JoinHandle<Option<Arc<Disk>>>>,
    pub(super) source: Box<dyn DiskSource>,
    pub(super) cache_mode: CacheMode,
    /// The available index with which each queue was started that was not stopped.
    pub(super) started: Vec<Option<u16>>,
    pub(super) is_logging: bool,
    /// The memory table that the front-end gave last.
    pub(super) memory: Option<Arc<DeviceMemory>>,
    /// The front-end.
    pub(super) peer: Option<PeerWatch>,
}

impl Engine {
    /// Starts the workers. `source` makes what gives the engine its disk; it gets the engine's control for that.
    ///
    /// # Errors
    ///
    /// Each kind of [`EngineError`].
    pub fn new(
        config: EngineConfig,
        source: impl FnOnce(EngineControl) -> io::Result<Box<dyn DiskSource>>,
    ) -> Result<Self, EngineError> {
        let device = config.device;
        let queues = usize::from(device.num_queues());
        let shape =
            EngineShape { queues: device.num_queues(), queue_size: device.queue_size(), workers: config.workers };
        let workers = shape.workers();
        let counters: Arc<[_]> = (0..queues).map(|_| Arc::new(QueueCounters::default())).collect();
        let shared = Arc::new(Shared::new(device, workers));
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| command_channel()).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let senders: Arc<[CommandSender]> = senders.into();
        let (host, queue_count) = (config.ring_host, device.num_queues());
        let attach = config.attach.map(|attach| start_attach(attach, host, queue_count, &senders)).transpose()?;
        let ring_policy = RingPolicy::of_this_kernel();
        let mut threads = Vec::new();
        for (number, commands) in receivers.into_iter().enumerate() {
            let own: Vec<_> = (number..queues).step_by(workers).map(|queue| (queue, counters[queue].clone())).collect();
            let slots_max = shape.slots_max(own.len());
            let bounce = BouncePool::new()?;
            let (shared, limits, attach) = (shared.clone(), device.request_limits(), attach.clone());
            let workers = WorkerSenders::new(&senders);
            let (segments_max, poll_time) = (device.segment_capacity(), config.poll_time);
            let place = Place {
                number,
                cpu: config.cpus.get(number % config.cpus.len().max(1)).copied(),
                completions_max: shape.completions_max(own.len()),
                ring_policy: ring_policy.clone(),
            };
            threads.push(start(place, move || WorkerParts {
                number,
                workers,
                commands,
                vrings: own.into_iter().map(|(queue, counters)| Vring::new(queue as u16, counters)).collect(),
                slots: Slots::new(slots_max, segments_max),
                bounce,
                limits,
                poll: PollPolicy::new(poll_time),
                shared,
                attach,
            })?);
        }
        let control = EngineControl { workers: senders, counters, started: StartedQueues::new(queues), shared, attach };
        Ok(Self {
            source: source(control.clone()).map_err(EngineError::Thread)?,
            control,
            threads,
            cache_mode: CacheMode::new(),
            started: vec![None; queues],
            is_logging: false,
            memory: None,
            peer: None,
        })
    }

    /// A handle for other threads.
    pub fn control(&self) -> EngineControl {
        self.control.clone()
    }

    /// Takes nothing more, waits until all I/O has ended, and lets go of the disk: others can have it when this returns.
    pub fn shutdown(mut self) {
        self.source.release(&|| true);
        self.control.send_to_all(|| Command::Shutdown);
        // A worker that panics ends the process.
        let disks = self.threads.drain(..).filter_map(|thread| thread.join().ok().flatten()).collect();
        self.control.command_builder(|done| BuilderCommand::SetDisk { disk: None, done });
        disk_release::close(disks);
    }

    /// Sends a command about one queue to its worker.
    pub(super) fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        self.control.send(index, command);
    }

    /// The same, and waits until the command is in force.
    pub(super) fn order<T>(&self, index: u16, command: impl FnOnce(usize, Reply<T>) -> Command) -> Option<T> {
        let (reply, pending) = Pending::new();
        self.send(index, |queue| command(queue, reply));
        self.wait(pending)
    }

    /// Sends a command to all workers and waits until it is in force everywhere.
    pub(super) fn order_all(&self, command: impl Fn(Reply<()>) -> Command) {
        for pending in self.control.begin_order(command) {
            // A worker that has ended holds nothing.
            self.wait(pending);
        }
    }

    /// Waits for an answer, but not for a front-end that is gone: the next front-end would wait for its I/O.
    pub(super) fn wait<T>(&self, pending: Pending<T>) -> Option<T> {
        pending.wait_while(|| !self.is_peer_gone())
    }

    pub(super) fn is_peer_gone(&self) -> bool {
        self.peer.as_ref().is_some_and(PeerWatch::is_gone)
    }

    pub(super) fn device(&self) -> MutexGuard<'_, BlkConfig> {
        self.control.shared.device()
    }

    pub(super) fn apply_cache_mode(&self) {
        let write_through = !self.cache_mode.writeback();
        self.control.shared.write_through.store(write_through, Ordering::Release);
    }
}

/// Starts the ring builder, and what follows the rings.
fn start_attach(
    config: AttachConfig,
    host: Option<RingHost>,
    queue_count: u16,
    workers: &Arc<[CommandSender]>,
) -> Result<Attach, EngineError> {
    let host = host.map_or_else(|| RingHost::in_threads(config.clone(), queue_count), Ok)?;
    let (host, events) = host.open()?;
    let control = Arc::clone(host.control());
    let (config, rings) = (Arc::new(config), Arc::new(SharedRings::new(queue_count)));
    let workers: Arc<dyn Workers> = Arc::new(WorkerSenders::new(workers));
    ring_watch::start(events, rings.clone(), workers.clone())?;
    let builder = builder::start(host, rings.clone(), workers.clone())?;
    Ok(Attach::new(config, queue_count, rings, builder, control, workers))
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.control.send_to_all(|| Command::Shutdown);
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("workers", &self.control.workers.len()).field("started", &self.started).finish()
    }
}
