//! The ring host's side: carries out the orders of the engine, and knows nothing of queues and front-ends.
//!
//! Two threads take orders. One pins memory and makes rings, which takes long. The other one does what must not wait
//! for that. The guard (`guard`) is a third one. Everything that is ordered is checked as if the engine were hostile: code
//! that has taken the engine over gets rings with the operator's policy and size in memory that it can name, and
//! nothing else.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::channel::Channel;
use super::config::AttachConfig;
use super::guard::{self, GuardSender, WatchedRing};
use super::message::{Answer, Control, DecodeError, Encoded, HostEvent, Order, RingId, RingSpec};
use super::refused::Refused;
use crate::direct::{DirectDevice, DirectQueue, QueueConfig, QueuePlacement};
use crate::disk::DiskKind;
use crate::limits::{Memlock, cap_file_growth_at};
use crate::memory::{GuestMemory, MemoryError, RegionConfig};
use crate::ring::{RingConfig, RingEnd, RingError};
use crate::vhost_user::adopt_eventfd;

/// The most regions of guest RAM.
const REGIONS_MAX: usize = 4096;
/// The time between two looks at whether memory is still pinned.
const DRAIN_LOOK: Duration = Duration::from_micros(200);
/// The longest wait until leaving memory is pinned no more. An ordinary request takes less; for a longer one the engine
/// ends the ring, and waits for the end of the ring.
pub(crate) const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// The longest wait for earlier pins to go before the guest's memory is pinned: the kernel takes rings apart some time
/// after their close. Pins of I/O that hangs do not go, and the guest's memory is pinned beside them.
const SETTLE: Duration = Duration::from_millis(500);
/// The longest wait for the end of a ring at a time.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the threads of a host share.
#[derive(Debug)]
struct Shared {
    config: AttachConfig,
    /// The most rings that have not ended: two for each queue.
    rings_max: usize,
    /// Keeps the limit of file sizes (RLIMIT_FSIZE) at the size of a disk of this kind. `None`: the program does.
    growth: Option<DiskKind>,
    events: Channel,
    /// The rings that run.
    rings: Mutex<HashMap<RingId, Arc<DirectQueue>>>,
    /// The rings that have not ended.
    ring_count: AtomicUsize,
    /// Orders up to this number are cancelled.
    cancelled: AtomicU64,
}

/// The thread that pins memory and makes rings.
pub(super) struct Maker {
    shared: Arc<Shared>,
    orders: Channel,
    guard: GuardSender,
    device: Option<DirectDevice>,
    /// The files of the regions that are pinned or about to be, as long as those have them: rings that are ending keep theirs.
    files: HashMap<u64, Weak<File>>,
    /// The regions since the last order about memory.
    regions: Vec<RegionConfig>,
    /// A region was lost.
    fault: Option<Refused>,
}

/// The thread that is never busy for long.
pub(super) struct Controller {
    shared: Arc<Shared>,
    control: Channel,
    guard: GuardSender,
}

/// The two threads that take orders. The guard has started.
pub(super) fn new(
    config: AttachConfig,
    queue_count: u16,
    growth: Option<DiskKind>,
    [orders, control, events]: [Channel; 3],
) -> std::io::Result<(Maker, Controller)> {
    let shared = Arc::new(Shared {
        config,
        rings_max: 2 * usize::from(queue_count),
        growth,
        events,
        rings: Mutex::default(),
        ring_count: AtomicUsize::new(0),
        cancelled: AtomicU64::new(0),
    });
    let ending = Arc::clone(&shared);
    let guard = guard::start(move |id, outstanding| ending.end_for_excess(id, outstanding))?;
    let maker = Maker {
        shared: Arc::clone(&shared),
        orders,
        guard: guard.clone(),
        device: None,
        files: HashMap::new(),
        regions: Vec::new(),
        fault: None,
    };
    Ok((maker, Controller { shared, control, guard }))
}

