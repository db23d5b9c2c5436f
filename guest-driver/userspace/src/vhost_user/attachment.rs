//! The attachment of a queue, which is a ring or is about to become one: the driver's side of the epochs, in guest RAM.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use ringpass_guest_abi::attach::{AreaAddress, AttachPayload, Lengths};
use ringpass_guest_abi::control::{CONTROL_PAGE_BYTES, DriverControl};
use ringpass_guest_abi::epoch::Epoch;
use ringpass_guest_abi::epoch::driver::{Action, Event, Machine};
use ringpass_guest_abi::probe::{Device, F_DSYNC};
use ringpass_guest_abi::{Cqe, DriverRing, FixedAddressing, RingMemory, SegmentLimits, Sqe};

use super::Error;
use super::memory::Memory;
use crate::ram::RamArea;
use crate::ring::RamRing;

/// The control page, as memory of 32-bit words.
#[derive(Debug)]
struct Page(RamArea);

impl Page {
    fn word(&self, offset_bytes: u32) -> &std::sync::atomic::AtomicU32 {
        self.0.word32(offset_bytes.into()).expect("a word of the control page")
    }
}

impl RingMemory for Page {
    fn load_relaxed(&self, offset_bytes: u32) -> u32 {
        self.word(offset_bytes).load(Ordering::Relaxed)
    }

    fn load_acquire(&self, offset_bytes: u32) -> u32 {
        self.word(offset_bytes).load(Ordering::Acquire)
    }

    fn store_relaxed(&self, offset_bytes: u32, value: u32) {
        self.word(offset_bytes).store(value, Ordering::Relaxed);
    }

    fn store_release(&self, offset_bytes: u32, value: u32) {
        self.word(offset_bytes).store(value, Ordering::Release);
    }

    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn write_sqe(&self, _slot: u32, _sqe: &Sqe) {
        unreachable!("a control page has no SQEs");
    }

    fn read_cqe(&self, _offset_bytes: u32) -> Cqe {
        unreachable!("a control page has no CQEs");
    }
}

/// The sizes of a queue's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize {
    /// SQ entries: a power of two.
    pub sq_entries: u32,
    /// CQ entries: a power of two, at least as many as SQ entries. At most this many requests are outstanding.
    pub cq_entries: u32,
}

/// The rings that an application wants for a queue.
#[derive(Clone, Debug)]
pub(super) struct WantedRings {
    pub(super) memory: Arc<Memory>,
    /// The rings are smaller if the device has lower limits.
    pub(super) size: RingSize,
}

impl WantedRings {
    /// Allocates memory for such rings of a device that has answered PROBE like this.
    pub(super) fn attachment(&self, device: Device) -> Result<Attachment, Error> {
        let size = RingSize {
            sq_entries: self.size.sq_entries.min(device.limits.sq_entries_max),
            cq_entries: self.size.cq_entries.min(device.limits.cq_entries_max),
        };
        Attachment::new(&self.memory, device, size)
    }
}

/// The memory for the rings of one queue, and the state of its epochs.
#[derive(Debug)]
pub(super) struct Attachment {
    device: Device,
    size: RingSize,
    lengths: Lengths,
    control: DriverControl<Page>,
    payload: AttachPayload,
    /// The areas of even and odd epochs. `None`: the ring of the present epoch has the area.
    areas: [Option<(RamArea, RamArea)>; 2],
    machine: Machine,
    ring: Option<LiveRing>,
    is_muted: bool,
    /// Number of rings that the queue has had.
    pub(super) epochs: u64,
}

/// A ring that the device has opened.
#[derive(Debug)]
pub(super) struct LiveRing {
    epoch: Epoch,
    pub(super) ring: DriverRing<RamRing>,
    /// How its SQEs name memory.
    pub(super) addressing: FixedAddressing,
    /// What its SQEs may transfer.
    pub(super) segments: SegmentLimits,
}

impl Attachment {
    /// Allocates memory for rings of this size. The caller keeps to the limits of `device`.
    fn new(memory: &Memory, device: Device, size: RingSize) -> Result<Self, Error> {
        let lengths = Lengths::of(size.sq_entries, size.cq_entries, device.limits.page_bytes);
        // The device may have larger pages than this process.
        let aligned = |len_bytes| memory.allocate_aligned(len_bytes, device.limits.page_bytes.into());
        let mut control = aligned(lengths.control_bytes.max(CONTROL_PAGE_BYTES.into()))?;
        let mut areas = Vec::new();
        for _ in 0..2 {
            areas.push((aligned(lengths.rings_bytes)?, aligned(lengths.sqes_bytes)?));
        }
        let address =
            |area: &(RamArea, RamArea)| AreaAddress { rings_gpa: area.0.gpa().into(), sqes_gpa: area.1.gpa().into() };
        let payload = AttachPayload {
            version: device.version.into(),
            features: device.features.into(),
            sq_entries: size.sq_entries.into(),
            cq_entries: size.cq_entries.into(),
            control_gpa: control.gpa().into(),
            areas: [address(&areas[0]), address(&areas[1])],
            ..AttachPayload::default()
        };
        // From ATTACH on the device may use the areas.
        control.lend();
        areas.iter_mut().for_each(lend);
        let mut areas = areas.into_iter();
        Ok(Self {
            device,
            size,
            lengths,
            control: DriverControl::new(Page(control)),
            payload,
            areas: [areas.next(), areas.next()],
            machine: Machine::new(),
            ring: None,
            is_muted: false,
            epochs: 0,
        })
    }

