//! The front-end's side of vhost-user: sets up the device, and sets it up again when it comes back.
//!
//! Everything that a device needs to continue is in memory that outlives the device: the rings, the requests in them,
//! the pending ATTACH, and the in-flight region if there is one. So the connection waits without limit for a device
//! that is gone, sets it up in the same way again, and the device continues at the used index.

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

use self::link::{Conversations, Link, RETRY_MAX};
use self::offer::Negotiated;
pub(super) use self::offer::Offer;
use self::set_up::{Inflight, add_region, describe};
use super::Error;
use super::memory::{Memory, Region};
use super::virtqueue::Vring;
use crate::eventfd;

/// First pause between two attempts to connect.
const RETRY_MIN: Duration = Duration::from_millis(5);

/// A connection to a device. A thread restores it when it is lost.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// The connection has ended, and the device gets no more messages.
    has_ended: bool,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    negotiated: Negotiated,
    memory: Arc<Memory>,
    vrings: Vec<Arc<Vring>>,
    inflight: Option<Inflight>,
    /// Held while the driver changes the set-up and announces the change, and while it sets a device up that came back.
    /// Otherwise a change could be lost: the set-up has already read the former state, and there is no connection yet
    /// on which to announce the change.
    changes: Mutex<()>,
    /// The connection, if there is one at present.
    link: Mutex<Option<Link>>,
    reconnects: AtomicU64,
    stop: EventFd,
    conversations: Conversations,
}

impl Connection {
    /// How often the connection was lost and restored.
    pub(super) fn reconnects(&self) -> u64 {
        self.shared.reconnects.load(Ordering::Relaxed)
    }

    /// Creates a region and announces it to the device. If the device is gone, the set-up announces all regions later.
    pub(super) fn add_region(&self, make: impl FnOnce(&Memory) -> Result<Region, Error>) -> Result<(), Error> {
        let _changes = self.shared.changes();
        let region = make(&self.shared.memory)?;
        let sent = self.shared.send(|frontend| add_region(frontend, &region));
        sent.inspect_err(|_| drop(self.shared.memory.remove(region.gpa)))
    }

    /// Removes the region at `gpa`, also from the device. When this returns, the device does not access the region any
    /// more.
    pub(super) fn remove_region(&self, gpa: u64) -> Result<(), Error> {
        let _changes = self.shared.changes();
        let region = self.shared.memory.remove(gpa).ok_or(Error::NoMemory)?;
        let failed = Error::protocol("removing a memory region");
        self.shared.send(|frontend| frontend.remove_mem_region(&describe(&region)).map_err(failed))
    }

    /// Gives a queue another eventfd for interrupts, which the device signals once.
    pub(super) fn renew_call(&self, index: usize) -> Result<(), Error> {
        let _changes = self.shared.changes();
        let call = self.shared.vrings[index].renew_call()?;
        let failed = Error::protocol("changing the call eventfd");
        self.shared.send(|frontend| frontend.set_vring_call(index, &call).map_err(failed))
    }

    /// Cuts the connection, so that the thread makes a new one. A killed device whose I/O hangs cannot end, and does
    /// not close its socket, although another process may already serve the disk.
    pub(super) fn cut(&self) {
        if let Some(link) = self.shared.link().as_ref() {
            let _ = link.stream.shutdown(Shutdown::Both);
        }
    }

    /// Stops all queues and starts them again where they stopped, like a machine that is paused and resumed.
    pub(super) fn restart_queues(&self) -> Result<(), Error> {
        self.shared.send(|frontend| {
            let mut bases = Vec::new();
            for index in 0..self.shared.vrings.len() {
                let base = frontend.get_vring_base(index).map_err(Error::protocol("stopping a queue"))?;
                bases.push(u16::try_from(base).unwrap_or_default());
            }
            self.shared.start_queues(frontend, |index| bases[index])
        })
    }

    /// Stops all queues, within the time limit of a conversation. The device then accesses no memory any more.
    ///
    /// # Errors
    ///
    /// The device does not confirm the stop, so it may still use the memory. The connection ends nevertheless.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        let _ = self.shared.stop.write(1);
        // The thread may be reconnecting: end its conversation with the device.
        self.shared.conversations.watchdog.cut_all();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic. If it did, the end would be the same.
            let _ = thread.join();
        }
        self.shared.conversations.watchdog.allow();
        let mut link = self.shared.link().take().ok_or(Error::NotStopped { why: "the connection is lost".into() })?;
        let stopped = self.shared.conversations.run(&mut link, |frontend| {
            (0..self.shared.vrings.len()).try_for_each(|index| {
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

    /// Sends messages to the device, if it is there. A device that comes back gets the complete set-up anyway.
    fn send(&self, messages: impl FnOnce(&mut Frontend) -> Result<(), Error>) -> Result<(), Error> {
        let mut link = self.link();
        let Some(link) = link.as_mut() else { return Ok(()) };
        self.conversations.run(link, messages).or_else(|error| match error {
            // The device is there but did not answer. The watchdog has cut the connection, because the driver would
            // take a late answer for the next answer.
            Error::Silent { .. } => Err(error),
            _ if link.is_gone() => Ok(()),
            _ => Err(error),
        })
    }

    /// Restores the connection each time it is lost, until the driver stops.
    fn keep_connected(&self) {
        loop {
            let stream = self.link().as_ref().map(|link| link.stream.try_clone());
            let continues = match stream {
                Some(Ok(stream)) => self.wait(Some(stream.as_fd()), None),
                Some(Err(_)) | None => self.wait(None, Some(RETRY_MIN)),
            };
            if !continues {
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

    /// Waits until the other side has closed `socket`, or for `timeout`. Returns false if this side must stop.
    fn wait(&self, socket: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        let timeout = timeout.and_then(|timeout| rustix::event::Timespec::try_from(timeout).ok());
        let mut fds = vec![PollFd::from_borrowed_fd(eventfd::borrow(&self.stop), PollFlags::IN)];
        // The device sends only replies, so a hang-up is the only other event.
        fds.extend(socket.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)));
        while poll(&mut fds, timeout.as_ref()) == Err(rustix::io::Errno::INTR) {}
        !fds[0].revents().contains(PollFlags::IN)
    }

    fn reconnect(&self) -> Result<(), Error> {
        let mut link = Link::open(&self.path, self.conversations.patience, |pause| self.wait(None, Some(pause)))?;
        let _changes = self.changes();
        self.conversations.run(&mut link, |frontend| {
            let offered = frontend.get_features().map_err(Error::protocol("asking for the features"))?;
            if self.negotiated.features & !offered != 0 {
                return Err(Error::Lacks { what: "the features that it had before" });
            }
            frontend.get_protocol_features().map_err(Error::protocol("asking for the protocol features"))?;
            self.negotiated.accept(frontend)?;
            self.set_up(frontend, |index| self.vrings[index].used_idx())
        })?;
        *self.link() = Some(link);
        Ok(())
    }
}
