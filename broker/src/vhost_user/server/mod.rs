//! A server that serves one front-end after another.

#[cfg(test)]
mod tests;
mod waiting_front_ends;

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use thiserror::Error;
use tracing::{info, warn};

use super::connection::{Connection, ConnectionError, Received};
use super::device::Device;
use super::listener::{BoundSocket, ListenError, Listener, SocketAccess};
use super::session::{Session, SessionError, refresh_capacity};
use crate::log_limit::LogCause;
use waiting_front_ends::{FrontEndWaiter, PATIENCE, WaitingFrontEnd, WaitingFrontEnds};

/// How long to wait before the next try when accepting a connection fails. The socket stays readable meanwhile.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Why the server ends although its owner has not stopped it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The socket cannot be used.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System {
        /// What the server was doing.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Serves one device to one front-end at a time. A second front-end waits until the first is gone, and the log says so.
///
/// A front-end blocks no other if it is connected and silent, or if it stops in the middle of a message.
#[derive(Debug)]
pub struct Server {
    waiting: WaitingFrontEnds,
    requests: Arc<HandleRequests>,
}

/// Sends requests to a running [`Server`], from any thread.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    requests: Arc<HandleRequests>,
}

/// What handles ask of the server. The server looks at it between two messages.
#[derive(Debug)]
struct HandleRequests {
    /// An eventfd that is readable when there is a request.
    wake: OwnedFd,
    /// An eventfd that is readable when the server must end.
    stop: OwnedFd,
    is_stopping: AtomicBool,
    is_refresh_due: AtomicBool,
    is_announcement_due: AtomicBool,
}

/// The requests since the last look.
struct TakenRequests {
    is_refresh_due: bool,
    is_announcement_due: bool,
}

/// How a session ended.
enum End {
    Closed,
    Stopped,
}

