//! Requests of virtio-blk on a virtqueue: header, data, status.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::Error;
use super::memory::Memory;
use super::virtqueue::{Buffer, Virtqueue};
use crate::RamArea;

/// Room for the header and payload of one request, its answer, and its status.
const SLOT_BYTES: u64 = 512;
const ANSWER_OFFSET: u64 = 256;
pub(super) const ANSWER_BYTES: u32 = 128;
const STATUS_OFFSET: u64 = 511;
const HEADER_BYTES: usize = 16;
/// What no device writes.
const NO_STATUS: u8 = 0xff;

/// Whatever a request has besides its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body<'a> {
    /// A buffer of the guest, read or written by the device.
    Data { gpa: u64, len_bytes: u32, is_write: bool },
    /// At most 240 bytes for the device, and room for its answer.
    Payload(&'a [u8]),
    /// A range of the disk: for the device, and without an answer.
    Range(&'a [u8; 16]),
    /// Nothing.
    Nothing,
}

/// The places of a queue's requests: one for each that can be outstanding, by the head of its chain.
#[derive(Debug)]
pub(super) struct Requests {
    area: RamArea,
}

impl Requests {
    pub(super) fn new(memory: &Memory, queue: &Virtqueue) -> Result<Self, Error> {
        Ok(Self { area: memory.allocate(SLOT_BYTES * u64::from(queue.setup().size))? })
    }

    /// Makes a request available. `None`: there is no room.
    pub(super) fn send(&mut self, queue: &mut Virtqueue, kind: u32, offset_bytes: u64, body: &Body<'_>) -> Option<u16> {
        // The head is known only when the chain is made, and the chain names the place: each place belongs to the head that
        // will be taken next.
        let buffers = match body {
            Body::Data { .. } | Body::Payload(_) => 3,
            Body::Range(_) | Body::Nothing => 2,
        };
        let head = queue.next_head(buffers)?;
        let at = u64::from(head) * SLOT_BYTES;
        let gpa = self.area.gpa() + at;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(offset_bytes / 512).to_le_bytes());
        self.area.write(at, &header);
        self.area.write(at + STATUS_OFFSET, &[NO_STATUS]);
        let status = Buffer::writable(gpa + STATUS_OFFSET, 1);
        match *body {
            Body::Data { gpa: data_gpa, len_bytes, is_write } => {
                let data = Buffer { gpa: data_gpa, len_bytes, is_writable: !is_write };
                queue.add(&[Buffer::readable(gpa, HEADER_BYTES as u32), data, status])
            }
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
            Body::Nothing => queue.add(&[Buffer::readable(gpa, HEADER_BYTES as u32), status]),
        }
    }

    /// A read or write.
    pub(super) fn transfer(
        &mut self,
        queue: &mut Virtqueue,
        offset_bytes: u64,
        gpa: u64,
        len_bytes: u32,
        is_write: bool,
    ) -> Option<u16> {
        let kind = if is_write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        self.send(queue, kind, offset_bytes, &Body::Data { gpa, len_bytes, is_write })
    }

    /// The status of a request that came back.
    pub(super) fn status(&self, head: u16) -> u8 {
        let mut status = [NO_STATUS];
        self.area.read(u64::from(head) * SLOT_BYTES + STATUS_OFFSET, &mut status);
        status[0]
    }

    /// Its answer; what the device did not write is zero.
    pub(super) fn answer(&self, head: u16) -> [u8; ANSWER_BYTES as usize] {
        let mut answer = [0; ANSWER_BYTES as usize];
        self.area.read(u64::from(head) * SLOT_BYTES + ANSWER_OFFSET, &mut answer);
        answer
    }
}
