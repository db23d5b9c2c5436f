//! The order of entries on a queue that can be attached.
//!
//! A device that is restarted knows nothing but the virtqueue. It continues behind the used index, as every virtio device
//! does. So that this finds a pending ATTACH again, and nothing else, exactly once: ARM goes on an empty queue, ATTACH right
//! behind it, nothing behind ATTACH, and neither is recorded in the in-flight region.

use crate::request::{ErrorCode, RequestType};

/// What a device does with an entry that it took from the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Execute it.
    Execute,
    /// Complete it with this code, and execute nothing.
    Refuse(ErrorCode),
    /// The queue is broken: stop it until it is set up again. The entry is not completed.
    Break,
}

/// The rules, for one queue from its start to its stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueOrder {
    queue: u16,
    last: Last,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Last {
    /// Nothing was taken since the queue started: what comes may be the ATTACH of an armed queue.
    Nothing,
    /// An ARM that was executed.
    Arm,
    /// An ATTACH that is pending.
    Attach,
    /// Anything else.
    Other,
}

impl QueueOrder {
    /// A queue that starts.
    pub fn new(queue: u16) -> Self {
        Self { queue, last: Last::Nothing }
    }

    /// Whether an ATTACH is pending.
    pub fn is_attached(&self) -> bool {
        self.last == Last::Attach
    }

    /// The next entry: a request of this interface, or an ordinary one (`None`), while `in_flight` other entries of this
    /// queue have not been completed, those found in the in-flight region included.
    ///
    /// ARM and ATTACH must not be recorded in the in-flight region, whatever the verdict.
    pub fn take(&mut self, entry: Option<RequestType>, in_flight: u16) -> Verdict {
        let (verdict, last) = match (self.last, entry) {
            (Last::Attach, _) => (Verdict::Break, Last::Attach),
            (_, Some(RequestType::Arm | RequestType::Attach)) if self.queue == 0 => refuse(ErrorCode::Queue),
            (_, Some(RequestType::Probe | RequestType::Event | RequestType::Detach)) if self.queue != 0 => {
                refuse(ErrorCode::Queue)
            }
            (_, Some(RequestType::Arm | RequestType::Attach)) if in_flight != 0 => refuse(ErrorCode::Order),
            (_, Some(RequestType::Arm)) => (Verdict::Execute, Last::Arm),
            (Last::Nothing | Last::Arm, Some(RequestType::Attach)) => (Verdict::Execute, Last::Attach),
            (Last::Other, Some(RequestType::Attach)) => refuse(ErrorCode::Order),
            (_, _) => (Verdict::Execute, Last::Other),
        };
        self.last = last;
        verdict
    }

    /// ATTACH was completed.
    pub fn attach_completed(&mut self) {
        self.last = Last::Other;
    }
}

fn refuse(code: ErrorCode) -> (Verdict, Last) {
    (Verdict::Refuse(code), Last::Other)
}

#[cfg(test)]
mod tests;
