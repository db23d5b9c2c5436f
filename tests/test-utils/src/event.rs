//! Eventfds: kicks and calls.

use std::{
    os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};
use vmm_sys_util::eventfd::EventFd;

/// An eventfd (eventfd(2)).
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new eventfd that does not block and is not signalled.
    ///
    /// # Errors
    ///
    /// The process has no more file descriptors.
    pub fn new() -> Result<Self> {
        Self::with_flags(EventfdFlags::NONBLOCK)
    }

    /// A new eventfd with these flags: one that blocks, or a semaphore.
    ///
    /// # Errors
    ///
    /// The process has no more file descriptors.
    pub fn with_flags(flags: EventfdFlags) -> Result<Self> {
        Ok(Self(eventfd(0, flags | EventfdFlags::CLOEXEC)?))
    }

    /// Signals the eventfd once.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn signal(&self) -> Result<()> {
        self.add(1)
    }

    /// Adds any number to the counter.
    ///
    /// # Errors
    ///
    /// The counter has no room for it, or the eventfd cannot be written.
    pub fn add(&self, count: u64) -> Result<()> {
        rustix::io::write(&self.0, &count.to_ne_bytes())?;
        Ok(())
    }

    /// How often the eventfd was signalled since the last call of this function. A blocking eventfd waits for a signal.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be read.
    pub fn take(&self) -> Result<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the eventfd is signalled within this time. The signal stays.
    ///
    /// # Errors
    ///
    /// poll(2) fails.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        wait_readable(self.as_fd(), timeout)
    }

    /// Another descriptor of the same eventfd, as the type in the interfaces of rust-vmm.
    ///
    /// # Errors
    ///
    /// The process has no more file descriptors.
    pub fn to_eventfd(&self) -> Result<EventFd> {
        let fd = self.0.try_clone()?.into_raw_fd();
        // SAFETY: `into_raw_fd` gave up the ownership of an open descriptor just now, and `EventFd` takes it over.
        Ok(unsafe { EventFd::from_raw_fd(fd) })
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The eventfds of a vring, which the front-end may change while the driver runs.
#[derive(Debug)]
pub struct Eventfds {
    kick: Mutex<Arc<Event>>,
    call: Mutex<Arc<Event>>,
}

impl Eventfds {
    /// A new pair.
    ///
    /// # Errors
    ///
    /// The process has no more file descriptors.
    pub fn new() -> Result<Arc<Self>> {
        let event = || Ok::<_, anyhow::Error>(Mutex::new(Arc::new(Event::new()?)));
        Ok(Arc::new(Self { kick: event()?, call: event()? }))
    }

    /// The driver signals this eventfd after it has made chains available.
    pub fn kick(&self) -> Arc<Event> {
        locked(&self.kick).clone()
    }

    /// The device signals this eventfd after it has used chains.
    pub fn call(&self) -> Arc<Event> {
        locked(&self.call).clone()
    }

    /// The driver signals `kick` from now on. The old eventfd may hold a signal that the device has not seen.
    pub fn set_kick(&self, kick: Event) -> Arc<Event> {
        let kick = Arc::new(kick);
        *locked(&self.kick) = kick.clone();
        kick
    }

    /// The driver waits for `call` from now on. A driver that waits already goes on waiting for the old eventfd, which
    /// is the result.
    pub fn set_call(&self, call: Event) -> Arc<Event> {
        std::mem::replace(&mut *locked(&self.call), Arc::new(call))
    }

    /// The driver signals `kick` from now on, and once at once, because the last signal may have gone to the old
    /// eventfd.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn change_kick(&self, kick: Event) -> Result<()> {
        self.set_kick(kick).signal()
    }

    /// The driver waits for `call` from now on. It looks at the ring once, because the last signal may have come by the
    /// old eventfd.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn change_call(&self, call: Event) -> Result<()> {
        self.set_call(call).signal()
    }
}

fn locked(event: &Mutex<Arc<Event>>) -> MutexGuard<'_, Arc<Event>> {
    event.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a file descriptor can be read within this time.
///
/// # Errors
///
/// poll(2) fails.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> Result<bool> {
    let end = Instant::now() + timeout;
    loop {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
        match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
