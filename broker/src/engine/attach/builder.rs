//! The thread that pins the guest's memory and makes rings.
//!
//! Pinning takes half a second for each GiB, and making a ring a system call that waits for other rings: neither is for a
//! worker, which executes other queues, nor for the protocol thread, for which the front-end waits. Here one thing happens
//! after the other, so that nothing has to be said about the order of two changes of memory.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::attach::Geometry;
use ringpass_guest_abi::epoch::Epoch;
use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::discards::{DiscardWatch, Discarded};
use super::{AttachConfig, AttachmentId, Gate, LiveRing, Refused, Ticket, WorkerSender};
use crate::direct::{DirectDevice, QueueConfig, QueuePlacement};
use crate::disk::Disk;
use crate::engine::EngineError;
use crate::engine::command::{AttachEvent, Command, Reply};
use crate::engine::thread::AbortOnPanic;
use crate::limits::Memlock;
use crate::log_limit::LogLimit;
use crate::memory::{GuestMemory, MemoryError, RegionConfig};
use crate::ring::{RingConfig, RingEnd, RingError, StillRunning};
use crate::threads::leave_signals_to_others;
use crate::vhost_user::DeviceMemory;

/// How often memory is looked at while it is pinned, and the words of rings that count.
const LOOK: Duration = Duration::from_millis(50);
/// How often is looked whether memory that leaves is pinned still, and how long.
const DRAIN_LOOK: Duration = Duration::from_micros(200);
/// Longer than an ordinary request takes; one that takes longer is waited for with its ring.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// How long what is pinned may take to go before the guest's memory is pinned: the kernel takes rings apart later.
const SETTLE: Duration = Duration::from_millis(100);
/// How long is waited for the end of a ring at a time.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the builder is asked for.
#[derive(Debug)]
pub(in crate::engine) enum Order {
    /// Make a ring.
    Build(BuildOrder),
    /// The guest's memory, from now on. Rings that run have it when `done` is told. If it `loses_some`, no I/O of a ring
    /// can land in that any more by then.
    SetMemory { memory: Arc<DeviceMemory>, loses_some: bool, done: Reply<()> },
    /// The disk of rings that are made from now on. `None`: it is let go when `done` is told. No ring may run.
    SetDisk { disk: Option<Arc<Disk>>, done: Reply<()> },
    /// No queue is attached any more: nothing has to stay pinned.
    Unpin,
}

/// A ring that is to be made.
#[derive(Debug)]
pub(in crate::engine) struct BuildOrder {
    pub(in crate::engine) queue: u16,
    pub(in crate::engine) attachment: AttachmentId,
    pub(in crate::engine) geometry: Geometry,
    pub(in crate::engine) epoch: Epoch,
    /// What completions signal.
    pub(in crate::engine) call: Option<EventFd>,
    pub(in crate::engine) call_generation: u32,
    /// By which the order can be taken back.
    pub(in crate::engine) ticket: Ticket,
}

/// A ring that was made.
#[derive(Debug)]
pub(in crate::engine) struct Built {
    pub(in crate::engine) ring: LiveRing,
    /// The call eventfd that it has.
    pub(in crate::engine) call_generation: u32,
}

struct Builder {
    config: Arc<AttachConfig>,
    gate: Arc<Gate>,
    workers: WorkerSender,
    memory: Option<Arc<DeviceMemory>>,
    disk: Option<Arc<Disk>>,
    pinned: Option<Pinned>,
    /// Rings over memory that was let go of, which may not have ended.
    ending: Vec<RingEnd>,
    /// What a guest can bring about as often as it likes.
    refusals: LogLimit,
    pinnings: LogLimit,
    discards: LogLimit,
}

/// The guest's memory, pinned, and the rings over it.
struct Pinned {
    device: DirectDevice,
    watch: DiscardWatch,
}

