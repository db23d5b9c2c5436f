//! Arbitrary in-flight regions and rings, for fuzzers and property tests.
//!
//! Bytes become a region as an earlier process, or a hostile front-end, may have left it, and then steps of a driver
//! and a device, with restarts of the device. The recovery must match a model.

mod model;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use self::model::Contents;
use super::inflight::VERSION;
use super::{InflightQueue, InflightRegion, QueueError, QueueSetup, SplitQueue};
use crate::fuzzing::Choices;
use crate::virtio_blk::{Continuity, DeviceRecord};

const DESC_TABLE: u64 = 0;
const AVAIL_RING: u64 = 0x1000;
const USED_RING: u64 = 0x2000;
const MEMORY_BYTES: usize = 0x3000;
/// The region has entries for this many descriptors; queues have at most this many.
const SIZE_MAX: u16 = 16;

/// The events of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Outcome {
    pub(super) refused: bool,
    pub(super) replayed: bool,
    pub(super) repaired: bool,
    pub(super) restarted: bool,
    pub(super) stopped: bool,
    pub(super) completed: bool,
}

/// Starts queues from the region that the bytes describe, and takes the steps that they describe.
///
/// # Panics
///
/// If a queue does not go on where the model does, or breaks one of its own rules.
pub fn inflight_region(bytes: &[u8]) {
    run(bytes);
    device_record(bytes);
}

/// Puts any bytes behind the queues, as a dead process or a hostile front-end may have left them, and records
/// something.
fn device_record(bytes: &[u8]) {
    let file = InflightRegion::create(1, 1).expect("a memfd");
    let (queue_bytes, head_bytes) = (64, 16);
    // Behind the magic, or over it.
    let at = queue_bytes + if bytes.len() & 1 == 0 { head_bytes } else { 0 };
    let bytes = &bytes[..bytes.len().min(file.size_bytes as usize - at)];
    let mapped = || {
        let fd = file.fd.try_clone().expect("a file descriptor");
        InflightRegion::from_fd(fd, 0, file.size_bytes, 1, 1).expect("our own region")
    };
    let mut rest = bytes;
    while !rest.is_empty() {
        let offset = (at + bytes.len() - rest.len()) as u64;
        let written = rustix::io::pwrite(&file.fd, rest, offset).expect("inside the region");
        rest = &rest[written..];
    }
    let region = mapped();
    let found = region.device_record();
    if let Some(record) = found.as_deref().and_then(DeviceRecord::from_bytes) {
        assert_eq!(record.compare(&record, u16::MAX), Ok(Continuity::Same));
    }
    region.set_device_record(b"what comes next");
    let is_ours = at != queue_bytes || bytes.is_empty();
    let record = mapped().device_record();
    assert!(!is_ours || record.as_deref() == Some(&b"what comes next"[..]), "{record:?}");
}

fn run(bytes: &[u8]) -> Outcome {
    let mut choices = Choices::new(bytes);
    let mut world = World::new(&mut choices);
    let mut outcome = Outcome::default();
    world.fill_region(&mut choices);
    let Some(mut device) = Device::start(&world, &mut outcome) else { return outcome };
    while !choices.is_empty() {
        match choices.below(12) {
            0..=2 => world.make_available(&mut choices),
            3..=5 => match device.pop(&world) {
                Ok(()) => {}
                Err(_) => {
                    outcome.stopped = true;
                    return outcome;
                }
            },
            6 => device.add_used(&world, &mut choices),
            7 => outcome.completed |= device.publish(&world),
            8 => device.notifications(&mut choices),
            9 => world.write_ring(&mut choices),
            10 => world.write_region(&mut choices),
            _ => {
                outcome.restarted = true;
                let expected = device.in_flight;
                match Device::start(&world, &mut outcome) {
                    Some(next) => {
                        if !world.is_tampered {
                            assert_eq!(next.replay, expected, "all chains in flight, in the order of taking");
                        }
                        device = next;
                    }
                    None => {
                        assert!(world.is_tampered, "the device refused its own region");
                        return outcome;
                    }
                }
            }
        }
    }
    outcome
}

thread_local! {
    /// Memory and region are made once, because mapping them takes longer than everything else.
    static SHARED: (GuestMemoryMmap, InflightQueue) = {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("guest memory");
        let file = InflightRegion::create(1, SIZE_MAX).expect("a memfd");
        let region = InflightRegion::from_fd(file.fd, 0, file.size_bytes, 1, SIZE_MAX).expect("our own region");
        (memory, region.queue(0).expect("its only queue"))
    };
}

/// Resets a region to its initial state.
fn clear(region: &InflightQueue) {
    region.set_version(0);
    region.set_desc_num(0);
    region.set_last_batch_head(0);
    region.set_used_idx(0);
    for head in 0..SIZE_MAX {
        region.set_in_flight(head, false);
        region.set_counter(head, 0);
        region.set_next(head, 0);
    }
}

