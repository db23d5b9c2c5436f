//! Sends reads and writes to the ring or the virtqueue, and takes their completions.

use ringpass_guest_abi::block_queue::Request;
use ringpass_guest_abi::completion::Completed;
use ringpass_guest_abi::{SEGMENT_BOUNDARY_BYTES, Sqe};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::super::attachment::{Attachment, LiveRing};
use super::delegated::Delegated;
use super::pending::Place;
use super::{Driver, EIO, Ended};

/// Whether the driver has put a request onto a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    OnRing,
    /// There is no room, or no ring, at present.
    NotNow,
    /// No ring can execute the request.
    Never,
}

impl Driver {
    pub(super) fn send_to_ring(&mut self) {
        if !self.is_ring() {
            return self.send_elsewhere();
        }
        while let Some(&id) = self.waiting.front() {
            match self.place_on_ring(id) {
                Placed::OnRing => {
                    self.waiting.pop_front();
                }
                Placed::NotNow => break,
                Placed::Never => {
                    self.waiting.pop_front();
                    self.publish();
                    self.fall_back(id);
                }
            }
        }
        self.publish();
    }

    /// Sends requests over queue 0 while the queue has no ring, as far as there is room: the others may meet the next ring.
    fn send_elsewhere(&mut self) {
        while self.fault.is_none() && self.delegated.waiting.is_empty() {
            let Some(id) = self.waiting.pop_front() else { break };
            self.fall_back(id);
            self.progress_delegated();
        }
    }

    /// Puts a request onto the ring. The kernel sees it only after [`publish`](Self::publish).
    #[inline]
    pub(super) fn place_on_ring(&mut self, id: usize) -> Placed {
        let Some(pending) = self.slots[id].as_mut() else { return Placed::NotNow };
        let Some(attachment) = self.attachment.as_mut() else { return Placed::NotNow };
        let has_durable_writes = attachment.has_durable_writes();
        let Some(LiveRing { ring, addressing, segments, .. }) = attachment.live_ring() else { return Placed::NotNow };
        let Request { write, offset_bytes, gpa, len_bytes, durable, .. } = pending.rest();
        // The rest of the request follows when this part has ended.
        let up_to_boundary = SEGMENT_BOUNDARY_BYTES - gpa % SEGMENT_BOUNDARY_BYTES;
        let len_bytes = len_bytes.min(segments.bytes_max).min(up_to_boundary as u32);
        let can_be_segment = segments.takes(gpa, len_bytes, offset_bytes) && !(write && durable && !has_durable_writes);
        // Requests on queue 0 can name memory that SQEs cannot, and the answer reports what is wrong with a request.
        let Some(address) = addressing.resolve(gpa, len_bytes).ok().filter(|_| can_be_segment) else {
            return Placed::Never;
        };
        let build = if write { Sqe::write_fixed } else { Sqe::read_fixed };
        let sqe = build(address, len_bytes, offset_bytes, id as u64);
        let sqe = if durable && write { sqe.durable() } else { sqe };
        if ring.push(&sqe).is_err() {
            return Placed::NotNow;
        }
        pending.place = Place::Ring;
        pending.sent_bytes = len_bytes;
        Placed::OnRing
    }

    /// Publishes the SQ tail, and rings the doorbell if the kernel needs that.
    #[inline]
    pub(super) fn publish(&mut self) {
        if self.attachment.as_mut().and_then(Attachment::ring).is_some_and(|ring| ring.publish()) {
            self.queue.kick();
        }
    }

    pub(super) fn reap_ring(&mut self) {
        while let Some(ended) = self.reap_one_of_ring() {
            self.ended.push_back(ended);
        }
    }

    /// The next request that ended with a CQE of the ring.
    #[inline]
    pub(super) fn reap_one_of_ring(&mut self) -> Option<Ended> {
        loop {
            let cqe = self.attachment.as_mut().and_then(Attachment::ring)?.reap()?;
            let id = usize::try_from(cqe.user_data).unwrap_or(usize::MAX);
            // Anything may be in the CQ: a CQE must not end a request that is not on the ring.
            let Some(Some(pending)) = self.slots.get_mut(id) else { continue };
            if pending.place != Place::Ring {
                continue;
            }
            let completed = Completed::of(cqe.res, pending.sent_bytes);
            if completed != Completed::Done {
                if let Some(ended) = self.handle_undone(id, completed) {
                    return Some(ended);
                }
                continue;
            }
            if !pending.note_part_done() {
                pending.place = Place::Waiting;
                self.waiting.push_front(id);
                continue;
            }
            let res = pending.request.len_bytes as i32;
            if let Some(ended) = self.end(id, res) {
                return Some(ended);
            }
        }
    }

