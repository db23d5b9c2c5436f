//! The driver of a queue that is attached.

use std::{thread, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use ringpass_guest_abi::{
    Cqe, DriverRing, FixedAddressing, RingLayout, Sqe,
    attach::{AreaAddress, AttachPayload, Lengths},
    control::{CONTROL_PAGE_BYTES, DriverControl},
    epoch::driver::{Action, Event, Machine, State},
    request::{ErrorCode, T_ARM, T_ATTACH},
    rings_area_bytes, sqes_area_bytes,
};

use super::{Found, Interface, PATIENCE, Words, wait_until};
use crate::front_end::{descriptor::Descriptor, ram::Arena, vring::DriverVring};

/// Entries of the SQ.
pub const SQ_ENTRIES: u32 = 32;
/// Entries of the CQ.
pub const CQ_ENTRIES: u32 = 64;
const PAGE_BYTES: u32 = 4096;

const ARM_PLACE: u64 = 0;
const ATTACH_PLACE: u64 = 1;
/// For requests that are neither.
const OTHER_PLACE: u64 = 2;

/// A driver's buffers: so many, each of so many bytes, one behind the other.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// Where the first is.
    pub gpa: u64,
    /// How many there are.
    pub count: u64,
    /// Length of each.
    pub each_bytes: u32,
}

impl Buffers {
    /// Where a buffer is.
    pub fn at(&self, index: u64) -> u64 {
        self.gpa + index % self.count * u64::from(self.each_bytes)
    }
}

/// The driver of a queue that is attached.
#[derive(Debug)]
pub struct RingDriver {
    pub(super) vring: DriverVring,
    interface: Interface,
    pub(super) addressing: FixedAddressing,
    payload: AttachPayload,
    pub(super) buffers: Buffers,
    control: DriverControl<Words>,
    pub(super) machine: Machine,
    pub(super) ring: Option<DriverRing<Words>>,
    /// Requests without a completion, in their order: of which nothing is known if the ring ends.
    pub(super) outstanding: Vec<Sqe>,
    pub(super) completions: Vec<Cqe>,
    attach_head: Option<u16>,
    is_device_broken: bool,
}

impl RingDriver {
    /// The driver of an empty queue; its pages are taken from `arena`.
    ///
    /// # Errors
    ///
    /// Not enough RAM is left.
    pub fn new(vring: DriverVring, arena: &mut Arena, addressing: FixedAddressing) -> Result<Self> {
        let interface = Interface::take(arena, Self::PLACES)?;
        Self::with_requests(vring, arena, interface, addressing)
    }

    /// How many places its requests take.
    pub const PLACES: u64 = 3;

    /// The same with its requests in other memory.
    ///
    /// # Errors
    ///
    /// Not enough RAM is left.
    pub fn with_requests(
        vring: DriverVring,
        arena: &mut Arena,
        interface: Interface,
        addressing: FixedAddressing,
    ) -> Result<Self> {
        let page = u64::from(PAGE_BYTES);
        let control_gpa = arena.take(CONTROL_PAGE_BYTES.into(), page)?;
        let mut area = || -> Result<AreaAddress> {
            let rings_gpa = arena.take(rings_area_bytes(CQ_ENTRIES).next_multiple_of(page), page)?.into();
            let sqes_gpa = arena.take(sqes_area_bytes(SQ_ENTRIES).next_multiple_of(page), page)?.into();
            Ok(AreaAddress { rings_gpa, sqes_gpa })
        };
        let payload = AttachPayload {
            sq_entries: SQ_ENTRIES.into(),
            cq_entries: CQ_ENTRIES.into(),
            control_gpa: control_gpa.into(),
            areas: [area()?, area()?],
            ..AttachPayload::default()
        };
        let count = CQ_ENTRIES.into();
        let buffers = Buffers { gpa: arena.take(count * page, page)?, count, each_bytes: PAGE_BYTES };
        let control = DriverControl::new(Words::new(vring.ram(), control_gpa, 0));
        Ok(Self {
            vring,
            interface,
            addressing,
            payload,
            buffers,
            control,
            machine: Machine::new(),
            ring: None,
            outstanding: Vec::new(),
            completions: Vec::new(),
            attach_head: None,
            is_device_broken: false,
        })
    }

    /// The queue.
    pub fn vring(&mut self) -> &mut DriverVring {
        &mut self.vring
    }

    /// The payload of its ATTACH.
    pub fn payload(&self) -> AttachPayload {
        self.payload
    }

    /// Its buffers.
    pub fn buffers(&self) -> Buffers {
        self.buffers
    }