/// The state that outlives the device.
struct World {
    memory: GuestMemoryMmap,
    size: u16,
    event_idx: bool,
    region: InflightQueue,
    avail_idx: u16,
    /// The driver or the front-end wrote data that only the device may write.
    is_tampered: bool,
}

impl World {
    fn new(choices: &mut Choices<'_>) -> Self {
        let (memory, region) = SHARED.with(Clone::clone);
        memory.write_slice(&[0; MEMORY_BYTES], GuestAddress(0)).expect("all of it");
        clear(&region);
        let start = choices.number() as u16;
        let world = Self {
            memory,
            size: 1 << choices.below(5),
            event_idx: choices.below(2) == 1,
            region,
            avail_idx: start,
            is_tampered: false,
        };
        world.store(USED_RING + 2, start);
        world.store(AVAIL_RING + 2, start);
        world
    }

    /// A region as another process may have left it, mostly a valid one.
    fn fill_region(&mut self, choices: &mut Choices<'_>) {
        let region = &self.region;
        region.set_version([VERSION, VERSION, VERSION, 0, 2, 0xffff][choices.below(6)]);
        let behind = if choices.below(8) == 7 { choices.number() as u16 } else { choices.below(4) as u16 };
        region.set_used_idx(self.load(USED_RING + 2).wrapping_sub(behind));
        region.set_last_batch_head(head(choices));
        for n in 0..choices.below(usize::from(self.size) + 1) {
            let entry = n as u16;
            region.set_in_flight(entry, choices.below(3) == 0);
            // Far from the maximum: a counter that wraps loses the order.
            region.set_counter(entry, choices.number() >> 1);
            region.set_next(entry, head(choices));
        }
        // The driver made the chains in flight available.
        let in_flight = (0..self.size).filter(|&head| region.is_in_flight(head)).count() as u16;
        self.avail_idx = self.avail_idx.wrapping_add(in_flight);
        self.store(AVAIL_RING + 2, self.avail_idx);
    }

    fn setup(&self) -> QueueSetup {
        QueueSetup {
            size: self.size,
            desc_table: GuestAddress(DESC_TABLE),
            avail_ring: GuestAddress(AVAIL_RING),
            used_ring: GuestAddress(USED_RING),
            next_avail: self.load(USED_RING + 2),
            driver_features: u64::from(self.event_idx) << VIRTIO_RING_F_EVENT_IDX,
            used_log_gpa: None,
            inflight: Some(self.region.clone()),
        }
    }

    fn store(&self, gpa: u64, value: u16) {
        self.memory.write_obj(value.to_le(), GuestAddress(gpa)).expect("inside");
    }

    fn load(&self, gpa: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(gpa)).expect("inside"))
    }

    fn make_available(&mut self, choices: &mut Choices<'_>) {
        self.store(AVAIL_RING + 4 + 2 * u64::from(self.avail_idx % self.size), head(choices));
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.store(AVAIL_RING + 2, self.avail_idx);
    }

    /// The driver writes anything anywhere in its rings and its table.
    fn write_ring(&mut self, choices: &mut Choices<'_>) {
        let area = [DESC_TABLE, AVAIL_RING, AVAIL_RING, USED_RING][choices.below(4)];
        let offset = 2 * choices.below(256) as u64;
        self.is_tampered |= area == USED_RING;
        self.store(area + offset, choices.number() as u16);
        self.avail_idx = self.load(AVAIL_RING + 2);
    }

    /// The front-end writes anything to the region.
    fn write_region(&mut self, choices: &mut Choices<'_>) {
        self.is_tampered = true;
        let value = choices.number();
        let entry = choices.below(SIZE_MAX.into()) as u16;
        match choices.below(6) {
            0 => self.region.set_version(value as u16),
            1 => self.region.set_used_idx(value as u16),
            2 => self.region.set_last_batch_head(value as u16),
            3 => self.region.set_in_flight(entry, value & 1 == 0),
            4 => self.region.set_counter(entry, value),
            _ => self.region.set_next(entry, value as u16),
        }
    }
}

/// A head: mostly one of a small queue, sometimes one that no queue has.
fn head(choices: &mut Choices<'_>) -> u16 {
    match choices.byte() {
        byte @ 0..=239 => u16::from(byte % 8),
        byte => u16::from(byte) * 257,
    }
}

/// A device process.
struct Device {
    queue: SplitQueue,
    replay: VecDeque<u16>,
    /// Taken and not returned.
    taken: Vec<u16>,
    /// Returned, but not published.
    unpublished: Vec<u16>,
    /// All chains that were taken and not published, in the order of taking.
    in_flight: VecDeque<u16>,
}

