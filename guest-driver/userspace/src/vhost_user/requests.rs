//! Requests of virtio-blk on a virtqueue: header, data, status.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::Error;
use super::config::Geometry;
use super::memory::Memory;
use super::segments::Segments;
use super::virtqueue::{Buffer, Virtqueue};
use crate::ram::RamArea;

/// The bytes of one request's place: header and payload, answer, and status.
const PLACE_BYTES: u64 = 512;
const ANSWER_OFFSET: u64 = 256;
pub(super) const ANSWER_BYTES: u32 = 128;
const STATUS_OFFSET: u64 = 511;
const HEADER_BYTES: usize = 16;
/// The status before the device writes one.
const NO_STATUS: u8 = 0xff;

/// The part of a request after its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body<'a> {
    /// At most 240 bytes, with room for an answer.
    Payload(&'a [u8]),
    /// A range of the disk, without an answer.
    Range(&'a [u8; 16]),
    /// Nothing, without an answer.
    Empty,
}

/// The memory for headers, answers and statuses of a queue's requests: one place for each head.
#[derive(Debug)]
pub(super) struct Requests {
    area: RamArea,
    segments: Segments,
}

/// A read or write that the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) head: u16,
    /// The length of its data: at most as many bytes as the device takes in one request.
    pub(super) len_bytes: u32,
}

impl Requests {
    pub(super) fn new(memory: &Memory, queue: &Virtqueue, geometry: &Geometry) -> Result<Self, Error> {
        let size = queue.vring().size;
        let segments = Segments::new(geometry, size)?;
        let mut area = memory.allocate(PLACE_BYTES * u64::from(size))?;
        // The device uses the area for as long as the connection lasts.
        area.lend();
        Ok(Self { area, segments })
    }

    /// Makes a request other than a read or write available, and returns its head. `None`: there is no room.
    pub(super) fn send(&mut self, queue: &mut Virtqueue, kind: u32, body: &Body<'_>) -> Option<u16> {
        let buffers = match body {
            Body::Payload(_) => 3,
            Body::Range(_) | Body::Empty => 2,
        };
        let (at, status) = self.write_header(queue, buffers, kind, 0)?;
        let gpa = self.area.gpa() + at;
        match *body {
            Body::Payload(payload) => {
                debug_assert!(payload.len() as u64 <= ANSWER_OFFSET - HEADER_BYTES as u64);
                self.area.write(at + HEADER_BYTES as u64, payload);
                self.area.write(at + ANSWER_OFFSET, &[0; ANSWER_BYTES as usize]);
                let readable = Buffer::readable(gpa, (HEADER_BYTES + payload.len()) as u32);
                queue.add(&[readable, Buffer::writable(gpa + ANSWER_OFFSET, ANSWER_BYTES), status])
            }
            Body::Range(range) => {
                self.area.write(at + HEADER_BYTES as u64, range);
                queue.add(&[Buffer::readable(gpa, (HEADER_BYTES + range.len()) as u32), status])
            }
            Body::Empty => queue.add(&[Buffer::readable(gpa, HEADER_BYTES as u32), status]),
        }
    }

    /// Writes the header of a request that will have this many buffers. Returns the place of the request in the area,
    /// and the buffer of its status.
    fn write_header(
        &mut self,
        queue: &Virtqueue,
        buffers: usize,
        kind: u32,
        offset_bytes: u64,
    ) -> Option<(u64, Buffer)> {
        // The place belongs to the head of the chain. The queue chooses the head only when it makes the chain, but the
        // chain names the place: so take the place of the head that the queue chooses next.
        let at = u64::from(queue.next_head(buffers)?) * PLACE_BYTES;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(offset_bytes / 512).to_le_bytes());
        self.area.write(at, &header);
        self.area.write(at + STATUS_OFFSET, &[NO_STATUS]);
        Some((at, Buffer::writable(self.area.gpa() + at + STATUS_OFFSET, 1)))
    }

    /// Maximum number of bytes of one read or write.
    pub(super) fn transfer_bytes_max(&self) -> u32 {
        self.segments.request_bytes_max()
    }

    /// Makes a read or write available, or as much of it as the device takes in one request. `None`: there is no room.
    pub(super) fn transfer(
        &mut self,
        queue: &mut Virtqueue,
        offset_bytes: u64,
        gpa: u64,
        len_bytes: u32,
        is_write: bool,
    ) -> Option<Sent> {
        let kind = if is_write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        let len_bytes = len_bytes.min(self.transfer_bytes_max());
        let count = self.segments.count(len_bytes);
        let (at, status) = self.write_header(queue, count + 2, kind, offset_bytes)?;
        let header = Buffer::readable(self.area.gpa() + at, HEADER_BYTES as u32);
        let head = if count == 1 {
            // The usual case.
            queue.add(&[header, Buffer { gpa, len_bytes, is_writable: !is_write }, status])
        } else {
            let data = self.segments.of(gpa, len_bytes, is_write);
            queue.add(&std::iter::once(header).chain(data).chain([status]).collect::<Vec<_>>())
        };
        head.map(|head| Sent { head, len_bytes })
    }

    /// The status of a request whose chain the device has returned.
    pub(super) fn status(&self, head: u16) -> u8 {
        let mut status = [NO_STATUS];
        self.area.read(u64::from(head) * PLACE_BYTES + STATUS_OFFSET, &mut status);
        status[0]
    }

    /// The answer of such a request. Bytes that the device did not write are zero.
    pub(super) fn answer(&self, head: u16) -> [u8; ANSWER_BYTES as usize] {
        let mut answer = [0; ANSWER_BYTES as usize];
        self.area.read(u64::from(head) * PLACE_BYTES + ANSWER_OFFSET, &mut answer);
        answer
    }
}
