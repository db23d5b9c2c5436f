//! Where front-ends come from: a socket file of our own, or a socket that was passed to this process.

mod directory;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, accessat, chownat, fchmod, fstat, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use self::directory::Directory;
use super::connection::pid_of_peer;
use crate::processes::Process;

/// Why no front-end can be waited for.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Somebody else serves this socket.
    #[error("{}: another process listens there; stop it, or give another path", .path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that must not be removed.
    #[error("{}: a file that is no socket is in the way; remove it, or give another path", .path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The kernel has no room for the path (`sun_path` in unix(7)).
    #[error("{}: a socket's path has at most {PATH_BYTES_MAX} bytes, this one has {}; give a shorter one", .path.display(), .path.as_os_str().len())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The path cannot be listened on.
    #[error("{}: {what}: {source}{}", .path.display(), path_hint(.source))]
    Path {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It is not there any more when it is to be listened on.
    #[error("{}: another process has removed or replaced this socket; give each server a path of its own", .path.display())]
    Replaced {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot have the group that it is to have.
    #[error("{}: giving the socket to group {group}: {source}; only root and members of a group can", .path.display())]
    Group {
        /// The socket.
        path: PathBuf,
        /// Number of the group.
        group: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The descriptor is something else.
    #[error("file descriptor {fd} is not a Unix stream socket; pass a listening or a connected one")]
    NotAUnixSocket {
        /// Its number.
        fd: RawFd,
    },
    /// It neither listens nor is connected.
    #[error("file descriptor {fd} is a Unix stream socket that neither listens nor is connected; pass one that does")]
    NotConnected {
        /// Its number.
        fd: RawFd,
    },
    /// The descriptor cannot be used.
    #[error("file descriptor {fd}: {source}{}", fd_hint(.source))]
    Fd {
        /// Its number.
        fd: RawFd,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn path_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => ". Make its directory first",
        Some(Errno::NOTDIR) => ". A part of the path is no directory",
        Some(Errno::ACCESS | Errno::PERM) => {
            ". The user of this process must be allowed to write to the directory, also without the privileges that a server \
             gives up (--sandbox): run it as the directory's owner, or pass an open socket with --fd"
        }
        Some(Errno::ROFS) => ". Choose a place that can be written to, such as /run",
        _ => "",
    }
}

fn fd_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::BADF) => ". Whoever starts this process must leave the socket open under that number",
        _ => "",
    }
}

/// `sun_path` without the byte that ends it.
const PATH_BYTES_MAX: usize = 107;
/// How many may wait to be accepted.
const BACKLOG: i32 = 128;

/// Who may connect to a socket file: whoever may write to it (unix(7)) and search the directories above it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// The file's mode, of which the umask takes its bits. None: the umask alone decides.
    pub mode: Option<u32>,
    /// Number of the file's group. None: the one that every new file in that directory gets.
    pub group: Option<u32>,
}

impl SocketAccess {
    /// Only the owner of the file.
    pub const OWNER: Self = Self { mode: Some(0o600), group: None };
}

/// A source of connections.
#[derive(Debug)]
pub(crate) struct Listener {
    /// The socket file, if it is ours. Removed before this process stops listening: until then no other takes its place.
    _file: Option<SocketFile>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Listening(UnixListener),
    /// One connection, which was made before.
    Connected(Option<UnixStream>),
}

/// A socket file on which nobody listens yet. Removed when dropped.
#[derive(Debug)]
pub struct BoundSocket {
    file: SocketFile,
    socket: OwnedFd,
    directory: Directory,
}

