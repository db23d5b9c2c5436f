use std::io::{Read, Write};
use std::thread;

use rustix::event::EventfdFlags;
use rustix::pipe::{PipeFlags, pipe_with};

use super::*;

const SET_VRING_NUM: u32 = 8;

/// Our end, the front-end's end, and an eventfd that wakes ours.
fn pair() -> (Connection, UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    (Connection::new(ours), theirs, wake)
}

fn bytes(request: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, 1, body.len() as u32].map(u32::to_ne_bytes);
    [header.as_flattened(), body].concat()
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

fn expect_message(connection: &mut Connection, wake: &OwnedFd) -> Message {
    match connection.receive(wake.as_fd()).unwrap() {
        Received::Message(message) => message,
        other => panic!("{other:?} instead of a message"),
    }
}

#[test]
fn a_message_that_comes_byte_by_byte_is_whole() {
    let (mut connection, mut theirs, wake) = pair();
    let writer = thread::spawn(move || {
        for byte in bytes(SET_VRING_NUM, &[1, 2, 3, 4, 5, 6, 7, 8]) {
            theirs.write_all(&[byte]).unwrap();
            thread::yield_now();
        }
        theirs
    });
    let message = expect_message(&mut connection, &wake);
    assert_eq!(message.header.request, SET_VRING_NUM);
    assert_eq!(message.body, [1, 2, 3, 4, 5, 6, 7, 8]);
    drop(writer.join().unwrap());
    assert!(matches!(connection.receive(wake.as_fd()).unwrap(), Received::Closed));
}

#[test]
fn messages_that_arrive_together_are_separated_with_their_descriptors() {
    let (mut connection, mut theirs, wake) = pair();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    send_with_fds(&theirs, &bytes(1, &[]), &[writer]);
    theirs.write_all(&[bytes(2, &[9; 8]), bytes(3, &[])].concat()).unwrap();
    let messages: Vec<_> = (0..3).map(|_| expect_message(&mut connection, &wake)).collect();
    let summary: Vec<_> = messages.iter().map(|one| (one.header.request, one.body.len(), one.fds.len())).collect();
    assert_eq!(summary, [(1, 0, 1), (2, 8, 0), (3, 0, 0)]);
    // Dropping a message closes its descriptors.
    drop(messages);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn descriptors_are_kept_until_the_body_of_their_message_arrives() {
    let (mut connection, mut theirs, wake) = pair();
    let whole = bytes(SET_VRING_NUM, &[7; 8]);
    let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    send_with_fds(&theirs, &whole[..5], &[reader]);
    rustix::io::write(&wake, &1_u64.to_ne_bytes()).unwrap();
    assert!(matches!(connection.receive(wake.as_fd()).unwrap(), Received::Woken));
    rustix::io::read(&wake, &mut [0; 8]).unwrap();
    theirs.write_all(&whole[5..]).unwrap();
    let message = expect_message(&mut connection, &wake);
    assert_eq!((message.fds.len(), message.body), (1, vec![7; 8]));
}

#[test]
fn the_maximum_number_of_descriptors_arrives_close_on_exec() {
    let (mut connection, theirs, wake) = pair();
    let eventfd = || rustix::event::eventfd(0, EventfdFlags::empty()).unwrap();
    let fds: Vec<_> = std::iter::repeat_with(eventfd).take(MAX_FDS).collect();
    send_with_fds(&theirs, &bytes(1, &[]), &fds);
    let message = expect_message(&mut connection, &wake);
    assert_eq!(message.fds.len(), MAX_FDS);
    for fd in &message.fds {
        assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn too_many_descriptors_end_the_connection_and_are_closed() {
    let (mut connection, theirs, wake) = pair();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let writers: Vec<OwnedFd> = (0..200).map(|_| writer.try_clone().unwrap()).collect();
    drop(writer);
    let whole = bytes(SET_VRING_NUM, &[7; 8]);
    send_with_fds(&theirs, &whole[..4], &writers);
    send_with_fds(&theirs, &whole[4..], &writers);
    drop(writers);
    let error = connection.receive(wake.as_fd()).unwrap_err();
    assert!(matches!(error, ConnectionError::FdsLost), "{error}");
    drop(connection);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_close_in_the_middle_of_a_message_differs_from_a_close_between_messages() {
    let (mut connection, mut theirs, wake) = pair();
    theirs.write_all(&bytes(SET_VRING_NUM, &[7; 8])[..15]).unwrap();
    drop(theirs);
    let error = connection.receive(wake.as_fd()).unwrap_err();
    assert_eq!(error.to_string(), "the front-end closed the connection after 15 bytes of a message");
}

#[test]
fn a_front_end_that_dies_with_unread_replies_counts_as_closed() {
    let (mut connection, theirs, wake) = pair();
    connection.send(&Reply::number(1, 0), wake.as_fd()).unwrap();
    drop(theirs);
    assert!(matches!(connection.receive(wake.as_fd()).unwrap(), Received::Closed));
}

#[test]
fn an_invalid_header_ends_the_connection_before_the_body_is_read() {
    let (mut connection, mut theirs, wake) = pair();
    theirs.write_all([1_u32, 1, 1 << 30].map(u32::to_ne_bytes).as_flattened()).unwrap();
    let error = connection.receive(wake.as_fd()).unwrap_err();
    assert_eq!(error.to_string(), "message 1 announces 1073741824 bytes; the back-end reads at most 8192");
}

#[test]
fn a_reply_carries_its_descriptor() {
    let (mut connection, theirs, wake) = pair();
    let fd = rustix::event::eventfd(7, EventfdFlags::CLOEXEC).unwrap();
    connection.send(&Reply { request: 31, body: vec![1, 2, 3], fd: Some(fd) }, wake.as_fd()).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut got = [0; 64];
    let received =
        rustix::net::recvmsg(&theirs, &mut [IoSliceMut::new(&mut got)], &mut control, RecvFlags::empty()).unwrap();
    assert_eq!(got[..received.bytes], *[[31_u32, 5, 3].map(u32::to_ne_bytes).as_flattened(), &[1, 2, 3]].concat());
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => vec![],
        })
        .collect();
    assert_eq!(fds.len(), 1);
    let mut count = [0; 8];
    rustix::io::read(&fds[0], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 7);
}

#[test]
fn an_unread_reply_can_be_given_up() {
    let (mut connection, mut theirs, wake) = pair();
    let reply = Reply { request: 24, body: vec![0x5a; 4096], fd: None };
    let stopper = thread::spawn({
        let wake = wake.try_clone().unwrap();
        // The socket holds some replies; the next one waits. The connection gives it up when this write arrives, early
        // or late.
        move || rustix::io::write(&wake, &1_u64.to_ne_bytes()).unwrap()
    });
    let error = loop {
        if let Err(error) = connection.send(&reply, wake.as_fd()) {
            break error;
        }
    };
    assert!(matches!(error, ConnectionError::Interrupted), "{error}");
    stopper.join().unwrap();
    // The replies that were sent before are whole.
    let mut first = vec![0; 12 + 4096];
    theirs.read_exact(&mut first).unwrap();
    assert!(first[12..].iter().all(|byte| *byte == 0x5a));
}

#[test]
fn the_process_at_the_other_end_is_known() {
    let (connection, _theirs, _wake) = pair();
    assert_eq!(connection.peer_pid(), Some(std::process::id() as i32));
}
