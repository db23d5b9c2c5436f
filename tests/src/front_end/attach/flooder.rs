//! A hostile driver that keeps a ring's SQ full.

use std::{sync::Arc, thread};

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::{
    FixedAddressing, RingLayout, RingMemory, SLOT_SHIFT_MIN, Sqe,
    attach::{AreaAddress, AttachPayload, Lengths},
    control::{CONTROL_PAGE_BYTES, DriverControl},
    epoch::{Announcement, Epoch, Phase},
    probe::VERSION,
    request::{T_ARM, T_ATTACH},
    rings_area_bytes, sqes_area_bytes,
};

use super::{Found, PATIENCE, RequestPlaces, Words, bench::QUEUE_SIZE, wait_until};
use crate::front_end::{event::Eventfds, rig::TestRam, session::FrontEnd, vring::DriverVring};

const PAGE_BYTES: u32 = 4096;
/// The buffer of all requests: as long as the smallest slot, and in one.
pub const BUFFER_BYTES: u32 = 1 << SLOT_SHIFT_MIN;

/// The size of the ring that a flooder asks for.
#[derive(Clone, Copy, Debug)]
pub struct FlooderRing {
    /// SQ entries.
    pub sq_entries: u32,
    /// CQ entries.
    pub cq_entries: u32,
}

/// How a flooder treats its completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaping {
    /// It reaps each completion, and keeps to the rules: it never has more outstanding than its CQ has entries.
    Honest,
    /// It never reaps, and submits more all the time.
    Never,
    /// The same, and it makes the ring's words say that nothing is outstanding.
    Lying,
}

/// A driver that gives its ring the same requests again and again, as fast as the kernel takes them.
#[derive(Debug)]
pub struct Flooder {
    vring: DriverVring,
    requests: RequestPlaces,
    words: Words,
    layout: RingLayout,
    addressing: FixedAddressing,
    buffer_gpa: u64,
    attach_head: u16,
    control_gpa: u64,
    /// The number of requests that it has given to the ring.
    sq_tail: u32,
}

/// Asks for a flooder's queue.
#[derive(Debug)]
pub struct Detacher {
    control: Words,
    eventfds: Arc<Eventfds>,
}

impl Detacher {
    /// Tells the device that the driver wants its queue back.
    ///
    /// # Errors
    ///
    /// The doorbell cannot be rung.
    pub fn detach(&self) -> Result<()> {
        DriverControl::new(self.control.clone()).set_detach();
        self.eventfds.kick().signal()
    }
}

impl Flooder {
    /// Starts a queue, and attaches it with a ring of this size. The buffer of its requests has [`BUFFER_BYTES`] and lies
    /// in one slot.
    ///
    /// # Errors
    ///
    /// The ring does not open.
    pub fn attach(
        front_end: &FrontEnd,
        ram: &mut TestRam,
        buffer_gpa: u64,
        index: u16,
        ring: FlooderRing,
    ) -> Result<Self> {
        let mut vring = ram.vring(front_end, QUEUE_SIZE)?;
        front_end.start_vring(index, &vring.layout(), vring.eventfds(), 0)?;
        let arena = &mut ram.arenas[0];
        let requests = RequestPlaces::take(arena, 2)?;
        let page = u64::from(PAGE_BYTES);
        let control_gpa = arena.take(CONTROL_PAGE_BYTES.into(), page)?;
        let lengths = Lengths::of(ring.sq_entries, ring.cq_entries, PAGE_BYTES);
        let mut area = || -> Result<AreaAddress> {
            let rings_gpa = arena.take(rings_area_bytes(ring.cq_entries).next_multiple_of(page), page)?.into();
            let sqes_gpa = arena.take(sqes_area_bytes(ring.sq_entries).next_multiple_of(page), page)?.into();
            Ok(AreaAddress { rings_gpa, sqes_gpa })
        };
        let areas = [area()?, area()?];
        let payload = AttachPayload {
            version: VERSION.into(),
            sq_entries: ring.sq_entries.into(),
            cq_entries: ring.cq_entries.into(),
            control_gpa: control_gpa.into(),
            areas,
            ..AttachPayload::default()
        };
        let control = DriverControl::new(Words::new(vring.ram(), control_gpa, 0));
        control.clear();
        requests.send(&mut vring, 0, T_ARM, &[])?;
        let attach_head = requests.send(&mut vring, 1, T_ATTACH, &payload.to_bytes())?;
        let epoch = Epoch::NONE.next();
        let open = Announcement { epoch, phase: Phase::Open }.to_word();
        wait_until("an open ring", || {
            ensure!(vring.used_idx()? != vring.next_avail(), "ATTACH ended: {:?}", requests.outcome(&vring, 1)?);
            Ok(control.announced() == open)
        })?;
        let record = control.ring();
        let refused = |error| anyhow::anyhow!("the ring's record: {error:?}");
        let layout = record.layout(ring.sq_entries, ring.cq_entries, &lengths).map_err(refused)?;
        let addressing = record.addressing().map_err(refused)?;
        let area = areas[epoch.area().index()];
        let words = Words::new(vring.ram(), area.rings_gpa.get(), area.sqes_gpa.get());
        Ok(Self { vring, requests, words, layout, addressing, buffer_gpa, attach_head, control_gpa, sq_tail: 0 })
    }

