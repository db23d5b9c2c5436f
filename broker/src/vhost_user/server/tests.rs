use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::super::fake::{Call, Calls, FakeDevice};
use super::super::message::Header;
use super::super::session::RequestError;
use super::*;
use crate::log_limit::LogLimits;

const GET_FEATURES: u32 = 1;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_BACKEND_REQ_FD: u32 = 21;
const BACKEND_REQ_AND_CONFIG: u64 = 1 << 5 | 1 << 9;

/// A server in a thread.
struct Rig {
    _directory: tempfile::TempDir,
    path: PathBuf,
    handle: ServerHandle,
    calls: Calls,
    thread: JoinHandle<Result<(), ServerError>>,
}

impl Rig {
    fn start() -> Self {
        Self::with_patience(PATIENCE)
    }

    /// A server that waits this long for a front-end that left something undone.
    fn with_patience(patience: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut server = Server::bind(&path).unwrap();
        server.waiting.patience = patience;
        let handle = server.handle();
        let mut device = FakeDevice::default();
        let calls = device.calls.clone();
        let thread = thread::spawn(move || server.run(&mut device));
        Self { _directory: directory, path, handle, calls, thread }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Ends the server and returns the calls to the device.
    fn stop(self) -> Vec<Call> {
        self.handle.stop();
        self.thread.join().unwrap().unwrap();
        assert!(!self.path.exists(), "the socket is removed");
        self.calls.take()
    }
}

fn message(request: u32, body: &[u8]) -> Vec<u8> {
    [[request, 1, body.len() as u32].map(u32::to_ne_bytes).as_flattened(), body].concat()
}

/// Waits until the server has handled all earlier messages.
fn synchronise(stream: &mut UnixStream) {
    stream.write_all(&message(GET_FEATURES, &[])).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..12], *[GET_FEATURES, 5, 8].map(u32::to_ne_bytes).as_flattened());
}

fn expect_end(stream: &mut UnixStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        // The server closed the connection with something unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        other => panic!("the server closes the connection: {other:?}"),
    }
}

#[test]
fn one_front_end_is_served_after_another() {
    let rig = Rig::start();
    let mut first = rig.connect();
    synchronise(&mut first);
    // The second front-end is connected and waits; the server serves it when the first is gone.
    let mut second = rig.connect();
    second.write_all(&message(GET_FEATURES, &[])).unwrap();
    synchronise(&mut first);
    drop(first);
    let mut reply = [0; 20];
    second.read_exact(&mut reply).unwrap();
    let begun = || [Call::RefreshCapacity, Call::SetDirtyLog(false)];
    let expected = [&begun()[..], &[Call::Abandon, Call::SetMemory(vec![])], &begun()].concat();
    assert_eq!(rig.calls.take(), expected, "the session of the first ends before the second begins");
    drop(second);
    rig.stop();
}

#[test]
fn a_silent_front_end_blocks_no_other_and_is_served_when_it_speaks() {
    let rig = Rig::start();
    let mut silent: Vec<_> = (0..3).map(|_| rig.connect()).collect();
    let mut second = rig.connect();
    synchronise(&mut second);
    drop(second);
    synchronise(&mut silent[1]);
    rig.stop();
}

#[test]
fn many_silent_front_ends_block_no_other() {
    let rig = Rig::start();
    let silent: Vec<_> = (0..100).map(|_| rig.connect()).collect();
    synchronise(&mut rig.connect());
    drop(silent);
    synchronise(&mut rig.connect());
    rig.stop();
}

#[test]
fn a_front_end_stuck_in_a_message_is_disconnected_after_another_has_waited() {
    let rig = Rig::with_patience(Duration::from_millis(50));
    let mut first = rig.connect();
    synchronise(&mut first);
    first.write_all(&message(GET_FEATURES, &[])[..5]).unwrap();
    // No other front-end waits: a silent one does not count.
    let _silent = rig.connect();
    thread::sleep(Duration::from_millis(150));
    first.write_all(&message(GET_FEATURES, &[])[5..]).unwrap();
    first.read_exact(&mut [0; 20]).unwrap();

    first.write_all(&message(GET_FEATURES, &[])[..8]).unwrap();
    synchronise(&mut rig.connect());
    expect_end(&mut first);
    rig.stop();
}

