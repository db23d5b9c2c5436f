//! The engine as others see it: a [`Device`] for the vhost-user session, and a handle for everybody else.

use std::error::Error;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io};

use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::attach::{Attach, AttachConfig, BuilderCommand, SharedRings, Workers, builder};
use super::bounce::BouncePool;
use super::command::{Command, CommandSender, WhichEventfd, WorkerSenders, command_channel};
use super::control::{EngineControl, StartedQueues};
use super::counters::QueueCounters;
use super::poll::PollPolicy;
use super::reply::{Pending, Reply};
use super::shape::EngineShape;
use super::slot::Slots;
use super::source::DiskSource;
use super::thread::{Place, start};
use super::vring::Vring;
use super::worker::WorkerParts;
use super::{EngineError, Shared, let_go};
use crate::disk::Disk;
use crate::vhost_user::{ConfigWriteError, Device, DeviceMemory, PeerWatch, QueueEventfds, RingFault};
use crate::virtio_blk::{BlkConfig, CacheMode, Continuity, Told};
use crate::virtqueue::{DirtyLog, QUEUE_SIZE_MAX, QueueSetup};

/// What an engine is to be.
#[derive(Debug)]
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
}

/// Executes the queues of a device.
///
/// Dropped, it takes nothing more; its threads end when the I/O under way has ended. [`shutdown`](Self::shutdown) waits
/// for that.
pub struct Engine {
    control: EngineControl,
    threads: Vec<JoinHandle<Option<Arc<Disk>>>>,
    source: Box<dyn DiskSource>,
    cache_mode: CacheMode,
    /// The available index with which each queue was started that was not stopped.
    started: Vec<Option<u16>>,
    is_logging: bool,
    /// What the front-end gave last.
    memory: Option<Arc<DeviceMemory>>,
    /// The front-end.
    peer: Option<PeerWatch>,
}

impl Engine {
    /// Starts the workers. `source` gets the engine's control and makes what gives the engine its disk, by means of it.
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
        let shape = EngineShape::of(&config);
        let workers = shape.workers();
        let counters: Arc<[_]> = (0..queues).map(|_| Arc::new(QueueCounters::default())).collect();
        let shared = Arc::new(Shared::new(device, workers));
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| command_channel()).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let senders: Arc<[CommandSender]> = senders.into();
        let attach = config.attach.map(|attach| start_attach(attach, queues as u16, &senders)).transpose()?;
        let mut threads = Vec::new();
        for (number, commands) in receivers.into_iter().enumerate() {
            let own: Vec<_> = (number..queues).step_by(workers).map(|queue| (queue, counters[queue].clone())).collect();
            let slots_max = shape.slots_max(own.len());
            let bounce = BouncePool::new()?;
            let (shared, limits, attach) = (shared.clone(), device.request_limits(), attach.clone());
            let workers = senders.clone();
            let (segments_max, poll_time) = (device.segment_capacity(), config.poll_time);
            let place = Place {
                number,
                cpu: config.cpus.get(number % config.cpus.len().max(1)).copied(),
                completions_max: shape.completions_max(own.len()),
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

    /// Takes nothing more, waits until all I/O has ended, and lets go of the disk: others can have it when this
    /// returns.
    pub fn shutdown(mut self) {
        self.source.release(&|| true);
        self.control.send_to_all(|| Command::Shutdown);
        // A worker that panics ends the process.
        let disks = self.threads.drain(..).filter_map(|thread| thread.join().ok().flatten()).collect();
        self.control.command_builder(|done| BuilderCommand::SetDisk { disk: None, done });
        let_go::close(disks);
    }

    /// Sends a command about one queue to its worker.
    fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        self.control.send(index, command);
    }

    /// The same, and waits until it is in force.
    fn order<T>(&self, index: u16, command: impl FnOnce(usize, Reply<T>) -> Command) -> Option<T> {
        let (reply, pending) = Pending::new();
        self.send(index, |queue| command(queue, reply));
        self.wait(pending)
    }

    /// Sends a command to all workers and waits until it is in force everywhere.
    fn order_all(&self, command: impl Fn(Reply<()>) -> Command) {
        for pending in self.control.begin_order(command) {
            // A worker that has ended holds nothing.
            self.wait(pending);
        }
    }

    /// Waits for an answer, and not for a front-end that is gone: whoever comes next would wait for its I/O.
    fn wait<T>(&self, pending: Pending<T>) -> Option<T> {
        pending.wait_while(|| !self.is_peer_gone())
    }

    fn is_peer_gone(&self) -> bool {
        self.peer.as_ref().is_some_and(PeerWatch::is_gone)
    }

    fn set_eventfd(&self, index: u16, which: WhichEventfd, eventfd: Option<EventFd>) {
        self.order(index, |queue, reply| Command::SetEventfd { queue, which, eventfd, reply });
    }

    fn device(&self) -> MutexGuard<'_, BlkConfig> {
        self.control.shared.device()
    }

    fn told(&self) -> Told {
        Told::new(&self.device(), self.cache_mode.driver_features())
    }

    fn apply_cache_mode(&self) {
        let write_through = !self.cache_mode.writeback();
        self.control.shared.write_through.store(write_through, Ordering::Release);
    }
}

