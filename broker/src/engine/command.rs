//! What the engine's handle asks of its workers, and the way there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use ringpass_guest_abi::request::ErrorCode;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::EngineError;
use super::attach::{AttachEvent, AttachmentId, Workers};
use super::reply::Reply;
use crate::disk::Disk;
use crate::vhost_user::{DeviceMemory, QueueEventfds, RingFault};
use crate::virtio_blk::RequestLimits;
use crate::virtqueue::{DirtyLog, QueueSetup};

/// A command, and the worker's own numbers of queues in it.
#[derive(Debug)]
pub(super) enum Command {
    SetMemory {
        memory: Arc<DeviceMemory>,
        reply: Reply<()>,
    },
    /// Nothing: in force once no request that is under way uses a table that is not the present one any more.
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
    /// The disk is to go; no queue of the front-end runs.
    GiveUpDisk {
        reply: Reply<LetGo>,
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
        enabled: bool,
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
    /// Something that was ordered for an attachment of the queue has come about.
    Attachment {
        queue: usize,
        attachment: AttachmentId,
        event: AttachEvent,
    },
    /// The driver has asked for the queue back.
    Detach {
        queue: usize,
    },
    /// Rings end; their drivers get others.
    EndRings {
        reason: ErrorCode,
    },
    /// Rings end and none follows. `done` is told when they are gone.
    FinishRings {
        reason: ErrorCode,
        done: Option<Reply<()>>,
    },
    /// Queue 0: the driver is to look at its other queues.
    TellDriver,
    /// The request in this slot, which waited, has its blocks of the disk.
    BeginGranted {
        slot: u32,
    },
}

/// What a worker says of the disk that it is to let go.
#[derive(Debug)]
pub(super) enum LetGo {
    /// It does so when I/O has ended that a former front-end has left behind.
    AfterFormerIo,
    /// The disk that it had. No I/O of the worker is under way, and the kernel holds nothing any more for its ring.
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
    bell: Arc<Bell>,
}

/// The worker's end.
#[derive(Debug)]
pub(super) struct CommandReceiver {
    commands: Receiver<Command>,
    bell: Arc<Bell>,
}

/// Tells a worker that there are commands: cheap to look at for one that polls, and a wake-up for one that sleeps.
#[derive(Debug)]
struct Bell {
    rung: AtomicBool,
    eventfd: EventFd,
}

/// A way from the engine's handle to one worker.
pub(super) fn command_channel() -> Result<(CommandSender, CommandReceiver), EngineError> {
    let (sender, receiver) = channel();
    let eventfd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(EngineError::Eventfd)?;
    let bell = Arc::new(Bell { rung: AtomicBool::new(false), eventfd });
    Ok((CommandSender { commands: sender, bell: bell.clone() }, CommandReceiver { commands: receiver, bell }))
}

impl CommandSender {
    /// Sends a command. A worker that was shut down does not take it, and drops its reply.
    pub(super) fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            return;
        }
        // After the command: a worker that sees the bell finds it.
        self.bell.rung.store(true, Ordering::Release);
        // Cannot fail but for a full counter, and then the worker is woken as well.
        let _ = self.bell.eventfd.write(1);
    }
}

/// Reaches all workers of a device. A worker ends because it is told to, and not because no sender is left: it must
/// receive the ends of its rings also when the engine is gone.
#[derive(Clone, Debug)]
pub(super) struct WorkerSenders(Arc<[CommandSender]>);

impl WorkerSenders {
    pub(super) fn new(workers: &Arc<[CommandSender]>) -> Self {
        Self(Arc::clone(workers))
    }

    /// Sends a command about one queue to its worker.
    fn send(&self, index: u16, command: impl FnOnce(usize) -> Command) {
        let (index, count) = (usize::from(index), self.0.len());
        self.0[index % count].send(command(index / count));
    }

    /// Sends a command to all workers.
    fn send_to_all(&self, command: impl Fn() -> Command) {
        self.0.iter().for_each(|worker| worker.send(command()));
    }
}

impl Workers for WorkerSenders {
    fn attach_event(&self, queue: u16, attachment: AttachmentId, event: AttachEvent) {
        self.send(queue, |queue| Command::Attachment { queue, attachment, event });
    }

    fn detach(&self, queue: u16) {
        self.send(queue, |queue| Command::Detach { queue });
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

/// Wakes a worker without a command for it.
#[derive(Debug)]
pub(super) struct Waker(Arc<Bell>);

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
        &self.bell.eventfd
    }
}

#[cfg(test)]
impl CommandReceiver {
    /// How many can ring the bell or hear it.
    pub(super) fn bell_users(&self) -> usize {
        Arc::strong_count(&self.bell)
    }
}

impl CommandReceiver {
    /// Whether commands may have come. One load.
    #[inline]
    pub(super) fn is_rung(&self) -> bool {
        self.bell.rung.load(Ordering::Relaxed)
    }

    /// Becomes readable when a command comes.
    pub(super) fn eventfd(&self) -> &EventFd {
        &self.bell.eventfd
    }

    /// Takes what woke the worker, so that it does not do so again. Whether commands have come, the bell says: this may
    /// belong to one that was obeyed before the sender came to its eventfd.
    pub(super) fn take_wake_up(&self) {
        // Nothing to read is as good.
        let _ = self.bell.eventfd.read();
    }

    /// Silences the bell. What comes after that rings it again.
    pub(super) fn silence(&self) {
        self.take_wake_up();
        self.bell.rung.swap(false, Ordering::Acquire);
    }

    /// Wakes the worker.
    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.bell))
    }

    /// The next command.
    pub(super) fn next(&self) -> Option<Command> {
        match self.commands.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Empty) => None,
            // The handle is gone without a word: as if it had said so.
            Err(TryRecvError::Disconnected) => Some(Command::Shutdown),
        }
    }
}
