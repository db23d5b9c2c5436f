//! For tests: the device's side of queues, in the memory of a driver and without a connection. It does only what a test
//! asks.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::attach::{AreaAddress, AttachLimits, AttachPayload, Lengths};
use ringpass_guest_abi::control::{
    ACKNOWLEDGED_OFFSET_BYTES, ANNOUNCED_OFFSET_BYTES, DETACH_OFFSET_BYTES, MODE_DIRECT, RING_OFFSET_BYTES, RingRecord,
};
use ringpass_guest_abi::epoch::{Announcement, Epoch, Phase};
use ringpass_guest_abi::probe::{Device, F_DSYNC};
use ringpass_guest_abi::request::{ErrorCode, Outcome};
use ringpass_guest_abi::{Doorbell, FixedAddress, FixedAddressing, RingLayout, SegmentLimits};

use super::RingSize;
use super::attachment::WantedRings;
use super::config::Geometry;
use super::driver::Driver;
use super::memory::Memory;
use super::queue_zero::{News, QueueZero, SharedQueueZero};
use super::requests::Requests;
use super::virtqueue::{Virtqueue, Vring};

const RAM_GPA: u64 = 1 << 20;
const RAM_BYTES: u64 = 4 << 20;
const SIZE: RingSize = RingSize { sq_entries: 8, cq_entries: 16 };
const HEADER_BYTES: u64 = 16;
const SEGMENTS: SegmentLimits = SegmentLimits { address_align_bytes: 1, length_align_bytes: 1, bytes_max: 1 << 20 };

/// The memory and queue 0 of a driver.
pub(super) struct Guest {
    pub(super) memory: Arc<Memory>,
    pub(super) news: Arc<News>,
    pub(super) queue_zero: Arc<SharedQueueZero>,
    geometry: Geometry,
    ram: Arc<File>,
}

/// The device's side of one queue.
pub(super) struct DeviceQueue {
    vring: Arc<Vring>,
    ram: Arc<File>,
    returned: u16,
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::with(Geometry::read(&[], 0))
    }

    /// A guest of a device with this configuration space.
    pub(super) fn with(geometry: Geometry) -> Self {
        let memory = Arc::new(Memory::new());
        let ram = memory.add(RAM_GPA, RAM_BYTES).unwrap().file;
        let news = Arc::new(News::default());
        let queue_zero = QueueZero::new(&memory, 16, &geometry, news.clone()).unwrap();
        let queue_zero = Arc::new(SharedQueueZero::new(queue_zero, news.clone(), Duration::from_secs(60)));
        Self { memory, news, queue_zero, geometry, ram }
    }

    /// The driver of queue 1 and the device's side of it.
    pub(super) fn driver(&self) -> (Driver, DeviceQueue) {
        let queue = Virtqueue::new(&self.memory, 64).unwrap();
        let requests = Requests::new(&self.memory, &queue, &self.geometry).unwrap();
        let device = self.device_queue(queue.vring().clone());
        (Driver::new(1, self.queue_zero.clone(), queue, requests, 16), device)
    }

    /// The device's side of queue 0.
    pub(super) fn device_queue_zero(&self) -> DeviceQueue {
        self.device_queue(self.queue_zero.lock().vring().clone())
    }

    fn device_queue(&self, vring: Arc<Vring>) -> DeviceQueue {
        DeviceQueue { vring, ram: self.ram.clone(), returned: 0 }
    }

    /// The rings that an application wants.
    pub(super) fn rings(&self) -> WantedRings {
        WantedRings { memory: self.memory.clone(), size: SIZE }
    }

    /// The same of a device that has answered PROBE.
    pub(super) fn offer_rings(&self) -> WantedRings {
        let limits = AttachLimits { features: F_DSYNC, sq_entries_max: 64, cq_entries_max: 64, page_bytes: 4096 };
        let device =
            Device { version: 1, features: F_DSYNC, limits, segments: SEGMENTS, queue_count: 2, refusal: None };
        self.queue_zero.lock().set_device(device);
        self.rings()
    }
}

