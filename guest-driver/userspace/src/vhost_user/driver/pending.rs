//! A request that has not ended, and where it is.

use ringpass_guest_abi::block_queue::{Completion, Request};

use crate::ram::RamArea;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the driver: not sent yet, or to be sent again.
    Waiting,
    Ring,
    Virtqueue,
    /// Delegated to queue 0.
    QueueZero,
}

/// A request that has not ended.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) request: Request,
    /// The request's buffer, if the driver owns it: it keeps the buffer until the request has ended.
    buffer: Option<RamArea>,
    /// The order in which the driver got the requests, which it keeps when it sends them again.
    pub(super) sequence: u64,
    /// The length of the parts that the device has done.
    pub(super) done_bytes: u32,
    /// The length of the part that was last sent.
    pub(super) sent_bytes: u32,
    pub(super) place: Place,
    /// The application has dropped the queue: the driver does not report the end of the request.
    pub(super) is_abandoned: bool,
}

/// A request that has ended, with its buffer if the driver owned it.
#[derive(Debug)]
pub(in super::super) struct Ended {
    pub(in super::super) completion: Completion,
    pub(in super::super) buffer: Option<RamArea>,
}

impl Pending {
    pub(super) fn new(request: Request, mut buffer: Option<RamArea>, sequence: u64) -> Self {
        if let Some(buffer) = &mut buffer {
            buffer.lend();
        }
        Self { request, buffer, sequence, done_bytes: 0, sent_bytes: 0, place: Place::Waiting, is_abandoned: false }
    }

    /// The part of the request that the device has not done.
    #[inline]
    pub(super) fn rest(&self) -> Request {
        let done_bytes = self.done_bytes;
        Request {
            offset_bytes: self.request.offset_bytes + u64::from(done_bytes),
            gpa: self.request.gpa + u64::from(done_bytes),
            len_bytes: self.request.len_bytes - done_bytes,
            ..self.request
        }
    }

    /// Notes that the device has done the part that was last sent. Returns true if nothing is left.
    pub(super) fn note_part_done(&mut self) -> bool {
        self.done_bytes += std::mem::take(&mut self.sent_bytes);
        self.done_bytes == self.request.len_bytes
    }

    /// The request has ended: no device uses its buffer any more.
    #[inline]
    pub(super) fn end(self, res: i32) -> Ended {
        let mut buffer = self.buffer;
        if let Some(buffer) = &mut buffer {
            buffer.take_back();
        }
        Ended { completion: Completion { user_data: self.request.user_data, res }, buffer }
    }
}