#[test]
fn many_silent_front_ends_do_not_hide_one_that_waits_for_a_stuck_one() {
    let rig = Rig::with_patience(Duration::from_millis(50));
    let mut stuck = rig.connect();
    synchronise(&mut stuck);
    stuck.write_all(&message(GET_FEATURES, &[])[..5]).unwrap();
    let _silent: Vec<_> = (0..40).map(|_| rig.connect()).collect();
    let mut speaking = rig.connect();
    speaking.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    synchronise(&mut speaking);
    expect_end(&mut stuck);
    rig.stop();
}

#[test]
fn a_front_end_that_has_spoken_keeps_its_place_among_many() {
    let rig = Rig::start();
    let mut served = rig.connect();
    synchronise(&mut served);
    let mut waiting = rig.connect();
    waiting.write_all(&message(GET_FEATURES, &[])).unwrap();
    synchronise(&mut served);
    let _silent: Vec<_> = (0..40).map(|_| rig.connect()).collect();
    synchronise(&mut served);
    drop(served);
    waiting.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    waiting.read_exact(&mut [0; 20]).unwrap();
    rig.stop();
}

#[test]
fn a_front_end_that_reads_no_replies_is_disconnected_after_another_has_waited() {
    let rig = Rig::with_patience(Duration::from_millis(50));
    let mut first = rig.connect();
    first.set_nonblocking(true).unwrap();
    // Until the server cannot write and so reads no more.
    let mut failures = 0;
    while failures < 20 {
        match first.write_all(&message(GET_FEATURES, &[])) {
            Ok(()) => failures = 0,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                failures += 1;
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    synchronise(&mut rig.connect());
    rig.stop();
}

/// The guest of a silent front-end still has the disk.
#[test]
fn a_front_end_between_messages_is_never_disconnected() {
    let rig = Rig::with_patience(Duration::from_millis(1));
    let mut first = rig.connect();
    synchronise(&mut first);
    let mut second = rig.connect();
    second.write_all(&message(GET_FEATURES, &[])).unwrap();
    second.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    synchronise(&mut first);
    rig.stop();
}

#[test]
fn after_a_protocol_violation_the_next_front_end_is_served() {
    let rig = Rig::start();
    for wrong in [message(1000, &[]), message(8, &[0; 3]), vec![0; 12]] {
        let mut stream = rig.connect();
        stream.write_all(&wrong).unwrap();
        expect_end(&mut stream);
        synchronise(&mut rig.connect());
    }
    rig.stop();
}

/// The line about a changed device is the only explanation when a guest has lost its disk.
#[test]
fn a_flood_of_connections_hides_no_error_of_another_kind() {
    let log = LogLimits::new();
    let session = |source| ServeError::from(SessionError { request: SET_PROTOCOL_FEATURES, source });
    let (flags, version) = ([9, 5, 0].map(u32::to_ne_bytes), [9, 0, 0].map(u32::to_ne_bytes));
    let header = |bytes: [[u8; 4]; 3]| {
        let bytes = bytes.as_flattened().try_into().unwrap();
        ServeError::from(ConnectionError::from(Header::parse(bytes).unwrap_err()))
    };
    let flood = [
        LogCause::new("connected"),
        LogCause::new("disconnected"),
        ServeError::from(ConnectionError::FdsLost).cause(),
        header(flags).cause(),
        header(version).cause(),
        session(RequestError::NotNegotiated { feature: "CONFIG" }).cause(),
    ];
    for cause in flood {
        assert_eq!(log.count(cause), Some(1), "each has its own limit");
        (0..1000).for_each(|_| assert_eq!(log.count(cause), None));
    }
    let changed = session(RequestError::DeviceChanged("another device".into()));
    assert_eq!(log.count(changed.cause()), Some(1));
    // Values of a message are no part of a cause.
    let truncated = |got_bytes| ServeError::from(ConnectionError::Truncated { got_bytes }).cause();
    assert_eq!(truncated(1), truncated(2));
}

#[test]
fn the_server_ends_while_it_waits_for_a_front_end() {
    let calls = Rig::start().stop();
    assert_eq!(calls, [Call::Reset], "the server waits for the I/O");
}

#[test]
fn a_server_that_waits_for_its_last_io_leaves_its_socket_to_a_successor() {
    let rig = Rig::start();
    let mut served = rig.connect();
    synchronise(&mut served);
    let mut waiting = rig.connect();
    let last_io = rig.calls.last_io.clone();
    let io_under_way = last_io.lock().unwrap();
    rig.handle.stop();
    while !rig.calls.take().contains(&Call::Reset) {
        thread::yield_now();
    }
    let successor = Server::bind(&rig.path).expect("the path is free");
    expect_end(&mut served);
    expect_end(&mut waiting);
    let handle = successor.handle();
    let thread = thread::spawn(move || successor.run(&mut FakeDevice::default()));
    synchronise(&mut rig.connect());

    drop(io_under_way);
    rig.thread.join().unwrap().unwrap();
    synchronise(&mut UnixStream::connect(&rig.path).expect("the socket file of the successor stays"));
    handle.stop();
    thread.join().unwrap().unwrap();
    assert!(!rig.path.exists());
}

#[test]
fn the_server_ends_in_the_middle_of_a_message() {
    let rig = Rig::start();
    let mut stream = rig.connect();
    synchronise(&mut stream);
    stream.write_all(&message(GET_FEATURES, &[])[..5]).unwrap();
    let calls = rig.stop();
    let expected =
        [Call::RefreshCapacity, Call::SetDirtyLog(false), Call::Abandon, Call::SetMemory(vec![]), Call::Reset];
    assert_eq!(calls, expected);
    expect_end(&mut stream);
}

#[test]
fn an_inherited_connection_is_the_only_front_end() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = Server::from_inherited_fd(ours.as_raw_fd()).unwrap();
    let thread = thread::spawn(move || server.run(&mut FakeDevice::default()));
    synchronise(&mut theirs);
    drop(theirs);
    thread.join().unwrap().unwrap();
    drop(ours);
}

#[test]
fn the_front_end_learns_of_a_changed_capacity() {
    let rig = Rig::start();
    let mut stream = rig.connect();
    let (channel, mut received) = UnixStream::pair().unwrap();
    stream.write_all(&message(SET_PROTOCOL_FEATURES, &BACKEND_REQ_AND_CONFIG.to_ne_bytes())).unwrap();
    let fds: [BorrowedFd<'_>; 1] = [channel.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = message(SET_BACKEND_REQ_FD, &[]);
    rustix::net::sendmsg(&stream, &[io::IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
    drop(channel);
    synchronise(&mut stream);

    rig.calls.is_resized.store(true, Ordering::Relaxed);
    rig.handle.refresh_capacity();
    let mut told = [0; 12];
    received.read_exact(&mut told).unwrap();
    assert_eq!(told, *[2_u32, 1, 0].map(u32::to_ne_bytes).as_flattened());

    // The second time the capacity is the same: the server tells nothing, and the channel ends with the server.
    rig.handle.refresh_capacity();
    synchronise(&mut stream);
    rig.stop();
    assert_eq!(received.read(&mut told).unwrap(), 0);
}

#[test]
fn a_change_of_the_capacity_is_noticed_without_a_front_end() {
    let rig = Rig::start();
    rig.handle.refresh_capacity();
    while !rig.calls.take().contains(&Call::RefreshCapacity) {
        thread::yield_now();
    }
    rig.stop();
}

#[test]
fn the_size_of_the_disk_is_read_again_for_each_front_end() {
    let rig = Rig::start();
    for _ in 0..2 {
        let mut stream = rig.connect();
        synchronise(&mut stream);
        assert_eq!(rig.calls.take()[0], Call::RefreshCapacity);
        drop(stream);
        // The end of the session is also recorded.
        while !rig.calls.take().contains(&Call::SetMemory(vec![])) {
            thread::yield_now();
        }
    }
    rig.stop();
}
