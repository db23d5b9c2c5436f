//! The hostile guest: what it writes, and where. All of it comes from a seed.
//!
//! It has its own half of the disk and its own region of RAM. The honest queue beside it belongs to the same guest, so
//! the broker would not stop an access to that queue's memory or sectors. Therefore no value of the hostile guest names
//! them.

use std::ops::Range;

use anyhow::Result;
use ringpass_guest_abi::{
    FixedAddressing, Sqe,
    attach::AttachPayload,
    control::{ACKNOWLEDGED_OFFSET_BYTES, CONTROL_PAGE_BYTES, DETACH_OFFSET_BYTES, RING_OFFSET_BYTES},
    epoch::{Announcement, Epoch, Phase},
    request::{T_ARM, T_ATTACH, T_EVENT, T_PROBE},
    rings_area_bytes,
};
use ringpass_tests::front_end::{
    attach::{Attachment, CQ_ENTRIES, SQ_ENTRIES, bench::QUEUE_SIZE},
    blk::{HEADER_BYTES, header},
    descriptor::{DESCRIPTOR_BYTES, Descriptor},
    event::Eventfds,
    ram::{Arena, Ram},
    vring::{DriverVring, VringLayout},
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};
use vm_memory::{Bytes, GuestAddress};

const PAGE_BYTES: u64 = 4096;
/// DETACH in version 0 of the ABI.
const DETACH_OF_VERSION_0: u32 = 0x7270_0009;
/// The part of the disk that the hostile guest writes; no write is longer than its region of RAM.
pub(crate) const DISK_BYTES: u64 = 8 << 20;
/// Operations (`enum io_uring_op`).
const READ_FIXED: u8 = 4;
const WRITE_FIXED: u8 = 5;
/// `IOSQE_FIXED_FILE`.
const FIXED_FILE: u8 = 1;

/// A queue of the hostile guest.
#[derive(Debug)]
pub(crate) struct HostileQueue {
    /// Its index in the device.
    pub(crate) index: u16,
    /// Its virtqueue.
    pub(crate) vring: DriverVring,
    /// What an honest driver would ask for.
    pub(crate) payload: AttachPayload,
}

/// The hostile guest.
pub(crate) struct HostileGuest {
    ram: Ram,
    region: Range<u64>,
    addressing: FixedAddressing,
    rng: fastrand::Rng,
    /// Room for requests.
    places_gpa: u64,
    data_gpa: u64,
}

/// Pages for requests on virtqueues.
const PLACES: u64 = 16;
const DATA_BYTES: u64 = 64 << 10;

impl HostileGuest {
    /// Makes a guest with this region of RAM. `arena` must be all of that region.
    pub(crate) fn new(
        ram: &Ram,
        region: Range<u64>,
        arena: &mut Arena,
        addressing: FixedAddressing,
        rng: fastrand::Rng,
    ) -> Result<Self> {
        let places_gpa = arena.take(PLACES * PAGE_BYTES, PAGE_BYTES)?;
        let data_gpa = arena.take(DATA_BYTES, PAGE_BYTES)?;
        Ok(Self { ram: ram.clone(), region, addressing, rng, places_gpa, data_gpa })
    }

    /// Makes a queue of this guest.
    pub(crate) fn queue(&self, index: u16, arena: &mut Arena) -> Result<HostileQueue> {
        let layout = VringLayout::take(arena, QUEUE_SIZE)?;
        let payload = Attachment::take_payload(arena)?;
        Ok(HostileQueue { index, vring: DriverVring::new(&self.ram, layout, false, Eventfds::new()?)?, payload })
    }

    /// The generator, for random choices of the test.
    pub(crate) fn rng(&mut self) -> &mut fastrand::Rng {
        &mut self.rng
    }

    /// Empties a queue and its control page for a new start.
    pub(crate) fn clear(&self, queue: &mut HostileQueue) -> Result<()> {
        queue.vring.reset()?;
        let control = GuestAddress(queue.payload.control_gpa.get());
        Ok(self.ram.memory().write_slice(&[0; CONTROL_PAGE_BYTES as usize], control)?)
    }

