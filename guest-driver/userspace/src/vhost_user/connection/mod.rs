//! The front-end's side of vhost-user: sets the device up, and sets it up again when it comes back.
//!
//! Everything that a device needs to go on is in memory that outlives it: the rings, the requests in them, the pending
//! ATTACH, and an in-flight region if there is one. So a device that is gone is waited for, without end, told the same
//! things again, and goes on where the used index says.

mod link;
mod offer;
mod set_up;

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::EventFd;

use self::link::{Link, RETRY_MAX, Waits};
use self::offer::Negotiated;
pub(super) use self::offer::Offer;
use self::set_up::{Inflight, add_region, describe};
use super::Error;
use super::memory::{Memory, Region};
use super::virtqueue::Setup;
use crate::raw;

/// How long to wait at first before it is tried again to connect.
const RETRY_MIN: Duration = Duration::from_millis(5);

/// A connection to a device, kept up by a thread.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Nothing is left to be told to the device.
    has_ended: bool,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    negotiated: Negotiated,
    memory: Arc<Memory>,
    queues: Vec<Arc<Setup>>,
    inflight: Option<Inflight>,
    /// Held while something is changed that a device is told, and told to it; and while a device that came back is told everything.
    /// Otherwise a change could come behind the latter's look at it, and find no connection to be told over.
    changes: Mutex<()>,
    /// The connection, if there is one now.
    link: Mutex<Option<Link>>,
    reconnects: AtomicU64,
    stop: EventFd,
    waits: Waits,
}

impl Connection {
    /// How often the device was lost and found again.
    pub(super) fn reconnects(&self) -> u64 {
        self.shared.reconnects.load(Ordering::Relaxed)
    }

    /// Makes a region, and tells the device of it. One that comes back later is told of all.
    pub(super) fn add_region(&self, make: impl FnOnce(&Memory) -> Result<Region, Error>) -> Result<(), Error> {
        let _changes = self.shared.changes();
        let region = make(&self.shared.memory)?;
        let told = self.shared.tell(|frontend| add_region(frontend, &region));
        told.inspect_err(|_| drop(self.shared.memory.remove(region.gpa)))
    }

    /// Takes the region at `gpa` out, and tells the device so. When this returns it reaches it no more.
    pub(super) fn remove_region(&self, gpa: u64) -> Result<(), Error> {
        let _changes = self.shared.changes();
        let region = self.shared.memory.remove(gpa).ok_or(Error::NoMemory)?;
        let failed = Error::protocol("removing a memory region");
        self.shared.tell(|frontend| frontend.remove_mem_region(&describe(&region)).map_err(failed))
    }

    /// Gives a queue another eventfd for interrupts, which the device signals once.
    pub(super) fn renew_call(&self, index: usize) -> Result<(), Error> {
        let _changes = self.shared.changes();
        let call = self.shared.queues[index].renew_call()?;
        let failed = Error::protocol("changing the call eventfd");
        self.shared.tell(|frontend| frontend.set_vring_call(index, &call).map_err(failed))
    }

    /// Gives this connection up for a new one. A device that was killed and cannot end, because I/O of it hangs, does not close
    /// its socket; another may serve already.
    pub(super) fn renew(&self) {
        if let Some(link) = self.shared.link().as_ref() {
            let _ = link.stream.shutdown(Shutdown::Both);
        }
    }

    /// Stops all queues and starts them again where they stopped, as a machine does that is paused.
    pub(super) fn stop_and_go_on(&self) -> Result<(), Error> {
        self.shared.tell(|frontend| {
            let mut bases = Vec::new();
            for index in 0..self.shared.queues.len() {
                let base = frontend.get_vring_base(index).map_err(Error::protocol("stopping a queue"))?;
                bases.push(u16::try_from(base).unwrap_or_default());
            }
            self.shared.start_queues(frontend, |index| bases[index])
        })
    }

    /// Stops all queues: none touches memory when its last request has ended, for which the device has the patience of all waits.
    ///
    /// # Errors
    ///
    /// The device does not say that. It is left at that: it may still use the memory.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        let _ = self.shared.stop.write(1);
        // Nobody else talks to the device now but the thread, if it is just connecting anew.
        self.shared.waits.watchdog.cut_all();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, nothing is left to be done.
            let _ = thread.join();
        }
        self.shared.waits.watchdog.allow();
        let mut link = self.shared.link().take().ok_or(Error::NotStopped { why: "its connection is lost".into() })?;
        let stopped = self.shared.waits.talk(&mut link, |frontend| {
            (0..self.shared.queues.len()).try_for_each(|index| {
                frontend.get_vring_base(index).map(drop).map_err(Error::protocol("stopping a queue"))
            })
        });
        stopped.map_err(|error| Error::NotStopped { why: error.to_string() })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("{error}");
        }
    }
}

impl Shared {
    fn link(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the device something, if it is there: one that comes back is told everything anew.
    fn tell(&self, message: impl FnOnce(&mut Frontend) -> Result<(), Error>) -> Result<(), Error> {
        let mut link = self.link();
        let Some(link) = link.as_mut() else { return Ok(()) };
        self.waits.talk(link, message).or_else(|error| match error {
            // It is there, and has not done it. The connection is cut, because a late answer would be taken for the next one.
            Error::Silent { .. } => Err(error),
            _ if link.is_gone() => Ok(()),
            _ => Err(error),
        })
    }

    /// Waits for the device to go, and for it to come back, until told to stop.
    fn keep(&self) {
        loop {
            let stream = self.link().as_ref().map(|link| link.stream.try_clone());
            let is_going = match stream {
                Some(Ok(stream)) => self.wait(Some(stream.as_fd()), None),
                Some(Err(_)) | None => self.wait(None, Some(RETRY_MIN)),
            };
            if !is_going {
                return;
            }
            *self.link() = None;
            let mut pause = RETRY_MIN;
            while let Err(error) = self.reconnect() {
                tracing::debug!(%error, "the device is not back yet");
                if !self.wait(None, Some(pause)) {
                    return;
                }
                pause = (pause * 2).min(RETRY_MAX);
            }
            self.reconnects.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until the other side has closed `socket`, or for `timeout`. False: this side is to stop.
    fn wait(&self, socket: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        let timeout = timeout.and_then(|timeout| rustix::event::Timespec::try_from(timeout).ok());
        let mut fds = vec![PollFd::from_borrowed_fd(raw::borrow(&self.stop), PollFlags::IN)];
        // Nothing comes unasked; what is readable besides replies that somebody waits for is the end.
        fds.extend(socket.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)));
        while poll(&mut fds, timeout.as_ref()) == Err(rustix::io::Errno::INTR) {}
        !fds[0].revents().contains(PollFlags::IN)
    }

    fn reconnect(&self) -> Result<(), Error> {
        let mut link = Link::open(&self.path, self.waits.patience, |pause| self.wait(None, Some(pause)))?;
        let _changes = self.changes();
        self.waits.talk(&mut link, |frontend| {
            let offered = frontend.get_features().map_err(Error::protocol("asking for the features"))?;
            if self.negotiated.features & !offered != 0 {
                return Err(Error::Lacks { what: "the features that it had before" });
            }
            frontend.get_protocol_features().map_err(Error::protocol("asking for the protocol features"))?;
            self.negotiated.tell(frontend)?;
            self.set_up(frontend, |index| self.queues[index].used_idx())
        })?;
        *self.link() = Some(link);
        Ok(())
    }
}
