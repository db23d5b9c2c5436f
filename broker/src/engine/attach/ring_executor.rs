//! What executes a ring of a guest.

use ringpass_guest_abi::{FixedAddressing, RingLayout};
use vmm_sys_util::eventfd::EventFd;

use super::refusal::Refused;
use crate::ring_host::{HostedRing, RingId};

/// What consumes the SQ of a ring and fills its CQ. One case for each [`RingKind`](super::RingKind).
#[derive(Debug)]
pub(in crate::engine) enum RingExecutor {
    /// The host kernel: the ring is an io_uring in guest memory.
    Kernel(HostedRing),
}

impl RingExecutor {
    /// The number of the ring.
    pub(in crate::engine) fn id(&self) -> RingId {
        match self {
            Self::Kernel(ring) => ring.id(),
        }
    }

    /// Where the parts of the ring are in its area.
    pub(in crate::engine) fn layout(&self) -> &RingLayout {
        match self {
            Self::Kernel(ring) => ring.layout(),
        }
    }

    /// How the ring's SQEs name guest memory.
    pub(in crate::engine) fn addressing(&self) -> FixedAddressing {
        match self {
            Self::Kernel(ring) => ring.addressing(),
        }
    }

    /// Completions signal `call` from now on, or nothing.
    ///
    /// # Errors
    ///
    /// The ring cannot have this eventfd; completions signal nothing then.
    pub(in crate::engine) fn set_completion(&self, call: Option<&EventFd>) -> Result<(), Refused> {
        match self {
            Self::Kernel(ring) => ring.set_call(call),
        }
    }

    /// Takes nothing more from the SQ. Calls `on_end`, on any thread, once the I/O under way has ended and the executor writes to guest
    /// memory no more.
    pub(in crate::engine) fn close(self, on_end: impl FnOnce() + Send + 'static) {
        match self {
            Self::Kernel(ring) => ring.close().on_end(on_end),
        }
    }
}
