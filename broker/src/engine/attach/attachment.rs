//! A queue whose ATTACH is pending.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use ringpass_guest_abi::SegmentLimits;
use ringpass_guest_abi::attach::{Geometry, GpaRange};
use ringpass_guest_abi::control::{
    ACKNOWLEDGED_OFFSET_BYTES, ANNOUNCED_OFFSET_BYTES, DETACH_OFFSET_BYTES, END_REASON_OFFSET_BYTES, MODE_DIRECT,
    RING_OFFSET_BYTES, RingRecord,
};
use ringpass_guest_abi::epoch::device::{AreaUse, Machine};
use ringpass_guest_abi::epoch::{Announcement, Area, Epoch};
use ringpass_guest_abi::request::ErrorCode;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::cancellation::CancellationToken;
use super::request::PendingAttachRequest;
use super::ring_executor::RingExecutor;
use crate::vhost_user::DeviceMemory;
use crate::virtqueue::DirtyLog;

/// Tells one attachment of a queue from the next: a ring that was requested for an earlier one may come late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct AttachmentId(pub(in crate::engine) u64);

/// A queue whose ATTACH is pending.
#[derive(Debug)]
pub(in crate::engine) struct Attachment {
    pub(in crate::engine) id: AttachmentId,
    pub(in crate::engine) machine: Machine,
    pub(in crate::engine) geometry: Geometry,
    /// ATTACH itself.
    pub(in crate::engine) attach: PendingAttachRequest,
    /// The rings that run, by their area.
    pub(in crate::engine) rings: [Option<LiveRing>; 2],
    /// Why the next epoch ends.
    pub(in crate::engine) end_reason: ErrorCode,
    /// A ring that is to be made.
    pub(in crate::engine) pending: Option<PendingRing>,
    /// Counts call eventfds: the builder may make a ring with one that has been replaced.
    pub(in crate::engine) call_generation: u32,
    /// Has the control page.
    memory: Rc<DeviceMemory>,
    /// Had the control page before, and is kept while a ring may be in it: the kernel writes to the ring's areas until
    /// the ring is gone.
    former_memory: Vec<Rc<DeviceMemory>>,
}

/// A ring that is to be made.
#[derive(Debug)]
pub(in crate::engine) enum PendingRing {
    /// The worker requests the ring when the queue is enabled.
    Deferred(Epoch),
    /// The worker has requested the ring of the builder, which may have claimed the request.
    Requested(CancellationToken),
}

/// A ring that runs.
#[derive(Debug)]
pub(in crate::engine) struct LiveRing {
    pub(in crate::engine) epoch: Epoch,
    pub(in crate::engine) executor: RingExecutor,
    /// Makes the doorbell thread look at the ring.
    pub(in crate::engine) doorbell: EventFd,
}

/// What happened to the ranges of an attachment when guest memory changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Ranges {
    /// They are the same memory as before.
    Stayed,
    /// They are in other memory: a ring in the memory before is of no use.
    Moved,
    /// Some of them are not in guest memory any more.
    Left,
}

impl Attachment {
    /// `memory` has all ranges of `geometry`.
    pub(in crate::engine) fn new(
        id: AttachmentId,
        geometry: Geometry,
        attach: PendingAttachRequest,
        memory: Rc<DeviceMemory>,
    ) -> Self {
        Self {
            id,
            machine: Machine::new(),
            geometry,
            attach,
            rings: [None, None],
            end_reason: ErrorCode::None,
            pending: None,
            call_generation: 0,
            memory,
            former_memory: Vec::new(),
        }
    }

    /// Whether no ring can touch guest memory: none runs, none that was closed is still ending, and none is being made.
    pub(in crate::engine) fn is_quiet(&self) -> bool {
        Area::ALL.into_iter().all(|area| match self.machine.area(area) {
            AreaUse::Free => true,
            AreaUse::Building => !matches!(self.pending, Some(PendingRing::Requested(_))),
            AreaUse::Live | AreaUse::Dying => false,
        })
    }

    /// Cancels the ring that is to be made. False: there is none, or the builder makes it and will tell the outcome.
    pub(in crate::engine) fn cancel_pending_ring(&mut self) -> bool {
        let is_cancelled = match &self.pending {
            Some(PendingRing::Deferred(_)) => true,
            Some(PendingRing::Requested(token)) => token.cancel(),
            None => false,
        };
        if is_cancelled {
            self.pending = None;
        }
        is_cancelled
    }

    /// Takes out the epoch of the ring that waits for the queue to be enabled.
    pub(in crate::engine) fn take_deferred(&mut self) -> Option<Epoch> {
        let deferred = self.pending.take_if(|pending| matches!(pending, PendingRing::Deferred(_)));
        match deferred {
            Some(PendingRing::Deferred(epoch)) => Some(epoch),
            Some(PendingRing::Requested(_)) | None => None,
        }
    }