impl Shared {
    /// Closes a ring that has more requests outstanding than it may have.
    fn end_for_excess(&self, id: RingId, outstanding: Option<u32>) {
        // First, so that the engine gives the queue no other ring when this one is gone.
        self.tell(HostEvent::Excess { id, outstanding });
        self.close(id);
    }

    fn close(&self, id: RingId) {
        // Not under the lock.
        let ring = self.rings().remove(&id);
        drop(ring);
    }

    fn tell(&self, event: HostEvent) {
        let Encoded { words, text, fds } = event.encode();
        // Without an engine the host ends.
        let _ = self.events.send(&words, &text, &fds);
    }

    fn rings(&self) -> MutexGuard<'_, HashMap<RingId, Arc<DirectQueue>>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maker {
    /// Carries out orders until the engine is gone. Says first that the host has started.
    pub(super) fn run(&mut self) {
        self.answer(Answer::Done);
        loop {
            let packet = match self.orders.receive() {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "the orders of the engine cannot be read");
                    break;
                }
            };
            match Order::decode(packet) {
                Ok(order) => self.carry_out(order),
                Err(error @ DecodeError::LostFile) => self.note_fault(error),
                Err(error) => {
                    tracing::error!(%error, "an order of the engine makes no sense");
                    break;
                }
            }
        }
    }

    /// The engine finds the end of the host from now on. For a host that has no process, whose end does this: the engine's thread for
    /// events keeps the socket for control open until then.
    pub(super) fn tell_end(&self) {
        self.shared.events.close_for_writing();
    }

    /// A file of a message was lost. A region has no answer, so the order that follows is refused.
    fn note_fault(&mut self, error: DecodeError) {
        self.fault = Some(Refused { code: ErrorCode::Resources, why: format!("for the ring process {error}") });
    }

    fn carry_out(&mut self, order: Order<OwnedFd>) {
        let answer = match order {
            Order::Region { gpa, len_bytes, file_offset_bytes, file_number, file } => {
                if self.regions.len() < REGIONS_MAX {
                    let known = self.files.get(&file_number).and_then(Weak::upgrade);
                    let file = known.unwrap_or_else(|| Arc::new(File::from(file)));
                    self.files.insert(file_number, Arc::downgrade(&file));
                    self.regions.push(RegionConfig { gpa, len_bytes, file, file_offset_bytes });
                }
                return;
            }
            Order::Pin { number, disk } => self.with_regions(|host, regions| host.pin(regions, disk, number)),
            Order::SetMemory { number } => self.with_regions(|host, regions| host.set_memory(regions, number)),
            Order::AwaitDrain => self.await_drain(),
            Order::MakeRing(spec) => self.make_ring(spec).unwrap_or_else(Answer::Refused),
            Order::Unpin => {
                self.device = None;
                self.forget_files();
                Answer::Done
            }
        };
        self.answer(answer);
    }

    fn answer(&self, answer: Answer) {
        let Encoded { words, text, fds } = answer.encode();
        // Without an engine the next read finds the end.
        let _ = self.orders.send(&words, &text, &fds);
    }

    fn with_regions(
        &mut self,
        carry_out: impl FnOnce(&mut Self, Vec<RegionConfig>) -> Result<(), RingError>,
    ) -> Answer {
        let regions = std::mem::take(&mut self.regions);
        let answer = match self.fault.take() {
            Some(refused) => Answer::Refused(refused),
            None => match carry_out(self, regions) {
                Ok(()) => Answer::Done,
                Err(RingError::Memory(MemoryError::NotWanted)) => Answer::NotWanted,
                Err(error) => Answer::Refused(Refused::from(&error)),
            },
        };
        self.forget_files();
        answer
    }

    /// Forgets the numbers of files that are closed.
    fn forget_files(&mut self) {
        self.files.retain(|_, file| file.strong_count() > 0);
    }

    fn pin(&mut self, regions: Vec<RegionConfig>, disk: OwnedFd, number: u64) -> Result<(), RingError> {
        let is_wanted = self.is_wanted(number);
        self.device = None;
        // Pinning measures what the process has pinned, so an earlier pin must not go meanwhile. Nor may the guest's
        // memory count twice against RLIMIT_MEMLOCK.
        let end = Instant::now() + SETTLE;
        let is_pinned = || Memlock::pinned_by_this_process().is_ok_and(|bytes| bytes > 0);
        while is_pinned() && is_wanted() && Instant::now() < end {
            thread::sleep(DRAIN_LOOK);
        }
        let memory = GuestMemory::new(regions)?;
        let AttachConfig { policy, direct, .. } = &self.shared.config;
        let device = DirectDevice::of_file(Arc::new(disk), &memory, policy.clone(), *direct, &is_wanted)?;
        self.device = Some(device);
        Ok(())
    }

    fn set_memory(&mut self, regions: Vec<RegionConfig>, number: u64) -> Result<(), RingError> {
        let is_wanted = self.is_wanted(number);
        let device = self.device.as_ref().ok_or(MemoryError::NoRegions)?;
        device.set_memory_while(regions, &is_wanted)
    }

    fn is_wanted(&self, number: u64) -> impl Fn() -> bool + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        // Numbers begin with 0, and nothing is cancelled at first.
        move || shared.cancelled.load(Ordering::Relaxed) <= number
    }

    /// Waits until the requests that were under way have ended, and with them their pins.
    fn await_drain(&self) -> Answer {
        let Some(device) = &self.device else { return Answer::Done };
        let end = Instant::now() + DRAIN_PATIENCE;
        loop {
            match device.has_drained() {
                Ok(true) => return Answer::Done,
                Ok(false) if Instant::now() < end => thread::sleep(DRAIN_LOOK),
                Ok(false) => return Answer::NotDrained,
                Err(error) => {
                    tracing::warn!(%error, "cannot tell whether I/O in leaving memory has ended");
                    return Answer::NotDrained;
                }
            }
        }
    }

    fn make_ring(&mut self, spec: RingSpec<OwnedFd>) -> Result<Answer, Refused> {
        if let Some(refused) = self.fault.take() {
            return Err(refused);
        }
        let refused = |error: &RingError| Refused::from(error);
        let device = self.device.as_ref().ok_or_else(|| refused(&MemoryError::NoRegions.into()))?;
        let slot_shift = device.memory().layout().slot_shift();
        let RingSpec { id, rings_gpa, sqes_gpa, sq_entries, cq_entries, doorbell, call } = spec;
        self.check(sq_entries, cq_entries, slot_shift)?;
        let config =
            QueueConfig::new(RingConfig { sq_entries, cq_entries }, QueuePlacement::GuestRam { rings_gpa, sqes_gpa })
                .doorbell(eventfd(doorbell)?)
                .completion(call.map(eventfd).transpose()?);
        let others = device.ends();
        let kernel_bytes = guard::kernel_bytes();
        // A ring that the guard cannot watch is closed.
        let attached = device.attach(config).and_then(|queue| {
            let gauge = queue.gauge()?;
            Ok((queue, gauge))
        });
        let (queue, gauge) = attached.map_err(|error| {
            // The refusal gives the driver its areas back. A ring that was made in part has no I/O, so it ends soon.
            let ends = device.ends();
            ends.iter().filter(|end| !others.iter().any(|other| other.is_same(end))).for_each(await_end);
            refused(&error)
        })?;
        let layout = *queue.layout();
        let end = queue.end();
        self.shared.ring_count.fetch_add(1, Ordering::Relaxed);
        self.shared.rings().insert(id, Arc::new(queue));
        let shared = Arc::clone(&self.shared);
        end.on_end(move || {
            shared.ring_count.fetch_sub(1, Ordering::Relaxed);
            shared.tell(HostEvent::Gone { id });
        });
        self.guard.watch(WatchedRing { id, cq_entries, gauge, kernel_bytes });
        self.shared.tell(HostEvent::Runs { id });
        Ok(Answer::Made { layout, slot_shift })
    }

    /// What an honest engine keeps to.
    fn check(&self, sq_entries: u32, cq_entries: u32, slot_shift: u32) -> Result<(), Refused> {
        let limits = self.shared.config.limits(slot_shift);
        if sq_entries > limits.sq_entries_max || cq_entries > limits.cq_entries_max {
            let why = format!(
                "a ring of {sq_entries} SQ and {cq_entries} CQ entries is larger than this memory allows ({} and {})",
                limits.sq_entries_max, limits.cq_entries_max
            );
            return Err(Refused { code: ErrorCode::Entries, why });
        }
        if self.shared.ring_count.load(Ordering::Relaxed) >= self.shared.rings_max {
            let why = format!("there are {} rings that have not ended", self.shared.rings_max);
            return Err(Refused { code: ErrorCode::Resources, why });
        }
        Ok(())
    }
}

