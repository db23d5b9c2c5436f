//! A driver that gets rings: the driver's side of `docs/abi.md` over the RAM of a test.

use std::sync::atomic::{Ordering, fence};

use ringpass_guest_abi::attach::{AreaAddress, AttachPayload, Lengths};
use ringpass_guest_abi::control::DriverControl;
use ringpass_guest_abi::epoch::driver::{Action, Event, Machine, State};
use ringpass_guest_abi::probe::ProbeAnswer;
use ringpass_guest_abi::request::{
    DetachPayload, EventAnswer, NO_FIELD, Outcome, T_ARM, T_ATTACH, T_DETACH, T_EVENT, T_PROBE,
};
use ringpass_guest_abi::{Cqe, DriverRing, FixedAddressing, RingMemory, Sqe};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::driver::{Buffer, DriverQueue, Ram, wait_until};
use crate::memory::IOVA_BASE;

pub(super) const SQ_ENTRIES: u32 = 32;
pub(super) const CQ_ENTRIES: u32 = 64;
/// Where a queue's control page, areas and requests begin: behind all that the rig uses.
const ATTACH_GPA: u64 = 25 << 20;
const ATTACH_BYTES: u64 = 1 << 20;
const REQUESTS_OFFSET: u64 = 0x8_0000;
/// Data for requests of the ring.
const DATA_OFFSET: u64 = 0xc_0000;

/// Words of guest memory.
#[derive(Clone)]
pub(super) struct Window {
    memory: GuestMemoryMmap,
    rings_gpa: u64,
    sqes_gpa: u64,
}

impl Window {
    fn load(&self, offset: u32, order: Ordering) -> u32 {
        self.memory.load(GuestAddress(self.rings_gpa + u64::from(offset)), order).unwrap()
    }

    fn store(&self, offset: u32, value: u32, order: Ordering) {
        self.memory.store(value, GuestAddress(self.rings_gpa + u64::from(offset)), order).unwrap();
    }
}

impl RingMemory for Window {
    fn load_acquire(&self, offset: u32) -> u32 {
        self.load(offset, Ordering::Acquire)
    }

    fn load_relaxed(&self, offset: u32) -> u32 {
        self.load(offset, Ordering::Relaxed)
    }

    fn store_release(&self, offset: u32, value: u32) {
        self.store(offset, value, Ordering::Release);
    }

    fn store_relaxed(&self, offset: u32, value: u32) {
        self.store(offset, value, Ordering::Relaxed);
    }

    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn write_sqe(&self, index: u32, sqe: &Sqe) {
        let bytes: Vec<u8> = sqe.to_words().into_iter().flat_map(u64::to_ne_bytes).collect();
        self.memory.write_slice(&bytes, GuestAddress(self.sqes_gpa + u64::from(index) * 64)).unwrap();
    }

    fn read_cqe(&self, offset: u32) -> Cqe {
        let mut bytes = [0; 16];
        self.memory.read_slice(&mut bytes, GuestAddress(self.rings_gpa + u64::from(offset))).unwrap();
        let [first, second] = [&bytes[..8], &bytes[8..]].map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
        Cqe::from_words([first, second])
    }
}

/// A request of the interface on a queue of the rig.
pub(super) struct Interface {
    memory: GuestMemoryMmap,
    gpa: u64,
}

impl Interface {
    fn new(ram: &Ram, index: u16) -> Self {
        Self { memory: ram.memory.clone(), gpa: ATTACH_GPA + u64::from(index) * ATTACH_BYTES + REQUESTS_OFFSET }
    }

    /// Makes a request available in place `place`, and kicks.
    pub(super) fn send(&self, queue: &mut DriverQueue, place: u64, kind: u32, payload: &[u8]) -> u16 {
        let at = self.gpa + place * 0x1000;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        self.memory.write_slice(payload, GuestAddress(at + 16)).unwrap();
        self.memory.write_slice(&[0xff; 0x200], GuestAddress(at + 0x800)).unwrap();
        let head = queue.add(&[
            Buffer { gpa: at, len_bytes: 16 + payload.len() as u32, writable: false },
            Buffer { gpa: at + 0x800, len_bytes: 0x100, writable: true },
            Buffer { gpa: at + 0x900, len_bytes: 1, writable: true },
        ]);
        queue.kick.write(1).unwrap();
        head
    }

