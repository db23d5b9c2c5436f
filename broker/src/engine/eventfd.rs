//! The front-end's eventfds, used so that it cannot block a worker.
//!
//! The front-end goes on using them. Some block, and that stays so: the flag belongs to both sides. A kick that somebody
//! else has taken would block who reads it; a counter that is full, who signals it.

use std::io;

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, IoSliceMut, ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

use crate::ring::borrow_eventfd;
use crate::vhost_user::QueueEventfds;

/// The eventfds of a queue.
#[derive(Debug, Default)]
pub(super) struct Eventfds {
    pub(super) kick: Option<Kick>,
    pub(super) call: Option<Signal>,
    pub(super) err: Option<Signal>,
}

impl From<QueueEventfds> for Eventfds {
    fn from(QueueEventfds { kick, call, err }: QueueEventfds) -> Self {
        Self { kick: kick.map(Kick), call: call.map(Signal::new), err: err.map(Signal::new) }
    }
}

/// An eventfd that the front-end or the driver signals.
#[derive(Debug)]
pub(super) struct Kick(pub(super) EventFd);

impl Kick {
    /// Takes the kicks that came, if there still are some.
    pub(super) fn take(&self) {
        let mut count = [0; size_of::<u64>()];
        // An eventfd has no offset; this one stands for "none".
        let taken =
            preadv2(borrow_eventfd(&self.0), &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
        // Linux before 5.8 cannot promise not to block. There was a kick a moment ago.
        if taken == Err(Errno::OPNOTSUPP) {
            let _ = self.0.read();
        }
        // That there is nothing any more is as good: the queue is looked at.
    }
}

/// An eventfd that we signal.
#[derive(Debug)]
pub(super) struct Signal {
    eventfd: EventFd,
    may_block: bool,
}

impl Signal {
    pub(super) fn new(eventfd: EventFd) -> Self {
        let flags = fcntl_getfl(borrow_eventfd(&eventfd));
        Self { eventfd, may_block: !flags.is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)) }
    }

    /// Signals it. If its counter is full, whoever waits for it wakes up without us.
    pub(super) fn send(&self, queue_index: u16) {
        if self.may_block && !self.has_room() {
            return;
        }
        match self.eventfd.write(1) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => self.report(queue_index, &error),
        }
    }

    /// The eventfd, for somebody else who signals it too.
    pub(super) fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn has_room(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&borrow_eventfd(&self.eventfd), PollFlags::OUT)], Some(&now)) == Ok(1)
    }

    #[cold]
    fn report(&self, queue_index: u16, error: &io::Error) {
        tracing::debug!(queue = queue_index, %error, "an eventfd of the front-end cannot be signalled");
    }
}
