//! The fuzzers' functions as property tests, and the real server under the same scripts.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::super::fake::{Call, FakeDevice};
use super::super::server::Server;
use super::script::MEMFD_NAME;
use super::*;
use crate::fuzzing::save_seed;

const GET_FEATURES: u32 = 1;

fn script() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..600)
}

proptest! {
    #[test]
    fn arbitrary_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        parse_message(&bytes);
    }

    #[test]
    fn any_sequence_of_messages_keeps_to_the_contract_of_the_device(bytes in script()) {
        run_session(&bytes);
    }
}

/// Scripts must set up rings and logs, or the properties above would show nothing. Scripts that do become seeds for the
/// fuzzer.
#[test]
fn scripts_start_rings_and_logs() {
    let (mut started, mut enabled, mut logged) = (0, 0, 0);
    let mut next_byte = bytes_from(7);
    for number in 0..2000 {
        let bytes: Vec<u8> = std::iter::repeat_with(&mut next_byte).take(400).collect();
        let calls = calls_of(&bytes);
        let count = |is_meant: fn(&Call) -> bool| calls.iter().filter(|call| is_meant(call)).count();
        let starts = count(|call| matches!(call, Call::Start(_)));
        started += starts;
        enabled += count(|call| matches!(call, Call::SetEnabled(_, true)));
        logged += count(|call| matches!(call, Call::SetDirtyLog(true)));
        if starts > 2 {
            save_seed("vhost_user_session", &format!("rings-{number}"), &bytes);
        }
    }
    assert!(started > 150 && enabled > 80 && logged > 80, "{started} rings started, {enabled} enabled, {logged} logs");
}

/// A small generator of bytes (xorshift64*), so that every run uses the same scripts.
fn bytes_from(seed: u64) -> impl FnMut() -> u8 {
    let mut state = seed;
    move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    }
}

/// Runs the server over its socket against front-ends that send anything and leave. After each of them, the server
/// serves the next one, and no descriptor or mapping of the previous ones is left.
#[test]
fn after_arbitrary_messages_the_next_front_end_is_served_and_nothing_leaks() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = Server::bind(&path).unwrap();
    let handle = server.handle();
    let thread = thread::spawn(move || server.run(&mut FakeDevice::default()));

    proptest!(ProptestConfig::with_cases(200), |(bytes in script(), cut in prop::option::of(0_usize..40))| {
        let sent = send_all(&path, &bytes, cut);
        ask_features(&path);
        // The server answered this front-end after it had ended the other's session.
        prop_assert_eq!(left_of(&sent), Vec::<String>::new());
    });

    handle.stop();
    thread.join().unwrap().unwrap();
    assert!(!path.exists(), "the socket is removed");
}

/// Sends a script, the last message perhaps only in part, and reads until the server closes the connection or has read
/// everything. Returns the identities of the descriptors.
fn send_all(path: &Path, script: &[u8], cut: Option<usize>) -> HashSet<String> {
    let stream = UnixStream::connect(path).unwrap();
    let mut identities = HashSet::new();
    let messages: Vec<Sent> = Script::new(script).collect();
    let count = messages.len();
    for (number, Sent { bytes, fds }) in messages.into_iter().enumerate() {
        identities.extend(fds.iter().map(identity));
        let end = if number + 1 == count { bytes.len() - cut.unwrap_or(0).min(bytes.len() - 1) } else { bytes.len() };
        if !send(&stream, &bytes[..end], &fds) {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // Until the server has read everything, or has closed the connection.
    let _ = (&stream).read_to_end(&mut Vec::new());
    identities
}

/// False: the server has closed the connection.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let sent = rustix::net::sendmsg(stream, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    sent.is_ok_and(|count| count == bytes.len())
}

/// A well-behaved front-end: asks for the features and gets an answer.
fn ask_features(path: &Path) {
    let mut stream = UnixStream::connect(path).unwrap();
    let request = [GET_FEATURES, 1, 0].map(u32::to_ne_bytes);
    assert!(send(&stream, request.as_flattened(), &[]));
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], GET_FEATURES.to_ne_bytes());
}

/// Identifies the file of a descriptor: the link in /proc, and the count of an eventfd, which the fake device leaves
/// alone.
fn identity(fd: &impl AsRawFd) -> String {
    identity_of(&format!("/proc/self/fd/{}", fd.as_raw_fd()), &format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
        .expect("an open descriptor")
}

fn identity_of(link: &str, info: &str) -> Option<String> {
    let target = fs::read_link(link).ok()?.to_string_lossy().into_owned();
    let status = fs::metadata(link).ok()?;
    let info = fs::read_to_string(info).ok()?;
    let eventfd = info.lines().find(|line| line.starts_with("eventfd-count")).unwrap_or("").to_owned();
    Some(format!("{target} {} {eventfd}", std::os::unix::fs::MetadataExt::ino(&status)))
}

/// Which of these are still open or mapped in this process. Works while other tests open files at the same time.
fn left_of(identities: &HashSet<String>) -> Vec<String> {
    let mut left: Vec<String> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            identity_of(&format!("/proc/self/fd/{name}"), &format!("/proc/self/fdinfo/{name}"))
        })
        .filter(|open| identities.contains(open))
        .collect();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let inodes: HashSet<&str> = identities
        .iter()
        .filter(|identity| identity.contains(MEMFD_NAME))
        .filter_map(|identity| identity.split_whitespace().rev().find(|word| word.parse::<u64>().is_ok()))
        .collect();
    left.extend(
        maps.lines()
            .filter(|line| line.contains(MEMFD_NAME))
            .filter(|line| line.split_whitespace().nth(4).is_some_and(|inode| inodes.contains(inode)))
            .map(str::to_owned),
    );
    left
}