/// How SQEs name memory on the rings of the device.
fn addressing() -> FixedAddressing {
    FixedAddressing::new(1 << 30, 22).unwrap()
}

impl DeviceQueue {
    /// How many chains the driver has made available.
    pub(super) fn available(&self) -> u16 {
        self.read16(self.vring.avail_gpa + 2)
    }

    pub(super) fn vring(&self) -> &Arc<Vring> {
        &self.vring
    }

    /// Completes the `index`th chain that the driver made available, with an answer if it has room for one.
    pub(super) fn complete(&mut self, index: u16, answer: &[u8], status: u8) {
        let chain = self.chain(index);
        if !answer.is_empty() {
            self.write(self.gpa_of(chain[chain.len() - 2]), answer);
        }
        self.write(self.gpa_of(chain[chain.len() - 1]), &[status]);
        let slot = u64::from(self.returned % self.vring.size);
        self.write(self.vring.used_gpa + 4 + 8 * slot, &u32::from(chain[0]).to_le_bytes());
        self.returned += 1;
        self.set_used_index(self.returned);
    }

    /// Completes ARM, the `index`th chain that the driver made available, and ATTACH, the next chain.
    pub(super) fn complete_attach(&mut self, index: u16, code: ErrorCode) {
        self.complete(index, &Outcome::of(ErrorCode::None).to_bytes(), 0);
        self.complete(index + 1, &Outcome::of(code).to_bytes(), u8::from(code != ErrorCode::Detached));
    }

    /// Writes the used index: the number of chains that the device has returned.
    pub(super) fn set_used_index(&self, count: u16) {
        self.write(self.vring.used_gpa + 2, &count.to_le_bytes());
    }

    /// Announces a phase of an epoch, for the ATTACH that is the `index`th chain.
    pub(super) fn announce(&self, index: u16, epoch: u32, phase: Phase) {
        self.announce_with(index, epoch, phase, &SEGMENTS);
    }

    /// The same for a ring with these limits of segments.
    pub(super) fn announce_with(&self, index: u16, epoch: u32, phase: Phase, segments: &SegmentLimits) {
        let control_gpa = self.control_gpa(index);
        let layout = layout();
        self.write(
            control_gpa + u64::from(RING_OFFSET_BYTES),
            &RingRecord::new(&layout, addressing(), segments, MODE_DIRECT).to_bytes(),
        );
        let word = Announcement { epoch: Epoch::new(epoch), phase }.to_word();
        self.write(control_gpa + u64::from(ANNOUNCED_OFFSET_BYTES), &word.to_le_bytes());
    }

    /// What the driver has acknowledged, for the ATTACH that is the `index`th chain.
    pub(super) fn acknowledged(&self, index: u16) -> Option<Announcement> {
        let mut word = [0; 4];
        self.read(self.control_gpa(index) + u64::from(ACKNOWLEDGED_OFFSET_BYTES), &mut word);
        Announcement::from_word(u32::from_le_bytes(word))
    }

    /// Whether the driver has set the detach word, for the ATTACH that is the `index`th chain.
    pub(super) fn has_detach_word(&self, index: u16) -> bool {
        let mut word = [0; 4];
        self.read(self.control_gpa(index) + u64::from(DETACH_OFFSET_BYTES), &mut word);
        u32::from_le_bytes(word) == 1
    }

    /// The number of SQ entries that ATTACH, the `index`th chain, asks for.
    pub(super) fn sq_entries(&self, index: u16) -> u32 {
        self.attach_payload(index).sq_entries.get()
    }

    fn control_gpa(&self, index: u16) -> u64 {
        self.attach_payload(index).control_gpa.get()
    }

    fn attach_payload(&self, index: u16) -> AttachPayload {
        let mut payload = [0; AttachPayload::BYTES];
        self.read(self.gpa_of(self.chain(index)[0]) + HEADER_BYTES, &mut payload);
        AttachPayload::from_bytes(&payload)
    }