    /// The ring that the driver submits to, if there is one.
    pub(in crate::engine) fn live(&self) -> Option<&LiveRing> {
        self.rings.iter().flatten().next()
    }

    /// The front-end gave other guest memory, and the control page is from now on where the guest has it. If a range is
    /// in guest memory no more, the control page stays where it was until ATTACH completes; completing ATTACH neither
    /// reads nor writes it.
    pub(in crate::engine) fn move_to(&mut self, memory: &Rc<DeviceMemory>) -> Ranges {
        let ranges = self.geometry.ranges();
        let addresses = |memory: &DeviceMemory| ranges.map(|(_, range)| host_address(memory, &range));
        let now = addresses(memory);
        if now.contains(&None) {
            return Ranges::Left;
        }
        let former = std::mem::replace(&mut self.memory, Rc::clone(memory));
        if now == addresses(&former) {
            return Ranges::Stayed;
        }
        self.former_memory.push(former);
        self.forget_former_memory();
        Ranges::Moved
    }

    /// Lets former memory go if no ring can be in it. The worker calls this when a ring may be gone, before it requests
    /// the next one. True: memory was let go.
    pub(in crate::engine) fn forget_former_memory(&mut self) -> bool {
        let forgets = self.is_quiet() && !self.former_memory.is_empty();
        if forgets {
            self.former_memory.clear();
        }
        forgets
    }

    /// The two words with which an attachment begins: the announcement word as found, and whether the driver has set
    /// the detach word.
    pub(in crate::engine) fn initial_words(&self) -> (u32, bool) {
        (self.load(ANNOUNCED_OFFSET_BYTES), self.is_wanted_back())
    }

    /// Whether the driver has set the detach word.
    pub(in crate::engine) fn is_wanted_back(&self) -> bool {
        self.load(DETACH_OFFSET_BYTES) != 0
    }

    /// The driver's acknowledgement word.
    pub(in crate::engine) fn acknowledged(&self) -> u32 {
        self.load(ACKNOWLEDGED_OFFSET_BYTES)
    }

    /// Tells the driver where the parts of its next ring are, how its SQEs name guest memory and what they may transfer.
    /// The worker does this before it announces the ring.
    pub(in crate::engine) fn describe_ring(
        &self,
        executor: &RingExecutor,
        segments: &SegmentLimits,
        log: Option<&DirtyLog>,
    ) {
        let record = RingRecord::new(executor.layout(), executor.addressing(), segments, MODE_DIRECT).to_bytes();
        for (offset_bytes, word) in (RING_OFFSET_BYTES..).step_by(4).zip(record.chunks_exact(4)) {
            let word = u32::from_le_bytes(word.try_into().expect("chunks of four bytes"));
            self.store(offset_bytes, word, Ordering::Relaxed, log);
        }
    }

    /// Stores the announcement for the driver.
    pub(in crate::engine) fn announce(&self, announcement: Announcement, log: Option<&DirtyLog>) {
        self.store(END_REASON_OFFSET_BYTES, self.end_reason as u32, Ordering::Relaxed, log);
        self.store(ANNOUNCED_OFFSET_BYTES, announcement.to_word(), Ordering::Release, log);
    }

    /// Reads a word of the control page, which is in guest memory: ATTACH was checked.
    fn load(&self, offset_bytes: u32) -> u32 {
        let word = self.memory.load::<u32>(self.word_gpa(offset_bytes), Ordering::Acquire);
        word.map(u32::from_le).unwrap_or_default()
    }

    fn store(&self, offset_bytes: u32, word: u32, order: Ordering, log: Option<&DirtyLog>) {
        let gpa = self.word_gpa(offset_bytes);
        let _ = self.memory.store(word.to_le(), gpa, order);
        if let Some(log) = log {
            log.mark(gpa.0, size_of::<u32>() as u64);
        }
    }

    fn word_gpa(&self, offset_bytes: u32) -> GuestAddress {
        GuestAddress(self.geometry.control().gpa() + u64::from(offset_bytes))
    }

    /// Takes out the ring of an area.
    pub(in crate::engine) fn take_ring(&mut self, area: Area) -> Option<LiveRing> {
        self.rings[area.index()].take()
    }
}

/// Where a range is in this process, if it lies in one region of `memory`.
pub(in crate::engine) fn host_address(memory: &DeviceMemory, range: &GpaRange) -> Option<*mut u8> {
    let region = memory.find_region(GuestAddress(range.gpa()))?;
    let end_gpa = region.start_addr().0.checked_add(region.len())?;
    if range.end_gpa() > end_gpa {
        return None;
    }
    memory.get_host_address(GuestAddress(range.gpa())).ok()
}