    /// Whether the device announces the ring of the queue's first epoch as open.
    pub(crate) fn has_ring(&self, queue: &HostileQueue) -> Result<bool> {
        let word: u32 = self.ram.memory().read_obj(GuestAddress(queue.payload.control_gpa.get()))?;
        Ok(word == Announcement { epoch: Epoch::NONE.next(), phase: Phase::Open }.to_word())
    }

    /// The index at which a front-end would start the queue, or a random one.
    pub(crate) fn base(&mut self, queue: &mut HostileQueue) -> Result<u16> {
        let base = if self.rng.u8(..8) == 0 { self.rng.u16(..) } else { queue.vring.used_idx()? };
        Ok(base)
    }

    /// Does one thing, which may be allowed or not.
    pub(crate) fn act(&mut self, queue: &mut HostileQueue) -> Result<()> {
        match self.rng.u8(..20) {
            0..3 => self.scribble_on_control(queue),
            3..5 => self.scribble_on_rings(queue),
            5..9 => self.submit_anything(queue),
            9..11 => self.scribble_on_virtqueue(queue),
            11 => self.scribble_anywhere(queue),
            12 => {
                // Fewer kicks than an eventfd counts before a write blocks.
                for _ in 0..self.rng.usize(..500) {
                    queue.vring.kick()?;
                }
                Ok(())
            }
            13 => self.ask_for_ring(queue, true),
            14..16 => self.ask_for_ring(queue, false),
            _ => self.send_anything(queue),
        }
    }

    /// Sends ARM and ATTACH: as an honest driver does if `well`, otherwise with random faults.
    pub(crate) fn ask_for_ring(&mut self, queue: &mut HostileQueue, well: bool) -> Result<()> {
        let payload = if well { queue.payload } else { self.any_payload(queue.payload) };
        if well || self.rng.bool() {
            self.send(queue, T_ARM, &[])?;
        }
        let mut bytes = payload.to_bytes().to_vec();
        if !well && self.rng.u8(..8) == 0 {
            bytes.resize(self.rng.usize(..4000), 0);
        }
        self.send(queue, T_ATTACH, &bytes)
    }

    /// A number that has a meaning in some field, but never names memory or sectors of the honest queue.
    ///
    /// The number fills a word of 64 bits: a number of 32 bits could, as the low half of a word, be such a sector. It
    /// is never 2^64-1, which as an offset means the file's own position, and that can be anywhere.
    fn value(&mut self) -> u64 {
        let Range { start, end } = self.region;
        match self.rng.u8(..8) {
            0 => 0,
            // No request type among them writes to the disk.
            1 => *[2, 3, 4, 5, 6, 8, 9, 10, 16, 255].get(self.rng.usize(..10)).unwrap_or(&0),
            2 => 1 << self.rng.u32(1..64),
            3 => u64::MAX - self.rng.u64(1..4096),
            4 => self.rng.u64(start..end) & !(PAGE_BYTES - 1),
            5 => (end - PAGE_BYTES).wrapping_add(self.rng.u64(..4) * 2048),
            6 => self.addressing.iova_base() + self.rng.u64(start..end),
            _ => self.rng.u64(1 << 40..u64::MAX),
        }
    }

    fn scribble(&mut self, range: Range<u64>) -> Result<()> {
        let gpa = self.rng.u64(range) & !7;
        let value = self.value();
        Ok(self.ram.memory().write_obj(value, GuestAddress(gpa))?)
    }

    fn scribble_on_control(&mut self, queue: &HostileQueue) -> Result<()> {
        let control_gpa = queue.payload.control_gpa.get();
        for _ in 0..self.rng.usize(1..20) {
            match self.rng.u8(..4) {
                // An answer to the device that may be right.
                0 => {
                    let word: u32 = self.ram.memory().read_obj(GuestAddress(control_gpa))?;
                    let word = if self.rng.bool() { word } else { self.rng.u32(..40) };
                    let at = GuestAddress(control_gpa + u64::from(ACKNOWLEDGED_OFFSET_BYTES));
                    self.ram.memory().write_obj(word, at)?;
                    queue.vring.kick()?;
                }
                1 => {
                    let at = GuestAddress(control_gpa + u64::from(DETACH_OFFSET_BYTES));
                    self.ram.memory().write_obj(self.rng.u32(..2), at)?;
                }
                2 => {
                    // The announcement, which the device finds when the queue starts again.
                    self.ram.memory().write_obj(self.rng.u32(..40), GuestAddress(control_gpa))?;
                }
                _ => self.scribble(control_gpa..control_gpa + 512)?,
            }
        }
        Ok(())
    }