/// Why the server closed a connection.
#[derive(Debug, Error)]
enum ServeError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Server {
    /// Listens on a socket file, which the server removes at its end. Replaces a stale socket, on which no process
    /// listens.
    ///
    /// # Errors
    ///
    /// Another process listens there, another kind of file is there, or the path is unusable.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        Self::listen(BoundSocket::bind(path, SocketAccess::default())?)
    }

    /// Listens on a socket that the caller has made.
    ///
    /// # Errors
    ///
    /// Another process has removed or replaced the socket.
    pub fn listen(socket: BoundSocket) -> Result<Self, ServerError> {
        Self::new(socket.listen()?)
    }

    /// Serves a Unix stream socket that the parent process passed under a number. A listening socket works as with
    /// [`bind`](Self::bind); a connected socket is the only front-end, and the server ends after it.
    ///
    /// # Errors
    ///
    /// There is no such descriptor, or it is not a Unix stream socket that listens or is connected.
    pub fn from_inherited_fd(number: RawFd) -> Result<Self, ServerError> {
        Self::new(Listener::inherited(number)?)
    }

    /// Whether [`bind`](Self::bind) can make a socket there, as far as this can be found out without making one.
    ///
    /// # Errors
    ///
    /// The path is too long, its directory is missing or not writable, or a file that is not a socket is in the way.
    pub fn check_path(path: &Path) -> Result<(), ListenError> {
        Listener::check(path)
    }

    /// Whether [`from_inherited_fd`](Self::from_inherited_fd) can serve the descriptor of that number. The descriptor
    /// stays unchanged, except that a listening socket becomes non-blocking.
    ///
    /// # Errors
    ///
    /// There is no such descriptor, or it is not a Unix stream socket that listens or is connected.
    pub fn check_inherited_fd(number: RawFd) -> Result<(), ListenError> {
        Listener::inherited(number).map(drop)
    }

    fn new(listener: Listener) -> Result<Self, ServerError> {
        let eventfd = || {
            rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
                .map_err(|errno| ServerError::System { what: "making an eventfd for the server", source: errno.into() })
        };
        let requests = HandleRequests {
            wake: eventfd()?,
            stop: eventfd()?,
            is_stopping: AtomicBool::new(false),
            is_refresh_due: AtomicBool::new(false),
            is_announcement_due: AtomicBool::new(false),
        };
        Ok(Self { waiting: WaitingFrontEnds::new(listener, PATIENCE), requests: Arc::new(requests) })
    }

    /// A handle for requests to the running server.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { requests: Arc::clone(&self.requests) }
    }

    /// Serves until [`ServerHandle::stop`], or until the only front-end is gone. Then the server stops listening,
    /// removes its socket file and waits for I/O: when this returns without an error, all I/O of the device has ended.
    ///
    /// The server disconnects a front-end that breaks the protocol or dies, and serves the next one.
    ///
    /// # Errors
    ///
    /// The socket gives no more connections. The server retries after temporary errors, such as a lack of descriptors
    /// or of memory.
    pub fn run(self, device: &mut dyn Device) -> Result<(), ServerError> {
        self.run_with(device, || {})
    }

    /// As [`run`](Self::run), and calls `on_closed` when the server has stopped listening, before it waits for I/O, so
    /// that the caller can close further sockets.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run); then the server does not call `on_closed`.
    pub fn run_with(mut self, device: &mut dyn Device, on_closed: impl FnOnce()) -> Result<(), ServerError> {
        while let Some(front_end) = self.next_front_end(device)? {
            let pid = front_end.pid;
            if let Some(total) = self.waiting.log.count(LogCause::new("connected")) {
                info!(pid, total, "front-end connected");
            }
            let end = self.serve(front_end, device);
            if let Ok(End::Stopped) = end {
                break;
            }
            match end {
                Ok(_) => {
                    if let Some(total) = self.waiting.log.count(LogCause::new("disconnected")) {
                        info!(pid, total, "front-end disconnected");
                    }
                }
                Err(error) => {
                    if let Some(total) = self.waiting.log.count(error.cause()) {
                        warn!(pid, %error, total, "connection to the front-end closed");
                    }
                }
            }
        }
        // The last I/O may take any time. A front-end that connects meanwhile would wait for an answer, and a successor
        // could not listen here. The lock of the disk keeps the successor's requests away from this I/O.
        drop(self.waiting);
        on_closed();
        info!("stopping: waiting for the last I/O");
        device.reset();
        Ok(())
    }

    /// Waits for a front-end that speaks. `None`: the server must end.
    fn next_front_end(&mut self, device: &mut dyn Device) -> Result<Option<WaitingFrontEnd>, ServerError> {
        let system = |what| move |source| ServerError::System { what, source };
        let mut has_complained = false;
        loop {
            if self.requests.is_stopping() {
                return Ok(None);
            }
            // A front-end that comes later asks for the capacity itself.
            if self.requests.take().is_refresh_due {
                refresh_capacity(device);
            }
            let is_paused = match self.waiting.take_connections() {
                Ok(()) => false,
                Err(error) if is_lasting(&error) => return Err(system("accepting a front-end")(error)),
                Err(error) => {
                    if !std::mem::replace(&mut has_complained, true) {
                        warn!(%error, "no front-end can be accepted: trying again until one can");
                    }
                    true
                }
            };
            if let Some(front_end) = self.waiting.take_speaker() {
                return Ok(Some(front_end));
            }
            if self.waiting.is_closed() {
                return Ok(None);
            }
            let others = self.waiting.to_poll().filter(|_| !is_paused);
            let fds = std::iter::once(self.requests.wake.as_fd()).chain(others);
            let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match rustix::event::poll(&mut fds, Some(&ACCEPT_PAUSE).filter(|_| is_paused)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("waiting for a front-end")(errno.into())),
            }
        }
    }

    /// Serves one front-end, from connection to disconnection.
    fn serve(&mut self, front_end: WaitingFrontEnd, device: &mut dyn Device) -> Result<End, ServeError> {
        let Self { waiting, requests } = self;
        let served_pid = front_end.pid;
        let mut connection = Connection::new(front_end.stream);
        let (wake, stop) = (requests.wake.as_fd(), requests.stop.as_fd());
        let watch = connection.peer_watch().inspect_err(|error| {
            if let Some(total) = waiting.log.count(LogCause::new("not watched")) {
                warn!(%error, total, "front-end not watched: waits for I/O do not end when it leaves");
            }
        });
        device.set_peer(watch.ok());
        // The disk may have been resized while no front-end was connected.
        refresh_capacity(device);
        let mut session = Session::new(device);
        loop {
            if requests.is_stopping() {
                return Ok(End::Stopped);
            }
            let taken = requests.take();
            if taken.is_refresh_due {
                session.refresh_capacity();
            }
            if taken.is_announcement_due {
                session.notify_config_change();
            }
            match connection.receive(FrontEndWaiter { waiting: &mut *waiting, served_pid, wake })? {
                Received::Closed => {
                    if let Some(hint) = session.departure_hint() {
                        if let Some(total) = waiting.log.count(LogCause::new("departure")) {
                            warn!(pid = served_pid, total, "front-end left: {hint}");
                        }
                    }
                    return Ok(End::Closed);
                }
                Received::Woken => {}
                Received::Message(message) => {
                    if let Some(reply) = session.handle(message)? {
                        connection.send(&reply, FrontEndWaiter { waiting: &mut *waiting, served_pid, wake: stop })?;
                    }
                }
            }
        }
    }
}

impl ServeError {
    /// The cause for rate limits of log lines. The front-end chooses the request, so the request is no part of the
    /// cause.
    fn cause(&self) -> LogCause {
        match self {
            Self::Connection(error) => error.cause(),
            Self::Session(error) => error.source.cause(),
        }
    }
}

/// Whether a socket that failed to accept a connection (`accept(2)`) will never accept one again.
fn is_lasting(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP | Errno::FAULT)
    )
}

impl ServerHandle {
    /// Ends the server: the server disconnects the front-end and waits for I/O under way.
    pub fn stop(&self) {
        self.requests.is_stopping.store(true, Ordering::Release);
        signal(&self.requests.stop);
        signal(&self.requests.wake);
    }

    /// Makes the device read the size of its disk again, and tells the front-end if the size changed.
    pub fn refresh_capacity(&self) {
        self.requests.is_refresh_due.store(true, Ordering::Release);
        signal(&self.requests.wake);
    }

    /// Tells the front-end, if there is one, that the device already has another capacity.
    pub fn announce_capacity(&self) {
        self.requests.is_announcement_due.store(true, Ordering::Release);
        signal(&self.requests.wake);
    }
}

impl HandleRequests {
    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// Clears `wake` before it reads the requests: the next call sees requests that come later.
    fn take(&self) -> TakenRequests {
        // EAGAIN: there was no request.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        TakenRequests {
            is_refresh_due: self.is_refresh_due.swap(false, Ordering::AcqRel),
            is_announcement_due: self.is_announcement_due.swap(false, Ordering::AcqRel),
        }
    }
}

/// EAGAIN means that the counter is full, so the eventfd is readable already.
fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}