impl BoundSocket {
    /// Makes the file. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// Somebody listens there, something else is there, the path cannot be used, or the socket cannot have the group.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Self, ListenError> {
        let directory = Directory::of(path);
        let lock = directory.lock();
        let (file, socket) = Self::make(path, access)?;
        drop(lock);
        Ok(Self { file, socket, directory })
    }

    fn make(path: &Path, access: SocketAccess) -> Result<(SocketFile, OwnedFd), ListenError> {
        let failed = |what| move |source| ListenError::Path { path: path.to_owned(), what, source };
        let bound = match bind(path, access) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path)?;
                bind(path, access)
            }
            other => other,
        };
        let socket = bound.map_err(|errno| match errno {
            Errno::NAMETOOLONG if path.as_os_str().len() > PATH_BYTES_MAX => {
                ListenError::TooLong { path: path.to_owned() }
            }
            errno => failed("making a socket there")(errno.into()),
        })?;
        let file = SocketFile::of(path).map_err(failed("looking at the new socket"))?;
        if let Some(group) = access.group {
            let refused = |errno: Errno| ListenError::Group { path: path.to_owned(), group, source: errno.into() };
            give_to_group(path, group).map_err(refused)?;
        }
        Ok((file, socket))
    }

    /// Takes connections from now on; none could be made before.
    pub(crate) fn listen(self) -> Result<Listener, ListenError> {
        let Self { file, socket, directory } = self;
        let _lock = directory.lock();
        listen(file, socket)
    }
}

fn listen(file: SocketFile, socket: OwnedFd) -> Result<Listener, ListenError> {
    if !file.is_there() {
        return Err(ListenError::Replaced { path: file.path().to_owned() });
    }
    rustix::net::listen(&socket, BACKLOG).map_err(|errno| ListenError::Path {
        path: file.path().to_owned(),
        what: "listening there",
        source: errno.into(),
    })?;
    Ok(Listener { _file: Some(file), source: Source::Listening(UnixListener::from(socket)) })
}

impl Listener {
    /// Listens on a path. A socket file that nobody listens on any more is replaced.
    pub(crate) fn bind(path: &Path, access: SocketAccess) -> Result<Self, ListenError> {
        let directory = Directory::of(path);
        // Between `bind` and `listen` the socket looks like one that nobody listens on.
        let _lock = directory.lock();
        let (file, socket) = BoundSocket::make(path, access)?;
        listen(file, socket)
    }

    /// Whether a socket can be made at the path, as far as that can be known without making it. A socket on which another
    /// process listens is no obstacle: the process may have ended when the socket is made.
    pub(crate) fn check(path: &Path) -> Result<(), ListenError> {
        if path.as_os_str().len() > PATH_BYTES_MAX {
            return Err(ListenError::TooLong { path: path.to_owned() });
        }
        if std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let refused = |source| ListenError::Path { path: path.to_owned(), what: "making a socket there", source };
        if !std::fs::metadata(directory).map_err(refused)?.is_dir() {
            return Err(refused(Errno::NOTDIR.into()));
        }
        accessat(CWD, directory, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)
            .map_err(|errno| refused(errno.into()))
    }

    /// Takes a socket that the parent process passed.
    pub(super) fn inherited(number: RawFd) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Fd { fd: number, source };
        // SAFETY: the number is only used to ask the kernel for a second descriptor; if nothing is open under it, the
        // kernel says so. Whoever owns the first one keeps it.
        let passed = unsafe { BorrowedFd::borrow_raw(number) };
        let fd = passed.try_clone_to_owned().map_err(failed)?;
        let ask = |answer: Result<bool, Errno>| match answer {
            Err(Errno::NOTSOCK) => Err(ListenError::NotAUnixSocket { fd: number }),
            other => other.map_err(|errno| failed(errno.into())),
        };
        let is_unix = ask(rustix::net::sockopt::socket_domain(&fd).map(|domain| domain == AddressFamily::UNIX))?;
        let is_stream = ask(rustix::net::sockopt::socket_type(&fd).map(|kind| kind == SocketType::STREAM))?;
        if !is_unix || !is_stream {
            return Err(ListenError::NotAUnixSocket { fd: number });
        }
        let source = if ask(rustix::net::sockopt::socket_acceptconn(&fd))? {
            let listener = UnixListener::from(fd);
            listener.set_nonblocking(true).map_err(failed)?;
            Source::Listening(listener)
        } else if rustix::net::getpeername(&fd) == Err(Errno::NOTCONN) {
            return Err(ListenError::NotConnected { fd: number });
        } else {
            Source::Connected(Some(UnixStream::from(fd)))
        };
        Ok(Self { _file: None, source })
    }

    /// The next connection, if one is there. Never waits.
    pub(crate) fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        match &mut self.source {
            Source::Connected(stream) => Ok(stream.take()),
            Source::Listening(listener) => match listener.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) => match Errno::from_io_error(&error) {
                    // Whoever connected is gone again, or it was a false alarm.
                    Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
                    _ => Err(error),
                },
            },
        }
    }

    /// What becomes readable when there is something to accept. `None`: no connection will come any more.
    pub(crate) fn to_poll(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Listening(listener) => Some(listener.as_fd()),
            Source::Connected(_) => None,
        }
    }
}

