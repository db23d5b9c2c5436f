use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::inotify;

use super::*;

fn socket_path() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vhost-user.sock");
    (directory, path)
}

#[test]
fn a_socket_is_removed_with_its_listener() {
    let (_directory, path) = socket_path();
    let mut listener = Listener::bind(&path, SocketAccess::default()).unwrap();
    assert!(listener.accept().unwrap().is_none());
    let _client = UnixStream::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_socket_of_another_process_is_not_removed() {
    let (_directory, path) = socket_path();
    let listener = Listener::bind(&path, SocketAccess::default()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
fn a_stale_socket_is_replaced() {
    let (_directory, path) = socket_path();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves it");
    let mut listener = Listener::bind(&path, SocketAccess::default()).unwrap();
    let _client = UnixStream::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
}

#[test]
fn a_socket_in_use_is_refused_even_if_its_queue_is_full() {
    let (_directory, path) = socket_path();
    let listener = Listener::bind(&path, SocketAccess::default()).unwrap();
    let refused = |path: &Path| Listener::bind(path, SocketAccess::default()).map(|_| ()).unwrap_err().to_string();
    let expected = format!("{}: another process listens there; stop it, or give another path", path.display());
    assert_eq!(refused(&path), expected);
    let mut waiting = Vec::new();
    while let Ok(client) = connect_without_waiting(&path) {
        waiting.push(client);
    }
    assert_eq!(refused(&path), expected);
    drop(listener);
}

#[test]
fn a_file_that_is_not_a_socket_stays() {
    let (_directory, path) = socket_path();
    std::fs::write(&path, "precious").unwrap();
    let error = Listener::bind(&path, SocketAccess::default()).unwrap_err().to_string();
    assert!(error.ends_with("a file that is not a socket is in the way; remove it, or give another path"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn an_unusable_path_is_refused_with_its_name() {
    let error =
        Listener::bind(Path::new("/proc/no-such-directory/socket"), SocketAccess::default()).unwrap_err().to_string();
    assert!(error.starts_with("/proc/no-such-directory/socket: making a socket there failed: "), "{error}");
    let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
    let error = Listener::bind(&long, SocketAccess::default()).unwrap_err().to_string();
    assert!(error.contains("at most 107 bytes, this one has 205"), "{error}");
}

#[test]
fn an_inherited_socket_may_listen_or_be_connected() {
    let (_directory, path) = socket_path();
    let passed = UnixListener::bind(&path).unwrap();
    let mut listener = Listener::inherited(passed.as_raw_fd()).unwrap();
    assert!(listener.to_poll().is_some());
    let _client = UnixStream::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
    drop(listener);
    assert!(path.exists(), "this process did not make the socket");

    let (passed, _other) = UnixStream::pair().unwrap();
    let mut connected = Listener::inherited(passed.as_raw_fd()).unwrap();
    assert!(connected.accept().unwrap().is_some());
    assert!(connected.accept().unwrap().is_none() && connected.to_poll().is_none(), "there is only one");
}

#[test]
fn an_inherited_descriptor_of_another_kind_is_refused() {
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for fd in [pipe.as_raw_fd(), datagram.as_raw_fd(), tcp.as_raw_fd()] {
        let error = Listener::inherited(fd).unwrap_err().to_string();
        let expected = format!("file descriptor {fd} is not a Unix stream socket; pass a listening or a connected one");
        assert_eq!(error, expected);
    }
    let error = Listener::inherited(1_000_000).unwrap_err().to_string();
    let expected = "file descriptor 1000000: Bad file descriptor (os error 9). The process that starts this one must \
                    leave the socket open under that number";
    assert_eq!(error, expected);
}

#[test]
fn a_socket_has_the_requested_mode_from_the_beginning() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, directory.path(), inotify::WatchFlags::CREATE | inotify::WatchFlags::ATTRIB).unwrap();
    // Bits that every umask leaves.
    let _listener = Listener::bind(&path, SocketAccess { mode: Some(0o400), group: None }).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o400);
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    assert_eq!(events.next().unwrap().events(), inotify::ReadFlags::CREATE);
    assert!(events.next().is_err(), "the socket had another mode at first");
}

#[test]
fn a_forbidden_group_is_named_and_no_socket_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let own = rustix::process::getegid().as_raw();
    let listener = Listener::bind(&path, SocketAccess { mode: None, group: Some(own) }).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().gid(), own);
    drop(listener);

    let other = 0x7fff_fff0;
    let refused = crate::privileges::without_privileges(|| {
        Listener::bind(&path, SocketAccess { mode: None, group: Some(other) }).map(drop)
    });
    let error = refused.unwrap().unwrap_err().to_string();
    assert!(error.contains(&format!("socket: giving the socket to group {other}: ")), "{error}");
    assert!(error.contains("only root and members of a group can"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_bound_socket_refuses_connections_until_it_listens() {
    let (_directory, path) = socket_path();
    let bound = BoundSocket::bind(&path, SocketAccess::default()).unwrap();
    assert_eq!(connect_without_waiting(&path).unwrap_err(), Errno::CONNREFUSED);
    let listener = bound.listen().unwrap();
    connect_without_waiting(&path).unwrap();
    drop(listener);

    let first = BoundSocket::bind(&path, SocketAccess::default()).unwrap();
    let second = BoundSocket::bind(&path, SocketAccess::default()).unwrap();
    let error = first.listen().unwrap_err().to_string();
    assert!(error.contains("another process has removed or replaced this socket"), "{error}");
    let _second = second.listen().unwrap();
    assert!(path.exists(), "the socket of the second stays");
}

#[test]
fn only_one_of_many_processes_replaces_a_stale_socket() {
    let (_directory, path) = socket_path();
    for _ in 0..50 {
        drop(UnixListener::bind(&path).unwrap());
        let barrier = std::sync::Barrier::new(8);
        let work = |is_list: bool| {
            barrier.wait();
            if is_list {
                // As `ringpass dev list` does.
                let _ = remove_if_stale(&path);
                return None;
            }
            Some(Listener::bind(&path, SocketAccess::default()))
        };
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..8).map(|index| scope.spawn(move || work(index % 4 == 3))).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        let mut served: Vec<Listener> = outcomes.into_iter().flatten().collect();
        assert_eq!(served.len(), 1, "the others learn that it is in use");
        let _client = UnixStream::connect(&path).unwrap();
        assert!(served[0].accept().unwrap().is_some(), "the path leads to the listener");
        drop(served);
        assert!(!path.exists());
    }
}

#[test]
fn a_server_starts_although_another_process_keeps_the_directory_lock() {
    let (directory, path) = socket_path();
    drop(UnixListener::bind(&path).unwrap());
    let other = std::fs::File::open(directory.path()).unwrap();
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert!(!remove_if_stale(&path).unwrap(), "the holder of the lock decides about the socket");
    assert!(path.exists());
    Listener::bind(&path, SocketAccess::default()).unwrap();
}

#[test]
fn an_unusable_path_is_found_without_making_a_socket() {
    let (directory, path) = socket_path();
    Listener::check(&path).unwrap();
    assert!(!path.exists());
    let refusal = |path: &Path| Listener::check(path).unwrap_err().to_string();
    std::fs::write(directory.path().join("file"), "x").unwrap();
    for (name, expected) in [
        ("none/s", "No such file or directory (os error 2). Make its directory first"),
        ("file/s", "Not a directory"),
        ("file", "a file that is not a socket is in the way"),
        (&"x".repeat(108), "a socket's path has at most 107 bytes"),
    ] {
        let text = refusal(&directory.path().join(name));
        assert!(text.contains(expected), "{text}");
    }
    assert!(refusal(Path::new("/")).contains("is in the way"));
    // A process that still listens may have ended when the socket is made; a stale socket is replaced.
    let listener = Listener::bind(&path, SocketAccess::default()).unwrap();
    Listener::check(&path).unwrap();
    drop(listener);
    drop(UnixListener::bind(&path).unwrap());
    Listener::check(&path).unwrap();
}

#[test]
fn a_socket_that_neither_listens_nor_is_connected_is_refused() {
    let socket = new_socket().unwrap();
    let error = Listener::inherited(socket.as_raw_fd()).unwrap_err().to_string();
    assert!(error.contains("neither listens nor is connected"), "{error}");
}
