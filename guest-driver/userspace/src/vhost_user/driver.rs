//! The driver of one queue: requests go to its ring while there is one, and otherwise to its virtqueue.
//!
//! A request stays a request until it is known what became of it. A ring that has ended gives back what it completed; the
//! rest is sent again, to the next ring or to the virtqueue, and never before the older ring's I/O has ended: that is what
//! the device's word says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ringpass_guest_abi::Sqe;
use ringpass_guest_abi::epoch::driver::{Action, Event};
use ringpass_guest_abi::request::{ErrorCode, Outcome, T_ARM, T_ATTACH};
use ringpass_workload::{Completion, Request};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::Error;
use super::attachment::Attachment;
use super::disk::Shared;
use super::first_queue::{Answer, Question, Ticket};
use super::requests::{Body, Requests};
use super::virtqueue::Virtqueue;

/// Times that the kernel may say "try again" for one request.
const RETRIES_MAX: u32 = 1000;
const EIO: i32 = -5;
const EAGAIN: i32 = -11;
const EINTR: i32 = -4;
const ECANCELED: i32 = -125;

/// How often somebody who polls looks for a completion before the driver looks at everything else.
const LOOKS_MAX: u32 = 16;

/// What one queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Rings that were begun.
    pub epochs: u64,
    /// Requests that were sent again, because the ring or the connection they were on has ended, or the device did a part.
    pub resubmitted: u64,
    /// Requests that went to queue 0, because they failed on a ring.
    pub detoured: u64,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting,
    Ring,
    Virtqueue,
    /// Queue 0, or on its way there.
    FirstQueue,
}

#[derive(Clone, Debug)]
struct Pending {
    request: Request,
    /// Requests keep this order when they are sent again.
    sequence: u64,
    done_bytes: u32,
    retries: u32,
    place: Place,
}

/// Whether a request is on a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    OnRing,
    /// There is no room, or no ring.
    No,
    /// No ring can take it.
    Never,
}

/// Who executes the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Virtqueue,
    /// ARM and ATTACH are on the virtqueue, which is not touched.
    Attached {
        attach: u16,
    },
}

/// Something that queue 0 does for another queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errand {
    /// A request that cannot go another way.
    Transfer {
        id: usize,
    },
    /// A write that is done, and is to be stable.
    Flush {
        id: usize,
    },
    Detach,
}

/// Nobody waits for queue 0: the user of this queue may do other things meanwhile.
#[derive(Debug, Default)]
struct Errands {
    /// Not sent yet: there was no room.
    waiting: VecDeque<Errand>,
    sent: Vec<(Ticket, Errand)>,
}

impl Errands {
    fn are_done(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }
}

/// The driver of a queue other than 0.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) index: u16,
    shared: Arc<Shared>,
    queue: Virtqueue,
    requests: Requests,
    attachment: Option<Attachment>,
    mode: Mode,
    /// A ring is wanted, as soon as the virtqueue is empty.
    wants_ring: bool,
    /// Rings were refused for now; the news that had come by then.
    refused_at: Option<u64>,
    refused: Option<ErrorCode>,
    /// The device's word as it was looked at last; 0 before the first.
    heard: u32,
    is_draining: bool,
    is_muted: bool,
    /// Looks for a completion that found none.
    looks: u32,
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    waiting: VecDeque<usize>,
    /// By head of the virtqueue.
    by_head: Vec<usize>,
    /// What goes over queue 0 for this queue.
    errands: Errands,
    done: VecDeque<Completion>,
    sequence: u64,
    counters: Counters,
    fault: Option<Error>,
}

impl Driver {
    pub(super) fn new(index: u16, shared: Arc<Shared>, queue: Virtqueue, requests: Requests, depth_max: usize) -> Self {
        let size = usize::from(queue.setup().size);
        Self {
            index,
            shared,
            queue,
            requests,
            attachment: None,
            mode: Mode::Virtqueue,
            wants_ring: false,
            refused_at: None,
            refused: None,
            heard: 0,
            is_draining: false,
            is_muted: false,
            looks: 0,
            slots: vec![None; depth_max],
            free: (0..depth_max).rev().collect(),
            waiting: VecDeque::with_capacity(depth_max),
            by_head: vec![usize::MAX; size],
            errands: Errands::default(),
            done: VecDeque::with_capacity(depth_max),
            sequence: 0,
            counters: Counters::default(),
            fault: None,
        }
    }

