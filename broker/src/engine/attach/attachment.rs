//! A queue with a pending ATTACH.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use ringpass_guest_abi::RingLayout;
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

use super::{Reply, Ticket};
use crate::direct::DirectQueue;
use crate::vhost_user::DeviceMemory;
use crate::virtqueue::DirtyLog;

/// Tells one attachment of a queue from the next: what was ordered for an earlier one may come late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct AttachmentId(pub(in crate::engine) u64);

/// A queue with a pending ATTACH.
#[derive(Debug)]
pub(in crate::engine) struct Attachment {
    pub(in crate::engine) id: AttachmentId,
    pub(in crate::engine) machine: Machine,
    pub(in crate::engine) geometry: Geometry,
    /// ATTACH itself.
    pub(in crate::engine) attach: Reply,
    /// Rings that run, by their area.
    pub(in crate::engine) rings: [Option<LiveRing>; 2],
    /// Why the next end comes.
    pub(in crate::engine) end_reason: ErrorCode,
    /// A ring that is to be made and can still be forgone at once.
    pub(in crate::engine) pending: Option<PendingRing>,
    /// Counts call eventfds: a ring may be built for one that has been replaced.
    pub(in crate::engine) call_generation: u32,
    /// Where the control page is.
    memory: Rc<DeviceMemory>,
    /// Where it was, while a ring is there still: the kernel writes to its areas until it is gone.
    former_memory: Vec<Rc<DeviceMemory>>,
}

/// A ring that is to be made.
#[derive(Debug)]
pub(in crate::engine) enum PendingRing {
    /// Once the queue is enabled.
    Deferred(Epoch),
    /// By the builder, who may have begun.
    Ordered(Ticket),
}

/// A ring that runs.
#[derive(Debug)]
pub(in crate::engine) struct LiveRing {
    pub(in crate::engine) epoch: Epoch,
    pub(in crate::engine) queue: DirectQueue,
    /// Has the doorbell thread look at the ring.
    pub(in crate::engine) doorbell: EventFd,
}

/// What became of the ranges of an attachment when guest memory changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Ranges {
    /// They are the memory that they were.
    Stayed,
    /// They are in other memory: a ring in the old one is of no use.
    Moved,
    /// Some are nowhere.
    Left,
}

impl Attachment {
    /// `memory` has all ranges of `geometry`.
    pub(in crate::engine) fn new(
        id: AttachmentId,
        geometry: Geometry,
        attach: Reply,
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

    /// Whether no ring exists, nor one that is closed and still under way, nor one that is being made.
    pub(in crate::engine) fn is_quiet(&self) -> bool {
        Area::ALL.into_iter().all(|area| match self.machine.area(area) {
            AreaUse::Free => true,
            AreaUse::Building => !matches!(self.pending, Some(PendingRing::Ordered(_))),
            AreaUse::Live | AreaUse::Dying => false,
        })
    }

    /// Forgoes the ring that is to be made. False: there is none, or it is being made and the outcome will be told.
    pub(in crate::engine) fn forgo_ring(&mut self) -> bool {
        let is_forgone = match &self.pending {
            Some(PendingRing::Deferred(_)) => true,
            Some(PendingRing::Ordered(ticket)) => ticket.withdraw(),
            None => false,
        };
        if is_forgone {
            self.pending = None;
        }
        is_forgone
    }

    /// The epoch of the ring that waits for the queue to be enabled. It does not wait any more.
    pub(in crate::engine) fn take_deferred(&mut self) -> Option<Epoch> {
        let deferred = self.pending.take_if(|pending| matches!(pending, PendingRing::Deferred(_)));
        match deferred {
            Some(PendingRing::Deferred(epoch)) => Some(epoch),
            Some(PendingRing::Ordered(_)) | None => None,
        }
    }

    /// The ring that the driver submits to, if there is one.
    pub(in crate::engine) fn live(&self) -> Option<&LiveRing> {
        self.rings.iter().flatten().next()
    }

    /// Guest memory is another one now, and the control page is where the guest has it. If a range is nowhere any more, it
    /// stays where it was until ATTACH completes, for which nothing is said or asked in the control page.
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

    /// To be called when a ring may be gone, before the next one is ordered. True: something was let go.
    pub(in crate::engine) fn forget_former_memory(&mut self) -> bool {
        let forgets = self.is_quiet() && !self.former_memory.is_empty();
        if forgets {
            self.former_memory.clear();
        }
        forgets
    }

    /// The two words that an ATTACH begins with.
    pub(in crate::engine) fn found(&self) -> (u32, bool) {
        (self.load(ANNOUNCED_OFFSET_BYTES), self.load(DETACH_OFFSET_BYTES) != 0)
    }

    /// The driver's word.
    pub(in crate::engine) fn acknowledged(&self) -> u32 {
        self.load(ACKNOWLEDGED_OFFSET_BYTES)
    }

    /// Tells the driver where the parts of its next ring are, before that is announced.
    pub(in crate::engine) fn describe_ring(&self, layout: &RingLayout, log: Option<&DirtyLog>) {
        let record = RingRecord::new(layout, MODE_DIRECT).to_bytes();
        for (offset_bytes, word) in (RING_OFFSET_BYTES..).step_by(4).zip(record.chunks_exact(4)) {
            let word = u32::from_le_bytes(word.try_into().expect("chunks of four bytes"));
            self.store(offset_bytes, word, Ordering::Relaxed, log);
        }
    }

    /// Announces.
    pub(in crate::engine) fn announce(&self, announcement: Announcement, log: Option<&DirtyLog>) {
        self.store(END_REASON_OFFSET_BYTES, self.end_reason as u32, Ordering::Relaxed, log);
        self.store(ANNOUNCED_OFFSET_BYTES, announcement.to_word(), Ordering::Release, log);
    }

    /// A word of the control page. That it is there was checked.
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

    /// Takes the ring of an area out.
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