impl Pinned {
    /// Gives the rings that run these regions for what they had. False: they must end.
    fn has_followed(&mut self, regions: &[RegionConfig], loses_some: bool, gate: &Gate) -> bool {
        match self.follow(regions, gate) {
            Ok(()) if !loses_some || self.await_drain() => return true,
            Ok(()) => tracing::warn!(
                "rings end, because their I/O keeps memory for longer than {DRAIN_PATIENCE:?} that the front-end takes away"
            ),
            // A front-end that is gone has taken all of it.
            Err(_) if regions.is_empty() => {}
            // Nor does anybody follow once all queues have stopped.
            Err(RingError::Memory(MemoryError::NotWanted)) => {}
            Err(error) => {
                tracing::warn!(
                    "rings end, because the guest's memory changed in a way that they cannot follow: {error}"
                );
            }
        }
        false
    }

    fn follow(&mut self, regions: &[RegionConfig], gate: &Gate) -> Result<(), RingError> {
        self.device.set_memory_while(regions.iter().cloned(), &|| gate.is_in_use())?;
        let looking = RingError::system("looking at a file of guest memory");
        self.watch.set_regions(regions).map_err(looking)?;
        self.watch.expect_all();
        Ok(())
    }

    /// Waits until requests that were under way have ended and with them what they kept pinned. False: they take long, or
    /// that cannot be told.
    fn await_drain(&self) -> bool {
        let end = Instant::now() + DRAIN_PATIENCE;
        loop {
            match self.device.has_drained() {
                Ok(true) => return true,
                Ok(false) if Instant::now() < end => thread::sleep(DRAIN_LOOK),
                Ok(false) => return false,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell whether I/O in memory that leaves has ended");
                    return false;
                }
            }
        }
    }
}

/// Starts the thread. It ends when nobody can order anything any more.
pub(in crate::engine) fn start(
    config: Arc<AttachConfig>,
    gate: Arc<Gate>,
    workers: WorkerSender,
) -> Result<Sender<Order>, EngineError> {
    let (sender, orders) = channel();
    thread::Builder::new()
        .name("ring-builder".into())
        .spawn(move || {
            leave_signals_to_others();
            // Queues and the front-end wait for what this thread does.
            let _guard = AbortOnPanic;
            Builder {
                config,
                gate,
                workers,
                memory: None,
                disk: None,
                pinned: None,
                ending: Vec::new(),
                refusals: LogLimit::new(),
                pinnings: LogLimit::new(),
                discards: LogLimit::new(),
            }
            .run(&orders);
        })
        .map_err(EngineError::Thread)?;
    Ok(sender)
}

