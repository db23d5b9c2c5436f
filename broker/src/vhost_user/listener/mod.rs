//! The source of front-ends: a socket file of this process, or a socket that another process passed to it.

mod directory;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, accessat, chownat, fchmod, fstat, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use self::directory::Directory;
use super::connection::pid_of_peer;
use crate::processes::Process;
use crate::socket_file::SocketFile;

/// Why the server cannot wait for front-ends.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another process serves this socket.
    #[error("{}: another process listens there; stop it, or give another path", .path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// A file that is not a socket, which the server must not remove.
    #[error("{}: a file that is not a socket is in the way; remove it, or give another path", .path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The path is longer than the kernel allows (`sun_path` in unix(7)).
    #[error("{}: a socket's path has at most {PATH_BYTES_MAX} bytes, this one has {}; give a shorter one", .path.display(), .path.as_os_str().len())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// A system call on the path failed.
    #[error("{}: {what} failed: {source}{}", .path.display(), path_hint(.source))]
    Path {
        /// The path.
        path: PathBuf,
        /// What the server was doing.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The socket file disappeared between its creation and the start of listening.
    #[error("{}: another process has removed or replaced this socket; give each server a path of its own", .path.display())]
    Replaced {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot get the requested group.
    #[error("{}: giving the socket to group {group}: {source}; only root and members of a group can", .path.display())]
    Group {
        /// The socket.
        path: PathBuf,
        /// Number of the group.
        group: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The descriptor is not a Unix stream socket.
    #[error("file descriptor {fd} is not a Unix stream socket; pass a listening or a connected one")]
    NotAUnixSocket {
        /// Number of the descriptor.
        fd: RawFd,
    },
    /// The socket neither listens nor is connected.
    #[error("file descriptor {fd} is a Unix stream socket that neither listens nor is connected; pass one that does")]
    NotConnected {
        /// Number of the descriptor.
        fd: RawFd,
    },
    /// A system call on the descriptor failed.
    #[error("file descriptor {fd}: {source}{}", fd_hint(.source))]
    Fd {
        /// Number of the descriptor.
        fd: RawFd,
        /// The kernel's error.
        source: io::Error,
    },
}

fn path_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => ". Make its directory first",
        Some(Errno::NOTDIR) => ". A part of the path is not a directory",
        Some(Errno::ACCESS | Errno::PERM) => {
            ". The user of this process must be allowed to write to the directory, also without the privileges that a \
             server gives up (--sandbox): run it as the directory's owner, or pass an open socket with --fd"
        }
        Some(Errno::ROFS) => ". Choose a writable place, such as /run",
        _ => "",
    }
}

fn fd_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::BADF) => ". The process that starts this one must leave the socket open under that number",
        _ => "",
    }
}

/// `sun_path` without its terminating NUL byte.
const PATH_BYTES_MAX: usize = 107;
/// How many connections may wait to be accepted.
const BACKLOG: i32 = 128;

/// Who may connect to a socket file: users who may write to it (unix(7)) and search the directories above it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SocketAccess {
    /// The file's mode, from which the umask takes its bits. None: the umask alone decides.
    pub mode: Option<u32>,
    /// Number of the file's group. None: the group that every new file in that directory gets.
    pub group: Option<u32>,
}

impl SocketAccess {
    /// Only the owner of the file.
    pub const OWNER: Self = Self { mode: Some(0o600), group: None };

    /// Sets [`mode`](Self#structfield.mode).
    #[must_use]
    pub fn mode(self, mode: impl Into<Option<u32>>) -> Self {
        Self { mode: mode.into(), ..self }
    }

    /// Sets [`group`](Self#structfield.group).
    #[must_use]
    pub fn group(self, group: impl Into<Option<u32>>) -> Self {
        Self { group: group.into(), ..self }
    }
}

/// A source of connections.
#[derive(Debug)]
pub(crate) struct Listener {
    /// The socket file, if this process made it. It is dropped, and so removed, before this process stops listening:
    /// until then no other process takes its place.
    _file: Option<SocketFile>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Listening(UnixListener),
    /// One connection, which existed before.
    Connected(Option<UnixStream>),
}

/// A socket file on which no process listens yet. Dropping it removes the file.
#[derive(Debug)]
pub struct BoundSocket {
    file: SocketFile,
    socket: OwnedFd,
    directory: Directory,
}

impl BoundSocket {
    /// Makes the socket file. Replaces a stale socket, on which no process listens any more.
    ///
    /// # Errors
    ///
    /// Another process listens there, another kind of file is there, the path is unusable, or the socket cannot get the
    /// group.
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

    /// Takes connections from now on. Before this call no front-end could connect.
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
    /// Listens on a path. Replaces a stale socket, on which no process listens any more.
    pub(crate) fn bind(path: &Path, access: SocketAccess) -> Result<Self, ListenError> {
        let directory = Directory::of(path);
        // Between `bind` and `listen` the socket looks stale.
        let _lock = directory.lock();
        let (file, socket) = BoundSocket::make(path, access)?;
        listen(file, socket)
    }

    /// Whether the server can make a socket at the path, as far as it can find out without making one. A socket on
    /// which another process listens is no obstacle: that process may have ended when the server makes its socket.
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
        // kernel says so. The owner of the first descriptor keeps it.
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
                    // The client has gone already, or it was a false alarm.
                    Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
                    _ => Err(error),
                },
            },
        }
    }

    /// The descriptor that becomes readable when there is a connection to accept. `None`: no connection will come any
    /// more.
    pub(crate) fn to_poll(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Listening(listener) => Some(listener.as_fd()),
            Source::Connected(_) => None,
        }
    }
}

/// A socket with a file, on which no process listens yet.
fn bind(path: &Path, access: SocketAccess) -> Result<OwnedFd, Errno> {
    let socket = new_socket()?;
    if let Some(mode) = access.mode {
        // The file gets the mode of the socket (unix_bind_bsd in Linux), so it never has another mode.
        fchmod(&socket, Mode::from_bits_retain(mode))?;
    }
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Changes the group of the socket file at `path`. Does not touch other files that another process put there meanwhile,
/// and does not follow links.
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

/// Removes the socket at `path` if no process listens on it. True: the socket is gone. False: another process is making
/// sockets in that directory at this moment, and the socket stays.
///
/// A [`BoundSocket`] also looks stale.
///
/// # Errors
///
/// The socket is in use, the file is not a socket, or the file cannot be examined or removed.
pub fn remove_if_stale(path: &Path) -> Result<bool, ListenError> {
    let directory = Directory::of(path);
    let Some(_lock) = directory.lock() else { return Ok(false) };
    remove_stale(path).map(|()| true)
}

/// Removes a socket on which no process listens.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |what| move |source| ListenError::Path { path: path.to_owned(), what, source };
    let metadata = std::fs::symlink_metadata(path).map_err(failed("looking at the file there"))?;
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match connect_without_waiting(path) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(failed("removing the stale socket")),
        Err(errno) if errno != Errno::AGAIN => Err(failed("asking whether a process listens there")(errno.into())),
        // A killed process listens until its last I/O has ended, but accepts no connection. Its successor must not
        // wait.
        Ok(socket) if is_of_an_ending_process(&socket) => {
            std::fs::remove_file(path).map_err(failed("removing the socket of a process that is ending"))
        }
        // The listener accepted the connection, or its queue is full.
        _ => Err(ListenError::InUse { path: path.to_owned() }),
    }
}

/// Whether the listening process has been killed and only its end is outstanding.
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
