//! The socket on which a device answers requests.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use thiserror::Error;

use super::StatusSource;
use super::clients::{Answer, CLIENTS_MAX, Clients};
use super::mode_change::{ModeChanges, OperatorSetting};
use crate::threads::leave_signals_to_others;
use crate::vhost_user::listener::{ListenError, Listener, SocketAccess};

/// How long to wait after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(200);

/// Why the control socket cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A system call failed.
    #[error("{}: {what} failed: {source}", .path.display())]
    System {
        /// The path of the socket.
        path: PathBuf,
        /// The step that failed.
        what: &'static str,
        /// The error that the kernel returned.
        source: io::Error,
    },
}

/// A socket that is bound but not served yet. Removed when dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: Listener,
    path: PathBuf,
}

/// Answers requests on a thread of its own, until it is dropped.
#[derive(Debug)]
pub struct ControlServer {
    /// Wakes the thread.
    wake: Arc<OwnedFd>,
    is_stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The requests.
#[derive(Debug, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Show,
    Stats,
    /// Changes the operator's mode.
    SetMode(OperatorSetting),
}

impl ControlSocket {
    /// Listens at `path`, for the owner only. Replaces a socket on which no process listens any more.
    ///
    /// # Errors
    ///
    /// Another process listens there, or the path cannot be used.
    pub fn bind(path: &Path) -> Result<Self, ControlError> {
        Self::bind_with(path, SocketAccess::OWNER)
    }

    /// The same, for the users that `access` admits.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind); the socket cannot be given to the group.
    pub fn bind_with(path: &Path, access: SocketAccess) -> Result<Self, ControlError> {
        Ok(Self { listener: Listener::bind(path, access)?, path: path.to_owned() })
    }

    /// Whether [`bind`](Self::bind) can make a socket there, as far as this can be known without making it.
    ///
    /// # Errors
    ///
    /// As [`Server::check_path`](crate::vhost_user::Server::check_path).
    pub fn check_path(path: &Path) -> Result<(), ControlError> {
        Ok(Listener::check(path)?)
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Starts to answer requests.
    ///
    /// # Errors
    ///
    /// The thread cannot be started, or there is no descriptor for it.
    pub fn serve(self, source: Arc<dyn StatusSource>) -> Result<ControlServer, ControlError> {
        let Self { mut listener, path } = self;
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = rustix::event::eventfd(0, flags).map_err(failed(&path, "making an eventfd"))?;
        let (wake, is_stopping) = (Arc::new(wake), Arc::new(AtomicBool::new(false)));
        let (theirs, must_stop) = (wake.clone(), is_stopping.clone());
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                leave_signals_to_others();
                let mut clients = Clients::default();
                let changes = ModeChanges::new(source.clone(), theirs.clone());
                while !must_stop.load(Ordering::Acquire) {
                    serve_once(&mut listener, &mut clients, &theirs, &|line, client| {
                        reply(line, client, &*source, &changes)
                    });
                }
            })
            .map_err(failed(&path, "starting the thread that answers"))?;
        Ok(ControlServer { wake, is_stopping, thread: Some(thread) })
    }
}

fn failed<E: Into<io::Error>>(path: &Path, what: &'static str) -> impl FnOnce(E) -> ControlError {
    let path = path.to_owned();
    move |source| ControlError::System { path, what, source: source.into() }
}

/// Accepts waiting clients, advances all clients, and waits for the next event.
fn serve_once(
    listener: &mut Listener,
    clients: &mut Clients,
    wake: &OwnedFd,
    reply: &dyn Fn(&[u8], &UnixStream) -> Answer,
) {
    // Before the clients: what is written from now on wakes the thread again.
    let _ = rustix::io::read(wake, &mut [0; 8]);
    let is_paused = match take_clients(listener, clients) {
        Ok(()) => false,
        // A lack of descriptors is temporary.
        Err(error) => {
            tracing::debug!(%error, "cannot accept a control client, trying again");
            true
        }
    };
    clients.advance(reply);
    // While no client can be accepted, the socket stays readable, so it is not polled.
    let socket = listener.to_poll().filter(|_| !is_paused);
    let awaited = [Some(wake.as_fd()), socket].into_iter().flatten().map(|fd| (fd, PollFlags::IN));
    let mut fds: Vec<PollFd<'_>> =
        awaited.chain(clients.to_poll()).map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
    let end = clients.next_end().map(|end| end.saturating_duration_since(Instant::now()));
    let limit = [end, is_paused.then_some(PAUSE)].into_iter().flatten().min();
    let limit = limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
    let _ = poll(&mut fds, limit.as_ref());
}

/// Accepts at most [`CLIENTS_MAX`] clients: each of them is advanced before a later client can replace it, and a flood
/// of clients does not keep the thread from stopping.
fn take_clients(listener: &mut Listener, clients: &mut Clients) -> io::Result<()> {
    for _ in 0..CLIENTS_MAX {
        let Some(stream) = listener.accept()? else { return Ok(()) };
        clients.add(stream)?;
    }
    Ok(())
}

