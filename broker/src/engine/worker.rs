//! One worker: a thread with an io_uring that executes the requests of its queues.
//!
//! A turn takes a bounded number of chains from each queue, submits all of them with one system call, and gives back
//! whatever has completed. Reads from the page cache complete inside that call. When a turn finds nothing to do, the
//! [poll policy](super::poll) decides whether the worker looks again or sleeps until a kick, a completion or a command.

use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use super::Shared;
use super::alignment::Alignment;
use super::attach::{Attach, AttachRequest};
use super::bounce::BouncePool;
use super::command::{CommandReceiver, CommandSender, LetGo};
use super::let_go::FormerDisk;
use super::poll::{Idle, PollPolicy};
use super::reply::Reply;
use super::ring::Ring;
use super::slot::Slots;
use super::token::Token;
use super::vring::{State, Takes, Vring};
use super::writer::Writer;
use crate::disk::Disk;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{GuestError, Parsed, RequestLimits, parse};
use crate::virtqueue::DirtyLog;

/// The most chains that a turn takes from one queue.
///
/// What is taken together completes together, and the driver can go on only then: a turn must be short against the
/// queue, or driver and worker wait for one another in turn. And it must be long against a system call, of which there
/// is one for each turn. It also bounds how long one queue holds up others.
const CHAINS_PER_TURN: usize = 8;

/// A worker, in its own thread.
pub(super) struct Worker<'r> {
    pub(super) ring: Ring<'r>,
    pub(super) commands: CommandReceiver,
    /// The ring is to tell of commands.
    pub(super) is_bell_armed: bool,
    pub(super) vrings: Vec<Vring>,
    /// No queue from this number on is started. A turn looks only at the queues below it, so that queues which are
    /// offered and not used cost nothing.
    pub(super) vrings_in_use: usize,
    /// The queue that the last turn began with.
    first_queue: usize,
    pub(super) slots: Slots,
    pub(super) bounce: BouncePool,
    /// Requests that wait for a bounce buffer, the first one first.
    pub(super) waiting: VecDeque<u32>,
    /// Requests that have their blocks now, and have waited for them.
    pub(super) granted: Vec<u32>,
    /// Which of the workers this is, and all of them.
    pub(super) number: usize,
    pub(super) workers: Arc<[CommandSender]>,
    pub(super) disk: Option<DiskInUse>,
    /// The disk before, which the kernel has not let go of yet.
    pub(super) former_disk: Option<FormerDisk>,
    /// Carries out writes into the page cache of a file. `None`: the disk is not such a file, or there is none yet.
    pub(super) writer: Option<Writer>,
    pub(super) memory: Option<Rc<DeviceMemory>>,
    /// The tables before, of the same front-end, while something holds them.
    pub(super) former_memory: Vec<Weak<DeviceMemory>>,
    /// Where queues that are to start mark what they write; each that has started has its own.
    pub(super) log: Option<Arc<DirtyLog>>,
    pub(super) limits: RequestLimits,
    pub(super) shared: Arc<Shared>,
    pub(super) poll: PollPolicy,
    /// A vring or the worker may be able to change its state.
    pub(super) is_unsettled: bool,
    /// What waits for requests to end.
    pub(super) endings: Endings,
    /// What makes rings of queues. `None`: the device does not offer that.
    pub(super) attach: Option<Attach>,
    /// How many queues were attached.
    pub(super) attachments: u64,
    /// Queue 0: there is something to tell the driver, and there was no EVENT to tell it with.
    pub(super) has_news: bool,
}

/// Commands that are in force once no request is under way any more.
#[derive(Debug, Default)]
pub(super) struct Endings {
    /// The disk is to go.
    pub(super) disk: Option<Reply<LetGo>>,
    /// And this one comes after it. A lock that is shared can be had again before.
    pub(super) next_disk: Option<Arc<Disk>>,
    /// All queues are to stop.
    pub(super) resets: Vec<Reply<()>>,
    /// A queue was enabled or disabled.
    pub(super) disabled: Vec<(usize, Reply<()>)>,
    /// No request is to be in memory that has left.
    pub(super) former_memory: Vec<Reply<()>>,
    /// All rings are to be gone.
    pub(super) rings: Vec<Reply<()>>,
    /// The worker is to end.
    pub(super) is_shutdown: bool,
}

