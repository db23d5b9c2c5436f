//! The handover over a socket pair.

mod support;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringpass_guest::handover::{
    Handover, HandoverError, LINE_BYTES_MAX, QueueEvents, QueueSetup, RegionSetup, Setup, SetupError, receive, send,
};
use ringpass_guest_abi::RingLayout;
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use support::{layout, map, memfd};
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;

fn setup() -> Setup {
    let queue = |index: u64| QueueSetup { rings_gpa: index * 8192, sqes_gpa: index * 8192 + 4096, layout: layout() };
    Setup {
        version: Setup::VERSION,
        regions: vec![
            RegionSetup { gpa: 0, len_bytes: MIB, offset_bytes: 0 },
            RegionSetup { gpa: 4 << 30, len_bytes: MIB, offset_bytes: MIB },
        ],
        queues: vec![queue(0), queue(1)],
        iova_base: 1 << 40,
        slot_shift: 22,
        disk_bytes: 64 * MIB,
        logical_block_bytes: 512,
        read_only: false,
    }
}

fn events() -> Vec<QueueEvents> {
    let event = || EventFd::new(0).unwrap();
    (0..2).map(|_| QueueEvents { doorbell: event(), completion: event() }).collect()
}

fn hand_over(setup: &Setup, memory: &[&File], events: &[QueueEvents]) -> (UnixStream, Result<Handover, HandoverError>) {
    let (broker, guest) = UnixStream::pair().unwrap();
    let memory: Vec<_> = memory.iter().map(|file| file.as_fd()).collect();
    send(&broker, setup, &memory, events).unwrap();
    drop(broker);
    let received = receive(&guest);
    (guest, received)
}

/// Sends bytes and descriptors without any check.
fn send_raw(line: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Handover, HandoverError> {
    let (broker, guest) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let sent = if line.is_empty() {
                0
            } else {
                sendmsg(&broker, &[IoSlice::new(&line[..1])], &mut control, SendFlags::NOSIGNAL).unwrap()
            };
            // The receiver may have given up by now.
            let _ = (&broker).write_all(&line[sent..]);
        });
        let received = receive(&guest);
        drop(guest);
        received
    })
}

#[test]
fn a_guest_receives_what_the_broker_sent() {
    let (low, high) = (memfd(MIB), memfd(2 * MIB));
    let sent_events = events();
    let (_, received) = hand_over(&setup(), &[&low, &high], &sent_events);
    let received = received.unwrap();
    assert_eq!(received.setup, setup());
    for (sent, got) in [&low, &high].into_iter().zip(&received.memory) {
        let got = File::from(got.try_clone().unwrap());
        assert_eq!(got.metadata().unwrap().ino(), sent.metadata().unwrap().ino());
    }
    for (number, (sent, got)) in (1..).zip(sent_events.iter().zip(&received.events)) {
        got.doorbell.write(number).unwrap();
        assert_eq!(sent.doorbell.read().unwrap(), number);
        sent.completion.write(number + 10).unwrap();
        assert_eq!(got.completion.read().unwrap(), number + 10);
    }
    // The received regions can be mapped, and their files are the broker's.
    let ram = map(&received.regions()).unwrap();
    let mut area = ram.allocator().unwrap().reserve(4 << 30, 4096).unwrap();
    area.write(0, b"guest");
    let mut bytes = [0; 5];
    high.read_exact_at(&mut bytes, MIB).unwrap();
    assert_eq!(&bytes, b"guest");
}

#[test]
fn received_descriptors_do_not_leak_into_started_programs() {
    let memory = memfd(2 * MIB);
    let (_, received) = hand_over(&setup(), &[&memory, &memory], &events());
    let received = received.unwrap();
    for fd in &received.memory {
        assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
    }
    for queue in &received.events {
        for event in [&queue.doorbell, &queue.completion] {
            let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd())).unwrap();
            let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            assert_ne!(u32::from_str_radix(flags, 8).unwrap() & 0o2_000_000, 0, "O_CLOEXEC in {flags}");
        }
    }
}

#[test]
fn bytes_after_the_setup_stay_in_the_socket() {
    let (broker, mut guest) = UnixStream::pair().unwrap();
    let memory = memfd(2 * MIB);
    send(&broker, &setup(), &[memory.as_fd(), memory.as_fd()], &events()).unwrap();
    (&broker).write_all(b"{\"job\":1}\n").unwrap();
    drop(broker);
    receive(&guest).unwrap();
    let mut rest = String::new();
    guest.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "{\"job\":1}\n");
}

