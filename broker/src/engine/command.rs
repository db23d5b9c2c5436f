//! What the engine's handle and the ring builder ask of the workers, and the way there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;

use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::EngineError;
use super::attach::{AttachEvent, AttachmentId, Workers};
use super::reply::Reply;
use crate::disk::Disk;
use crate::vhost_user::{DeviceMemory, QueueEventfds, RingFault};
use crate::virtio_blk::RequestLimits;
use crate::virtqueue::{DirtyLog, QueueSetup};

/// A command, with the worker's own numbers of queues.
#[derive(Debug)]
pub(super) enum Command {
    SetMemory {
        memory: Arc<DeviceMemory>,
        reply: Reply<()>,
    },
    /// In force once no request under way uses a table that is not the present one any more.
    LeaveFormerMemory {
        reply: Reply<()>,
    },
    SetDirtyLog {
        log: Option<Arc<DirtyLog>>,
        reply: Reply<()>,
    },
    SetUsedLog {
        queue: usize,
        used_log_gpa: Option<u64>,
        reply: Reply<()>,
    },
    SetLimits {
        limits: RequestLimits,
        reply: Reply<()>,
    },
    SetDisk {
        disk: Arc<Disk>,
        reply: Reply<()>,
    },
    /// The worker is to let go of the disk; no queue of the front-end runs.
    ReleaseDisk {
        reply: Reply<DiskRelease>,
    },
    Start {
        queue: usize,
        setup: QueueSetup,
        eventfds: QueueEventfds,
    },
    /// The driver set the queue up so that it cannot start.
    Break {
        queue: usize,
        fault: RingFault,
        err: Option<EventFd>,
    },
    Stop {
        queue: usize,
        reply: Reply<u16>,
    },
    SetEnabled {
        queue: usize,
        is_enabled: bool,
        reply: Reply<()>,
    },
    SetEventfd {
        queue: usize,
        which: WhichEventfd,
        eventfd: Option<EventFd>,
        reply: Reply<()>,
    },
    Abandon,
    Reset {
        reply: Reply<()>,
    },
    Shutdown,
    /// Something that the worker ordered for an attachment of the queue has happened.
    Attachment {
        queue: usize,
        attachment: AttachmentId,
        event: AttachEvent,
    },
    /// Rings end; their drivers get others.
    EndRings {
        reason: ErrorCode,
    },
    /// Rings end and none follows. The worker answers `done` when they are gone.
    FinishRings {
        reason: ErrorCode,
        done: Option<Reply<()>>,
    },
    /// The drivers are asked to leave their rings, and none follows. The worker answers when no queue is attached any more, and
    /// at the deadline.
    DrainRings {
        deadline: Instant,
        reply: Reply<UndrainedQueues>,
    },
    /// Queue 0: the driver is to look at its other queues.
    TellDriver,
    /// The request in this slot, which waited, has its blocks of the disk.
    BeginGranted {
        slot: u32,
    },
}

/// Indexes of queues that are still attached: their drivers have not left the ring, or have not answered.
pub(super) type UndrainedQueues = Vec<u16>;

/// What a worker says of the disk that it is to let go.
#[derive(Debug)]
pub(super) enum DiskRelease {
    /// It lets go when I/O has ended that a former front-end has left behind.
    AfterFormerIo,
    /// The disk that it had. No I/O of the worker is under way, and the kernel holds nothing any more for its io_uring.
    Now(Option<Arc<Disk>>),
}

/// The three eventfds of a vring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhichEventfd {
    Kick,
    Call,
    Err,
}

/// The sender's end of a worker's commands.
#[derive(Clone, Debug)]
pub(super) struct CommandSender {
    commands: Sender<Command>,
    wake_up: Arc<WakeUp>,
}

/// The worker's end.
#[derive(Debug)]
pub(super) struct CommandReceiver {
    commands: Receiver<Command>,
    wake_up: Arc<WakeUp>,
}

/// Tells a worker that there are commands: cheap to look at for a worker that polls, and a wake-up for a worker that sleeps.
#[derive(Debug)]
struct WakeUp {
    has_commands: AtomicBool,
    eventfd: EventFd,
}

