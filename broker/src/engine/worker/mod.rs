//! One worker: a thread with an io_uring that executes the requests of its queues.
//!
//! A poll iteration takes a bounded number of chains from each queue, submits all of them with one system call, and completes
//! what has ended. Reads from the page cache complete inside that call. When an iteration finds nothing to do, the
//! [poll policy](super::poll) decides whether the worker looks again or sleeps until a kick, a completion, a command or a deadline.
//!
//! The worker consists of parts that own their state: [`Queues`], [`Execution`] (requests under way, the disk), [`Deferred`] answers,
//! [`Rings`] (what makes rings of queues). The modules below are what it does with them:
//! `take`: from a chain to execution, and back. `commands`: what others ask of it. `settle`: what follows once something has ended.
//! `kicks`: how it learns of kicks, and sleeps. `attach_requests`, `epochs`: queues that become rings.

mod attach_requests;
mod commands;
mod epochs;
mod kicks;
mod settle;
mod take;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use ringpass_guest_abi::epoch::device::Event;

use super::Shared;
use super::attach::Attach;
use super::command::{CommandReceiver, WorkerSenders};
use super::deferred::Deferred;
use super::execution::Execution;
use super::execution::bounce::BouncePool;
use super::execution::slot::Slots;
use super::poll::{Idle, PollPolicy};
use super::queues::Queues;
use super::ring::Ring;
use super::timer::Timer;
use super::token::Token;
use super::vring::Vring;
use super::writer::Writer;
use crate::disk::Disk;
use crate::virtio_blk::RequestLimits;

/// A worker, in its own thread.
pub(super) struct Worker<'r> {
    commands: CommandReceiver,
    /// The io_uring is to tell of commands.
    is_command_poll_armed: bool,
    /// All workers of the device.
    workers: WorkerSenders,
    pub(super) queues: Queues,
    pub(super) execution: Execution<'r>,
    deferred: Deferred,
    /// What makes rings of queues. `None`: the device does not offer rings.
    rings: Option<Rings>,
    limits: RequestLimits,
    shared: Arc<Shared>,
    poll: PollPolicy,
    timer: Timer,
    /// A queue or the worker may be able to change its state.
    pub(super) is_unsettled: bool,
}

/// What a worker has for queues that become rings.
#[derive(Debug)]
struct Rings {
    attach: Attach,
    /// How many queues were attached.
    attachments: u64,
    /// Queue 0: there is something to tell the driver, and there was no EVENT to tell it with.
    has_news: bool,
    /// Events of epochs that are to be taken, with the worker's number of the queue.
    events: VecDeque<(usize, Event)>,
}

/// What a worker is made with.
pub(super) struct WorkerParts {
    pub(super) number: usize,
    pub(super) workers: WorkerSenders,
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
        let WorkerParts { number, workers, commands, vrings, slots, bounce, limits, poll, shared, attach } = parts;
        let identity = (number, limits.read_only());
        Self {
            commands,
            is_command_poll_armed: false,
            workers,
            queues: Queues::new(vrings),
            execution: Execution::new(ring, slots, bounce, identity, Arc::clone(&shared)),
            deferred: Deferred::default(),
            rings: attach.map(|attach| Rings { attach, attachments: 0, has_news: false, events: VecDeque::new() }),
            limits,
            shared,
            poll,
            timer: Timer::default(),
            is_unsettled: false,
        }
    }

    /// Works until it was told to end and the last request has ended. Gives the disk that it had; the kernel holds the disk no more
    /// for the worker's io_uring.
    pub(super) fn run(&mut self) -> Option<Arc<Disk>> {
        while !self.has_ended() {
            if self.poll_once() {
                self.poll.busy(Instant::now);
                continue;
            }
            match self.poll.idle(self.execution.under_way() > 0, Instant::now) {
                // The writer may be bound to the same CPU.
                Idle::Poll if self.execution.writer().is_some_and(Writer::is_busy) => std::thread::yield_now(),
                Idle::Poll => std::hint::spin_loop(),
                // The worker looks at a queue without a kick eventfd all the time; others may have the processor in between.
                Idle::Sleep if self.has_queue_without_kick() => std::thread::yield_now(),
                Idle::Sleep => self.sleep(),
            }
        }
        self.leave_disk()
    }

    /// Looks once at everything. False: there was nothing to do.
    pub(super) fn poll_once(&mut self) -> bool {
        let mut busy = false;
        if self.commands.has_commands() {
            self.obey();
            busy = true;
        }
        if let Some(deadline) = self.deferred.next_deadline() {
            busy |= self.meet_deadline(deadline);
        }
        if self.is_unsettled {
            self.settle();
            busy = true;
        }
        if self.may_take() {
            for number in self.queues.next_order() {
                busy |= self.take(number);
            }
        }
        if self.rings.is_some() {
            self.arm_doorbells();
        }
        busy |= self.begin_granted();
        self.execution.submit();
        busy |= self.reap();
        for vring in self.queues.in_use_mut() {
            vring.publish();
        }
        busy
    }

    /// Deals with what has completed. False: nothing.
    pub(super) fn reap(&mut self) -> bool {
        let mut busy = false;
        self.execution.ring().sync_completions();
        while let Some(completion) = self.execution.ring().reap() {
            match Token::from_user_data(completion.user_data()) {
                Token::Request(slot) => {
                    self.execution.completed(slot, completion.result());
                    self.complete_ended();
                }
                Token::Kick { queue, generation } => self.kicked(queue, generation, completion.flags()),
                Token::Commands => {
                    self.is_command_poll_armed = false;
                    self.commands.take_wake_up();
                }
                Token::DiskReleased => {
                    self.execution.disk_is_released();
                    self.is_unsettled = true;
                }
                Token::Timer => self.timer.has_fired(Instant::now()),
                Token::Nothing => continue,
            }
            busy = true;
        }
        while let Some((slot, result)) = self.execution.take_written() {
            self.execution.completed(slot, result);
            self.complete_ended();
            busy = true;
        }
        busy
    }

    fn has_ended(&self) -> bool {
        self.deferred.is_shutdown && self.execution.under_way() == 0 && self.queues.all_are_stopped()
    }

    /// The end of the worker: leaves the disk, and gives it.
    fn leave_disk(&mut self) -> Option<Arc<Disk>> {
        self.execution.unregister_disk();
        while !self.execution.has_left_disk() {
            self.execution.ring().submit_and_wait();
            self.reap();
        }
        self.execution.take_former_disk()
    }

    /// What makes rings of queues, for those that cannot do without.
    fn attach(&self) -> Option<&Attach> {
        self.rings.as_ref().map(|rings| &rings.attach)
    }
}
