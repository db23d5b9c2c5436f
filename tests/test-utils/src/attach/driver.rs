//! The driver of a queue that is attached.

use std::{thread, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest_abi::{
    Cqe, DriverRing, FixedAddressing, RingLayout, SLOT_SHIFT_MIN, SegmentLimits, Sqe,
    attach::{AttachPayload, Lengths},
    control::DriverControl,
    epoch::driver::{Action, Event, Machine, State},
    request::{ErrorCode, T_ARM, T_ATTACH},
};

use super::{Attachment, Buffers, CQ_ENTRIES, Found, RequestPlaces, SQ_ENTRIES, Words, attachment::PAGE_BYTES};
use crate::{PATIENCE, descriptor::Descriptor, ram::Arena, vring::DriverVring, wait_until};

const ARM_PLACE: u64 = 0;
const ATTACH_PLACE: u64 = 1;
/// For requests that are neither.
const OTHER_PLACE: u64 = 2;

/// The driver of a queue that is attached.
#[derive(Debug)]
pub struct RingDriver {
    pub(super) vring: DriverVring,
    /// Of the last ring. Before the first one any rule will do: a new ring adapts the requests that wait for it.
    pub(super) addressing: FixedAddressing,
    segments: Option<SegmentLimits>,
    pub(super) memory: Attachment,
    control: DriverControl<Words>,
    pub(super) machine: Machine,
    pub(super) ring: Option<DriverRing<Words>>,
    /// Requests without a completion, in their order: if the ring ends, the driver does not know whether they were
    /// executed.
    pub(super) outstanding: Vec<Sqe>,
    pub(super) completions: Vec<Cqe>,
    attach_head: Option<u16>,
    is_device_broken: bool,
}

impl RingDriver {
    /// The driver of an empty queue. It takes its pages from `arena`.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn new(vring: DriverVring, arena: &mut Arena) -> Result<Self> {
        Ok(Self::with_memory(vring, Attachment::take(arena)?))
    }

    /// How many places its requests take.
    pub const PLACES: u64 = Attachment::PLACES;

    /// The same with its requests in other memory.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn with_requests(vring: DriverVring, arena: &mut Arena, places: RequestPlaces) -> Result<Self> {
        Ok(Self::with_memory(vring, Attachment::with_requests(arena, places)?))
    }

    /// The driver of an empty queue, with this memory.
    pub fn with_memory(vring: DriverVring, memory: Attachment) -> Self {
        let control = DriverControl::new(Words::new(vring.ram(), memory.payload.control_gpa.get(), 0));
        Self {
            vring,
            addressing: FixedAddressing::new(1 << 30, SLOT_SHIFT_MIN).expect("in range"),
            segments: None,
            memory,
            control,
            machine: Machine::new(),
            ring: None,
            outstanding: Vec::new(),
            completions: Vec::new(),
            attach_head: None,
            is_device_broken: false,
        }
    }

    /// The queue.
    pub fn vring(&mut self) -> &mut DriverVring {
        &mut self.vring
    }

    /// The queue, for a driver that goes on without rings.
    pub fn into_vring(self) -> DriverVring {
        self.vring
    }

    /// The payload of its ATTACH.
    pub fn payload(&self) -> AttachPayload {
        self.memory.payload
    }

    /// Its buffers.
    pub fn buffers(&self) -> Buffers {
        self.memory.buffers
    }

    /// Requests without a completion.
    pub fn outstanding(&self) -> &[Sqe] {
        &self.outstanding
    }

    /// Begins anew on an empty queue, as after a reset of the device, and forgets outstanding requests.
    ///
    /// # Errors
    ///
    /// The queue is not in RAM.
    pub fn restart(&mut self) -> Result<()> {
        self.forget();
        self.outstanding.clear();
        self.vring.reset()
    }

    fn forget(&mut self) {
        self.ring = None;
        self.machine = Machine::new();
        self.attach_head = None;
        self.is_device_broken = false;
        self.completions.clear();
    }

    /// Sends ARM and ATTACH, and waits until the ring is open.
    ///
    /// # Errors
    ///
    /// The ring does not open.
    pub fn attach(&mut self) -> Result<()> {
        self.send_both(&self.payload().to_bytes())?;
        self.wait_open()
    }

    /// Sends ARM and an ATTACH with this payload.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_both(&mut self, payload: &[u8]) -> Result<()> {
        self.forget();
        self.control.clear();
        self.send_arm()?;
        self.send_attach(payload)
    }

    /// Sends ARM.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_arm(&mut self) -> Result<()> {
        self.send_at(ARM_PLACE, T_ARM, &[]).map(drop)
    }

    /// Sends ATTACH.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_attach(&mut self, payload: &[u8]) -> Result<()> {
        self.attach_head = Some(self.send_at(ATTACH_PLACE, T_ATTACH, payload)?);
        Ok(())
    }

    /// Sends a request of virtio-blk, with its header and status in a place. Returns its head.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_block(&mut self, kind: u32, sector: u64, data: Descriptor) -> Result<u16> {
        self.memory.requests.send_block(&mut self.vring, OTHER_PLACE, kind, sector, data)
    }

    /// Sends any attach request, in a place of its own. Returns its head.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_other(&mut self, kind: u32, payload: &[u8]) -> Result<u16> {
        self.send_at(OTHER_PLACE, kind, payload)
    }

    fn send_at(&mut self, place: u64, kind: u32, payload: &[u8]) -> Result<u16> {
        self.memory.requests.send(&mut self.vring, place, kind, payload)
    }

    /// Waits for the end of ATTACH, and takes ATTACH and ARM back.
    ///
    /// # Errors
    ///
    /// ATTACH does not end.
    pub fn wait_attach(&mut self) -> Result<Found> {
        let attach = self.attach_head.take().context("ATTACH was not sent")?;
        loop {
            let used = self.vring.next_used_by_spinning(PATIENCE).context("ATTACH has not ended")?;
            if used.head == attach {
                break;
            }
        }
        self.reap();
        self.ring = None;
        self.machine = Machine::new();
        self.memory.requests.outcome(&self.vring, ATTACH_PLACE)
    }

    /// Whether ATTACH has ended. Does not take ARM.
    ///
    /// # Errors
    ///
    /// The queue is not in RAM.
    pub fn has_attach_ended(&self) -> Result<bool> {
        Ok(self.attach_head.is_some() && self.vring.used_idx()? == self.vring.next_avail())
    }

    /// The device's word.
    pub fn announced(&self) -> u32 {
        self.control.announced()
    }

    /// Why the last ring ended.
    pub fn end_reason(&self) -> Option<ErrorCode> {
        self.control.end_reason()
    }

    /// Tells the device that the driver wants its queue back.
    ///
    /// # Errors
    ///
    /// The doorbell cannot be rung.
    pub fn detach(&mut self) -> Result<()> {
        self.control.set_detach();
        self.vring.kick()
    }

    /// The state of the driver's epoch machine.
    pub fn state(&self) -> State {
        self.machine.state()
    }

    /// The number of the epoch whose ring the driver uses.
    pub fn epoch(&self) -> Option<u32> {
        match self.machine.state() {
            State::Running { epoch } => Some(epoch.number()),
            _ => None,
        }
    }

    /// How the SQEs of the last ring name memory.
    pub fn addressing(&self) -> FixedAddressing {
        self.addressing
    }

    /// What the SQEs of the last ring may transfer.
    pub fn segments(&self) -> Option<SegmentLimits> {
        self.segments
    }

    /// Where the parts of the ring are that the driver uses.
    pub fn ring_layout(&self) -> Option<&RingLayout> {
        self.ring.as_ref().map(DriverRing::layout)
    }

    /// Whether the device has written nothing to the answer and the status of ATTACH.
    ///
    /// # Errors
    ///
    /// The request is not in RAM.
    pub fn is_attach_answer_untouched(&self) -> Result<bool> {
        self.memory.requests.is_untouched(&self.vring, ATTACH_PLACE)
    }

    /// The outcome of the request that [`send_other`](Self::send_other) sent.
    ///
    /// # Errors
    ///
    /// The request is not in RAM.
    pub fn other_outcome(&self) -> Result<Found> {
        self.memory.requests.outcome(&self.vring, OTHER_PLACE)
    }

    /// The status of the request that [`send_block`](Self::send_block) sent.
    ///
    /// # Errors
    ///
    /// The request is not in RAM.
    pub fn block_status(&self) -> Result<u8> {
        Ok(self.memory.requests.answer(&self.vring, OTHER_PLACE)?.1)
    }

    /// Reads the device's word and does what it says.
    ///
    /// # Errors
    ///
    /// The device broke the protocol.
    pub fn look(&mut self) -> Result<()> {
        self.step(Event::Announced(self.control.announced()))?;
        ensure!(!self.is_device_broken, "the device announced {:#x}", self.control.announced());
        Ok(())
    }

    fn step(&mut self, event: Event) -> Result<()> {
        for action in self.machine.step(event) {
            match action {
                Action::Start(epoch) => {
                    let lengths = Lengths::of(SQ_ENTRIES, CQ_ENTRIES, PAGE_BYTES);
                    let record = self.control.ring();
                    let refused = |error| anyhow::anyhow!("the ring's record: {error:?}");
                    let layout = record.layout(SQ_ENTRIES, CQ_ENTRIES, &lengths).map_err(refused)?;
                    let before = std::mem::replace(&mut self.addressing, record.addressing().map_err(refused)?);
                    self.segments = Some(record.segments().map_err(refused)?);
                    let area = self.payload().areas[epoch.area().index()];
                    let words = Words::new(self.vring.ram(), area.rings_gpa.get(), area.sqes_gpa.get());
                    self.ring = Some(DriverRing::new(words, layout).context("the ring's layout")?);
                    for sqe in std::mem::take(&mut self.outstanding) {
                        self.submit(readdressed(sqe, before, self.addressing))?;
                    }
                }
                Action::Drain => {
                    let end = Instant::now() + PATIENCE;
                    while !self.outstanding.is_empty() {
                        self.reap();
                        ensure!(Instant::now() < end, "outstanding requests do not end");
                        thread::yield_now();
                    }
                    self.step(Event::Drained)?;
                }
                Action::Reap(_) => {
                    self.reap();
                    self.ring = None;
                    self.step(Event::Reaped)?;
                }
                Action::Acknowledge(announcement) => {
                    self.control.acknowledge(announcement);
                    self.vring.kick()?;
                }
                Action::RequestDetach => self.detach()?,
                Action::Release => {}
                Action::Reset => self.is_device_broken = true,
            }
        }
        Ok(())
    }

    /// Waits until the driver may submit requests.
    ///
    /// # Errors
    ///
    /// The ring does not open, or ATTACH ends.
    pub fn wait_open(&mut self) -> Result<()> {
        wait_until("an open ring", || {
            self.look()?;
            self.ensure_attached()?;
            Ok(self.machine.may_submit())
        })
    }

    /// Waits until this epoch is open.
    ///
    /// # Errors
    ///
    /// It does not open, a later one is open, or ATTACH ends.
    pub fn wait_epoch(&mut self, number: u32) -> Result<()> {
        wait_until("the next epoch", || {
            self.look()?;
            self.ensure_attached()?;
            ensure!(self.epoch().is_none_or(|epoch| epoch <= number), "epoch {:?}, not {number}", self.epoch());
            Ok(self.epoch() == Some(number))
        })
    }

    pub(super) fn ensure_attached(&mut self) -> Result<()> {
        if self.has_attach_ended()? {
            let found = self.wait_attach()?;
            bail!("ATTACH has ended: {found:?}");
        }
        Ok(())
    }
}

/// A request of an earlier ring for a ring that names memory in another way. An address that is none stays as it is.
fn readdressed(sqe: Sqe, before: FixedAddressing, now: FixedAddressing) -> Sqe {
    let gpa = sqe.addr.wrapping_sub(before.iova_base());
    match (before.resolve(gpa, sqe.len_bytes), now.resolve(gpa, sqe.len_bytes)) {
        (Ok(was), Ok(is)) if (was.buf_index, was.addr) == (sqe.buf_index, sqe.addr) => {
            Sqe { buf_index: is.buf_index, addr: is.addr, ..sqe }
        }
        _ => sqe,
    }
}