/// A way from the engine's handle to one worker.
pub(super) fn command_channel() -> Result<(CommandSender, CommandReceiver), EngineError> {
    let (sender, receiver) = channel();
    let eventfd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(EngineError::Eventfd)?;
    let wake_up = Arc::new(WakeUp { has_commands: AtomicBool::new(false), eventfd });
    Ok((CommandSender { commands: sender, wake_up: wake_up.clone() }, CommandReceiver { commands: receiver, wake_up }))
}

impl CommandSender {
    /// Sends a command. A worker that was shut down does not take it, and drops its reply.
    pub(super) fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            return;
        }
        // After the command: a worker that sees the flag finds the command.
        self.wake_up.has_commands.store(true, Ordering::Release);
        // The write fails only if the counter is full, and then the worker is woken as well.
        let _ = self.wake_up.eventfd.write(1);
    }
}

/// Wakes a worker without a command for it.
#[derive(Debug)]
pub(super) struct Waker(Arc<WakeUp>);

impl Waker {
    /// Wakes the worker, if it sleeps or is about to.
    pub(super) fn wake(&self) {
        // As for a command.
        let _ = self.0.eventfd.write(1);
    }
}

#[cfg(test)]
impl CommandSender {
    /// What wakes the worker.
    pub(super) fn eventfd(&self) -> &EventFd {
        &self.wake_up.eventfd
    }
}

#[cfg(test)]
impl CommandReceiver {
    /// How many can wake the worker or be woken.
    pub(super) fn wake_up_users(&self) -> usize {
        Arc::strong_count(&self.wake_up)
    }
}

impl CommandReceiver {
    /// Whether commands may have come. One load.
    #[inline]
    pub(super) fn has_commands(&self) -> bool {
        self.wake_up.has_commands.load(Ordering::Relaxed)
    }

    /// Becomes readable when a command comes.
    pub(super) fn eventfd(&self) -> &EventFd {
        &self.wake_up.eventfd
    }

    /// Takes what woke the worker, so that it does not do so again. The flag says whether commands have come: the wake-up may
    /// belong to a command that the worker obeyed before its sender came to the eventfd.
    pub(super) fn take_wake_up(&self) {
        // It does not matter if there is nothing to read.
        let _ = self.wake_up.eventfd.read();
    }

    /// Forgets what was signalled so far. A command that comes after that signals again.
    pub(super) fn clear(&self) {
        self.take_wake_up();
        self.wake_up.has_commands.swap(false, Ordering::Acquire);
    }

    /// Wakes the worker.
    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake_up))
    }

    /// The next command.
    pub(super) fn next(&self) -> Option<Command> {
        match self.commands.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Empty) => None,
            // All senders are gone: as if the handle had shut the worker down.
            Err(TryRecvError::Disconnected) => Some(Command::Shutdown),
        }
    }
}

/// The way to all workers of a device, for the ring builder and for rings that end.
#[derive(Clone, Debug)]
pub(super) struct WorkerSenders(Arc<[CommandSender]>);

impl WorkerSenders {
    pub(super) fn new(workers: &Arc<[CommandSender]>) -> Self {
        Self(Arc::clone(workers))
    }

    /// Sends a command about one queue to its worker.
    pub(super) fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        let (index, count) = (usize::from(index), self.0.len());
        self.0[index % count].send(command(index / count));
    }

    /// Sends a command to all workers.
    pub(super) fn send_to_all(&self, command: impl Fn() -> Command) {
        self.0.iter().for_each(|worker| worker.send(command()));
    }

    /// Sends a command to one worker.
    pub(super) fn send_to(&self, worker: usize, command: Command) {
        self.0[worker].send(command);
    }
}

/// Workers do not end for want of a sender, but because the engine shuts them down: they must hear of the end of their rings also when
/// the engine is gone.
impl Workers for WorkerSenders {
    fn attach_event(&self, queue: u16, attachment: AttachmentId, event: AttachEvent) {
        self.send(queue, |queue| Command::Attachment { queue, attachment, event });
    }

    fn tell_driver(&self) {
        self.send(0, |_| Command::TellDriver);
    }

    fn end_rings(&self, reason: ErrorCode) {
        self.send_to_all(|| Command::EndRings { reason });
    }

    fn finish_rings(&self, reason: ErrorCode) {
        self.send_to_all(|| Command::FinishRings { reason, done: None });
    }
}
