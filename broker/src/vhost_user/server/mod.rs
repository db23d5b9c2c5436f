//! Serving one front-end after another.

mod lobby;
#[cfg(test)]
mod tests;

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
use crate::log_limit::Cause;
use lobby::{Attendance, Lobby, PATIENCE, Visitor};

/// How long to wait when a connection cannot be accepted, before it is tried again. The socket is readable all the while.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Why the server ends without having been told to.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Serves one device to one front-end at a time. A second one waits until the first is gone, and a line of the log says so.
///
/// A front-end that is connected and says nothing keeps nobody out, nor does one that stops in the middle of a message.
#[derive(Debug)]
pub struct Server {
    lobby: Lobby,
    control: Arc<Control>,
}

/// Tells a [`Server`] things while it runs, from any thread.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    control: Arc<Control>,
}

#[derive(Debug)]
struct Control {
    /// An eventfd that is readable when there is news.
    wake: OwnedFd,
    /// An eventfd that is readable when the server is to end.
    stop: OwnedFd,
    is_stopping: AtomicBool,
    is_refresh_due: AtomicBool,
    is_announcement_due: AtomicBool,
}

/// What others had to say since the last look.
struct News {
    is_refresh_due: bool,
    is_announcement_due: bool,
}

/// How a session ended.
enum End {
    Closed,
    Stopped,
}

/// Why a connection was closed by us.
#[derive(Debug, Error)]
enum ServeError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Server {
    /// Listens on a socket file, which is removed with the server. A stale one, that nobody listens on, is replaced.
    ///
    /// # Errors
    ///
    /// Somebody listens there, something else is there, or the path cannot be used.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        Self::listen(BoundSocket::bind(path, SocketAccess::default())?)
    }

    /// Listens on a socket that has been made.
    ///
    /// # Errors
    ///
    /// Somebody has removed or replaced it.
    pub fn listen(socket: BoundSocket) -> Result<Self, ServerError> {
        Self::new(socket.listen()?)
    }

    /// Serves a Unix stream socket that was passed to this process under a number. With a listening one as
    /// [`bind`](Self::bind); a connected one is the only front-end, and the server ends after it.
    ///
    /// # Errors
    ///
    /// There is no such descriptor, or it is something else.
    pub fn from_inherited_fd(number: RawFd) -> Result<Self, ServerError> {
        Self::new(Listener::inherited(number)?)
    }

    /// Whether [`bind`](Self::bind) can make a socket there, as far as that can be known without making it.
    ///
    /// # Errors
    ///
    /// The path is too long, its directory is not there or cannot be written, or something that is no socket is in the way.
    pub fn check_path(path: &Path) -> Result<(), ListenError> {
        Listener::check(path)
    }

    /// Whether [`from_inherited_fd`](Self::from_inherited_fd) can serve the descriptor of that number, which stays as it is but
    /// for a listening socket, which does not block any more.
    ///
    /// # Errors
    ///
    /// There is no such descriptor, or it is something else.
    pub fn check_inherited_fd(number: RawFd) -> Result<(), ListenError> {
        Listener::inherited(number).map(drop)
    }

    fn new(listener: Listener) -> Result<Self, ServerError> {
        let eventfd = || {
            rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
                .map_err(|errno| ServerError::System { what: "making an eventfd for the server", source: errno.into() })
        };
        let control = Control {
            wake: eventfd()?,
            stop: eventfd()?,
            is_stopping: AtomicBool::new(false),
            is_refresh_due: AtomicBool::new(false),
            is_announcement_due: AtomicBool::new(false),
        };
        Ok(Self { lobby: Lobby::new(listener, PATIENCE), control: Arc::new(control) })
    }

    /// To tell the server things once it runs.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { control: Arc::clone(&self.control) }
    }

    /// Serves until [`ServerHandle::stop`], or until the only front-end is gone. Then the server stops listening, removes its
    /// socket file and waits for I/O: all I/O of the device has ended when this returns without an error.
    ///
    /// A front-end that breaks the protocol, or dies, is disconnected; the next one is served.
    ///
    /// # Errors
    ///
    /// The socket gives no more connections. What passes, as a lack of descriptors or of memory, is waited for.
    pub fn run(self, device: &mut dyn Device) -> Result<(), ServerError> {
        self.run_with(device, || {})
    }

    /// The same, and calls `on_closed` when the server has stopped listening, before it waits for I/O: to close further sockets.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run); `on_closed` is not called then.
    pub fn run_with(mut self, device: &mut dyn Device, on_closed: impl FnOnce()) -> Result<(), ServerError> {
        while let Some(visitor) = self.next_front_end(device)? {
            let pid = visitor.pid;
            if let Some(total) = self.lobby.log.count(Cause::new("connected")) {
                info!(pid, total, "front-end connected");
            }
            let end = self.serve(visitor, device);
            if let Ok(End::Stopped) = end {
                break;
            }
            match end {
                Ok(_) => {
                    if let Some(total) = self.lobby.log.count(Cause::new("disconnected")) {
                        info!(pid, total, "front-end disconnected");
                    }
                }
                Err(error) => {
                    if let Some(total) = self.lobby.log.count(error.cause()) {
                        warn!(pid, %error, total, "connection to the front-end closed");
                    }
                }
            }
        }
        // The last I/O may take any time. A front-end that connects meanwhile would wait for an answer, and a successor could not
        // listen here. The lock of the disk keeps the successor's requests away from this I/O.
        drop(self.lobby);
        on_closed();
        info!("stopping: waiting for the last I/O");
        device.reset();
        Ok(())
    }

    /// Waits for a front-end that says something. `None`: the server is to end.
    fn next_front_end(&mut self, device: &mut dyn Device) -> Result<Option<Visitor>, ServerError> {
        let system = |what| move |source| ServerError::System { what, source };
        let mut has_complained = false;
        loop {
            if self.control.is_stopping() {
                return Ok(None);
            }
            // A front-end that is still to come asks for the capacity itself.
            if self.control.take_news().is_refresh_due {
                refresh_capacity(device);
            }
            let is_paused = match self.lobby.take_connections() {
                Ok(()) => false,
                Err(error) if is_lasting(&error) => return Err(system("accepting a front-end")(error)),
                Err(error) => {
                    if !std::mem::replace(&mut has_complained, true) {
                        warn!(%error, "no front-end can be accepted; it is tried again and again");
                    }
                    true
                }
            };
            if let Some(visitor) = self.lobby.take_speaker() {
                return Ok(Some(visitor));
            }
            if self.lobby.is_closed() {
                return Ok(None);
            }
            let others = self.lobby.to_poll().filter(|_| !is_paused);
            let fds = std::iter::once(self.control.wake.as_fd()).chain(others);
            let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match rustix::event::poll(&mut fds, Some(&ACCEPT_PAUSE).filter(|_| is_paused)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("waiting for a front-end")(errno.into())),
            }
        }
    }

    /// One front-end, from connection to disconnection.
    fn serve(&mut self, visitor: Visitor, device: &mut dyn Device) -> Result<End, ServeError> {
        let Self { lobby, control } = self;
        let served_pid = visitor.pid;
        let mut connection = Connection::new(visitor.stream);
        let (wake, stop) = (control.wake.as_fd(), control.stop.as_fd());
        let watch = connection.peer_watch().inspect_err(|error| {
            if let Some(total) = lobby.log.count(Cause::new("not watched")) {
                warn!(%error, total, "cannot watch the front-end");
            }
        });
        device.set_peer(watch.ok());
        // The disk may have been resized while nobody was there to be told.
        refresh_capacity(device);
        let mut session = Session::new(device);
        loop {
            if control.is_stopping() {
                return Ok(End::Stopped);
            }
            let news = control.take_news();
            if news.is_refresh_due {
                session.refresh_capacity();
            }
            if news.is_announcement_due {
                session.notify_config_change();
            }
            match connection.receive(Attendance { lobby: &mut *lobby, served_pid, wake })? {
                Received::Closed => {
                    if let Some(farewell) = session.farewell()
                        && let Some(total) = lobby.log.count(Cause::new("farewell"))
                    {
                        warn!(pid = served_pid, total, "front-end: {farewell}");
                    }
                    return Ok(End::Closed);
                }
                Received::Woken => {}
                Received::Message(message) => {
                    if let Some(reply) = session.handle(message)? {
                        connection.send(&reply, Attendance { lobby: &mut *lobby, served_pid, wake: stop })?;
                    }
                }
            }
        }
    }
}

