//! The attach sequence: the permitted order of entries on a queue that can be attached.
//!
//! A restarted device knows only the virtqueue. It continues after the used index, as every virtio device does. The
//! rules make it find a pending ATTACH again exactly once, and no other request: the driver sends ARM on an empty
//! queue, ATTACH directly after it, and nothing after ATTACH; the device records neither in the in-flight region.

use crate::request::{ErrorCode, RequestType};

/// The decision about an entry that the device took from the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Execute it.
    Execute,
    /// Complete it with this code, and do not execute it.
    Refuse(ErrorCode),
    /// The queue is broken: stop it until it is set up again, and do not complete the entry.
    Break,
}

/// The state of the rules for one queue, from its start to its stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttachSequence {
    queue: u16,
    last: Last,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Last {
    /// The device has taken no entry since the queue started: the next may be the ATTACH of an armed queue.
    Nothing,
    /// An executed ARM.
    Arm,
    /// A pending ATTACH.
    Attach,
    /// Any other entry.
    Other,
}

impl AttachSequence {
    /// A queue that starts.
    pub fn new(queue: u16) -> Self {
        Self { queue, last: Last::Nothing }
    }

    /// Whether an ATTACH is pending.
    pub fn is_attached(&self) -> bool {
        self.last == Last::Attach
    }

    /// Decides about the next entry: a request of this interface, or an ordinary request (`None`). `in_flight` is the
    /// number of other entries of this queue that are not completed yet, including those found in the in-flight region.
    ///
    /// The device must not record ARM and ATTACH in the in-flight region, regardless of the verdict.
    pub fn take(&mut self, entry: Option<RequestType>, in_flight: u16) -> Verdict {
        let (verdict, last) = match (self.last, entry) {
            (Last::Attach, _) => (Verdict::Break, Last::Attach),
            (_, Some(RequestType::Arm | RequestType::Attach)) if self.queue == 0 => refuse(ErrorCode::Queue),
            (_, Some(RequestType::Probe | RequestType::Event)) if self.queue != 0 => refuse(ErrorCode::Queue),
            (_, Some(RequestType::Arm | RequestType::Attach)) if in_flight != 0 => refuse(ErrorCode::Order),
            (_, Some(RequestType::Arm)) => (Verdict::Execute, Last::Arm),
            (Last::Nothing | Last::Arm, Some(RequestType::Attach)) => (Verdict::Execute, Last::Attach),
            (Last::Other, Some(RequestType::Attach)) => refuse(ErrorCode::Order),
            (_, _) => (Verdict::Execute, Last::Other),
        };
        self.last = last;
        verdict
    }

    /// Records that the device has completed ATTACH.
    pub fn attach_completed(&mut self) {
        self.last = Last::Other;
    }
}

fn refuse(code: ErrorCode) -> (Verdict, Last) {
    (Verdict::Refuse(code), Last::Other)
}

#[cfg(test)]
mod tests;