    /// The answer that came to a place, and its status.
    pub(super) fn answer(&self, place: u64) -> (Vec<u8>, u8) {
        let at = self.gpa + place * 0x1000;
        let mut answer = vec![0; 0x100];
        self.memory.read_slice(&mut answer, GuestAddress(at + 0x800)).unwrap();
        (answer, self.memory.read_obj(GuestAddress(at + 0x900)).unwrap())
    }

    /// The outcome that came to a place: code, offset of the field, status.
    pub(super) fn outcome(&self, place: u64) -> (u32, u32, u8) {
        let (answer, status) = self.answer(place);
        let outcome = Outcome::from_bytes(answer[..Outcome::BYTES].try_into().unwrap());
        (outcome.error.get(), outcome.field_offset_bytes.get(), status)
    }
}

/// The driver of queue 0.
pub(super) struct FirstQueue {
    pub(super) queue: DriverQueue,
    interface: Interface,
    event: Option<u16>,
}

const EVENT_PLACE: u64 = 0;
const OTHER_PLACE: u64 = 1;

impl FirstQueue {
    pub(super) fn new(ram: &Ram, queue: DriverQueue) -> Self {
        Self { queue, interface: Interface::new(ram, 0), event: None }
    }

    pub(super) fn probe(&mut self) -> (ProbeAnswer, u8) {
        let head = self.interface.send(&mut self.queue, OTHER_PLACE, T_PROBE, &[]);
        assert_eq!(self.queue.wait_by_polling().head, head);
        let (answer, status) = self.interface.answer(OTHER_PLACE);
        (ProbeAnswer::from_prefix(&answer), status)
    }

    pub(super) fn post_event(&mut self) {
        self.event = Some(self.interface.send(&mut self.queue, EVENT_PLACE, T_EVENT, &[]));
    }

    /// Waits until EVENT is complete; gives what it says.
    pub(super) fn wait_event(&mut self) -> u32 {
        let event = self.event.take().expect("an EVENT was posted");
        assert_eq!(self.queue.wait_by_polling().head, event);
        let (answer, status) = self.interface.answer(EVENT_PLACE);
        assert_eq!(status, 0);
        EventAnswer::from_bytes(answer[..EventAnswer::BYTES].try_into().unwrap()).events.get()
    }

    /// The chain of the EVENT that is pending.
    pub(super) fn take_event(&mut self) -> u16 {
        self.event.take().expect("an EVENT was posted")
    }

    /// Sends any request, and waits for its outcome.
    pub(super) fn other(&mut self, kind: u32, payload: &[u8]) -> (u32, u32, u8) {
        let head = self.interface.send(&mut self.queue, OTHER_PLACE, kind, payload);
        while self.queue.wait_by_polling().head != head {}
        self.interface.outcome(OTHER_PLACE)
    }

    /// Sends any request, and waits for the next that ends: the length of that in the used ring.
    pub(super) fn used_bytes(&mut self, kind: u32, payload: &[u8]) -> u32 {
        self.interface.send(&mut self.queue, OTHER_PLACE, kind, payload);
        self.queue.wait_by_polling().len_bytes
    }

    pub(super) fn detach(&mut self, queue: u16) -> (u32, u32, u8) {
        let payload = DetachPayload { queue: queue.into(), ..DetachPayload::default() };
        self.other(T_DETACH, &payload.to_bytes())
    }
}

/// The driver of a queue that is attached.
pub(super) struct RingDriver {
    ram: Ram,
    pub(super) index: u16,
    pub(super) queue: DriverQueue,
    pub(super) interface: Interface,
    pub(super) machine: Machine,
    control: DriverControl<Window>,
    payload: AttachPayload,
    ring: Option<DriverRing<Window>>,
    /// Requests without a completion, in their order: of which nothing is known if the ring ends.
    pub(super) outstanding: Vec<Sqe>,
    pub(super) completions: Vec<Cqe>,
    attach_head: Option<u16>,
}

const ARM_PLACE: u64 = 0;
const ATTACH_PLACE: u64 = 1;

