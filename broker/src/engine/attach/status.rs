//! What the device tells of its rings: to operators, and to drivers that get none.

use ringpass_guest_abi::RingLayout;
use ringpass_guest_abi::epoch::device::State;

use super::availability::{OperatorMode, RingKind};
use super::refusal::Refused;

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
    /// How many rings of the queue ended because they had more requests outstanding than their CQ had entries.
    pub ended_for_cost: u64,
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