    pub(super) fn setup(&self) -> &Arc<super::virtqueue::Setup> {
        self.queue.setup()
    }

    /// Has the queue become a ring.
    pub(super) fn want_ring(&mut self, attachment: Attachment) {
        self.attachment = Some(attachment);
        self.wants_ring = true;
        self.refused = None;
        self.progress();
    }

    /// Has the queue become a virtqueue.
    pub(super) fn give_ring_up(&mut self) {
        self.wants_ring = false;
        if self.mode != Mode::Virtqueue {
            self.step(Event::Detach);
        }
    }

    pub(super) fn is_ring(&self) -> bool {
        self.attachment.as_ref().is_some_and(Attachment::may_submit)
    }

    pub(super) fn is_virtqueue(&self) -> bool {
        self.mode == Mode::Virtqueue && !self.wants_ring
    }

    pub(super) fn epoch(&self) -> Option<u32> {
        self.attachment.as_ref().and_then(Attachment::epoch)
    }

    /// Why the queue is not a ring.
    pub(super) fn refused(&self) -> Option<ErrorCode> {
        self.refused
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { epochs: self.attachment.as_ref().map_or(0, |attachment| attachment.epochs), ..self.counters }
    }

    pub(super) fn fault(&self) -> Option<&Error> {
        self.fault.as_ref()
    }

    /// Requests that have not completed.
    pub(super) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request. False: as many are outstanding as can be.
    pub(super) fn push(&mut self, request: &Request) -> bool {
        let Some(id) = self.free.pop() else { return false };
        self.sequence += 1;
        let pending =
            Pending { request: *request, sequence: self.sequence, done_bytes: 0, retries: 0, place: Place::Waiting };
        self.slots[id] = Some(pending);
        // The usual case: there is a ring, and nobody waits.
        if !(self.waiting.is_empty() && self.is_ring() && self.place_on_ring(id) == Placed::OnRing) {
            self.waiting.push_back(id);
        }
        true
    }