impl RingDriver {
    pub(super) fn new(ram: &Ram, index: u16, queue: DriverQueue) -> Self {
        let base = ATTACH_GPA + u64::from(index) * ATTACH_BYTES;
        let area = |number: u64| AreaAddress {
            rings_gpa: (base + 0x1_0000 * (number + 1)).into(),
            sqes_gpa: (base + 0x1_0000 * (number + 1) + 0x8000).into(),
        };
        let payload = AttachPayload {
            sq_entries: SQ_ENTRIES.into(),
            cq_entries: CQ_ENTRIES.into(),
            control_gpa: base.into(),
            areas: [area(0), area(1)],
            ..AttachPayload::default()
        };
        let control = DriverControl::new(Window { memory: ram.memory.clone(), rings_gpa: base, sqes_gpa: 0 });
        Self {
            ram: ram.clone(),
            index,
            queue,
            interface: Interface::new(ram, index),
            machine: Machine::new(),
            control,
            payload,
            ring: None,
            outstanding: Vec::new(),
            completions: Vec::new(),
            attach_head: None,
        }
    }

    /// The payload that it sends.
    pub(super) fn payload(&self) -> AttachPayload {
        self.payload
    }

    /// Sends ARM and ATTACH.
    pub(super) fn attach(&mut self) {
        self.control.clear();
        self.machine = Machine::new();
        self.interface.send(&mut self.queue, ARM_PLACE, T_ARM, &[]);
        self.send_attach(&self.payload.to_bytes());
    }

    pub(super) fn send_attach(&mut self, payload: &[u8]) {
        self.attach_head = Some(self.interface.send(&mut self.queue, ATTACH_PLACE, T_ATTACH, payload));
    }

    /// Sends ATTACH behind an ARM and waits for its outcome.
    pub(super) fn refused(&mut self, payload: &[u8]) -> (u32, u32, u8) {
        let arm = self.interface.send(&mut self.queue, ARM_PLACE, T_ARM, &[]);
        assert_eq!(self.queue.wait_by_polling().head, arm);
        self.send_attach(payload);
        self.wait_attach()
    }

    /// Waits for ATTACH itself to complete, and takes it and ARM back.
    pub(super) fn wait_attach(&mut self) -> (u32, u32, u8) {
        let attach = self.attach_head.take().expect("ATTACH was sent");
        while self.queue.wait_by_polling().head != attach {}
        self.interface.outcome(ATTACH_PLACE)
    }

    /// Whether ATTACH is complete, without taking ARM.
    pub(super) fn is_attach_complete(&self) -> bool {
        self.queue.used_idx() >= 2
    }

    /// What came for ATTACH, and its status.
    pub(super) fn answer(&self) -> (Vec<u8>, u8) {
        self.interface.answer(ATTACH_PLACE)
    }

    /// The device's word.
    pub(super) fn announced(&self) -> u32 {
        self.control.announced()
    }

    pub(super) fn set_detach(&self) {
        self.control.set_detach();
    }

    /// Looks at the device's word and does what it says.
    pub(super) fn look(&mut self) {
        self.step(Event::Announced(self.control.announced()));
    }

    pub(super) fn step(&mut self, event: Event) {
        let actions: Vec<Action> = self.machine.step(event).into_iter().collect();
        for action in actions {
            match action {
                Action::Start(epoch) => {
                    let lengths = Lengths::of(SQ_ENTRIES, CQ_ENTRIES, 4096);
                    let layout = self.control.ring().layout(SQ_ENTRIES, CQ_ENTRIES, &lengths).unwrap();
                    let area = self.payload.areas[epoch.area().index()];
                    let (rings_gpa, sqes_gpa) = (area.rings_gpa.get(), area.sqes_gpa.get());
                    let window = Window { memory: self.ram.memory.clone(), rings_gpa, sqes_gpa };
                    self.ring = Some(DriverRing::new(window, layout).unwrap());
                    for sqe in std::mem::take(&mut self.outstanding) {
                        self.submit(sqe);
                    }
                }
                Action::Drain => {
                    wait_until("the end of what is outstanding", || {
                        self.reap();
                        self.outstanding.is_empty()
                    });
                    self.step(Event::Drained);
                }
                Action::Reap(_) => {
                    self.reap();
                    self.ring = None;
                    self.step(Event::Reaped);
                }
                Action::Acknowledge(announcement) => {
                    self.control.acknowledge(announcement);
                    self.queue.kick.write(1).unwrap();
                }
                Action::RequestDetach => self.control.set_detach(),
                Action::Release => {}
                Action::Reset => panic!("the device broke the protocol"),
            }
        }
    }

    /// Waits until the driver may submit.
    pub(super) fn wait_open(&mut self) {
        wait_until("an epoch that is open", || {
            self.look();
            self.machine.may_submit()
        });
    }