    /// Handles a completion that does not say that its part is done. Gives the request if the completion ends it.
    #[cold]
    fn handle_undone(&mut self, id: usize, completed: Completed) -> Option<Ended> {
        match completed {
            Completed::Done => None,
            Completed::Again { done_bytes } => {
                if let Some(Some(pending)) = self.slots.get_mut(id) {
                    pending.done_bytes += done_bytes;
                }
                self.fall_back(id);
                None
            }
            Completed::Failed { errno } => self.end(id, -errno),
        }
    }

    pub(super) fn send_to_virtqueue(&mut self) {
        let mut has_sent = false;
        while let Some(&id) = self.waiting.front() {
            let Some(pending) = self.slots[id].as_mut() else { break };
            let Request { write, offset_bytes, gpa, len_bytes, .. } = pending.rest();
            let Some(sent) = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, write) else {
                break;
            };
            pending.place = Place::Virtqueue;
            pending.sent_bytes = sent.len_bytes;
            self.by_head[usize::from(sent.head)] = id;
            self.waiting.pop_front();
            has_sent = true;
        }
        if has_sent && self.queue.wants_kick() {
            self.queue.kick();
        }
    }

    pub(super) fn reap_virtqueue(&mut self) {
        loop {
            let head = match self.queue.reap() {
                Ok(Some(head)) => head,
                Ok(None) => return,
                Err(error) => return self.set_fault(error),
            };
            let id = std::mem::replace(&mut self.by_head[usize::from(head)], usize::MAX);
            let status = self.requests.status(head);
            let Some(Some(pending)) = self.slots.get_mut(id) else { continue };
            let Request { len_bytes, durable, write, .. } = pending.request;
            if u32::from(status) != VIRTIO_BLK_S_OK {
                self.complete(id, EIO);
            } else if !pending.note_part_done() {
                // The device takes no more in one request: the driver sends the rest before all waiting requests.
                pending.place = Place::Waiting;
                self.waiting.push_front(id);
            } else if durable && write {
                self.delegate(Delegated::Flush { id });
            } else {
                self.complete(id, len_bytes as i32);
            }
        }
    }

    /// Has the driver send a request again.
    pub(super) fn requeue(&mut self, id: usize) {
        if let Some(pending) = &mut self.slots[id] {
            pending.place = Place::Waiting;
            self.counters.resubmitted += 1;
            self.waiting.push_back(id);
        }
    }

    pub(super) fn complete(&mut self, id: usize, res: i32) {
        let ended = self.end(id, res);
        self.ended.extend(ended);
    }

    /// Ends a request. `None`: the application has dropped the queue; the buffer returns to the allocator.
    #[inline]
    fn end(&mut self, id: usize, res: i32) -> Option<Ended> {
        let pending = self.slots[id].take()?;
        self.free.push(id);
        let is_abandoned = pending.is_abandoned;
        Some(pending.end(res)).filter(|_| !is_abandoned)
    }

    /// Called when the application drops the queue. The driver discards the requests that it has not sent. It keeps the
    /// buffers of the others until these requests have ended, and then returns them to the allocator.
    pub(in super::super) fn abandon(&mut self) {
        for pending in self.slots.iter_mut().flatten() {
            pending.is_abandoned = true;
        }
        self.ended.clear();
        while let Some(id) = self.waiting.pop_front() {
            self.complete(id, EIO);
        }
        for delegated in std::mem::take(&mut self.delegated.waiting) {
            let (Delegated::Fallback { id } | Delegated::Flush { id }) = delegated;
            self.complete(id, EIO);
        }
    }

    /// Fails the requests that the device does not have, after a fault of the device. The device may still execute the
    /// others: such a request keeps its buffer, and ends only if the device completes it.
    pub(super) fn fail_unsent(&mut self) {
        while let Some(id) = self.waiting.pop_front() {
            self.complete(id, EIO);
        }
        while let Some(delegated) = self.delegated.waiting.pop_front() {
            let (Delegated::Fallback { id } | Delegated::Flush { id }) = delegated;
            self.complete(id, EIO);
        }
    }
}
