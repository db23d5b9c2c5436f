//! A virtio-blk driver on one queue of an engine.

use std::collections::HashMap;

use ringpass_test_utils::PATIENCE;
use ringpass_test_utils::blk::{HEADER_BYTES, NO_STATUS, header, range};
use ringpass_test_utils::descriptor::{DESCRIPTOR_BYTES, Descriptor};
use ringpass_test_utils::vring::{DriverVring, Used};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{eventfds, features, indirect_tables_gpa, setup};
use super::rig::SECTOR;
use crate::vhost_user::QueueEventfds;
use crate::virtqueue::{InflightQueue, QueueSetup};

/// Requests of one queue that can be outstanding.
pub(super) const DEPTH_MAX: u16 = 128;

/// Where the places for requests begin. One of them lies across the boundary of the two regions.
const PLACES_GPA: u64 = 8 << 20;
/// Header, status and data of a request.
const PLACE_BYTES: u64 = 0x6000;
const STATUS_OFFSET: u64 = 0x800;
const DATA_OFFSET: u64 = 0x1000;
/// Room for an indirect table.
const TABLE_BYTES: u64 = 128 * DESCRIPTOR_BYTES;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Which one.
    pub(super) head: u16,
    /// `VIRTIO_BLK_S_*`.
    pub(super) status: u8,
    /// What was read.
    pub(super) data: Vec<u8>,
    /// The length in the used ring.
    pub(super) used_bytes: u32,
}

/// A virtio-blk driver on one queue.
pub(super) struct BlockDriver {
    pub(super) index: u16,
    pub(super) vring: DriverVring,
    /// Numbers of the free places.
    places: Vec<u64>,
    /// The features that it accepted of the device.
    pub(super) blk_features: u64,
    /// Its chains are in indirect tables.
    pub(super) indirect: bool,
    /// By head: the number of the place, and how much is read.
    outstanding: HashMap<u16, (u64, u32)>,
    /// The data is cut into buffers of this length.
    pub(super) segment_bytes: u32,
    /// The data begins this far behind a page boundary.
    pub(super) misalignment_bytes: u64,
    /// Where the data is, if not in the request's own place: for one request at a time.
    pub(super) data_gpa: Option<u64>,
    /// Waits for interrupts, and does not poll.
    pub(super) by_interrupt: bool,
    /// Chains added since the last kick.
    added: u16,
}

impl BlockDriver {
    pub(super) fn new(index: u16, vring: DriverVring) -> Self {
        Self {
            index,
            vring,
            places: (0..DEPTH_MAX.into()).rev().collect(),
            blk_features: u64::MAX,
            indirect: false,
            outstanding: HashMap::new(),
            segment_bytes: u32::MAX,
            misalignment_bytes: 0,
            data_gpa: None,
            by_interrupt: false,
            added: 0,
        }
    }

    /// The set-up of its queue.
    pub(super) fn setup(&self, next_avail: u16, inflight: Option<InflightQueue>) -> QueueSetup {
        let driver_features = features(&self.vring, self.blk_features);
        QueueSetup { driver_features, ..setup(&self.vring, next_avail, inflight) }
    }

    /// The eventfds of its queue.
    pub(super) fn eventfds(&self) -> QueueEventfds {
        eventfds(&self.vring)
    }

    /// The first page of the place that the next request gets, and the last one got if none is outstanding.
    pub(super) fn place_pages(&self) -> u64 {
        self.place_gpa(*self.places.last().expect("a free place")) / 4096
    }

    /// How many requests are outstanding.
    pub(super) fn depth(&self) -> usize {
        self.outstanding.len()
    }

