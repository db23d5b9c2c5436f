//! Requests on their way to the ring or the virtqueue, and back.

use ringpass_guest_abi::Sqe;
use ringpass_workload::{Completion, Request};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::super::attachment::Attachment;
use super::errands::Errand;
use super::pending::Place;
use super::{Driver, EIO};

/// Times that the kernel may say "try again" for one request.
const RETRIES_MAX: u32 = 1000;
const EAGAIN: i32 = -11;
const EINTR: i32 = -4;
const ECANCELED: i32 = -125;

/// Whether a request is on a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    OnRing,
    /// There is no room, or no ring.
    No,
    /// No ring can take it.
    Never,
}

impl Driver {
    pub(super) fn send_to_ring(&mut self) {
        if !self.is_ring() {
            return;
        }
        while let Some(&id) = self.waiting.front() {
            match self.place_on_ring(id) {
                Placed::OnRing => {
                    self.waiting.pop_front();
                }
                Placed::No => break,
                Placed::Never => {
                    self.waiting.pop_front();
                    self.publish();
                    self.detour(id);
                }
            }
        }
        self.publish();
    }

    /// Puts a request onto the ring, which the kernel does not see yet.
    #[inline]
    pub(super) fn place_on_ring(&mut self, id: usize) -> Placed {
        let Some(pending) = self.slots[id].as_mut() else { return Placed::No };
        let Some(attachment) = self.attachment.as_mut() else { return Placed::No };
        let device = *attachment.device();
        let Request { write, offset_bytes, gpa, len_bytes, durable, .. } = pending.rest();
        let len_bytes = len_bytes.min(device.segment_bytes_max);
        let is_aligned = (gpa | u64::from(len_bytes)) & (u64::from(device.segment_align_bytes) - 1) == 0;
        // What rings cannot name, queue 0 can; and if there is anything wrong with it, it says so.
        let Some(address) = device.addressing.resolve(gpa, len_bytes).ok().filter(|_| is_aligned) else {
            return Placed::Never;
        };
        let build = if write { Sqe::write_fixed } else { Sqe::read_fixed };
        let sqe = build(address, len_bytes, offset_bytes, id as u64);
        let sqe = if durable && write { sqe.durable() } else { sqe };
        match attachment.ring().map(|ring| ring.push(&sqe)) {
            Some(Ok(())) => {
                pending.place = Place::Ring;
                Placed::OnRing
            }
            Some(Err(_)) | None => Placed::No,
        }
    }

    /// Shows the kernel what is on the ring.
    #[inline]
    pub(super) fn publish(&mut self) {
        if self.attachment.as_mut().and_then(Attachment::ring).is_some_and(|ring| ring.publish()) {
            self.queue.kick();
        }
    }

    pub(super) fn reap_ring(&mut self) {
        while let Some(completion) = self.reap_one_of_ring() {
            self.done.push_back(completion);
        }
    }

    /// The next completion on the ring that ends a request.
    #[inline]
    pub(super) fn reap_one_of_ring(&mut self) -> Option<Completion> {
        loop {
            let cqe = self.attachment.as_mut().and_then(Attachment::ring)?.reap()?;
            let id = usize::try_from(cqe.user_data).unwrap_or(usize::MAX);
            // A device that makes completions up reaches nothing that is not on the ring.
            let Some(Some(pending)) = self.slots.get_mut(id) else { continue };
            if pending.place != Place::Ring {
                continue;
            }
            let left_bytes = pending.request.len_bytes - pending.done_bytes;
            if cqe.res > 0 && cqe.res as u32 >= left_bytes {
                let res = pending.request.len_bytes as i32;
                return self.end(id, res);
            }
            self.unfinished(id, cqe.res);
        }
    }

    /// A request whose completion is not its end.
    #[cold]
    fn unfinished(&mut self, id: usize, res: i32) {
        let Some(Some(pending)) = self.slots.get_mut(id) else { return };
        match res {
            ECANCELED | EAGAIN | EINTR if pending.retries < RETRIES_MAX => {
                pending.retries += u32::from(res != ECANCELED);
                self.put_aside(id);
            }
            res if res > 0 => {
                pending.done_bytes += res as u32;
                self.put_aside(id);
            }
            // Not the last word: rings may not reach that memory (yet), or whose ring it is was killed while it worked on
            // the request. The answer of queue 0 counts.
            _ => self.detour(id),
        }
    }

    pub(super) fn send_to_virtqueue(&mut self) {
        let mut has_sent = false;
        while let Some(&id) = self.waiting.front() {
            let Some(pending) = self.slots[id].as_mut() else { break };
            let Request { write, offset_bytes, gpa, len_bytes, .. } = pending.rest();
            let Some(head) = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, write) else {
                break;
            };
            pending.place = Place::Virtqueue;
            self.by_head[usize::from(head)] = id;
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
                Err(error) => return self.break_down(error),
            };
            let id = std::mem::replace(&mut self.by_head[usize::from(head)], usize::MAX);
            let status = self.requests.status(head);
            let Some(Some(pending)) = self.slots.get(id) else { continue };
            let Request { len_bytes, durable, write, .. } = pending.request;
            let is_ok = u32::from(status) == VIRTIO_BLK_S_OK;
            if is_ok && durable && write {
                self.run_errand(Errand::Flush { id });
            } else {
                self.complete(id, if is_ok { len_bytes as i32 } else { EIO });
            }
        }
    }

    pub(super) fn put_aside(&mut self, id: usize) {
        if let Some(pending) = &mut self.slots[id] {
            pending.place = Place::Waiting;
            self.counters.resubmitted += 1;
            self.waiting.push_back(id);
        }
    }

    pub(super) fn complete(&mut self, id: usize, res: i32) {
        let completion = self.end(id, res);
        self.done.extend(completion);
    }

    /// A request has ended.
    #[inline]
    fn end(&mut self, id: usize, res: i32) -> Option<Completion> {
        let pending = self.slots[id].take()?;
        self.free.push(id);
        Some(Completion { user_data: pending.request.user_data, res })
    }

    /// The device is broken: it gets nothing more. What it has, it may still execute: such a request keeps its buffer, and ends only
    /// with its completion, if that comes.
    pub(super) fn fail_unsent(&mut self) {
        while let Some(id) = self.waiting.pop_front() {
            self.complete(id, EIO);
        }
        while let Some(errand) = self.errands.waiting.pop_front() {
            if let Errand::Transfer { id } | Errand::Flush { id } = errand {
                self.complete(id, EIO);
            }
        }
    }
}