/// The answer to a line.
fn reply(line: &[u8], client: &UnixStream, source: &dyn StatusSource, changes: &ModeChanges) -> Answer {
    let json = match serde_json::from_slice(line) {
        Ok(Request::Show) => serde_json::to_value(source.status()),
        Ok(Request::Stats) => serde_json::to_value(source.stats()),
        Ok(Request::SetMode(setting)) => return changes.begin(setting, client),
        Err(error) => {
            let error = format!(
                "not understood: {error}; send one line: {{\"request\":\"show\"}}, {{\"request\":\"stats\"}} or \
                 {{\"request\":\"set-mode\",\"mode\":\"virtqueue\",\"timeout_ms\":10000}}"
            );
            Ok(serde_json::json!({ "error": error }))
        }
    };
    Answer::Now(json.unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() })).to_string())
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.is_stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // The thread does not panic; if it did, nothing would be left to do.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::mem::MaybeUninit;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use rustix::fs::inotify;

    use super::*;
    use crate::control::{DeviceStats, DeviceStatus, DiskStatus, RingsOffer, SettableMode};

    struct Fixed;

    impl StatusSource for Fixed {
        fn status(&self) -> DeviceStatus {
            let disk = DiskStatus {
                path: "disk.img".into(),
                size_bytes: 4096,
                logical_block_bytes: 512,
                read_only: false,
                direct_io: true,
            };
            let rings = RingsOffer {
                offered: false,
                why_not: vec![],
                closed: None,
                limits: None,
                ended_for_cost: 0,
                wants: String::new(),
            };
            let (name, mode, version) = ("vm1".into(), "auto".into(), "0".into());
            DeviceStatus { name, pid: 1, version, disk, mode, rings, queues: vec![] }
        }

        fn stats(&self) -> DeviceStats {
            DeviceStats { name: "vm1".into(), started_ms: None, age_ms: None, queues: vec![] }
        }

        fn set_mode(&self, mode: SettableMode, timeout: Duration) -> Result<(), String> {
            match mode {
                SettableMode::Auto => Ok(()),
                SettableMode::Virtqueue => Err(format!("not within {timeout:?}")),
            }
        }
    }

    fn served() -> (tempfile::TempDir, PathBuf, ControlServer) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.control");
        let server = ControlSocket::bind(&path).unwrap().serve(Arc::new(Fixed)).unwrap();
        (directory, path, server)
    }

    fn ask(path: &Path, bytes: &[u8]) -> serde_json::Value {
        let stream = UnixStream::connect(path).unwrap();
        (&stream).write_all(bytes).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn a_request_is_answered_and_an_unknown_line_gets_the_list_of_requests() {
        let (_directory, path, _server) = served();
        assert_eq!(ask(&path, b"{\"request\":\"show\"}\n")["disk"]["size_bytes"], 4096);
        assert_eq!(ask(&path, b"{\"request\":\"stats\"}\n")["name"], "vm1");
        for line in [&b"{\"request\":\"stop\"}\n"[..], b"\n", b"garbage\n", &[b'x'; 8192]] {
            let error = ask(&path, line)["error"].as_str().unwrap().to_owned();
            assert!(error.contains(r#"{"request":"show"}"#), "{error}");
        }
    }

    #[test]
    fn the_operator_sets_the_mode_and_gets_the_reason_if_it_stays() {
        let (_directory, path, _server) = served();
        let set = |mode: &str| {
            ask(&path, format!("{{\"request\":\"set-mode\",\"mode\":\"{mode}\",\"timeout_ms\":7}}\n").as_bytes())
        };
        assert_eq!(set("auto")["mode"], "auto");
        assert_eq!(set("virtqueue")["error"], "not within 7ms");
        for bad in ["direct", ""] {
            let error = set(bad)["error"].as_str().unwrap().to_owned();
            assert!(error.contains("not understood") && error.contains("set-mode"), "{error}");
        }
    }

    #[test]
    fn clients_that_hang_delay_no_other() {
        let (_directory, path, server) = served();
        // More clients than the server keeps at a time.
        let hanging: Vec<UnixStream> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
        for stream in &hanging {
            (&*stream).write_all(b"{\"requ").unwrap_or_default();
        }
        assert_eq!(ask(&path, b"{\"request\":\"stats\"}\n")["name"], "vm1");
        drop(server);
        assert!(!path.exists(), "the socket is removed");
    }

    #[test]
    fn many_clients_at_once_are_all_answered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.control");
        let socket = ControlSocket::bind(&path).unwrap();
        let clients: Vec<UnixStream> = (0..60).map(|_| UnixStream::connect(&path).unwrap()).collect();
        for mut client in &clients {
            client.write_all(b"{\"request\":\"stats\"}\n").unwrap();
        }
        let _server = socket.serve(Arc::new(Fixed)).unwrap();
        for client in clients {
            assert!(std::io::read_to_string(client).unwrap().contains("vm1"));
        }
    }

    #[test]
    fn the_socket_never_admits_others_even_for_a_moment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.sock");
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&watch, directory.path(), inotify::WatchFlags::CREATE | inotify::WatchFlags::ATTRIB)
            .unwrap();
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(socket.path()).unwrap().permissions().mode() & 0o777, 0o600);
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(watch, &mut buffer);
        assert_eq!(events.next().unwrap().events(), inotify::ReadFlags::CREATE);
        assert!(events.next().is_err(), "it had another mode at first");
    }

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_socket_is_replaced() {
        let (_directory, path, server) = served();
        let error = ControlSocket::bind(&path).unwrap_err().to_string();
        assert!(error.contains("another process listens there"), "{error}");
        drop(server);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        ControlSocket::bind(&path).unwrap();
    }
}
