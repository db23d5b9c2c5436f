//! A request of the attach protocol (`docs/abi.md`), and where its answer goes.

use std::rc::Rc;

use ringpass_guest_abi::request::PAYLOAD_BYTES_MAX;
use vm_memory::{Bytes, GuestAddress};

use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{AttachRequest, SegmentList};
use crate::virtqueue::{DirtyLog, SplitQueue, UnrecordedChain};

/// A request of the attach protocol that the worker has taken from a queue and not answered. The request may stay
/// pending for as long as its queue runs.
#[derive(Debug)]
pub(in crate::engine) struct PendingAttachRequest {
    /// The head of the request's chain.
    pub(in crate::engine) head: u16,
    /// The guest's memory as it is now. The places of the answer were in it when the chain was parsed.
    pub(in crate::engine) memory: Rc<DeviceMemory>,
    pub(in crate::engine) status_gpa: GuestAddress,
    /// Device-writable bytes before the status.
    pub(in crate::engine) answer_bytes: u32,
    /// Room for the answer, in the order of the chain.
    places: Vec<(GuestAddress, usize)>,
    /// `None`: the in-flight region has the chain.
    unrecorded: Option<UnrecordedChain>,
}

impl PendingAttachRequest {
    /// A request that was just parsed, and its payload. The payload is copied once: as much of it as any payload may
    /// have, and one byte more if it is longer.
    pub(in crate::engine) fn new(
        chain: UnrecordedChain,
        request: &AttachRequest,
        memory: Rc<DeviceMemory>,
        segments: &SegmentList,
    ) -> (Self, Vec<u8>) {
        let mut payload_left = request.payload_bytes as usize;
        let mut payload = Vec::new();
        let mut places = Vec::new();
        for segment in segments.iter() {
            let readable = payload_left.min(segment.len_bytes);
            payload_left -= readable;
            let wanted = readable.min((PAYLOAD_BYTES_MAX as usize + 1).saturating_sub(payload.len()));
            let filled = payload.len();
            payload.resize(filled + wanted, 0);
            // The segment was in this memory when the chain was parsed.
            let _ = memory.read_slice(&mut payload[filled..], segment.gpa);
            if readable < segment.len_bytes {
                let gpa = GuestAddress(segment.gpa.0 + readable as u64);
                places.push((gpa, segment.len_bytes - readable));
            }
        }
        let AttachRequest { status_gpa, answer_bytes, .. } = *request;
        let head = chain.head();
        (Self { head, memory, status_gpa, answer_bytes, places, unrecorded: Some(chain) }, payload)
    }

    /// Records the request's chain in the in-flight region of its queue: a later process takes the request again.
    pub(in crate::engine) fn record(&mut self, queue: &mut SplitQueue) {
        if let Some(chain) = self.unrecorded.take() {
            queue.record(chain);
        }
    }

    /// Leaves the request to the next process, or to a later poll iteration of this one, as if it had not been taken. False, and
    /// nothing changes: the in-flight region has the request, so that a later process takes it again anyway.
    pub(in crate::engine) fn undo(self, queue: &mut SplitQueue) -> bool {
        self.unrecorded.is_some_and(|chain| queue.undo_pop(chain))
    }

    /// Writes as much of the answer as there is room for, and returns the number of bytes. The status is written when
    /// the chain is completed.
    pub(in crate::engine) fn write_answer(&self, answer: &[u8], log: Option<&DirtyLog>) -> u32 {
        let mut rest = answer;
        let mut written_bytes = 0;
        for &(gpa, len_bytes) in &self.places {
            let (part, later) = rest.split_at(len_bytes.min(rest.len()));
            rest = later;
            let is_written = self.memory.write_slice(part, gpa).is_ok();
            if let Some(log) = log {
                log.mark(gpa.0, part.len() as u64);
            }
            if !is_written {
                // The place has left the guest's memory since. What comes after it does not count (VIRTIO 1.2,
                // 2.7.8.2).
                break;
            }
            written_bytes += part.len() as u32;
        }
        written_bytes
    }
}