    /// The requests of the flood: one for each entry of the SQ, each `len_bytes` long, one behind the other on a disk
    /// of `disk_bytes`. Executes the first of them, which must succeed.
    ///
    /// # Errors
    ///
    /// The length is not 1 to [`BUFFER_BYTES`], or the request fails.
    pub fn fill(&mut self, is_write: bool, len_bytes: u32, disk_bytes: u64) -> Result<()> {
        let address = self.addressing.resolve(self.buffer_gpa, len_bytes);
        let address = address.map_err(|error| anyhow::anyhow!("{error}"))?;
        let make = if is_write { Sqe::write_fixed } else { Sqe::read_fixed };
        let places = disk_bytes / u64::from(len_bytes);
        for slot in 0..self.layout.sq_entries {
            let offset_bytes = u64::from(slot) % places * u64::from(len_bytes);
            self.words.write_sqe(slot, &make(address, len_bytes, offset_bytes, slot.into()));
        }
        self.give(1)?;
        wait_until("the first completion", || Ok(self.words.load_acquire(self.layout.cq_tail_offset) == 1))?;
        let res = self.words.read_cqe(self.layout.cqes_offset).res;
        self.words.store_release(self.layout.cq_head_offset, 1);
        ensure!(u32::try_from(res) == Ok(len_bytes), "a request of {len_bytes} bytes: {res}");
        Ok(())
    }

    /// Gives the ring so many requests.
    fn give(&mut self, count: u32) -> Result<()> {
        self.sq_tail = self.sq_tail.wrapping_add(count);
        self.words.store_release(self.layout.sq_tail_offset, self.sq_tail);
        self.vring.kick()
    }

    /// Floods until it `is_over`, or until the ring has ended.
    ///
    /// # Errors
    ///
    /// The queue is not in RAM.
    pub fn flood(&mut self, reaping: Reaping, is_over: impl Fn() -> bool) -> Result<()> {
        while !is_over() && !self.has_ended()? {
            if self.submit(reaping)? == 0 {
                thread::yield_now();
            }
        }
        Ok(())
    }

    /// Gives the ring as many requests as its SQ takes, and returns their number.
    fn submit(&mut self, reaping: Reaping) -> Result<u32> {
        let RingLayout { sq_entries, cq_entries, .. } = self.layout;
        let taken = self.words.load_acquire(self.layout.sq_head_offset);
        if reaping == Reaping::Lying {
            self.words.store_relaxed(self.layout.cq_tail_offset, taken);
        }
        let mut room = sq_entries.saturating_sub(self.sq_tail.wrapping_sub(taken));
        if reaping == Reaping::Honest {
            let completed = self.words.load_acquire(self.layout.cq_tail_offset);
            self.words.store_release(self.layout.cq_head_offset, completed);
            room = room.min(cq_entries.saturating_sub(self.sq_tail.wrapping_sub(completed)));
        }
        if room > 0 {
            self.give(room)?;
        }
        Ok(room)
    }

    /// What asks for the queue back while the flooder floods on another thread.
    pub fn detacher(&self) -> Detacher {
        Detacher { control: Words::new(self.vring.ram(), self.control_gpa, 0), eventfds: self.vring.eventfds().clone() }
    }

    /// The number of requests that it has given to the ring.
    pub fn submitted(&self) -> u32 {
        self.sq_tail
    }

    /// Whether ATTACH has ended, and so the ring.
    ///
    /// # Errors
    ///
    /// The queue is not in RAM.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.vring.used_idx()? == self.vring.next_avail())
    }

    /// Waits for the end of ATTACH.
    ///
    /// # Errors
    ///
    /// ATTACH does not end.
    pub fn wait_attach(&mut self) -> Result<Found> {
        while self.vring.next_used_by_spinning(PATIENCE).context("ATTACH has not ended")?.head != self.attach_head {}
        self.requests.outcome(&self.vring, 1)
    }

    /// Its virtqueue, for a driver that goes on without rings.
    pub fn into_vring(self) -> DriverVring {
        self.vring
    }
}