    /// Requests without a completion.
    pub fn outstanding(&self) -> &[Sqe] {
        &self.outstanding
    }

    /// Begins anew on an empty queue, as after a reset of the device. Outstanding requests are forgotten.
    ///
    /// # Errors
    ///
    /// It is not in RAM.
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
    /// It does not open.
    pub fn attach(&mut self) -> Result<()> {
        self.send_both(&self.payload.to_bytes())?;
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

    /// Sends a request of virtio-blk, with its header and status in a place. Gives its head.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_block(&mut self, kind: u32, sector: u64, data: Descriptor) -> Result<u16> {
        self.interface.send_block(&mut self.vring, OTHER_PLACE, kind, sector, data)
    }

    /// Sends any request of the interface, in a place of its own.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_other(&mut self, kind: u32, payload: &[u8]) -> Result<u16> {
        self.send_at(OTHER_PLACE, kind, payload)
    }

    fn send_at(&mut self, place: u64, kind: u32, payload: &[u8]) -> Result<u16> {
        self.interface.send(&mut self.vring, place, kind, payload)
    }

    /// Waits for the end of ATTACH, and takes it and ARM back.
    ///
    /// # Errors
    ///
    /// It does not end.
    pub fn wait_attach(&mut self) -> Result<Found> {
        let attach = self.attach_head.take().context("ATTACH was not sent")?;
        loop {
            self.vring.spin_for_used(PATIENCE).context("waiting for the end of ATTACH")?;
            if self.vring.take_used()?.is_some_and(|used| used.head == attach) {
                break;
            }
        }
        self.reap();
        self.ring = None;
        self.machine = Machine::new();
        self.interface.outcome(&self.vring, ATTACH_PLACE)
    }

    /// Whether ATTACH has ended. ARM is not taken.
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

    /// Says that the driver wants its queue back. DETACH on queue 0 follows.
    pub fn set_detach(&self) {
        self.control.set_detach();
    }

    /// The number of the epoch whose ring it uses.
    pub fn epoch(&self) -> Option<u32> {
        match self.machine.state() {
            State::Running { epoch } => Some(epoch.number()),
            _ => None,
        }
    }

    /// Where the parts of the ring are that it uses.
    pub fn ring_layout(&self) -> Option<&RingLayout> {
        self.ring.as_ref().map(DriverRing::layout)
    }

    /// The outcome of the request that was sent with [`send_other`](Self::send_other).
    ///
    /// # Errors
    ///
    /// It is not in RAM.
    pub fn other_outcome(&self) -> Result<Found> {
        self.interface.outcome(&self.vring, OTHER_PLACE)
    }

    /// The status of the request that was sent with [`send_block`](Self::send_block).
    ///
    /// # Errors
    ///
    /// It is not in RAM.
    pub fn block_status(&self) -> Result<u8> {
        Ok(self.interface.answer(&self.vring, OTHER_PLACE)?.1)
    }

    /// Looks at the device's word and does what it says.
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
                    let layout = self.control.ring().layout(SQ_ENTRIES, CQ_ENTRIES, &lengths);
                    let layout = layout.map_err(|error| anyhow::anyhow!("the ring's record: {error:?}"))?;
                    let area = self.payload.areas[epoch.area().index()];
                    let words = Words::new(self.vring.ram(), area.rings_gpa.get(), area.sqes_gpa.get());
                    self.ring = Some(DriverRing::new(words, layout).context("the ring's layout")?);
                    for sqe in std::mem::take(&mut self.outstanding) {
                        self.submit(sqe)?;
                    }
                }
                Action::Drain => {
                    let end = Instant::now() + PATIENCE;
                    while !self.outstanding.is_empty() {
                        self.reap();
                        ensure!(Instant::now() < end, "what is outstanding does not end");
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
                Action::RequestDetach => self.set_detach(),
                Action::Release => {}
                Action::Reset => self.is_device_broken = true,
            }
        }
        Ok(())
    }

    /// Waits until requests may be submitted.
    ///
    /// # Errors
    ///
    /// The ring does not open, or ATTACH ends.
    pub fn wait_open(&mut self) -> Result<()> {
        wait_until("a ring that is open", || {
            self.look()?;
            self.ensure_attached()?;
            Ok(self.machine.may_submit())
        })
    }

    /// Waits until a certain epoch is open.
    ///
    /// # Errors
    ///
    /// It does not open, another is, or ATTACH ends.
    pub fn wait_epoch(&mut self, number: u32) -> Result<()> {
        wait_until("the epoch that is to come", || {
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