impl ServeError {
    /// The cause for the limits of log lines. The front-end chooses the request, so the request is no part of it.
    fn cause(&self) -> Cause {
        match self {
            Self::Connection(error) => error.cause(),
            Self::Session(error) => error.source.cause(),
        }
    }
}

/// Whether a socket that failed to accept (`accept(2)`) will never do so again.
fn is_lasting(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP | Errno::FAULT)
    )
}

impl ServerHandle {
    /// Ends the server: the front-end is disconnected, and I/O that is under way is waited for.
    pub fn stop(&self) {
        self.control.is_stopping.store(true, Ordering::Release);
        signal(&self.control.stop);
        signal(&self.control.wake);
    }

    /// Has the device look at the size of its disk again, and the front-end told if it changed.
    pub fn refresh_capacity(&self) {
        self.control.is_refresh_due.store(true, Ordering::Release);
        signal(&self.control.wake);
    }

    /// The device has another capacity already: has the front-end told, if there is one.
    pub fn announce_capacity(&self) {
        self.control.is_announcement_due.store(true, Ordering::Release);
        signal(&self.control.wake);
    }
}

impl Control {
    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// Takes the news off `wake` first: what comes later is seen later.
    fn take_news(&self) -> News {
        // EAGAIN: there was none.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        News {
            is_refresh_due: self.is_refresh_due.swap(false, Ordering::AcqRel),
            is_announcement_due: self.is_announcement_due.swap(false, Ordering::AcqRel),
        }
    }
}

/// EAGAIN means that the counter is full: it is readable already.
fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}
