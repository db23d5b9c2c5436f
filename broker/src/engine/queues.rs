//! The queues of a worker, and what they share: the guest's memory and the dirty log.

use std::rc::{Rc, Weak};
use std::sync::Arc;

use vm_memory::Bytes;

use super::attach::Ranges;
use super::execution::ChainOrigin;
use super::execution::slot::Slot;
use super::vring::Vring;
use crate::vhost_user::DeviceMemory;
use crate::virtio_blk::{Answer, Operation, Status};
use crate::virtqueue::{DirtyLog, QueueError};

/// The queues of a worker.
#[derive(Debug)]
pub(super) struct Queues {
    vrings: Vec<Vring>,
    /// No queue from this number on is started. A poll iteration looks only at the queues below it, so that queues which are offered
    /// and not used cost nothing.
    in_use: usize,
    /// The queue that the last poll iteration began with.
    first: usize,
    memory: Option<Rc<DeviceMemory>>,
    /// The tables before, of the same front-end, while something holds them.
    former_memory: Vec<Weak<DeviceMemory>>,
    /// Where queues that are to start mark what they write; each that has started has its own.
    log: Option<Arc<DirtyLog>>,
}

/// What a change of guest memory means for a queue that runs.
#[derive(Debug)]
pub(super) struct MemoryChange {
    /// Why the queue takes nothing until there is another table: its rings are not in this one.
    pub(super) held: Option<QueueError>,
    /// What became of the ranges of its attachment, if it has one.
    pub(super) ranges: Option<Ranges>,
}

impl Queues {
    pub(super) fn new(vrings: Vec<Vring>) -> Self {
        Self { vrings, in_use: 0, first: 0, memory: None, former_memory: Vec::new(), log: None }
    }

    /// How many queues there are, started or not.
    pub(super) fn len(&self) -> usize {
        self.vrings.len()
    }

    /// A queue by the worker's number of it.
    #[inline]
    pub(super) fn get(&self, number: usize) -> &Vring {
        &self.vrings[number]
    }

    /// The same, to change it.
    #[inline]
    pub(super) fn get_mut(&mut self, number: usize) -> &mut Vring {
        &mut self.vrings[number]
    }