    /// The descriptors of the `index`th chain that the driver made available.
    fn chain(&self, index: u16) -> Vec<u16> {
        let slot = u64::from(index % self.vring.size);
        let mut chain = vec![self.read16(self.vring.avail_gpa + 4 + 2 * slot)];
        loop {
            let at = self.descriptor(chain[chain.len() - 1]);
            if self.read16(at + 12) & 1 == 0 {
                return chain;
            }
            chain.push(self.read16(at + 14));
        }
    }

    /// The position on the disk and the data segments (address and length) of the read or write that is the `index`th
    /// chain.
    pub(super) fn transfer(&self, index: u16) -> (u64, Vec<(u64, u32)>) {
        let chain = self.chain(index);
        let mut sector = [0; 8];
        self.read(self.gpa_of(chain[0]) + 8, &mut sector);
        let segment = |&descriptor: &u16| {
            let mut len_bytes = [0; 4];
            self.read(self.descriptor(descriptor) + 8, &mut len_bytes);
            (self.gpa_of(descriptor), u32::from_le_bytes(len_bytes))
        };
        (u64::from_le_bytes(sector) * 512, chain[1..chain.len() - 1].iter().map(segment).collect())
    }

    /// The address, the length and the position on the disk in the `number`th SQE of the ring of epoch 1, whose ATTACH was
    /// made available as the `index`th chain.
    pub(super) fn sqe(&self, index: u16, number: u32) -> (FixedAddress, u32, u64) {
        let mut sqe = [0; 64];
        let slot = u64::from(number % SIZE.sq_entries);
        self.read(self.odd_area(index).sqes_gpa.get() + 64 * slot, &mut sqe);
        let word = |at: usize| u64::from_le_bytes(sqe[at..at + 8].try_into().unwrap());
        let address = FixedAddress { buf_index: word(40) as u16, addr: word(16) };
        (address, word(24) as u32, word(8))
    }

    /// Completes that SQE, as the `number`th CQE.
    pub(super) fn complete_sqe(&self, index: u16, number: u32, res: i32) {
        let (rings_gpa, sqes_gpa) = (self.odd_area(index).rings_gpa.get(), self.odd_area(index).sqes_gpa.get());
        let mut user_data = [0; 8];
        self.read(sqes_gpa + 64 * u64::from(number % SIZE.sq_entries) + 32, &mut user_data);
        let cqe = rings_gpa + u64::from(layout().cqes_offset) + 16 * u64::from(number % SIZE.cq_entries);
        self.write(cqe, &user_data);
        self.write(cqe + 8, &res.to_le_bytes());
        self.write(rings_gpa + u64::from(layout().sq_head_offset), &(number + 1).to_le_bytes());
        self.write(rings_gpa + u64::from(layout().cq_tail_offset), &(number + 1).to_le_bytes());
    }

    fn odd_area(&self, index: u16) -> AreaAddress {
        self.attach_payload(index).areas[1]
    }

    fn descriptor(&self, number: u16) -> u64 {
        self.vring.desc_gpa + 16 * u64::from(number)
    }

    fn gpa_of(&self, descriptor: u16) -> u64 {
        let mut gpa = [0; 8];
        self.read(self.descriptor(descriptor), &mut gpa);
        u64::from_le_bytes(gpa)
    }

    fn read16(&self, gpa: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(gpa, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn read(&self, gpa: u64, into: &mut [u8]) {
        self.ram.read_exact_at(into, gpa - RAM_GPA).unwrap();
    }

    fn write(&self, gpa: u64, from: &[u8]) {
        self.ram.write_all_at(from, gpa - RAM_GPA).unwrap();
    }
}

fn layout() -> RingLayout {
    let lengths = Lengths::of(SIZE.sq_entries, SIZE.cq_entries, 4096);
    RingLayout {
        sq_entries: SIZE.sq_entries,
        cq_entries: SIZE.cq_entries,
        sq_head_offset: 0,
        sq_tail_offset: 4,
        sq_flags_offset: 8,
        cq_head_offset: 12,
        cq_tail_offset: 16,
        cq_flags_offset: 20,
        cqes_offset: 64,
        rings_bytes: lengths.rings_bytes,
        sqes_bytes: lengths.sqes_bytes,
        doorbell: Doorbell::Always,
    }
}
