//! A request that has not ended, and where it is.

use ringpass_workload::Request;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Waiting,
    Ring,
    Virtqueue,
    /// Queue 0, or on its way there.
    FirstQueue,
}

#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) request: Request,
    /// Requests keep this order when they are sent again.
    pub(super) sequence: u64,
    pub(super) done_bytes: u32,
    pub(super) retries: u32,
    pub(super) place: Place,
}

impl Pending {
    pub(super) fn new(request: Request, sequence: u64) -> Self {
        Self { request, sequence, done_bytes: 0, retries: 0, place: Place::Waiting }
    }

    /// What is left of the request.
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
}
