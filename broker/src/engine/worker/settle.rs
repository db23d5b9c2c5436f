//! What follows once requests, rings or queues have ended, or a deadline has come.

use std::time::Instant;

use super::Worker;
use crate::engine::attach::Attachment;
use crate::engine::command::DiskRelease;
use crate::engine::deferred::all_done;
use crate::engine::reply::{Reply, done};
use crate::engine::vring::{ActiveQueue, Vring};
use crate::log_limit::LogCause;

impl Worker<'_> {
    /// Gives the answers that waited for something to end, and sets up queues that waited for the disk. What the worker has completed
    /// has been published by then.
    pub(in crate::engine) fn settle(&mut self) {
        self.is_unsettled = false;
        for number in 0..self.queues.len() {
            self.settle_queue(number);
        }
        self.settle_disk();
        self.settle_answers();
        self.queues.count_in_use();
        self.step_epochs();
    }

    fn settle_queue(&mut self, number: usize) {
        let has_disk = self.execution.has_disk() && self.deferred.disk_release.is_none();
        let vring = self.queues.get_mut(number);
        vring.settle();
        if vring.waits().is_some_and(|is_stop_asked| has_disk || is_stop_asked) {
            self.set_up_queue(number);
        }
    }

    /// Sets up a queue that waits.
    fn set_up_queue(&mut self, number: usize) {
        let Some(memory) = self.queues.memory().cloned() else {
            let why = "the front-end started it before it gave the guest's memory";
            return self.break_down(number, LogCause::new(why), &why);
        };
        let log = self.queues.log().cloned();
        match self.queues.get_mut(number).set_up(memory, log) {
            // If the front-end has asked the queue to stop, it may have stopped already.
            Ok(()) => {
                self.is_unsettled |= !self.queues.get(number).is_running();
                if self.queues.get(number).index == 0 {
                    self.queue_zero_has_started();
                }
            }
            Err(error) => self.break_down(number, error.cause(), &error),
        }
    }

    /// Lets the disk go if it is to go and no request is under way, and takes the next one.
    fn settle_disk(&mut self) {
        if self.deferred.disk_release.is_none() || self.execution.under_way() > 0 {
            return;
        }
        self.execution.unregister_disk();
        if !self.execution.has_left_disk() {
            return;
        }
        let disk = self.execution.take_former_disk();
        if let Some(reply) = self.deferred.disk_release.take() {
            // If the sender does not wait any more, the disk is closed here.
            let _ = reply.send(DiskRelease::Now(disk));
        }
        if let Some(disk) = self.deferred.next_disk.take() {
            self.take_disk(disk);
            // Queues may wait for it.
            self.is_unsettled = true;
        }
    }

    fn settle_answers(&mut self) {
        let Self { queues, deferred, .. } = self;
        if !deferred.former_memory.is_empty() && !queues.has_former_memory() {
            all_done(&mut deferred.former_memory);
        }
        deferred.enables.retain(|(number, reply)| {
            let is_in_force = is_enable_in_force(queues.get_mut(*number));
            if is_in_force {
                done(reply);
            }
            !is_in_force
        });
        // Rings of a front-end that is gone count too: its guest may have come back, and reads what they write.
        if queues.iter_mut().all(|vring| vring.attachment_mut().is_none()) {
            all_done(&mut deferred.rings);
            if let Some(drain) = deferred.drain.take() {
                let _ = drain.reply.send(Vec::new());
            }
        }
        if queues.all_are_stopped() {
            all_done(&mut deferred.resets);
        }
    }

    /// A deadline of a deferred answer. False: it has not come yet.
    #[inline]
    pub(super) fn meet_deadline(&mut self, deadline: Instant) -> bool {
        if Instant::now() < deadline {
            return false;
        }
        if let Some(drain) = self.deferred.drain.take() {
            let attached = self.queues.iter_mut().filter_map(attached_index);
            let _ = drain.reply.send(attached.collect());
        }
        true
    }

    /// The worker is to let go of the disk.
    pub(super) fn release_disk(&mut self, reply: Reply<DiskRelease>) {
        self.deferred.next_disk = None;
        if self.execution.under_way() > 0 {
            // The queues of the front-end that gives the disk up have stopped: this I/O is a former front-end's.
            let _ = reply.send(DiskRelease::AfterFormerIo);
        }
        self.deferred.disk_release = Some(reply);
    }
}

/// Whether the last SET_VRING_ENABLE is in force: a disabled queue executes nothing, so its ring must have ended.
fn is_enable_in_force(vring: &mut Vring) -> bool {
    // The ring of a front-end that is gone was not disabled by this one.
    vring.is_enabled || vring.present_mut().and_then(|active| active.attachment()).is_none_or(Attachment::is_quiet)
}

/// Index of a queue that is attached.
fn attached_index(vring: &mut Vring) -> Option<u16> {
    let index = vring.index;
    vring.active_mut().and_then(|active| ActiveQueue::attachment(active)).map(|_| index)
}