impl Controller {
    /// Carries out orders until the engine is gone.
    pub(super) fn run(self) {
        loop {
            let packet = match self.control.receive() {
                Ok(Some(packet)) => packet,
                Ok(None) => return,
                Err(error) => return tracing::error!(%error, "the orders of the engine cannot be read"),
            };
            match Control::decode(packet) {
                Ok(order) => self.carry_out(order),
                // Only one of the orders has a file.
                Err(error @ DecodeError::LostFile) => {
                    let why = format!("for the ring process {error}");
                    self.answer(Answer::Refused(Refused { code: ErrorCode::Resources, why }));
                }
                Err(error) => return tracing::error!(%error, "an order of the engine makes no sense"),
            }
        }
    }

    fn carry_out(&self, order: Control<OwnedFd>) {
        match order {
            Control::SetCall { id, call } => {
                let answer = self.set_call(id, call).map_or_else(Answer::Refused, |()| Answer::Done);
                self.answer(answer);
            }
            Control::Close { id } => self.shared.close(id),
            Control::Suspect { id } => self.guard.suspect(id),
            Control::Cancel { number } => {
                self.shared.cancelled.fetch_max(number.saturating_add(1), Ordering::Relaxed);
            }
            Control::SetDiskSize { size_bytes } => self.follow_growth(size_bytes),
        }
    }