impl Device {
    /// Starts a queue and compares where it goes on with the model. `None`: the queue was refused, and the region is
    /// unchanged.
    fn start(world: &World, outcome: &mut Outcome) -> Option<Self> {
        let before = Contents::of(&world.region);
        let used_idx = world.load(USED_RING + 2);
        let expected = before.recovered(world.size, used_idx, used_idx);
        let queue = match SplitQueue::new(world.setup(), &world.memory) {
            Ok(queue) => queue,
            Err(error) => {
                assert!(expected.is_none(), "refused, but the model goes on: {error}");
                assert_eq!(Contents::of(&world.region), before, "refused, but the region has changed");
                outcome.refused = true;
                return None;
            }
        };
        let expected = expected.expect("a region that the model refuses");
        assert_eq!(queue.next_avail(), expected.next_avail);
        assert_eq!(usize::from(queue.in_flight()), expected.replay.len());
        let after = Contents::of(&world.region);
        assert_eq!((after.version, after.used_idx), (VERSION, used_idx), "the region matches the ring");
        outcome.replayed |= !expected.replay.is_empty();
        outcome.repaired |= before.version == VERSION && before.used_idx != used_idx;
        let replay: VecDeque<u16> = expected.replay.into();
        Some(Self { queue, in_flight: replay.clone(), replay, taken: Vec::new(), unpublished: Vec::new() })
    }

    /// Takes a chain and puts it back: nothing changes.
    fn pop_and_undo(&mut self, world: &World) -> Result<(), QueueError> {
        let (next_avail, in_flight) = (self.queue.next_avail(), self.queue.in_flight());
        let region = Contents::of(&world.region);
        match self.queue.pop()? {
            // A replayed chain can be put back at once only.
            Some(popped) if self.replay.is_empty() => {
                let chain = popped.leave_unrecorded();
                assert!(self.queue.undo_pop(chain), "it was taken last");
            }
            Some(popped) => popped.undo(),
            None => {}
        }
        assert_eq!((self.queue.next_avail(), self.queue.in_flight()), (next_avail, in_flight));
        assert_eq!(Contents::of(&world.region), region, "nothing was recorded");
        Ok(())
    }

    fn pop(&mut self, world: &World) -> Result<(), QueueError> {
        self.pop_and_undo(world)?;
        let before = self.queue.next_avail();
        let Some((head, mut chain)) = self.queue.pop_recorded(&world.memory)? else {
            assert!(self.replay.is_empty());
            assert!(!self.queue.has_work());
            return Ok(());
        };
        assert!(head < world.size);
        assert!(!self.taken.contains(&head) && !self.unpublished.contains(&head), "taken twice");
        assert!(chain.by_ref().count() <= 2 * 1024, "a chain ends");
        match self.replay.pop_front() {
            Some(expected) => assert_eq!((head, self.queue.next_avail()), (expected, before)),
            None => {
                assert_eq!(self.queue.next_avail(), before.wrapping_add(1));
                self.in_flight.push_back(head);
            }
        }
        assert!(world.is_tampered || world.region.is_in_flight(head), "taken, but not recorded");
        self.taken.push(head);
        assert_eq!(usize::from(self.queue.in_flight()), self.taken.len() + self.replay.len());
        Ok(())
    }

    /// Returns one of the taken chains. Nothing outside the device sees that yet.
    fn add_used(&mut self, world: &World, choices: &mut Choices<'_>) {
        if self.taken.is_empty() {
            return;
        }
        let head = self.taken.remove(choices.below(self.taken.len()));
        let used_idx = world.load(USED_RING + 2);
        let was_in_flight = world.region.is_in_flight(head);
        self.queue.add_used(head, 7, None).expect("it is in flight");
        self.queue.add_used(head, 7, None).expect_err("it is not in flight any more");
        assert_eq!(world.load(USED_RING + 2), used_idx);
        assert_eq!(world.region.is_in_flight(head), was_in_flight);
        self.unpublished.push(head);
    }

    /// Lets the driver see the returned chains. False: there were none.
    fn publish(&mut self, world: &World) -> bool {
        let used_idx = world.load(USED_RING + 2);
        self.queue.publish(None);
        let published = std::mem::take(&mut self.unpublished);
        for (n, &head) in (0..).zip(&published) {
            assert!(!world.region.is_in_flight(head));
            if !world.is_tampered {
                let entry = u64::from(used_idx.wrapping_add(n) % world.size);
                assert_eq!(world.load(USED_RING + 4 + 8 * entry), head);
            }
        }
        if !world.is_tampered {
            assert_eq!(usize::from(world.load(USED_RING + 2).wrapping_sub(used_idx)), published.len());
        }
        if !published.is_empty() {
            assert_eq!(world.region.used_idx(), world.load(USED_RING + 2));
        }
        self.in_flight.retain(|head| !published.contains(head));
        !published.is_empty()
    }

    fn notifications(&mut self, choices: &mut Choices<'_>) {
        match choices.below(3) {
            0 => {
                self.queue.needs_signal();
                assert!(!self.queue.needs_signal(), "no chain was returned since");
            }
            1 => assert_eq!(self.queue.enable_kicks(None), self.queue.has_work()),
            _ => self.queue.disable_kicks(None),
        }
    }
}