/// Starts what makes rings.
fn start_attach(config: AttachConfig, queue_count: u16, workers: &Arc<[CommandSender]>) -> Result<Attach, EngineError> {
    let (config, rings) = (Arc::new(config), Arc::new(SharedRings::new(queue_count)));
    let workers: Arc<dyn Workers> = Arc::new(WorkerSenders::new(workers));
    let commands = builder::start(config.clone(), rings.clone(), workers.clone())?;
    Ok(Attach::new(config, queue_count, rings, commands, workers))
}

/// Whether all regions of `before` are in `memory`, and are the same memory.
fn has_all(memory: &DeviceMemory, before: &DeviceMemory) -> bool {
    let same = |region: &GuestRegionMmap<()>, other: &GuestRegionMmap<()>| {
        (region.start_addr(), region.len(), region.as_ptr()) == (other.start_addr(), other.len(), other.as_ptr())
    };
    before.iter().all(|region| memory.iter().any(|other| same(region, other)))
}

impl Device for Engine {
    fn set_peer(&mut self, peer: Option<PeerWatch>) {
        self.peer = peer;
    }

    fn queue_count(&self) -> u16 {
        self.device().num_queues()
    }

    /// Front-ends set their rings up as their own configuration says. What the device is prepared for goes by the size
    /// in its configuration, and a longer ring waits.
    fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    fn device_features(&self) -> u64 {
        self.device().device_features()
    }

    fn set_driver_features(&mut self, features: u64) {
        self.cache_mode.set_driver_features(features);
        self.apply_cache_mode();
    }

    fn config_space(&self) -> Vec<u8> {
        self.device().to_bytes(self.cache_mode.writeback()).to_vec()
    }

    fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        self.cache_mode.write_config(offset_bytes, bytes)?;
        self.apply_cache_mode();
        Ok(())
    }

    fn driver_settings(&self) -> u8 {
        self.cache_mode.settings()
    }

    fn restore_driver_settings(&mut self, settings: u8) {
        self.cache_mode.restore(settings);
        self.apply_cache_mode();
    }

    fn record(&self) -> Vec<u8> {
        self.told().to_bytes()
    }

    fn compare_record(&self, record: &[u8], queues_in_use: u16) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let Some(earlier) = Told::from_bytes(record) else { return Ok(false) };
        Ok(earlier.compare(&self.told(), queues_in_use)? == Continuity::Larger)
    }

    fn forget_driver(&mut self) {
        self.cache_mode = CacheMode::new();
        self.apply_cache_mode();
    }

    fn set_memory(&mut self, memory: Arc<DeviceMemory>) {
        // A front-end that is gone hears of nothing.
        let loses_some = self.memory.as_ref().is_some_and(|before| !has_all(&memory, before));
        // The builder first: no worker that knows this table has a ring made in the one before.
        let rings = self.control.attach.as_ref().map(|attach| {
            let (done, pending) = Pending::new();
            attach.command(BuilderCommand::SetMemory { memory: memory.clone(), loses_some, done });
            pending
        });
        self.order_all(|reply| Command::SetMemory { memory: memory.clone(), reply });
        // Whoever takes memory away may give it to somebody else: nothing may land there any more. Memory that is new
        // is not waited for: it takes long to pin, and until then a driver's requests in it go the other way
        // (docs/abi.md, section 7).
        if loses_some {
            self.order_all(|reply| Command::LeaveFormerMemory { reply });
            rings.map(|pending| self.wait(pending));
        }
        self.memory = Some(memory);
    }

    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.is_logging = log.is_some();
        if let Some(attach) = &self.control.attach {
            let available_again = attach.rings.availability.set_logging(self.is_logging);
            if self.is_logging {
                // The kernel logs nothing of what a ring writes. The guest need not be asked, nor could it answer: the
                // front-end waits for this with its locks held.
                self.order_all(|done| Command::FinishRings { reason: ErrorCode::Mode, done: Some(done) });
            } else if !available_again.is_empty() {
                attach.workers().tell_driver();
            }
        }
        self.order_all(|reply| Command::SetDirtyLog { log: log.clone(), reply });
    }

    fn set_used_log(&mut self, index: u16, used_log_gpa: Option<u64>) {
        self.order(index, |queue, reply| Command::SetUsedLog { queue, used_log_gpa, reply });
    }

    fn start_queue(&mut self, index: u16, setup: QueueSetup, eventfds: QueueEventfds) {
        self.started[usize::from(index)] = Some(setup.next_avail);
        self.control.started.set(index, true);
        self.send(index, |queue| Command::Start { queue, setup, eventfds });
        self.source.request();
    }

    fn break_queue(&mut self, index: u16, fault: RingFault, err: Option<EventFd>) {
        self.send(index, |queue| Command::Break { queue, fault, err });
    }

    fn stop_queue(&mut self, index: u16) -> Option<u16> {
        if self.control.attach.is_some() {
            // All queues stop as a rule, one after the other: their rings end side by side.
            self.control.send_to_all(|| Command::EndRings { reason: ErrorCode::None });
        }
        let stopped_at = self.order(index, |queue, reply| Command::Stop { queue, reply });
        if stopped_at.is_none() && self.is_peer_gone() {
            return None;
        }
        let started_at = self.started[usize::from(index)].take();
        self.control.started.set(index, false);
        // A worker that was shut down has taken nothing since.
        let next_avail = stopped_at.or(started_at).unwrap_or_default();
        let all_stopped = self.started.iter().all(Option::is_none);
        if let (true, Some(attach)) = (all_stopped, &self.control.attach) {
            // A device reset, as far as a back-end can see one.
            attach.rings.availability.clear_discard();
        }
        if self.is_logging && all_stopped {
            // The guest is being migrated: who goes on with it needs the disk.
            let is_wanted = || !self.peer.as_ref().is_some_and(PeerWatch::is_gone);
            self.source.release(&is_wanted);
            self.control.give_disk_up(is_wanted);
        }
        Some(next_avail)
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        self.order(index, |queue, reply| Command::SetEnabled { queue, enabled, reply });
    }

    fn set_call(&mut self, index: u16, call: Option<EventFd>) {
        self.set_eventfd(index, WhichEventfd::Call, call);
    }

    fn set_kick(&mut self, index: u16, kick: Option<EventFd>) {
        self.set_eventfd(index, WhichEventfd::Kick, kick);
    }

    fn set_err(&mut self, index: u16, err: Option<EventFd>) {
        self.set_eventfd(index, WhichEventfd::Err, err);
    }

    fn abandon(&mut self) {
        self.started.fill(None);
        self.control.started.set_none();
        self.memory = None;
        self.peer = None;
        self.control.send_to_all(|| Command::Abandon);
        if let Some(attach) = &self.control.attach {
            // The next front-end may have another guest. If it is the same one, its discards show again.
            attach.rings.availability.clear_discard();
        }
        self.source.stop_waiting();
    }

    fn reset(&mut self) {
        self.started.fill(None);
        self.control.started.set_none();
        self.order_all(|reply| Command::Reset { reply });
        self.forget_driver();
    }

    fn refresh_capacity(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let size_bytes = self.source.refresh_size_bytes()?;
        Ok(self.control.set_size_bytes(size_bytes)?)
    }
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