/// The disk that requests go to.
#[derive(Debug)]
pub(super) struct DiskInUse {
    /// Held for its lock; requests name it as the ring's fixed file.
    pub(super) disk: Arc<Disk>,
    /// What buffers must keep to. `None`: any will do.
    pub(super) alignment: Option<Alignment>,
}

/// What a worker is made with.
pub(super) struct WorkerParts {
    pub(super) number: usize,
    pub(super) workers: Arc<[CommandSender]>,
    pub(super) commands: CommandReceiver,
    pub(super) vrings: Vec<Vring>,
    pub(super) slots: Slots,
    pub(super) bounce: BouncePool,
    pub(super) limits: RequestLimits,
    pub(super) poll: PollPolicy,
    pub(super) shared: Arc<Shared>,
    pub(super) attach: Option<Attach>,
}

impl<'r> Worker<'r> {
    pub(super) fn new(ring: Ring<'r>, parts: WorkerParts) -> Self {
        Self {
            ring,
            commands: parts.commands,
            is_bell_armed: false,
            vrings: parts.vrings,
            vrings_in_use: 0,
            first_queue: 0,
            slots: parts.slots,
            bounce: parts.bounce,
            waiting: VecDeque::new(),
            granted: Vec::new(),
            number: parts.number,
            workers: parts.workers,
            disk: None,
            former_disk: None,
            writer: None,
            memory: None,
            former_memory: Vec::new(),
            log: None,
            limits: parts.limits,
            shared: parts.shared,
            poll: parts.poll,
            is_unsettled: false,
            endings: Endings::default(),
            attach: parts.attach,
            attachments: 0,
            has_news: false,
        }
    }

    /// Works until it was told to end and the last request has ended. Gives the disk that it had; the kernel holds it
    /// no more for the worker's ring.
    pub(super) fn run(&mut self) -> Option<Arc<Disk>> {
        while !self.has_ended() {
            if self.turn() {
                self.poll.busy(Instant::now);
                continue;
            }
            match self.poll.idle(self.slots.occupied() > 0, Instant::now) {
                // The writer may be bound to the same CPU.
                Idle::Poll if self.writer.as_ref().is_some_and(Writer::is_busy) => std::thread::yield_now(),
                Idle::Poll => std::hint::spin_loop(),
                // A queue without a kick eventfd is looked at all the time; others may have the processor in between.
                Idle::Sleep if self.has_queue_without_kick() => std::thread::yield_now(),
                Idle::Sleep => self.sleep(),
            }
        }
        self.leave_disk()
    }

    /// Looks once at everything. False: there was nothing to do.
    pub(super) fn turn(&mut self) -> bool {
        let mut busy = false;
        if self.commands.is_rung() {
            self.obey();
            busy = true;
        }
        if self.is_unsettled {
            self.settle();
            busy = true;
        }
        if self.may_take() {
            // Another queue comes first each time, or the first would get all slots that become free.
            let queues = self.vrings_in_use;
            self.first_queue = if self.first_queue + 1 < queues { self.first_queue + 1 } else { 0 };
            for number in (self.first_queue..queues).chain(0..self.first_queue) {
                busy |= self.take(number);
            }
        }
        if self.attach.is_some() {
            self.arm_doorbells();
        }
        busy |= self.begin_granted();
        if let Some(writer) = &mut self.writer {
            writer.wake();
        }
        self.ring.submit();
        busy |= self.reap();
        for vring in self.vrings_in_use() {
            vring.publish();
        }
        busy
    }

