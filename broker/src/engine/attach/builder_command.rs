//! Commands to the builder.

use std::sync::Arc;

use ringpass_guest_abi::attach::Geometry;
use ringpass_guest_abi::epoch::Epoch;
use vmm_sys_util::eventfd::EventFd;

use super::attachment::{AttachmentId, LiveRing};
use super::cancellation::CancellationToken;
use super::mailbox::{Entry, Receiver, Sender, mailbox};
use crate::disk::Disk;
use crate::engine::reply::Reply;
use crate::vhost_user::DeviceMemory;

/// A command to the builder.
#[derive(Debug)]
pub(in crate::engine) enum BuilderCommand {
    /// Make a ring.
    Build(BuildRequest),
    /// The guest has this memory from now on. If the guest `loses_some`, `done` is answered when no I/O of a ring can
    /// land any more in memory that leaves; otherwise when the rings that run have the new memory.
    SetMemory { memory: Arc<DeviceMemory>, loses_some: bool, done: Reply<()> },
    /// Rings that are made from now on have this disk. `None`: the builder has let the disk go when it answers `done`,
    /// except for rings that are ending.
    SetDisk { disk: Option<Arc<Disk>>, done: Reply<()> },
    /// No queue is attached any more: nothing needs to stay pinned.
    Unpin,
}

/// A request to make a ring.
#[derive(Debug)]
pub(in crate::engine) struct BuildRequest {
    pub(in crate::engine) queue: u16,
    pub(in crate::engine) attachment: AttachmentId,
    pub(in crate::engine) geometry: Geometry,
    pub(in crate::engine) epoch: Epoch,
    /// The eventfd that completions signal.
    pub(in crate::engine) call: Option<EventFd>,
    pub(in crate::engine) call_generation: u32,
    /// Lets the worker cancel the request.
    pub(in crate::engine) token: CancellationToken,
}

/// A ring that was made.
#[derive(Debug)]
pub(in crate::engine) struct Built {
    pub(in crate::engine) ring: LiveRing,
    /// The generation of the call eventfd that the ring has.
    pub(in crate::engine) call_generation: u32,
}

/// Sends commands to the builder. A builder that has ended drops them: the engine is going.
pub(in crate::engine) type BuilderSender = Sender<BuilderCommand>;

/// Receives the commands, in the builder.
pub(in crate::engine) type BuilderReceiver = Receiver<BuilderCommand>;

/// The way to the builder, and its end.
pub(in crate::engine) fn builder_channel() -> (BuilderSender, BuilderReceiver) {
    mailbox()
}

/// Commands that a guest can bring about as often as it likes replace their predecessors.
impl Entry for BuilderCommand {
    fn replaces(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            // A queue that requests a ring has cancelled its earlier request.
            (Self::Build(request), Self::Build(earlier)) => request.queue == earlier.queue,
            (Self::Unpin, Self::Unpin) => true,
            _ => false,
        }
    }

    fn changes_memory(&self) -> bool {
        matches!(self, Self::SetMemory { .. })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, sync_channel};
    use std::time::Duration;

    use super::super::range_registry::tests::geometry;
    use super::*;

    fn build(queue: u16, id: u64) -> BuilderCommand {
        BuilderCommand::Build(BuildRequest {
            queue,
            attachment: AttachmentId(id),
            geometry: geometry(0),
            epoch: Epoch::NONE.next(),
            call: None,
            call_generation: 0,
            token: CancellationToken::default(),
        })
    }

    #[test]
    fn commands_that_a_guest_repeats_do_not_pile_up_and_those_of_the_front_end_are_all_there() {
        let (sender, receiver) = builder_channel();
        let (done, _answers) = sync_channel(2);
        for id in 0..1000 {
            sender.send(build(1, id));
            sender.send(BuilderCommand::Unpin);
        }
        for loses_some in [false, true] {
            let memory = Arc::new(DeviceMemory::new());
            sender.send(BuilderCommand::SetMemory { memory, loses_some, done: done.clone() });
        }
        for _ in 0..2 {
            sender.send(BuilderCommand::SetDisk { disk: None, done: done.clone() });
        }
        sender.send(build(2, 7));
        let next = || receiver.next(Some(Duration::ZERO));
        let is_build = |command, queue, id| {
            matches!(command, Ok(BuilderCommand::Build(BuildRequest { queue: q, attachment: AttachmentId(a), .. }))
                if (q, a) == (queue, id))
        };
        assert!(is_build(next(), 1, 999));
        assert!(matches!(next(), Ok(BuilderCommand::Unpin)));
        assert!(receiver.changes().are_coming());
        assert!(matches!(next(), Ok(BuilderCommand::SetMemory { loses_some: false, .. })));
        assert!(matches!(next(), Ok(BuilderCommand::SetMemory { loses_some: true, .. })));
        assert!(!receiver.changes().are_coming());
        for _ in 0..2 {
            assert!(matches!(next(), Ok(BuilderCommand::SetDisk { .. })));
        }
        assert!(is_build(next(), 2, 7));
        assert!(matches!(next(), Err(RecvTimeoutError::Timeout)));
    }
}
