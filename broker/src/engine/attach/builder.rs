//! The builder: the thread that has the guest's memory pinned and rings made.
//!
//! Pinning takes half a second for each GiB, and making a ring is a system call that waits for other rings. A worker
//! cannot do this, because it executes other queues; nor can the protocol thread, because the front-end waits for it.
//! The builder carries out one command after the other, so that changes of memory have one order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use ringpass_guest_abi::request::ErrorCode;

use super::availability::RingKind;
use super::builder_command::{BuildRequest, BuilderCommand, BuilderReceiver, BuilderSender, Built, builder_channel};
use super::cancellation::CancellationToken;
use super::countdown::Countdown;
use super::discards::Discarded;
use super::pinned::{Pinned, regions};
use super::refusal::Refused;
use super::shared::SharedRings;
use super::workers::{AttachEvent, Workers};
use crate::disk::Disk;
use crate::engine::EngineError;
use crate::engine::reply::{self, Reply};
use crate::log_limit::{LogCause, LogLimit, LogLimits};
use crate::memory::RegionConfig;
use crate::ring::RingEnd;
use crate::ring_host::{PinError, RingClient};
use crate::threads::{AbortOnPanic, leave_signals_to_others};
use crate::vhost_user::DeviceMemory;

/// The time between two looks at pinned memory, and between two samples of the words of rings.
const LOOK: Duration = Duration::from_millis(50);

struct Builder {
    commands: BuilderReceiver,
    host: RingClient,
    rings: Arc<SharedRings>,
    workers: Arc<dyn Workers>,
    memory: Option<Arc<DeviceMemory>>,
    disk: Option<Arc<Disk>>,
    pinned: Option<Pinned>,
    /// Rings to be made, by their queue, when the guest's memory that a command will bring is there.
    postponed: BTreeMap<u16, BuildRequest>,
    /// Rings over memory that the builder has released. They may not have ended.
    ending: Vec<RingEnd>,
    /// Limits for the log lines that a guest can cause as often as it likes.
    refusals: LogLimits,
    pinnings: LogLimit,
    discards: LogLimit,
}

/// Starts the builder. It ends when no sender of commands is left.
pub(in crate::engine) fn start(
    host: RingClient,
    rings: Arc<SharedRings>,
    workers: Arc<dyn Workers>,
) -> Result<BuilderSender, EngineError> {
    let (sender, commands) = builder_channel();
    thread::Builder::new()
        .name("ring-builder".into())
        .spawn(move || {
            leave_signals_to_others();
            // Queues and the front-end wait for what this thread does.
            let _abort = AbortOnPanic;
            Builder {
                commands,
                host,
                rings,
                workers,
                memory: None,
                disk: None,
                pinned: None,
                postponed: BTreeMap::new(),
                ending: Vec::new(),
                refusals: LogLimits::new(),
                pinnings: LogLimit::new(),
                discards: LogLimit::new(),
            }
            .run();
        })
        .map_err(EngineError::Thread)?;
    Ok(sender)
}