    /// All queues.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Vring> {
        self.vrings.iter_mut()
    }

    /// All queues that are started, and perhaps some that are not.
    #[inline]
    pub(super) fn in_use_mut(&mut self) -> &mut [Vring] {
        &mut self.vrings[..self.in_use]
    }

    /// How many these are.
    #[inline]
    pub(super) fn in_use(&self) -> usize {
        self.in_use
    }

    /// To be called when queues may have started or stopped.
    pub(super) fn count_in_use(&mut self) {
        let last = self.vrings.iter().rposition(|vring| !vring.is_stopped());
        self.in_use = last.map_or(0, |last| last + 1);
    }

    pub(super) fn all_are_stopped(&self) -> bool {
        self.vrings.iter().all(Vring::is_stopped)
    }

    /// The order in which a poll iteration takes from the queues. Another queue comes first each time, or the first would get all
    /// slots that become free.
    #[inline]
    pub(super) fn next_order(&mut self) -> impl Iterator<Item = usize> + use<> {
        let queues = self.in_use;
        self.first = if self.first + 1 < queues { self.first + 1 } else { 0 };
        (self.first..queues).chain(0..self.first)
    }

    /// The guest's memory, if there is a front-end that gave it.
    pub(super) fn memory(&self) -> Option<&Rc<DeviceMemory>> {
        self.memory.as_ref()
    }

    pub(super) fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// The guest's memory is another table from now on. Gives what that means for each queue that runs.
    ///
    /// What drains belongs to a front-end that is gone, with its memory. What is broken takes nothing more, and while a queue is
    /// stopped the front-end asks nothing else.
    pub(super) fn set_memory(&mut self, memory: &Rc<DeviceMemory>) -> Vec<(usize, MemoryChange)> {
        self.forget_former_memory();
        self.former_memory.extend(self.memory.replace(Rc::clone(memory)).as_ref().map(Rc::downgrade));
        let mut changes = Vec::new();
        for (number, vring) in self.vrings.iter_mut().enumerate() {
            let Some(active) = vring.running_mut() else { continue };
            let ranges = active.attachment_mut().map(|attachment| attachment.move_to(memory));
            active.memory = Rc::clone(memory);
            // A request that is pending for as long as the queue is attached gets its answer where the guest has its memory by then,
            // and holds no region that has left.
            if let Some(attachment) = active.attachment_mut() {
                attachment.attach.memory = Rc::clone(memory);
            }
            if let Some(event) = &mut active.event {
                event.memory = Rc::clone(memory);
            }
            let held = active.queue.set_memory(memory).err();
            // A region that is exchanged goes first and then comes back.
            active.is_held = held.is_some();
            changes.push((number, MemoryChange { held, ranges }));
        }
        changes
    }

    /// The front-end is gone: what is under way keeps its own memory, and the next front-end does not wait for it.
    pub(super) fn forget_memory(&mut self) {
        self.memory = None;
        self.former_memory.clear();
    }

    /// Whether requests or attachments hold a table of the front-end that is not the present one any more.
    pub(super) fn has_former_memory(&mut self) -> bool {
        self.forget_former_memory();
        !self.former_memory.is_empty()
    }

    fn forget_former_memory(&mut self) {
        self.former_memory.retain(|table| table.strong_count() > 0);
    }

    /// Queues of the present front-end mark what they write in this log from now on.
    pub(super) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
        for active in self.vrings.iter_mut().filter_map(Vring::present_mut) {
            active.log = self.log.clone();
        }
        self.mark_used_rings();
    }

    pub(super) fn set_used_log(&mut self, number: usize, used_log_gpa: Option<u64>) {
        self.vrings[number].set_used_log(used_log_gpa);
        self.mark_used_rings();
    }

    /// What the worker wrote to used rings before it was logged counts as written now.
    fn mark_used_rings(&mut self) {
        for active in self.vrings.iter_mut().filter_map(Vring::present_mut) {
            if let Some(log) = &active.log {
                active.queue.mark_used_ring(log);
            }
        }
    }

    /// Completes a request that came from a chain. True: it was the last one under way of a queue that does not run, which may go
    /// on now.
    ///
    /// # Errors
    ///
    /// The used ring does not take the chain: the queue must stop.
    #[inline]
    pub(super) fn complete_request(&mut self, origin: &ChainOrigin, request: &Slot) -> Result<bool, QueueError> {
        let vring = &mut self.vrings[origin.queue];
        // The kernel may have written more of a read before it failed, and does not say how much.
        let is_read = matches!(request.operation, Operation::Read { .. } | Operation::GetId);
        // Data first, then the log, then the used ring. A request that failed may have been written in part.
        let log = vring.active_mut().and_then(|active| active.log.as_deref());
        if let (Some(log), true) = (log, is_read) {
            for segment in request.segments.iter() {
                log.mark(segment.gpa.0, segment.len_bytes as u64);
            }
        }
        let written_bytes = if is_read { request.progress_bytes as u32 } else { 0 };
        vring.count(request);
        let answer = origin.answer(request.status, written_bytes);
        let result = match &request.memory {
            Some(memory) => vring.complete(origin.head, memory, &answer),
            None => Ok(()),
        };
        let is_running = vring.is_running();
        let Some(active) = vring.active_mut() else { return result.map(|()| false) };
        active.in_flight -= 1;
        let is_last = active.in_flight == 0 && !is_running;
        result.map(|()| is_last)
    }
}

impl Vring {
    /// Writes the status of a chain and puts the chain into the used ring. The driver sees it when the queue is published next.
    ///
    /// # Errors
    ///
    /// The used ring does not take the chain: the queue must stop.
    #[inline]
    pub(super) fn complete(&mut self, head: u16, memory: &DeviceMemory, answer: &Answer) -> Result<(), QueueError> {
        // The byte was in this memory when the chain was parsed; a request that was pending since may get its answer in another.
        let has_status = memory.write_obj(answer.status.byte(), answer.status_gpa).is_ok();
        let used_bytes = if has_status { answer.used_bytes() } else { answer.written_bytes };
        let Some(active) = self.active_mut() else { return Ok(()) };
        let log = active.log.as_deref();
        if let Some(log) = log {
            log.mark(answer.status_gpa.0, 1);
        }
        active.queue.add_used(head, used_bytes, log)?;
        active.has_unpublished = true;
        Ok(())
    }

    #[inline]
    fn count(&self, request: &Slot) {
        let counters = &self.counters;
        if request.is_bounced {
            counters.bounced.add(1);
        }
        if request.is_partial_write {
            counters.partial_writes.add(1);
        }
        if request.status != Status::Ok {
            return counters.failed.add(1);
        }
        match request.operation {
            Operation::Read { .. } => {
                counters.reads.add(1);
                counters.read_bytes.add(request.data_bytes.into());
            }
            Operation::Write { .. } => {
                counters.writes.add(1);
                counters.written_bytes.add(request.data_bytes.into());
            }
            Operation::Flush => counters.flushes.add(1),
            Operation::Discard(_) => counters.discards.add(1),
            Operation::WriteZeroes { .. } => counters.write_zeroes.add(1),
            Operation::GetId => {}
        }
    }
}
