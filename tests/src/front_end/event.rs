//! Eventfds: kicks and calls.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};

/// An eventfd (eventfd(2)) that does not block.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new one, not signalled.
    ///
    /// # Errors
    ///
    /// No more file descriptors.
    pub fn new() -> Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Signals it.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn signal(&self) -> Result<()> {
        rustix::io::write(&self.0, &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// How often it was signalled since it was taken last.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn take(&self) -> Result<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it is signalled within the time. It stays signalled.
    ///
    /// # Errors
    ///
    /// poll(2) fails.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        wait_readable(self.as_fd(), timeout)
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
    /// No more file descriptors.
    pub fn new() -> Result<Arc<Self>> {
        let event = || Ok::<_, anyhow::Error>(Mutex::new(Arc::new(Event::new()?)));
        Ok(Arc::new(Self { kick: event()?, call: event()? }))
    }

    /// The driver signals this one after it has made something available.
    pub fn kick(&self) -> Arc<Event> {
        self.kick.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The device signals this one after it has used something.
    pub fn call(&self) -> Arc<Event> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From here on the driver signals `kick`; once at once, because the old one may have been signalled last.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn change_kick(&self, kick: Event) -> Result<()> {
        let kick = Arc::new(kick);
        *self.kick.lock().unwrap_or_else(PoisonError::into_inner) = kick.clone();
        kick.signal()
    }

    /// From here on the driver waits for `call`. It looks at the ring once, because the old one may have been signalled.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn change_call(&self, call: Event) -> Result<()> {
        let call = Arc::new(call);
        let old = {
            let mut current = self.call.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, call)
        };
        old.signal()
    }
}

/// Whether a file descriptor can be read within the time.
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