impl Builder {
    fn run(&mut self) {
        loop {
            match self.commands.next(self.pinned.is_some().then_some(LOOK)) {
                Ok(command) => self.carry_out(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if !self.commands.changes().are_coming() {
                std::mem::take(&mut self.postponed).into_values().for_each(|request| self.build(request));
            }
            self.rings.metrics.sample();
            self.look_for_discards();
        }
    }

    fn carry_out(&mut self, command: BuilderCommand) {
        match command {
            BuilderCommand::Build(request) => self.build(request),
            BuilderCommand::SetMemory { memory, loses_some, done } => self.set_memory(memory, loses_some, done),
            BuilderCommand::SetDisk { disk, done } => {
                self.unpin();
                self.disk = disk;
                reply::done(&done);
            }
            // Another queue was attached since the command was sent, and may have its ring.
            BuilderCommand::Unpin if self.rings.ranges.is_in_use() => {}
            BuilderCommand::Unpin => self.unpin(),
        }
    }

    fn build(&mut self, request: BuildRequest) {
        if request.token.is_cancelled() {
            return;
        }
        if self.commands.changes().are_coming() {
            // The memory that is pinned may lack a part of the guest's memory.
            return self.postpone(request);
        }
        let prepared = self.prepare(&request.token);
        if prepared.is_err() && self.commands.changes().are_coming() {
            // The builder stopped pinning for this change, because the front-end may be waiting for it.
            return self.postpone(request);
        }
        if !request.token.claim() {
            return;
        }
        let (queue, attachment) = (request.queue, request.attachment);
        let event = match prepared.and_then(|()| self.make_ring(request)) {
            Ok(built) => AttachEvent::Built(Box::new(built)),
            Err(refused) => {
                if let Some(total) = self.refusals.count(LogCause::new(refused.code)) {
                    tracing::warn!(queue, total, "no ring for the queue: {} ({total} so far)", refused.why);
                }
                let code = refused.code;
                self.rings.metrics.set_refused(queue, refused);
                AttachEvent::BuildFailed(code)
            }
        };
        self.workers.attach_event(queue, attachment, event);
    }

    fn postpone(&mut self, request: BuildRequest) {
        // The queue has cancelled its earlier request.
        self.postponed.insert(request.queue, request);
    }

    /// Pins the guest's memory for the first ring.
    fn prepare(&mut self, token: &CancellationToken) -> Result<(), Refused> {
        if let Some(refused) = self.rings.availability.closed(RingKind::Direct) {
            return Err(refused);
        }
        if self.pinned.is_none() {
            self.pinned = Some(self.pin(token)?);
        }
        Ok(())
    }

    fn make_ring(&mut self, request: BuildRequest) -> Result<Built, Refused> {
        match &mut self.pinned {
            Some(pinned) => pinned.make_ring(&mut self.host, request),
            None => Err(Refused { code: ErrorCode::Resources, why: "no guest memory is pinned".into() }),
        }
    }

    fn pin(&mut self, token: &CancellationToken) -> Result<Pinned, Refused> {
        let (Some(memory), Some(disk)) = (&self.memory, &self.disk) else {
            let why = "the device has neither memory nor a disk any more: its front-end is leaving".into();
            return Err(Refused { code: ErrorCode::Mode, why });
        };
        let changes = self.commands.changes();
        let is_wanted = || !token.is_cancelled() && !changes.are_coming();
        let pinned = Pinned::new(&mut self.host, disk, memory, &is_wanted)?;
        if let Some(total) = self.pinnings.count() {
            let bytes = pinned.len_bytes();
            tracing::info!(bytes, total, "guest memory is pinned for rings ({total} times so far)");
        }
        Ok(pinned)
    }

    /// Gives the rings that run the new memory. Rings that cannot change their memory end, and new rings over the new
    /// memory follow. If the guest `loses_some`, `done` is answered before the new memory is pinned.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>, loses_some: bool, done: Reply<()>) {
        let regions = regions(&memory);
        // An empty table comes from a front-end that is gone: it gets no answer, and the next front-end does not wait
        // for its rings. Or it comes from a front-end that begins again (SET_OWNER), with no queue started.
        let is_gone = regions.is_empty();
        self.memory = Some(memory);
        if self.pinned.as_ref().is_some_and(|pinned| !pinned.has_open_rings()) {
            // No ring runs: new rings get the new memory, so the pinned memory is only in the way.
            self.unpin();
        }
        // The last look at memory that leaves.
        self.look_for_discards();
        if loses_some || is_gone {
            self.take_all_but(&regions);
        }
        if loses_some {
            self.answer_after_ends(done);
            self.give(&regions);
            return;
        }
        if is_gone {
            self.ending.clear();
        }
        self.give(&regions);
        reply::done(&done);
    }

    /// Answers when the rings that are ending are gone. The builder does not wait itself, because I/O that hangs would
    /// hold up the next command.
    fn answer_after_ends(&mut self, done: Reply<()>) {
        let counts = Countdown::split(done, self.ending.len());
        for (end, count) in self.ending.drain(..).zip(counts) {
            end.on_end(move || count.done());
        }
    }

    /// Takes all memory but `regions` from the rings that run.
    fn take_all_but(&mut self, regions: &[RegionConfig]) {
        let Some(mut pinned) = self.pinned.take() else { return };
        if pinned.keep_only(&mut self.host, regions) {
            self.pinned = Some(pinned);
        } else {
            self.end_rings(pinned);
        }
    }

    /// Gives the rings that run these regions. Gives up if the guest gets other memory meanwhile: pinning takes long,
    /// and the front-end may be waiting.
    fn give(&mut self, regions: &[RegionConfig]) {
        let Some(mut pinned) = self.pinned.take() else { return };
        let (rings, changes) = (&self.rings, self.commands.changes());
        match pinned.follow(&mut self.host, regions, &|| rings.ranges.is_in_use() && !changes.are_coming()) {
            Ok(()) => self.pinned = Some(pinned),
            // The next change goes on from the memory that is pinned.
            Err(PinError::NotWanted) if changes.are_coming() => self.pinned = Some(pinned),
            // No queue was attached any more. For a queue that is attached by now the builder pins memory anew.
            Err(PinError::NotWanted) => self.release(pinned),
            Err(PinError::Refused(refused)) => {
                if self.rings.ranges.is_in_use() {
                    tracing::warn!(
                        "rings end: the guest's memory changed in a way that they cannot follow: {} (new rings follow)",
                        refused.why
                    );
                }
                self.end_rings(pinned);
            }
        }
    }

    fn end_rings(&mut self, pinned: Pinned) {
        self.workers.end_rings(ErrorCode::Memory);
        self.release(pinned);
    }

    /// Releases all pinned memory. A discard that is noticed only now is logged; there is no ring to end.
    fn unpin(&mut self) {
        let Some(mut pinned) = self.pinned.take() else { return };
        if let Some(discarded) = pinned.look_for_discards() {
            self.log_discard(&discarded);
        }
        self.release(pinned);
    }

    /// Releases pinned memory. A ring that still runs keeps its memory until it ends.
    fn release(&mut self, pinned: Pinned) {
        self.ending.retain(|end| !end.has_ended());
        self.ending.extend(pinned.unpin(&mut self.host));
    }

    fn look_for_discards(&mut self) {
        let Some(discarded) = self.pinned.as_mut().and_then(Pinned::look_for_discards) else { return };
        // First, so that no queue is attached in between.
        self.rings.availability.note_discard();
        self.log_discard(&discarded);
        self.workers.finish_rings(ErrorCode::Discarded);
        self.unpin();
    }

    fn log_discard(&self, discarded: &Discarded) {
        // A guest with a balloon can reset its device as often as it likes.
        if let Some(total) = self.discards.count() {
            tracing::error!(
                bytes = discarded.bytes,
                total,
                "guest memory was discarded while rings had it pinned: data that the guest wrote or read through a ring since \
                 then may be wrong. Direct mode ends, and does not come back before the driver resets the device. A balloon, \
                 free page reporting, virtio-mem and postcopy do this: use a guest without them, or --mode virtqueue \
                 ({total} times so far)"
            );
        }
    }
}