    fn scribble_on_rings(&mut self, queue: &HostileQueue) -> Result<()> {
        let area = &queue.payload.areas[self.rng.usize(..2)];
        let rings_gpa = area.rings_gpa.get();
        for _ in 0..self.rng.usize(1..20) {
            // Mostly its indexes and flags.
            let len_bytes = if self.rng.bool() { 128 } else { rings_area_bytes(CQ_ENTRIES) };
            self.scribble(rings_gpa..rings_gpa + len_bytes)?;
        }
        Ok(())
    }

    fn scribble_on_virtqueue(&mut self, queue: &mut HostileQueue) -> Result<()> {
        let VringLayout { desc_gpa, avail_gpa, used_gpa, size } = queue.vring.layout();
        for _ in 0..self.rng.usize(1..8) {
            match self.rng.u8(..4) {
                0 => self.scribble(desc_gpa..desc_gpa + DESCRIPTOR_BYTES * u64::from(size))?,
                1 => self.scribble(avail_gpa..avail_gpa + 6 + 2 * u64::from(size))?,
                2 => self.scribble(used_gpa..used_gpa + VringLayout::used_bytes(size))?,
                _ => {
                    queue.vring.write_avail_idx(queue.vring.next_avail().wrapping_add(self.rng.u16(..4)))?;
                    queue.vring.kick()?;
                }
            }
        }
        Ok(())
    }

    fn scribble_anywhere(&mut self, queue: &HostileQueue) -> Result<()> {
        for _ in 0..self.rng.usize(1..40) {
            self.scribble(self.region.clone())?;
        }
        queue.vring.kick()
    }

    /// Writes SQEs and moves the tail by a random number, which can be more than there are SQEs. The guest never reaps
    /// a completion.
    fn submit_anything(&mut self, queue: &HostileQueue) -> Result<()> {
        let area = queue.payload.areas[self.rng.usize(..2)];
        for slot in 0..SQ_ENTRIES {
            let bytes: Vec<u8> = self.any_sqe().to_words().into_iter().flat_map(u64::to_ne_bytes).collect();
            self.ram.memory().write_slice(&bytes, GuestAddress(area.sqes_gpa.get() + u64::from(slot) * 64))?;
        }
        // The offset of the tail, from the control page. The guest may have overwritten it.
        let record = GuestAddress(queue.payload.control_gpa.get() + u64::from(RING_OFFSET_BYTES) + 4);
        let offset_bytes: u32 = self.ram.memory().read_obj(record)?;
        let tail = GuestAddress(area.rings_gpa.get() + u64::from((offset_bytes % 1024) & !3));
        for _ in 0..self.rng.usize(1..10) {
            let word: u32 = self.ram.memory().read_obj(tail)?;
            self.ram.memory().write_obj(word.wrapping_add(self.rng.u32(..2 * SQ_ENTRIES)), tail)?;
            queue.vring.kick()?;
        }
        Ok(())
    }

