//! The front-end's eventfds, used so that it cannot block a worker.
//!
//! The front-end goes on using them. Some block, and that stays so: the flag belongs to both sides. A kick that another
//! reader has taken would block the worker that reads; a full counter would block the worker that signals.

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
        Self { kick: kick.map(Kick::new), call: call.map(Signal::new), err: err.map(Signal::new) }
    }
}

/// So many single kicks in a row, and it is time to ask whether the eventfd gives no others (EFD_SEMAPHORE).
const SINGLES_MAX: u32 = 64;
/// The most that is read out of such an eventfd at a time.
const READS_MAX: u32 = 1024;

/// An eventfd that the front-end or the driver signals.
///
/// A read takes all kicks at once. An eventfd with EFD_SEMAPHORE gives one at a time, and its count can be so high that reading never
/// ends and each kick wakes the worker. The worker then stops reading it: a write wakes the worker, and not the fact that the eventfd
/// is readable.
#[derive(Debug)]
pub(super) struct Kick {
    eventfd: EventFd,
    singles: u32,
    is_endless: bool,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Single,
    /// All that there was, perhaps nothing.
    All,
    /// This kernel does not say.
    Unknown,
}

impl Kick {
    pub(super) fn new(eventfd: EventFd) -> Self {
        Self { eventfd, singles: 0, is_endless: false }
    }

    pub(super) fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// Whether it stays readable whatever is read: then only writes to it are news.
    pub(super) fn is_endless(&self) -> bool {
        self.is_endless
    }

    /// Takes the kicks that came, if there still are some.
    pub(super) fn take(&mut self) {
        if self.is_endless {
            return;
        }
        match self.read() {
            Taken::Single => self.singles += 1,
            Taken::All | Taken::Unknown => self.singles = 0,
        }
        // One read for each kick is enough as a rule.
        if self.singles == SINGLES_MAX {
            self.singles = 0;
            self.is_endless = (0..READS_MAX).all(|_| self.read() == Taken::Single);
            if self.is_endless {
                tracing::warn!(
                    "a kick eventfd of the front-end gives kicks one by one (EFD_SEMAPHORE) and has more kicks than the worker can read; \
                     it is not read any more"
                );
            }
        }
    }

    fn read(&self) -> Taken {
        let mut count = [0; size_of::<u64>()];
        // An eventfd has no offset; this one stands for "none".
        let buffers = &mut [IoSliceMut::new(&mut count)];
        match preadv2(borrow_eventfd(&self.eventfd), buffers, u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(_) if u64::from_ne_bytes(count) == 1 => Taken::Single,
            // Linux before 5.8 cannot promise not to block. There was a kick a moment ago.
            Err(Errno::OPNOTSUPP) => {
                let _ = self.eventfd.read();
                Taken::Unknown
            }
            // That there is nothing any more is as good: the queue is looked at.
            Ok(_) | Err(_) => Taken::All,
        }
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

    /// Signals it. If its counter is full, its reader wakes up without this signal.
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

    /// The eventfd, for another signaller.
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

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE};

    use super::*;

    fn kick(flags: i32, count: u64) -> (EventFd, Kick) {
        let eventfd = EventFd::new(flags | EFD_NONBLOCK).unwrap();
        if count > 0 {
            eventfd.write(count).unwrap();
        }
        (eventfd.try_clone().unwrap(), Kick::new(eventfd))
    }

    fn is_empty(eventfd: &EventFd) -> bool {
        eventfd.read().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    #[test]
    fn all_kicks_of_an_ordinary_eventfd_are_taken_at_once_however_often_it_is_kicked() {
        let (eventfd, mut kick) = kick(0, 1 << 40);
        kick.take();
        assert!(is_empty(&eventfd));
        for _ in 0..10 * SINGLES_MAX {
            eventfd.write(1).unwrap();
            kick.take();
        }
        assert!(is_empty(&eventfd) && !kick.is_endless());
    }

    #[test]
    fn a_semaphore_with_some_kicks_is_read_out() {
        let (eventfd, mut kick) = kick(EFD_SEMAPHORE, 1000);
        (0..SINGLES_MAX).for_each(|_| kick.take());
        assert!(is_empty(&eventfd) && !kick.is_endless());
    }

    #[test]
    fn a_semaphore_with_more_kicks_than_anybody_can_read_is_given_up_after_a_bounded_number_of_reads() {
        let count = 1 << 40;
        let (eventfd, mut kick) = kick(EFD_SEMAPHORE, count);
        (0..10 * SINGLES_MAX).for_each(|_| kick.take());
        assert!(kick.is_endless());
        // The counter ends at 2^64 - 2.
        let reads = u64::from(SINGLES_MAX + READS_MAX);
        eventfd.write(u64::MAX - 1 - (count - reads)).expect("so many kicks were read, and no more");
        assert!(eventfd.write(1).is_err(), "so many kicks were read, and no less");
    }
}