    /// Whether one more request of this length fits.
    pub(super) fn has_room(&self, len_bytes: u32) -> bool {
        let buffers = 2 + len_bytes.div_ceil(self.segment_bytes.min(len_bytes).max(1)) as usize;
        !self.places.is_empty() && self.vring.has_room(if self.indirect { 1 } else { buffers })
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.vring.ram().memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn place_gpa(&self, place: u64) -> u64 {
        PLACES_GPA + (u64::from(self.index) * u64::from(DEPTH_MAX) + place) * PLACE_BYTES
    }

    fn data_at(&self, place: u64) -> u64 {
        self.data_gpa.unwrap_or(self.place_gpa(place) + DATA_OFFSET) + self.misalignment_bytes
    }

    /// Makes a request available, without a kick.
    fn add(&mut self, kind: u32, sector: u64, out: &[u8], in_bytes: u32) -> u16 {
        let place = self.places.pop().expect("a free place");
        let (header_gpa, data) = (self.place_gpa(place), self.data_at(place));
        let status_gpa = header_gpa + STATUS_OFFSET;
        self.write(header_gpa, &header(kind, sector));
        self.write(status_gpa, &[NO_STATUS]);
        self.write(data, out);
        let mut chain = vec![Descriptor::readable(header_gpa, HEADER_BYTES)];
        let (len_bytes, buffer): (u32, fn(u64, u32) -> Descriptor) =
            if out.is_empty() { (in_bytes, Descriptor::writable) } else { (out.len() as u32, Descriptor::readable) };
        let mut offset = 0;
        while offset < len_bytes {
            let part_bytes = self.segment_bytes.min(len_bytes - offset);
            chain.push(buffer(data + u64::from(offset), part_bytes));
            offset += part_bytes;
        }
        chain.push(Descriptor::writable(status_gpa, 1));
        if self.indirect {
            let table_gpa = indirect_tables_gpa(&self.vring) + place * TABLE_BYTES;
            chain = vec![self.vring.write_indirect_table(table_gpa, &chain).unwrap()];
        }
        let head = self.vring.add(&chain).unwrap();
        self.vring.publish_quietly().unwrap();
        self.outstanding.insert(head, (place, in_bytes));
        self.added += 1;
        head
    }

    pub(super) fn add_read(&mut self, sector: u64, sectors: u64) -> u16 {
        self.add(VIRTIO_BLK_T_IN, sector, &[], (sectors * SECTOR) as u32)
    }

    pub(super) fn add_write(&mut self, sector: u64, data: &[u8]) -> u16 {
        self.add(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    pub(super) fn add_flush(&mut self) -> u16 {
        self.add(VIRTIO_BLK_T_FLUSH, 0, &[], 0)
    }

    pub(super) fn add_write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> u16 {
        self.add(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, sectors, unmap.into()), 0)
    }

    /// Kicks for what was added, if the device wants that.
    pub(super) fn kick(&mut self) {
        let added = std::mem::take(&mut self.added);
        if added > 0 {
            self.vring.kick_if_wanted(self.vring.next_avail().wrapping_sub(added)).unwrap();
        }
    }

    /// Waits for the next request that ends.
    pub(super) fn wait(&mut self) -> Outcome {
        self.kick();
        let next_used =
            if self.by_interrupt { DriverVring::next_used_by_call } else { DriverVring::next_used_by_spinning };
        let used = next_used(&mut self.vring, PATIENCE).unwrap();
        self.outcome(used)
    }

    /// A request that has ended.
    pub(super) fn poll(&mut self) -> Option<Outcome> {
        let used = self.vring.take_used().unwrap()?;
        Some(self.outcome(used))
    }

    fn outcome(&mut self, used: Used) -> Outcome {
        let (place, in_bytes) = self.outstanding.remove(&used.head).expect("an outstanding request");
        let mut data = vec![0; in_bytes as usize];
        let memory = self.vring.ram().memory();
        memory.read_slice(&mut data, GuestAddress(self.data_at(place))).unwrap();
        let status = memory.read_obj(GuestAddress(self.place_gpa(place) + STATUS_OFFSET)).unwrap();
        self.places.push(place);
        Outcome { head: used.head, status, data, used_bytes: used.len_bytes }
    }

    /// One request from its beginning to its end, while no other is outstanding.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], in_bytes: u32) -> Outcome {
        let head = self.add(kind, sector, out, in_bytes);
        let outcome = self.wait();
        assert_eq!(outcome.head, head, "another request came back");
        outcome
    }

    pub(super) fn read(&mut self, sector: u64, sectors: u64) -> Outcome {
        self.request(VIRTIO_BLK_T_IN, sector, &[], (sectors * SECTOR) as u32)
    }

    pub(super) fn write_data(&mut self, sector: u64, data: &[u8]) -> Outcome {
        self.request(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    pub(super) fn flush(&mut self) -> Outcome {
        self.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0)
    }

    pub(super) fn id(&mut self) -> Outcome {
        self.id_in(20)
    }

    /// The ID in a buffer of this length.
    pub(super) fn id_in(&mut self, room_bytes: u32) -> Outcome {
        self.request(VIRTIO_BLK_T_GET_ID, 0, &[], room_bytes)
    }

    pub(super) fn add_discard(&mut self, sector: u64, sectors: u32) -> u16 {
        self.add(VIRTIO_BLK_T_DISCARD, 0, &range(sector, sectors, 0), 0)
    }

    pub(super) fn discard(&mut self, sector: u64, sectors: u32) -> Outcome {
        self.request(VIRTIO_BLK_T_DISCARD, 0, &range(sector, sectors, 0), 0)
    }

    pub(super) fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Outcome {
        self.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, sectors, unmap.into()), 0)
    }

    /// A request of an unknown kind.
    pub(super) fn nonsense(&mut self) -> Outcome {
        self.request(0xdead, 0, &[], 0)
    }
}