    fn set_call(&self, id: RingId, call: Option<OwnedFd>) -> Result<(), Refused> {
        let call = call.map(eventfd).transpose()?;
        // Not under the lock: the guest decides how long the kernel is busy with a batch.
        let ring = self.shared.rings().get(&id).cloned();
        // A ring that the guard has closed signals nothing any more.
        ring.map_or(Ok(()), |ring| ring.set_completion(call.as_ref())).map_err(|error| Refused::from(&error))
    }

    /// The kernel refuses what rings of guests write beyond the end of the disk.
    fn follow_growth(&self, size_bytes: u64) {
        let Some(kind) = self.shared.growth else { return };
        if let Err(error) = cap_file_growth_at(kind, size_bytes) {
            tracing::warn!(%error, "cannot set RLIMIT_FSIZE of the ring process: writes of rings to the end of the disk will fail");
        }
    }

    fn answer(&self, answer: Answer) {
        let Encoded { words, text, fds } = answer.encode();
        // Without an engine the next read finds the end.
        let _ = self.control.send(&words, &text, &fds);
    }
}

fn eventfd(file: OwnedFd) -> Result<EventFd, Refused> {
    adopt_eventfd(file).map_err(|error| Refused { code: ErrorCode::Resources, why: error.to_string() })
}

fn await_end(end: &RingEnd) {
    // The ring closer logs an end that takes long.
    while end.wait(PATIENCE).is_err() {}
}