/// A socket with a file, on which nobody listens yet.
fn bind(path: &Path, access: SocketAccess) -> Result<OwnedFd, Errno> {
    let socket = new_socket()?;
    if let Some(mode) = access.mode {
        // The file takes over what the socket has (unix_bind_bsd in Linux), so there is no moment in which it has another.
        fchmod(&socket, Mode::from_bits_retain(mode))?;
    }
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Changes the group of the socket file at `path`, and of nothing that others put there meanwhile: links are not followed.
fn give_to_group(path: &Path, group: u32) -> Result<(), Errno> {
    let file = openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
        return Err(Errno::NOTSOCK);
    }
    chownat(&file, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A socket file that this process made, removed when it is dropped, unless somebody has put another one there.
#[derive(Debug)]
struct SocketFile(Arc<Made>);

#[derive(Debug)]
struct Made {
    path: PathBuf,
    identity: (u64, u64),
    is_removed: AtomicBool,
}

/// The socket files of this process, for an end without destructors.
static MADE: Mutex<Vec<Weak<Made>>> = Mutex::new(Vec::new());

/// Removes all socket files of this process, which is about to end.
pub(crate) fn remove_socket_files() {
    let made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    made.iter().filter_map(Weak::upgrade).for_each(|file| file.remove());
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let made = Made { path: path.to_owned(), identity: identity(path)?, is_removed: AtomicBool::new(false) };
        let made = Arc::new(made);
        let mut all = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|file| file.strong_count() > 0);
        all.push(Arc::downgrade(&made));
        Ok(Self(made))
    }

    fn path(&self) -> &Path {
        &self.0.path
    }

    fn is_there(&self) -> bool {
        self.0.is_there()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.0.remove();
    }
}

impl Made {
    fn is_there(&self) -> bool {
        identity(&self.path).is_ok_and(|found| found == self.identity)
    }

    /// Only once: another file that comes there later may have the same inode number.
    fn remove(&self) {
        if !self.is_removed.swap(true, Ordering::AcqRel) && self.is_there() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Removes the socket at `path` if it is one that no process listens on, unless another process makes sockets in that directory at
/// this moment. True: it is gone.
///
/// A [`BoundSocket`] looks like such a one.
///
/// # Errors
///
/// It is in use or is no socket; it cannot be looked at or removed.
pub fn remove_if_stale(path: &Path) -> Result<bool, ListenError> {
    let directory = Directory::of(path);
    let Some(_lock) = directory.lock() else { return Ok(false) };
    remove_stale(path).map(|()| true)
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |what| move |source| ListenError::Path { path: path.to_owned(), what, source };
    let metadata = std::fs::symlink_metadata(path).map_err(failed("looking at what is there"))?;
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match connect_without_waiting(path) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(failed("removing the stale socket")),
        Err(errno) if errno != Errno::AGAIN => Err(failed("asking whether somebody listens there")(errno.into())),
        // A process that was killed listens until its last I/O has ended, and accepts nobody. Its successor must not wait.
        Ok(socket) if is_of_an_ending_process(&socket) => {
            std::fs::remove_file(path).map_err(failed("removing the socket of a process that is ending"))
        }
        // Accepted, or waiting in somebody's queue.
        _ => Err(ListenError::InUse { path: path.to_owned() }),
    }
}

/// Whether the process that listens has been killed, and only its end has not come yet.
fn is_of_an_ending_process(connected: &OwnedFd) -> bool {
    pid_of_peer(connected)
        .and_then(|pid| u32::try_from(pid).ok())
        .is_some_and(|pid| Process::with_pid(pid).name().is_ending)
}

fn connect_without_waiting(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = new_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