    /// A random SQE. It can access the guest's own memory and its half of the disk.
    pub(crate) fn any_sqe(&mut self) -> Sqe {
        let len_bytes = self.rng.u32(1..=128) * 512;
        let is_write = self.rng.bool();
        let gpa = self.data_gpa + self.rng.u64(..DATA_BYTES / 8) * 8;
        let good = Sqe {
            opcode: if is_write { WRITE_FIXED } else { READ_FIXED },
            flags: FIXED_FILE,
            fd: 0,
            off_bytes: self.rng.u64(..DISK_BYTES / 512) * 512,
            addr: self.addressing.iova_base() + gpa,
            len_bytes,
            buf_index: (gpa >> 30) as u16,
            user_data: self.rng.u64(..),
            ..Sqe::default()
        };
        match self.rng.u8(..12) {
            0..5 => good,
            5 => Sqe { opcode: self.rng.u8(..), ..good },
            6 => Sqe { flags: self.rng.u8(..), ..good },
            7 => Sqe { fd: *[1, 2, -1, i32::MAX].get(self.rng.usize(..4)).unwrap_or(&1), ..good },
            8 if is_write => Sqe { addr: self.value(), buf_index: self.rng.u16(..64), ..good },
            // Across the end of the region, or just before it.
            8 => {
                let end = self.addressing.iova_base() + self.region.end;
                Sqe { addr: end + 4096 - self.rng.u64(..16) * 4096, ..good }
            }
            // A write never names the honest queue's part of the disk. Only a read uses the file's own position.
            9 if is_write => Sqe { off_bytes: self.rng.u64(1 << 40..u64::MAX), ..good },
            9 => Sqe { off_bytes: u64::MAX, ..good },
            10 => Sqe { ioprio: self.rng.u16(..), personality: self.rng.u16(..), file_index: self.rng.u32(..), ..good },
            _ => Sqe { addr3: self.value(), pad2: self.rng.u64(..4), rw_flags: self.rng.u32(..), ..good },
        }
    }

    fn any_payload(&mut self, good: AttachPayload) -> AttachPayload {
        let mut payload = good;
        for _ in 0..self.rng.usize(1..4) {
            let value = self.value();
            match self.rng.u8(..10) {
                0 => payload.version = self.rng.u16(..3).into(),
                1 => payload.reserved[self.rng.usize(..3)] = self.rng.u16(..).into(),
                2 => payload.features = value.into(),
                3 => payload.sq_entries = self.any_entries().into(),
                4 => payload.cq_entries = self.any_entries().into(),
                5 => payload.control_gpa = value.into(),
                6 => payload.areas[self.rng.usize(..2)].rings_gpa = value.into(),
                7 => payload.areas[self.rng.usize(..2)].sqes_gpa = value.into(),
                8 => payload.areas[1] = payload.areas[0],
                // The ring may overlap a virtqueue of this guest, which harms only this guest.
                _ => {
                    let page = self.rng.u64(self.region.clone()) & !(PAGE_BYTES - 1);
                    payload.areas[self.rng.usize(..2)].rings_gpa = page.into();
                }
            }
        }
        payload
    }

    fn any_entries(&mut self) -> u32 {
        if self.rng.bool() { 1 << self.rng.u32(..20) } else { self.rng.u32(..) }
    }

    /// Any request that writes nothing to the disk.
    fn send_anything(&mut self, queue: &mut HostileQueue) -> Result<()> {
        let kinds =
            [T_PROBE, T_ARM, T_EVENT, T_EVENT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, 0x7270_000b];
        for _ in 0..self.rng.usize(1..10) {
            let kind = kinds[self.rng.usize(..kinds.len())];
            let bytes = vec![0; self.rng.usize(..64)];
            self.send(queue, kind, &bytes)?;
        }
        if queue.index == 0 {
            // Not the honest queue, which is the first that can be attached.
            let target = self.rng.u16(..).max(2);
            self.send(queue, DETACH_OF_VERSION_0, &u64::from(target).to_le_bytes())?;
        }
        Ok(())
    }

    fn send(&mut self, queue: &mut HostileQueue, kind: u32, payload: &[u8]) -> Result<()> {
        let page = self.places_gpa + self.rng.u64(..PLACES - 1) * PAGE_BYTES;
        let memory = self.ram.memory();
        memory.write_slice(&header(kind, 0), GuestAddress(page))?;
        memory.write_slice(payload, GuestAddress(page + u64::from(HEADER_BYTES)))?;
        let readable = HEADER_BYTES + u32::try_from(payload.len())?;
        let size = queue.vring.layout().size;
        let first = self.rng.u16(..size);
        let next = |step: u16| (first + step) % size;
        let chain = [
            Descriptor::readable(page, readable).linked_to(next(1)),
            Descriptor::writable(page + 0x1000, 512).linked_to(next(2)),
            Descriptor::writable(page + 0x1800, 1),
        ];
        for (step, descriptor) in (0..).zip(chain) {
            queue.vring.write_descriptor(next(step), descriptor)?;
        }
        queue.vring.add_head(first)?;
        queue.vring.publish_quietly()?;
        queue.vring.kick()
    }
}
