//! The ring host's side: carries out the orders of the engine, and knows nothing of queues and front-ends.
//!
//! Two threads take orders. One pins memory and makes rings, which takes long. The other one does what must not wait
//! for that. The guard (`guard`) is a third one. Everything that is ordered is checked as if the engine were hostile: code
//! that has taken the engine over gets rings with the operator's policy and size in memory that it can name, and
//! nothing else.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, Packet};
use super::config::AttachConfig;
use super::guard::{self, GuardSender, WatchedRing};
use super::message::{Answer, Control, DecodeError, Encoded, HostEvent, Order, RingId, RingSpec};
use super::outbox::Outbox;
use super::own_disk::OwnDisk;
use super::refused::Refused;
use crate::direct::{DirectDevice, DirectQueue, QueueConfig, QueuePlacement};
use crate::limits::{Memlock, cap_file_growth_at};
use crate::memory::{GuestMemory, MemoryError, RegionConfig};
use crate::ring::{RingConfig, RingEnd, RingError};
use crate::vhost_user::adopt_eventfd;

/// The most regions of guest RAM.
const REGIONS_MAX: usize = 4096;
/// The most events that the engine has not taken. An honest engine takes all of them at once.
const BACKLOG_MAX: usize = 65536;
/// The time between two looks at whether memory is still pinned.
const DRAIN_LOOK: Duration = Duration::from_micros(200);
/// The longest wait until leaving memory is pinned no more. An ordinary request takes less. If a request takes longer, the engine ends
/// the ring and waits for its end.
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
    /// The only disk that rings get, and whose size limits the sizes of files. `None`: any disk, and the program limits sizes.
    own_disk: Option<OwnDisk>,
    events: Outbox,
    /// The rings that run.
    rings: Mutex<HashMap<RingId, Arc<DirectQueue>>>,
    /// The rings that have not ended.
    ring_count: AtomicUsize,
    /// One more than the largest number of an order that was cancelled.
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

/// The thread for everything that must not wait for pinning.
pub(super) struct Controller {
    shared: Arc<Shared>,
    control: Channel,
    guard: GuardSender,
}

/// The two threads that take orders. The guard has started.
pub(super) fn new(
    config: AttachConfig,
    queue_count: u16,
    own_disk: Option<OwnDisk>,
    [orders, control, events]: [Channel; 3],
) -> std::io::Result<(Maker, Controller)> {
    let shared = Arc::new(Shared {
        config,
        rings_max: 2 * usize::from(queue_count),
        own_disk,
        events: Outbox::start(events)?,
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
        self.events.put(event);
    }

    fn rings(&self) -> MutexGuard<'_, HashMap<RingId, Arc<DirectQueue>>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maker {
    /// Tells the engine that the host has started, and carries out its orders until the engine is gone. False: the orders
    /// cannot be read or make no sense; the log has the reason.
    pub(super) fn run(&mut self) -> bool {
        self.answer(Answer::Done);
        loop {
            match next_order(&self.orders, Order::decode) {
                Next::Order(order) => self.carry_out(order),
                // A region has no answer, so the order that follows is refused.
                Next::LostFile(refused, is_answered) if !is_answered => self.fault = Some(refused),
                Next::LostFile(refused, _) => {
                    self.regions.clear();
                    self.fault = None;
                    self.answer(Answer::Refused(refused));
                }
                Next::End { is_regular } => return is_regular,
            }
        }
    }

    /// The engine finds the end of the host from now on. For a host that has no process, whose end does this: the engine's thread for
    /// events keeps the socket for control open until then.
    pub(super) fn tell_end(&self) {
        self.shared.events.close();
    }

    fn carry_out(&mut self, order: Order<OwnedFd>) {
        let answer = match order {
            Order::Region { gpa, len_bytes, file_offset_bytes, file_number, file } => {
                if self.regions.len() == REGIONS_MAX {
                    let why = format!("the guest has more than {REGIONS_MAX} regions of memory");
                    self.fault = Some(Refused { code: ErrorCode::Resources, why });
                } else {
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
        if let Some(own) = self.shared.own_disk {
            own.check(disk.as_fd())?;
        }
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
        if self.shared.rings().contains_key(&id) {
            return Err(Refused { code: ErrorCode::Resources, why: "the ring has the number of another".into() });
        }
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
        if self.shared.events.backlog() > BACKLOG_MAX {
            let why = "the engine does not take what the ring process tells of its rings".into();
            return Err(Refused { code: ErrorCode::Resources, why });
        }
        if self.shared.ring_count.load(Ordering::Relaxed) >= self.shared.rings_max {
            let why = format!("there are {} rings that have not ended", self.shared.rings_max);
            return Err(Refused { code: ErrorCode::Resources, why });
        }
        Ok(())
    }
}

impl Controller {
    /// As [`Maker::run`].
    pub(super) fn run(&self) -> bool {
        loop {
            match next_order(&self.control, Control::decode) {
                Next::Order(order) => self.carry_out(order),
                // The only order with a file is answered.
                Next::LostFile(refused, _) => self.answer(Answer::Refused(refused)),
                Next::End { is_regular } => return is_regular,
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
            // Numbers of other rings would pile up.
            Control::Suspect { id } if self.shared.rings().contains_key(&id) => self.guard.suspect(id),
            Control::Suspect { .. } => {}
            Control::Cancel { number } => {
                self.shared.cancelled.fetch_max(number.saturating_add(1), Ordering::Relaxed);
            }
            Control::SetDiskSize { size_bytes } => {
                self.follow_growth(size_bytes);
                self.answer(Answer::Done);
            }
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
        let Some(disk) = self.shared.own_disk else { return };
        if let Err(error) = cap_file_growth_at(disk.kind, size_bytes) {
            tracing::warn!(%error, "cannot set RLIMIT_FSIZE of the ring process: writes of rings to the end of the disk will fail");
        }
    }

    fn answer(&self, answer: Answer) {
        let Encoded { words, text, fds } = answer.encode();
        // Without an engine the next read finds the end.
        let _ = self.control.send(&words, &text, &fds);
    }
}

/// What came over a socket.
enum Next<T> {
    Order(T),
    /// An order without its file, and whether the engine waits for an answer.
    LostFile(Refused, bool),
    End {
        is_regular: bool,
    },
}

fn next_order<T>(channel: &Channel, decode: impl FnOnce(Packet) -> Result<T, DecodeError>) -> Next<T> {
    let packet = match channel.receive() {
        Ok(Some(packet)) => packet,
        Ok(None) => return Next::End { is_regular: true },
        Err(error) => {
            tracing::error!(%error, "the orders of the engine cannot be read");
            return Next::End { is_regular: false };
        }
    };
    match decode(packet) {
        Ok(order) => Next::Order(order),
        Err(error @ DecodeError::LostFile { is_answered }) => {
            let why = format!("the ring process did not get a file: {error}");
            Next::LostFile(Refused { code: ErrorCode::Resources, why }, is_answered)
        }
        Err(error) => {
            tracing::error!(%error, "an order of the engine makes no sense");
            Next::End { is_regular: false }
        }
    }
}

fn eventfd(file: OwnedFd) -> Result<EventFd, Refused> {
    adopt_eventfd(file).map_err(|error| Refused { code: ErrorCode::Resources, why: error.to_string() })
}

fn await_end(end: &RingEnd) {
    // The ring closer logs an end that takes long.
    while end.wait(PATIENCE).is_err() {}
}