    /// Queues start in commands only, and when the worker settles.
    pub(super) fn count_vrings_in_use(&mut self) {
        let last = self.vrings.iter().rposition(|vring| !matches!(vring.state, State::Stopped));
        self.vrings_in_use = last.map_or(0, |last| last + 1);
    }

    /// All queues that are started, and perhaps some that are not.
    pub(super) fn vrings_in_use(&mut self) -> &mut [Vring] {
        &mut self.vrings[..self.vrings_in_use]
    }

    /// Whether chains may be taken at all. If not because there is no room, the next completion makes some.
    pub(super) fn may_take(&self) -> bool {
        self.disk.is_some() && self.endings.disk.is_none() && self.slots.has_room()
    }

    /// Takes chains from one queue. False: there were none.
    pub(super) fn take(&mut self, number: usize) -> bool {
        for taken in 0..CHAINS_PER_TURN {
            let Some(slot_number) = self.slots.find() else { return taken > 0 };
            let vring = &mut self.vrings[number];
            let Some((active, takes)) = vring.taking_or_replaying_mut() else { return taken > 0 };
            let (memory, request_types) = (Rc::clone(&active.memory), active.request_types);
            let popped = match takes {
                Takes::Everything => active.queue.pop(),
                Takes::Replay => Ok(active.queue.pop_replay()),
            };
            let popped = match popped {
                Ok(Some(popped)) => popped,
                Ok(None) => return taken > 0,
                Err(error) => {
                    let cause = error.cause();
                    self.shared.guest_errors.record(vring.index, GuestError::BrokenRing, cause, &error);
                    self.break_down(number, cause, &error);
                    return true;
                }
            };
            // The queue has stopped when the last of them has ended, which may be in this turn.
            self.is_unsettled |= takes == Takes::Replay;
            let slot = self.slots.get(slot_number);
            let parsed = parse(popped.chain(&memory), &self.limits, request_types, &mut slot.segments);
            if let Parsed::Interface(parsed) = &parsed {
                let chain = popped.leave_unrecorded();
                let (request, payload) = AttachRequest::new(chain, parsed, memory, &slot.segments);
                self.take_interface(number, parsed.request_type, request, &payload);
                continue;
            }
            let head = popped.record();
            active.sequence.take(None, 0);
            match parsed {
                Parsed::Interface(_) => {}
                Parsed::Request(request) => {
                    active.in_flight += 1;
                    slot.queue = number;
                    slot.head = head;
                    slot.request = Some(request);
                    slot.memory = Some(memory);
                    slot.is_write_through = self.shared.is_write_through();
                    slot.progress_bytes = 0;
                    slot.retries = 0;
                    self.slots.occupy(slot_number);
                    self.begin(slot_number);
                }
                Parsed::Answer(answer) => self.answer(number, head, &memory, &answer),
                Parsed::Malformed(error) => {
                    let cause = error.cause();
                    self.shared.guest_errors.record(vring.index, GuestError::from(&error), cause, &error);
                    self.break_down(number, cause, &error);
                    return true;
                }
            }
        }
        true
    }

    /// Deals with what has completed. False: nothing.
    pub(super) fn reap(&mut self) -> bool {
        let mut busy = false;
        self.ring.sync_completions();
        while let Some(completion) = self.ring.reap() {
            match Token::from_user_data(completion.user_data()) {
                Token::Request(slot) => self.completed(slot, completion.result()),
                Token::Kick { queue, generation } => self.kicked(queue, generation, completion.flags()),
                Token::Commands => {
                    self.is_bell_armed = false;
                    self.commands.take_wake_up();
                }
                Token::DiskReleased => self.disk_is_released(),
                Token::Nothing => continue,
            }
            busy = true;
        }
        while let Some((slot, result)) = self.writer.as_mut().and_then(Writer::take) {
            self.completed(slot, result);
            busy = true;
        }
        busy
    }

    fn has_ended(&self) -> bool {
        self.endings.is_shutdown
            && self.slots.occupied() == 0
            && self.vrings.iter().all(|vring| matches!(vring.state, State::Stopped))
    }
}