impl Builder {
    fn run(&mut self, orders: &Receiver<Order>) {
        loop {
            let order = if self.pinned.is_some() {
                orders.recv_timeout(LOOK)
            } else {
                orders.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match order {
                Ok(order) => self.carry_out(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.gate.sample();
            self.look_for_discards();
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Build(order) => {
                let (queue, attachment) = (order.queue, order.attachment);
                let pinned = self.pinned(&order.ticket);
                if !order.ticket.begin() {
                    return;
                }
                let event = match pinned.and_then(|pinned| build(pinned, order)) {
                    Ok(built) => AttachEvent::Built(Box::new(built)),
                    Err(refused) => {
                        if let Some(total) = self.refusals.count() {
                            tracing::warn!(queue, total, "no ring for the queue: {} ({total} so far)", refused.why);
                        }
                        let code = refused.code;
                        self.gate.note_refusal(queue, refused);
                        AttachEvent::BuildFailed(code)
                    }
                };
                self.workers.send(queue, |queue| Command::Attachment { queue, attachment, event });
            }
            Order::SetMemory { memory, loses_some, done } => {
                self.set_memory(memory, loses_some);
                // Nobody waits any more: then nobody has to know.
                let _ = done.send(());
            }
            Order::SetDisk { disk, done } => {
                self.unpin();
                self.disk = disk;
                let _ = done.send(());
            }
            // Another queue has come meanwhile, and may have its ring.
            Order::Unpin if self.gate.is_in_use() => {}
            Order::Unpin => self.unpin(),
        }
    }

    /// What makes rings; the guest's memory is pinned for the first of them.
    fn pinned(&mut self, ticket: &Ticket) -> Result<&mut Pinned, Refused> {
        if let Some(refused) = self.gate.status().closed {
            return Err(refused);
        }
        if self.pinned.is_none() {
            self.pinned = Some(self.pin(ticket)?);
        }
        // It is there now.
        self.pinned.as_mut().ok_or_else(|| refused(&MemoryError::NoRegions.into()))
    }

    fn pin(&self, ticket: &Ticket) -> Result<Pinned, Refused> {
        let (Some(memory), Some(disk)) = (&self.memory, &self.disk) else {
            let why = "the device has neither memory nor a disk any more: its front-end is going".into();
            return Err(Refused { code: ErrorCode::Mode, why });
        };
        // What is pinned is measured, and what ended a moment ago must not end meanwhile.
        let end = Instant::now() + SETTLE;
        while Memlock::pinned_by_this_process().is_ok_and(|bytes| bytes > 0) && Instant::now() < end {
            thread::sleep(DRAIN_LOOK);
        }
        let regions = regions(memory);
        let memory = GuestMemory::new(regions.clone()).map_err(|error| refused(&error.into()))?;
        let watch = DiscardWatch::new(&regions).map_err(|error| {
            refused(&RingError::System { what: "looking at a file of guest memory", source: error })
        })?;
        let policy = self.config.policy.clone();
        let is_wanted = || ticket.is_wanted();
        let device = DirectDevice::new_while(disk.clone(), &memory, policy, self.config.direct, &is_wanted)
            .map_err(|error| refused(&error))?;
        if let Some(total) = self.pinnings.count() {
            let bytes = memory.len_bytes();
            tracing::info!(
                bytes,
                regions = regions.len(),
                total,
                "guest memory is pinned for rings ({total} times so far)"
            );
        }
        Ok(Pinned { device, watch })
    }

    /// Rings that run get the new memory, if they can be changed; otherwise they end, and are made anew over it.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>, loses_some: bool) {
        let regions = regions(&memory);
        // A front-end that is gone is not answered, and the next one does not wait for its rings.
        let is_gone = regions.is_empty();
        self.memory = Some(memory);
        if self.pinned.as_ref().is_some_and(|pinned| !pinned.device.ends().iter().any(is_open)) {
            // Nothing runs: what is pinned is only in the way.
            self.unpin();
        }
        // What leaves is not looked at any more.
        self.look_for_discards();
        if let Some(mut pinned) = self.pinned.take() {
            if pinned.has_followed(&regions, loses_some, &self.gate) {
                self.pinned = Some(pinned);
            } else {
                self.workers.send_to_all(|| Command::EndRings { reason: ErrorCode::Memory });
                self.let_go(pinned);
            }
        }
        if loses_some {
            self.ending.drain(..).for_each(|end| await_end(&end));
        } else if is_gone {
            self.ending.clear();
        }
    }

    /// Nothing stays pinned. A discard that is noticed only now is told; there is no ring to be taken away.
    fn unpin(&mut self) {
        let Some(mut pinned) = self.pinned.take() else { return };
        if let Some(discarded) = pinned.watch.look() {
            self.tell(&discarded);
        }
        self.let_go(pinned);
    }

    /// A ring that still runs keeps its memory until it ends.
    fn let_go(&mut self, pinned: Pinned) {
        self.ending.retain(|end| !end.has_ended());
        self.ending.extend(pinned.device.ends());
    }

    fn look_for_discards(&mut self) {
        let Some(discarded) = self.pinned.as_mut().and_then(|pinned| pinned.watch.look()) else { return };
        // First, so that no ring is asked for in between.
        self.gate.note_discard();
        self.tell(&discarded);
        self.workers.send_to_all(|| Command::FinishRings { reason: ErrorCode::Discarded, done: None });
        self.unpin();
    }

    fn tell(&self, discarded: &Discarded) {
        // A guest with a balloon can reset its device as often as it likes.
        if let Some(total) = self.discards.count() {
            tracing::error!(
                bytes = discarded.bytes,
                total,
                "guest memory was discarded while rings had it pinned: data that the guest wrote or read through a ring since \
                 then may be wrong. Direct mode ends, and does not come back before the driver resets the device. A balloon, \
                 free page reporting, virtio-mem and postcopy do this: use a guest without them, or --mode virtqueue \
                 ({total} times so far)"
            );
        }
    }
}

/// Makes a ring over what is pinned.
fn build(pinned: &mut Pinned, order: BuildOrder) -> Result<Built, Refused> {
    let Pinned { device, watch } = pinned;
    let BuildOrder { geometry, epoch, call, call_generation, .. } = order;
    let doorbell = eventfd().map_err(|error| refused(&error))?;
    let config = QueueConfig {
        ring: RingConfig { sq_entries: geometry.sq_entries(), cq_entries: geometry.cq_entries() },
        placement: QueuePlacement::GuestRam {
            rings_gpa: geometry.rings(epoch.area()).gpa(),
            sqes_gpa: geometry.sqes(epoch.area()).gpa(),
        },
        doorbell: Some(eventfd_of(&doorbell).map_err(|error| refused(&error))?),
        completion: call,
    };
    let others = device.ends();
    match device.attach(config) {
        Ok(queue) => {
            // Pinned by now, whether for all rings or for this one.
            watch.expect_all();
            Ok(Built { ring: LiveRing { epoch, queue, doorbell }, call_generation })
        }
        Err(error) => {
            // The driver gets its areas back with the refusal. A ring that failed half-way has no I/O, so it ends soon.
            let ends = device.ends();
            ends.iter().filter(|end| !others.iter().any(|other| other.is_same(end))).for_each(await_end);
            Err(refused(&error))
        }
    }
}

/// The regions of a table, for pinning.
fn regions(memory: &DeviceMemory) -> Vec<RegionConfig> {
    let region = |region: &vm_memory::GuestRegionMmap<()>| {
        // The session makes them of files only.
        let file = region.file_offset()?;
        Some(RegionConfig {
            gpa: region.start_addr().0,
            len_bytes: region.len(),
            file: file.arc().clone(),
            file_offset_bytes: file.start(),
        })
    };
    memory.iter().filter_map(region).collect()
}

fn is_open(end: &RingEnd) -> bool {
    matches!(end.wait(Duration::ZERO), Err(StillRunning::Open))
}

fn await_end(end: &RingEnd) {
    // The thread that waits for it tells of one that takes long.
    while end.wait(PATIENCE).is_err() {}
}

fn refused(error: &RingError) -> Refused {
    let code = match error {
        RingError::AreaInUse { .. } | RingError::Memory(MemoryError::NotWanted) => ErrorCode::Busy,
        RingError::Memory(MemoryError::Memlock(_) | MemoryError::NoMemoryToPin { .. } | MemoryError::System { .. }) => {
            ErrorCode::Resources
        }
        RingError::Memory(_) => ErrorCode::Memory,
        RingError::IntegrityProfile { .. } | RingError::UnsafePolicy { .. } => ErrorCode::Mode,
        RingError::Create { source, .. } if source.raw_os_error() == Some(nix::libc::EFAULT) => ErrorCode::Memory,
        _ => ErrorCode::Resources,
    };
    Refused { code, why: error.to_string() }
}

fn eventfd() -> Result<EventFd, RingError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(RingError::system("making the eventfd of a doorbell"))
}

fn eventfd_of(eventfd: &EventFd) -> Result<EventFd, RingError> {
    eventfd.try_clone().map_err(RingError::system("duplicating the eventfd of a doorbell"))
}