    /// Takes the next completion.
    pub(super) fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.done.pop_front() {
            return Some(completion);
        }
        // The usual case; what the device announces is looked at when there is none.
        if let Some(completion) = self.reap_one_of_ring() {
            return Some(completion);
        }
        if self.is_polled() {
            self.publish();
            return None;
        }
        self.progress();
        self.done.pop_front()
    }

    /// Whether somebody polls a ring with nothing to be sent to it, and comes again: most such looks are for a completion only. Each
    /// is a part of a request's latency.
    #[inline]
    fn is_polled(&mut self) -> bool {
        self.looks = self.looks.wrapping_add(1);
        !self.looks.is_multiple_of(LOOKS_MAX)
            && self.is_muted
            && self.waiting.is_empty()
            && self.errands.are_done()
            && self.is_ring()
    }

    /// How long to wait for an answer.
    pub(super) fn patience(&self) -> Duration {
        self.shared.patience()
    }

    pub(super) fn set_muted(&mut self, muted: bool) -> bool {
        self.is_muted = muted;
        let has_more = match self.mode {
            Mode::Virtqueue => self.queue.want_interrupts(!muted) && !muted,
            Mode::Attached { .. } => {
                self.attachment.as_mut().is_some_and(|attachment| attachment.set_muted(muted)) && !muted
            }
        };
        has_more || !self.done.is_empty()
    }

    /// Looks at everything once, and sends what can be sent.
    pub(super) fn progress(&mut self) {
        if self.fault.is_some() {
            return self.fail_all();
        }
        match self.mode {
            Mode::Virtqueue => self.reap_virtqueue(),
            Mode::Attached { .. } => {
                self.reap_ring();
                self.look();
            }
        }
        self.send();
        if !self.errands.sent.is_empty() {
            self.run_errands();
        }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn send(&mut self) {
        self.send_requests();
        if !self.errands.waiting.is_empty() {
            self.run_errands();
        }
    }

    fn send_requests(&mut self) {
        match self.mode {
            Mode::Attached { .. } => self.send_to_ring(),
            Mode::Virtqueue if self.wants_ring && self.may_ask() => {
                // The queue must be empty for ARM; what is new waits for the ring.
                if self.queue.is_empty() {
                    self.attach();
                }
            }
            Mode::Virtqueue => self.send_to_virtqueue(),
        }
    }

    /// Whether a ring may be asked for, and not only if something has changed.
    fn may_ask(&self) -> bool {
        self.refused_at.is_none_or(|news| self.shared.news() != news)
    }

    fn attach(&mut self) {
        let Some(attachment) = self.attachment.as_mut() else { return };
        let payload = attachment.begin();
        let arm = self.requests.send(&mut self.queue, T_ARM, 0, &Body::Payload(&[]));
        let attach = self.requests.send(&mut self.queue, T_ATTACH, 0, &Body::Payload(&payload));
        let (Some(_), Some(attach)) = (arm, attach) else {
            self.fault = Some(Error::BrokenDevice("an empty queue has no room for ARM and ATTACH".into()));
            return;
        };
        self.refused_at = None;
        self.heard = 0;
        self.mode = Mode::Attached { attach };
        attachment.set_muted(self.is_muted);
        self.queue.want_interrupts(true);
        self.queue.kick();
    }

    fn send_to_virtqueue(&mut self) {
        let mut has_sent = false;
        while let Some(&id) = self.waiting.front() {
            let Some(pending) = self.slots[id].as_mut() else { break };
            let Request { write, offset_bytes, gpa, len_bytes, .. } = rest(pending);
            let Some(head) = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, write) else {
                break;
            };
            pending.place = Place::Virtqueue;
            self.by_head[usize::from(head)] = id;
            self.waiting.pop_front();
            has_sent = true;
        }
        if has_sent && self.queue.wants_kick() {
            self.queue.kick();
        }
    }

    fn reap_virtqueue(&mut self) {
        loop {
            let head = match self.queue.reap() {
                Ok(Some(head)) => head,
                Ok(None) => return,
                Err(error) => return self.fault = Some(error),
            };
            let id = std::mem::replace(&mut self.by_head[usize::from(head)], usize::MAX);
            let status = self.requests.status(head);
            let Some(Some(pending)) = self.slots.get(id) else { continue };
            let Request { len_bytes, durable, write, .. } = pending.request;
            let is_ok = u32::from(status) == VIRTIO_BLK_S_OK;
            if is_ok && durable && write {
                self.run_errand(Errand::Flush { id });
            } else {
                self.complete(id, if is_ok { len_bytes as i32 } else { EIO });
            }
        }
    }

    fn send_to_ring(&mut self) {
        if !self.is_ring() {
            return;
        }
        while let Some(&id) = self.waiting.front() {
            match self.place_on_ring(id) {
                Placed::OnRing => {
                    self.waiting.pop_front();
                }
                Placed::No => break,
                Placed::Never => {
                    self.waiting.pop_front();
                    self.publish();
                    self.detour(id);
                }
            }
        }
        self.publish();
    }

    /// Shows the kernel what is on the ring.
    #[inline]
    fn publish(&mut self) {
        if self.attachment.as_mut().and_then(Attachment::ring).is_some_and(|ring| ring.publish()) {
            self.queue.kick();
        }
    }

    /// Puts a request onto the ring, which the kernel does not see yet.
    #[inline]
    fn place_on_ring(&mut self, id: usize) -> Placed {
        let Some(pending) = self.slots[id].as_mut() else { return Placed::No };
        let Some(attachment) = self.attachment.as_mut() else { return Placed::No };
        let device = *attachment.device();
        let Request { write, offset_bytes, gpa, len_bytes, durable, .. } = rest(pending);
        let len_bytes = len_bytes.min(device.segment_bytes_max);
        let is_aligned = (gpa | u64::from(len_bytes)) & (u64::from(device.segment_align_bytes) - 1) == 0;
        // What rings cannot name, queue 0 can; and if there is anything wrong with it, it says so.
        let Some(address) = device.addressing.resolve(gpa, len_bytes).ok().filter(|_| is_aligned) else {
            return Placed::Never;
        };
        let build = if write { Sqe::write_fixed } else { Sqe::read_fixed };
        let sqe = build(address, len_bytes, offset_bytes, id as u64);
        let sqe = if durable && write { sqe.durable() } else { sqe };
        match attachment.ring().map(|ring| ring.push(&sqe)) {
            Some(Ok(())) => {
                pending.place = Place::Ring;
                Placed::OnRing
            }
            Some(Err(_)) | None => Placed::No,
        }
    }

    fn reap_ring(&mut self) {
        while let Some(completion) = self.reap_one_of_ring() {
            self.done.push_back(completion);
        }
    }

    /// The next completion on the ring that ends a request.
    #[inline]
    fn reap_one_of_ring(&mut self) -> Option<Completion> {
        loop {
            let cqe = self.attachment.as_mut().and_then(Attachment::ring)?.reap()?;
            let id = usize::try_from(cqe.user_data).unwrap_or(usize::MAX);
            // A device that makes completions up reaches nothing that is not on the ring.
            let Some(Some(pending)) = self.slots.get_mut(id) else { continue };
            if pending.place != Place::Ring {
                continue;
            }
            let left_bytes = pending.request.len_bytes - pending.done_bytes;
            if cqe.res > 0 && cqe.res as u32 >= left_bytes {
                let res = pending.request.len_bytes as i32;
                return self.end(id, res);
            }
            self.unfinished(id, cqe.res);
        }
    }

    /// A request whose completion is not its end.
    #[cold]
    fn unfinished(&mut self, id: usize, res: i32) {
        let Some(Some(pending)) = self.slots.get_mut(id) else { return };
        match res {
            ECANCELED | EAGAIN | EINTR if pending.retries < RETRIES_MAX => {
                pending.retries += u32::from(res != ECANCELED);
                self.put_aside(id);
            }
            res if res > 0 => {
                pending.done_bytes += res as u32;
                self.put_aside(id);
            }
            // Not the last word: rings may not reach that memory (yet), or whose ring it is was killed while it worked on
            // the request. The answer of queue 0 counts.
            _ => self.detour(id),
        }
    }

    fn put_aside(&mut self, id: usize) {
        if let Some(pending) = &mut self.slots[id] {
            pending.place = Place::Waiting;
            self.counters.resubmitted += 1;
            self.waiting.push_back(id);
        }
    }

    /// Does a request over queue 0.
    fn detour(&mut self, id: usize) {
        self.counters.detoured += 1;
        self.run_errand(Errand::Transfer { id });
    }

    fn run_errand(&mut self, errand: Errand) {
        if let Errand::Transfer { id } | Errand::Flush { id } = errand
            && let Some(pending) = &mut self.slots[id]
        {
            pending.place = Place::FirstQueue;
        }
        self.errands.waiting.push_back(errand);
    }

    /// Takes the answers of queue 0, and sends what waits for it.
    fn run_errands(&mut self) {
        if let Err(error) = self.try_errands() {
            self.fault = Some(error);
        }
    }

    fn try_errands(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let mut first = shared.first();
        first.service()?;
        let mut index = 0;
        while let Some(&(ticket, errand)) = self.errands.sent.get(index) {
            match first.take(ticket) {
                Some(answer) => {
                    self.errands.sent.swap_remove(index);
                    self.end_errand(errand, &answer)?;
                }
                None => index += 1,
            }
        }
        while let Some(&errand) = self.errands.waiting.front() {
            let question = match errand {
                Errand::Transfer { id } => self.slots[id].as_ref().map(|pending| {
                    let Request { write, offset_bytes, gpa, len_bytes, .. } = rest(pending);
                    Question::Transfer { offset_bytes, gpa, len_bytes, is_write: write }
                }),
                Errand::Flush { .. } => Some(Question::Flush),
                Errand::Detach => Some(Question::Detach { queue: self.index }),
            };
            let Some(question) = question else {
                self.errands.waiting.pop_front();
                continue;
            };
            let Some(ticket) = first.ask(&question, Some(self.queue.setup())) else { break };
            self.errands.waiting.pop_front();
            self.errands.sent.push((ticket, errand));
        }
        Ok(())
    }

    fn end_errand(&mut self, errand: Errand, answer: &Answer) -> Result<(), Error> {
        let (id, is_durable) = match errand {
            Errand::Detach => return answer.check("DETACH"),
            Errand::Transfer { id } => (id, false),
            Errand::Flush { id } => (id, true),
        };
        let Some(Request { len_bytes, durable, write, .. }) = self.slots[id].as_ref().map(|pending| pending.request)
        else {
            return Ok(());
        };
        match answer.check("request") {
            Ok(()) if durable && write && !is_durable => self.run_errand(Errand::Flush { id }),
            Ok(()) => self.complete(id, len_bytes as i32),
            Err(_) => self.complete(id, EIO),
        }
        Ok(())
    }

    fn complete(&mut self, id: usize, res: i32) {
        let completion = self.end(id, res);
        self.done.extend(completion);
    }

    /// A request has ended.
    #[inline]
    fn end(&mut self, id: usize, res: i32) -> Option<Completion> {
        let pending = self.slots[id].take()?;
        self.free.push(id);
        Some(Completion { user_data: pending.request.user_data, res })
    }

    /// Looks at what the device says of rings.
    fn look(&mut self) {
        // ARM is there and stays; what comes behind it is ATTACH.
        if self.queue.ready() >= 2 {
            return self.step(Event::AttachCompleted);
        }
        if self.is_draining && !self.slots.iter().flatten().any(|pending| pending.place == Place::Ring) {
            self.is_draining = false;
            return self.step(Event::Drained);
        }
        if let Some(word) = self.attachment.as_ref().map(Attachment::announced)
            && word != self.heard
        {
            self.heard = word;
            self.step(Event::Announced(word));
        }
    }

    fn step(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(attachment) = self.attachment.as_mut() else { return };
            for action in attachment.step(event) {
                match self.act(action) {
                    Ok(next) => events.extend(next),
                    Err(error) => return self.fault = Some(error),
                }
            }
        }
    }

    fn act(&mut self, action: Action) -> Result<Option<Event>, Error> {
        let attachment = self.attachment.as_mut().expect("steps are those of an attachment");
        match action {
            Action::Start(epoch) => attachment.start(epoch)?,
            Action::Drain => self.is_draining = true,
            Action::Reap(_) => {
                self.is_draining = false;
                self.reap_ring();
                self.put_ring_aside();
                return Ok(Some(Event::Reaped));
            }
            Action::Acknowledge(announcement) => {
                attachment.take_ring_back();
                attachment.acknowledge(announcement);
                self.queue.kick();
            }
            Action::RequestDetach => {
                attachment.set_detach();
                self.run_errand(Errand::Detach);
            }
            Action::Release => self.release()?,
            Action::Reset => return Err(Error::BrokenDevice("it announced an epoch out of turn".into())),
        }
        Ok(None)
    }

    /// What was on a ring that has ended is to be sent again, before everything else and in its order.
    fn put_ring_aside(&mut self) {
        for id in 0..self.slots.len() {
            if self.slots[id].as_ref().is_some_and(|pending| pending.place == Place::Ring) {
                self.put_aside(id);
            }
        }
        let slots = &self.slots;
        self.waiting.make_contiguous().sort_by_key(|&id| slots[id].as_ref().map(|pending| pending.sequence));
        if let Some(attachment) = &mut self.attachment {
            attachment.take_ring_back();
        }
    }

    /// No ring is left: ARM and ATTACH come back.
    fn release(&mut self) -> Result<(), Error> {
        let Mode::Attached { attach } = self.mode else { return Ok(()) };
        while self.queue.reap()?.is_some() {}
        let answer = self.requests.answer(attach);
        let outcome = Outcome::from_bytes(answer[..Outcome::BYTES].try_into().expect("16 bytes"));
        let code = ErrorCode::from_number(outcome.error.get());
        tracing::debug!(queue = self.index, ?code, "the queue is a virtqueue again");
        self.refused = code;
        // Those that pass; an EVENT tells when.
        if matches!(code, Some(ErrorCode::Mode | ErrorCode::Busy | ErrorCode::Resources)) {
            self.refused_at = Some(self.shared.news());
        } else {
            self.wants_ring = false;
        }
        self.mode = Mode::Virtqueue;
        self.queue.want_interrupts(!self.is_muted);
        Ok(())
    }

    /// The device is broken: nothing more will come back from it.
    fn fail_all(&mut self) {
        for id in 0..self.slots.len() {
            self.complete(id, EIO);
        }
        self.waiting.clear();
        self.errands = Errands::default();
    }
}

/// What is left of a request.
fn rest(pending: &Pending) -> Request {
    let done_bytes = pending.done_bytes;
    Request {
        offset_bytes: pending.request.offset_bytes + u64::from(done_bytes),
        gpa: pending.request.gpa + u64::from(done_bytes),
        len_bytes: pending.request.len_bytes - done_bytes,
        ..pending.request
    }
}