    /// The number of the epoch that is open.
    pub(super) fn epoch(&self) -> Option<u32> {
        match self.machine.state() {
            State::Running { epoch } => Some(epoch.number()),
            _ => None,
        }
    }

    pub(super) fn data_gpa(&self) -> u64 {
        ATTACH_GPA + u64::from(self.index) * ATTACH_BYTES + DATA_OFFSET
    }

    pub(super) fn submit(&mut self, sqe: Sqe) {
        let ring = self.ring.as_mut().expect("an epoch is open");
        ring.push(&sqe).unwrap();
        self.outstanding.push(sqe);
        if ring.publish() {
            self.queue.kick.write(1).unwrap();
        }
    }

    /// Takes completions. What was not executed stays outstanding.
    pub(super) fn reap(&mut self) {
        while let Some(cqe) = self.ring.as_mut().and_then(DriverRing::reap) {
            if cqe.res != -nix::libc::ECANCELED {
                self.outstanding.retain(|sqe| sqe.user_data != cqe.user_data);
                self.completions.push(cqe);
            }
        }
    }

    /// Waits for the completion of a request.
    pub(super) fn wait(&mut self, user_data: u64) -> i32 {
        let mut res = None;
        wait_until("a completion", || {
            self.look();
            self.reap();
            let found = self.completions.iter().position(|cqe| cqe.user_data == user_data);
            res = found.map(|at| self.completions.swap_remove(at).res);
            res.is_some()
        });
        res.unwrap()
    }

    pub(super) fn read(&mut self, offset_bytes: u64, len_bytes: u32) -> Vec<u8> {
        let address = FixedAddressing { iova_base: IOVA_BASE }.resolve(self.data_gpa(), len_bytes).unwrap();
        self.submit(Sqe::read_fixed(address, len_bytes, offset_bytes, 1));
        assert_eq!(self.wait(1), len_bytes as i32);
        let mut data = vec![0; len_bytes as usize];
        self.ram.memory.read_slice(&mut data, GuestAddress(self.data_gpa())).unwrap();
        data
    }

    /// Reads a block into memory at a guest-physical address; gives the result.
    pub(super) fn try_read(&mut self, gpa: u64) -> i32 {
        let address = FixedAddressing { iova_base: IOVA_BASE }.resolve(gpa, 512).unwrap();
        self.submit(Sqe::read_fixed(address, 512, 0, 3));
        self.wait(3)
    }

    pub(super) fn write_without_waiting(&mut self, offset_bytes: u64, data: &[u8], user_data: u64) {
        self.ram.memory.write_slice(data, GuestAddress(self.data_gpa())).unwrap();
        let address = FixedAddressing { iova_base: IOVA_BASE }.resolve(self.data_gpa(), data.len() as u32).unwrap();
        self.submit(Sqe::write_fixed(address, data.len() as u32, offset_bytes, user_data));
    }

    /// Sends ARM and ATTACH again after they came back.
    pub(super) fn attach_again(&mut self) {
        self.ring = None;
        self.attach();
    }

    /// Writes nonsense to the driver's and the device's words, and kicks.
    pub(super) fn scribble(&self, word: u32) {
        let base = self.payload.control_gpa.get();
        for offset in [0, 4, 8, 36, 256, 260, 264] {
            self.ram
                .memory
                .write_obj(word.wrapping_mul(0x9e37_79b9) ^ offset as u32, GuestAddress(base + offset))
                .unwrap();
        }
        // The words that the device waits for, too.
        self.ram.memory.write_obj(word << 2 | 3, GuestAddress(base + 256)).unwrap();
        self.queue.kick.write(1).unwrap();
    }

    pub(super) fn write(&mut self, offset_bytes: u64, data: &[u8]) {
        self.ram.memory.write_slice(data, GuestAddress(self.data_gpa())).unwrap();
        let address = FixedAddressing { iova_base: IOVA_BASE }.resolve(self.data_gpa(), data.len() as u32).unwrap();
        self.submit(Sqe::write_fixed(address, data.len() as u32, offset_bytes, 2));
        assert_eq!(self.wait(2), data.len() as i32);
    }
}

/// What an outcome without a wrong field looks like.
pub(super) fn whole(code: ringpass_guest_abi::request::ErrorCode) -> (u32, u32, u8) {
    (code as u32, NO_FIELD, u8::from(!code.is_ok()))
}