    /// Returns the memory to the allocator. The device has completed ATTACH, or has never got it.
    pub(super) fn free(mut self) {
        self.end_ring();
        let Page(mut control) = self.control.into_memory();
        control.take_back();
        for (rings, sqes) in self.areas.iter_mut().flatten() {
            rings.take_back();
            sqes.take_back();
        }
    }

    /// Returns to the state before the first epoch. Returns the payload for a new ATTACH.
    pub(super) fn reset(&mut self) -> [u8; AttachPayload::BYTES] {
        self.end_ring();
        self.control.clear();
        self.machine = Machine::new();
        self.payload.to_bytes()
    }

    /// Whether a write on a ring can be durable.
    pub(super) fn has_durable_writes(&self) -> bool {
        self.device.features & F_DSYNC != 0
    }

    pub(super) fn may_submit(&self) -> bool {
        self.machine.may_submit()
    }

    /// The ring that runs, or that has ended and may still have completions.
    pub(super) fn ring(&mut self) -> Option<&mut DriverRing<RamRing>> {
        self.ring.as_mut().map(|live| &mut live.ring)
    }

    /// The ring for new requests.
    pub(super) fn live_ring(&mut self) -> Option<&mut LiveRing> {
        self.ring.as_mut()
    }

    /// The epoch of that ring.
    pub(super) fn epoch(&self) -> Option<u32> {
        self.ring.as_ref().map(|live| live.epoch.number())
    }

    /// The word that the device announces now.
    pub(super) fn announced(&self) -> u32 {
        self.control.announced()
    }

    /// Steps the machine of the epochs. The caller performs the actions.
    pub(super) fn step(&mut self, event: Event) -> impl Iterator<Item = Action> + use<> {
        self.machine.step(event).into_iter()
    }

    /// Starts the ring of an epoch that the device has opened.
    pub(super) fn start(&mut self, epoch: Epoch) -> Result<(), Error> {
        self.end_ring();
        let broken = |error: &dyn std::fmt::Display| Error::BrokenDevice(error.to_string());
        let RingSize { sq_entries, cq_entries } = self.size;
        let record = self.control.ring();
        let layout = record.layout(sq_entries, cq_entries, &self.lengths).map_err(|error| broken(&error))?;
        let addressing = record.addressing().map_err(|error| broken(&error))?;
        let segments = record.segments().map_err(|error| broken(&error))?;
        let (rings, sqes) =
            self.areas[epoch.area().index()].take().expect("a ring returns its area before the next epoch");
        let ring = RamRing::new(rings, sqes, &layout).map_err(|error| broken(&error))?;
        let mut ring = DriverRing::new(ring, layout).map_err(|error| broken(&error))?;
        if self.is_muted {
            ring.mute_interrupts();
        }
        self.ring = Some(LiveRing { epoch, ring, addressing, segments });
        self.epochs += 1;
        Ok(())
    }

    /// The ring has ended, and the driver does not read it any more: its area is free for a later epoch.
    pub(super) fn end_ring(&mut self) {
        if let Some(LiveRing { epoch, ring, .. }) = self.ring.take() {
            let mut areas = ring.into_memory().into_areas();
            lend(&mut areas);
            self.areas[epoch.area().index()] = Some(areas);
        }
    }

    pub(super) fn acknowledge(&self, announcement: ringpass_guest_abi::epoch::Announcement) {
        self.control.acknowledge(announcement);
    }

    pub(super) fn set_detach(&self) {
        self.control.set_detach();
    }

    /// Turns interrupts for completions off or on. Returns true if there is a completion already.
    pub(super) fn set_muted(&mut self, muted: bool) -> bool {
        self.is_muted = muted;
        match &mut self.ring {
            Some(live) if muted => {
                live.ring.mute_interrupts();
                false
            }
            Some(live) => live.ring.unmute_interrupts(),
            None => false,
        }
    }
}

/// The device may use the areas between two rings, too.
fn lend((rings, sqes): &mut (RamArea, RamArea)) {
    rings.lend();
    sqes.lend();
}