#[test]
fn an_invalid_setup_is_neither_sent_nor_accepted() {
    let memory = memfd(2 * MIB);
    let with_queue = |queue: QueueSetup| Setup { queues: vec![queue; 2], ..setup() };
    let queue = setup().queues[0];
    let cases = [
        (Setup { version: 3, ..setup() }, "version 3"),
        (Setup { regions: vec![], ..setup() }, "has no regions"),
        (Setup { queues: vec![], ..setup() }, "has no queues"),
        (Setup { regions: vec![setup().regions[0]; 250], ..setup() }, "250 regions and 2 queues need more than 253"),
        (Setup { iova_base: 0, ..setup() }, "the base of addresses is 0x0"),
        (Setup { iova_base: 4096, ..setup() }, "the base of addresses is 0x1000"),
        (Setup { slot_shift: 12, ..setup() }, "the shift of slots is 12"),
        (Setup { logical_block_bytes: 0, ..setup() }, "logical_block_bytes is 0x0"),
        (Setup { logical_block_bytes: 1536, ..setup() }, "logical_block_bytes is 0x600"),
        (Setup { disk_bytes: 1000, ..setup() }, "disk_bytes is 0x3e8"),
        (with_queue(QueueSetup { rings_gpa: MIB, ..queue }), "the rings area of queue 0 (4096 bytes"),
        (with_queue(QueueSetup { rings_gpa: 8, ..queue }), "must start at a page"),
        (with_queue(QueueSetup { sqes_gpa: !4095, ..queue }), "the SQE area of queue 0"),
        (with_queue(QueueSetup { layout: RingLayout { sq_entries: 0, ..layout() }, ..queue }), "sq_entries is 0"),
    ];
    for (bad, message) in cases {
        let (broker, _guest) = UnixStream::pair().unwrap();
        let error = send(&broker, &bad, &[memory.as_fd(), memory.as_fd()], &events()).unwrap_err().to_string();
        assert!(error.contains(message), "{error} should contain {message}");
        let mut line = serde_json::to_vec(&bad).unwrap();
        line.push(b'\n');
        let error = send_raw(&line, &[]).unwrap_err();
        assert!(matches!(error, HandoverError::Setup(_)), "{error}");
    }
    assert!(matches!(Setup { version: 9, ..setup() }.check(), Err(SetupError::Version { version: 9 })));
}

#[test]
fn missing_or_surplus_descriptors_are_refused() {
    let memory = memfd(2 * MIB);
    let (broker, _guest) = UnixStream::pair().unwrap();
    let error = send(&broker, &setup(), &[memory.as_fd()], &events()).unwrap_err().to_string();
    assert!(
        error.contains("needs 6 file descriptors (2 for memory, 2 times 2 for events), but there are 5"),
        "{error}"
    );
    let mut line = serde_json::to_vec(&setup()).unwrap();
    line.push(b'\n');
    for given in [0, 5, 7] {
        let error = send_raw(&line, &vec![memory.as_fd(); given]).unwrap_err().to_string();
        assert!(error.contains(&format!(
            "needs 6 file descriptors (2 for memory, 2 times 2 for events), but there are {given}"
        )));
    }
}

#[test]
fn a_line_that_is_not_a_setup_is_refused() {
    let too_long = vec![b' '; LINE_BYTES_MAX + 1];
    let unknown_field =
        serde_json::to_string(&setup()).unwrap().replace("\"version\"", "\"extra\":1,\"version\"") + "\n";
    let missing_field = serde_json::to_string(&setup()).unwrap().replace("\"read_only\":false,", "") + "\n";
    let missing_field = missing_field.replace(",\"read_only\":false", "");
    let cases: [(&[u8], &str); 7] = [
        (b"", "closed after 0 bytes"),
        (b"{\"version\":1", "closed after 12 bytes"),
        (b"\n", "malformed"),
        (b"[]\n", "malformed"),
        (unknown_field.as_bytes(), "unknown field `extra`"),
        (missing_field.as_bytes(), "missing field `read_only`"),
        (&too_long, "longer than 65536 bytes"),
    ];
    for (line, message) in cases {
        let error = send_raw(line, &[]).unwrap_err().to_string();
        assert!(error.contains(message), "{error} should contain {message}");
    }
}

#[test]
fn a_silent_broker_leads_to_the_time_out_of_the_socket() {
    let (_broker, guest) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let error = receive(&guest).unwrap_err().to_string();
    assert!(error.starts_with("cannot receive the setup over the socket"), "{error}");
}

#[test]
fn sending_to_a_guest_that_is_gone_is_an_error() {
    let (broker, guest) = UnixStream::pair().unwrap();
    drop(guest);
    let memory = memfd(2 * MIB);
    let error = send(&broker, &setup(), &[memory.as_fd(), memory.as_fd()], &events()).unwrap_err().to_string();
    assert!(error.starts_with("cannot send the setup over the socket: Broken pipe"), "{error}");
}
