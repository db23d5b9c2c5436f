//! What the device tells of its rings: to operators, and to drivers that get none.

use ringpass_guest_abi::RingLayout;
use ringpass_guest_abi::attach::AttachError;
use ringpass_guest_abi::epoch::device::State;
use ringpass_guest_abi::request::{ErrorCode, NO_FIELD};

use super::availability::{OperatorMode, RingKind};

/// Why a queue got no ring, or lost its ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The code that the driver got.
    pub code: ErrorCode,
    /// The reason, for people.
    pub why: String,
}

/// What the words of a queue's rings say, since the engine began. The words are in the guest's memory: the counts of an
/// honest guest are exact, and those of another guest deceive only their reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounts {
    /// SQEs that the driver published (SQ tail).
    pub submitted: u64,
    /// CQEs that were posted (CQ tail).
    pub completed: u64,
}

/// The ring of one queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingStatus {
    /// The state of the queue's epochs. `None`: the queue is an ordinary virtqueue.
    pub state: Option<State>,
    /// The layout of the ring that runs.
    pub layout: Option<RingLayout>,
    /// What the words of the rings say.
    pub counts: RingCounts,
    /// Why the queue got no ring last, or lost its ring.
    pub refused: Option<Refused>,
}

/// Whether the device gives out rings of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KindStatus {
    /// The kind.
    pub kind: RingKind,
    /// Why the device gives out no rings of this kind now. `None`: it gives them out.
    pub closed: Option<Refused>,
}

/// Whether the device gives out rings, and the ring of each queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingsStatus {
    /// The mode that the operator chose.
    pub operator_mode: OperatorMode,
    /// Each kind of ring.
    pub kinds: Vec<KindStatus>,
    /// Each queue.
    pub queues: Vec<RingStatus>,
}

impl RingsStatus {
    /// Why the device gives out no rings of this kind now. `None`: it gives them out.
    pub fn closed(&self, kind: RingKind) -> Option<&Refused> {
        self.kinds.iter().find(|status| status.kind == kind).and_then(|status| status.closed.as_ref())
    }
}

/// Why an ATTACH is refused: what the driver gets, and the reason for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) struct AttachRefusal {
    pub(in crate::engine) error: AttachError,
    pub(in crate::engine) why: String,
}

impl From<AttachError> for AttachRefusal {
    fn from(error: AttachError) -> Self {
        Self { error, why: error.to_string() }
    }
}

/// The reason lies in the device, and in no field of the payload.
impl From<Refused> for AttachRefusal {
    fn from(Refused { code, why }: Refused) -> Self {
        Self { error: AttachError { code, field_offset_bytes: NO_FIELD, value: 0 }, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attach_that_the_device_refuses_as_a_whole_names_no_field_and_keeps_the_reason() {
        let refusal = AttachRefusal::from(Refused { code: ErrorCode::Mode, why: "a reason".into() });
        assert_eq!(refusal.error, AttachError { code: ErrorCode::Mode, field_offset_bytes: NO_FIELD, value: 0 });
        assert_eq!(refusal.why, "a reason");
    }
}
