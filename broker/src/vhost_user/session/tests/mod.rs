//! The session against a device that records its calls.

mod config;
mod logging;
mod memory;
mod negotiation;
mod rings;

use std::os::fd::OwnedFd;

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq as Code;

use super::super::connection::Message;
use super::super::fake::{Call, Calls, FakeDevice};
use super::super::message::{Header, Reply};
use super::negotiation::OFFERED;
use super::{Session, SessionError};

/// Addresses of the test's guest memory in the guest and in the front-end.
const GPA: u64 = 0x1_0000_0000;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY_BYTES: u64 = 1 << 20;

/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

/// Runs `test` with a session that begins as front-ends begin one: with protocol features negotiated.
fn with_session(test: impl FnOnce(&mut Rig<'_>)) {
    with_new_session(|rig| {
        rig.ok(Code::SET_PROTOCOL_FEATURES, OFFERED.bits().to_ne_bytes(), []);
        rig.ok(Code::SET_FEATURES, PROTOCOL_FEATURES.to_ne_bytes(), []);
        rig.calls.take();
        test(rig);
    });
}

/// Runs `test` with a session before its first message.
fn with_new_session(test: impl FnOnce(&mut Rig<'_>)) {
    let mut device = FakeDevice::default();
    let calls = device.calls.clone();
    let mut rig = Rig { session: Session::new(&mut device), calls };
    rig.calls.take();
    test(&mut rig);
}

struct Rig<'d> {
    session: Session<'d>,
    calls: Calls,
}

impl Rig<'_> {
    /// Sends a request without asking for an acknowledgement.
    fn send<const FDS: usize>(
        &mut self,
        code: Code,
        body: impl AsRef<[u8]>,
        fds: [OwnedFd; FDS],
    ) -> Result<Option<Reply>, SessionError> {
        self.session.handle(message(code, false, body.as_ref(), fds.into()))
    }

    /// Sends a request, which must succeed without a reply.
    fn ok<const FDS: usize>(&mut self, code: Code, body: impl AsRef<[u8]>, fds: [OwnedFd; FDS]) {
        let reply = self.send(code, body, fds).unwrap();
        assert!(reply.is_none(), "{code:?} has no reply of its own: {reply:?}");
    }

    /// Sends a request, which must succeed with a reply, and returns the body of the reply.
    fn ask(&mut self, code: Code, body: impl AsRef<[u8]>) -> Vec<u8> {
        self.send(code, body, []).unwrap().expect("a reply").body
    }

    fn ask_number(&mut self, code: Code) -> u64 {
        u64::from_ne_bytes(self.ask(code, []).try_into().expect("8 bytes"))
    }

    /// Sends a request with the flag for an acknowledgement, and returns the number that comes back.
    fn ack<const FDS: usize>(&mut self, code: Code, body: impl AsRef<[u8]>, fds: [OwnedFd; FDS]) -> u64 {
        let reply = self.session.handle(message(code, true, body.as_ref(), fds.into())).unwrap().expect("a reply");
        assert_eq!(reply.request, u32::from(code));
        u64::from_ne_bytes(reply.body.try_into().expect("8 bytes"))
    }

    /// Sends a request that the session must refuse: once with an acknowledgement of the refusal, and once so that the
    /// refusal ends the session. The session must not call the device. Returns the error message.
    fn refused(&mut self, code: Code, body: impl AsRef<[u8]>, fds: impl Fn() -> Vec<OwnedFd>) -> String {
        self.calls.take();
        let acknowledged = self.session.handle(message(code, true, body.as_ref(), fds()));
        match acknowledged {
            Ok(reply) => assert_eq!(reply.expect("a reply").body, 1_u64.to_ne_bytes(), "{code:?} is refused"),
            Err(error) => panic!("{code:?} can be answered: {error}"),
        }
        let error = self.session.handle(message(code, false, body.as_ref(), fds())).unwrap_err();
        assert_eq!(self.calls.take(), [], "a refused request changes nothing");
        error.to_string()
    }

    /// Adds the test's memory.
    fn add_memory(&mut self) {
        self.ok(Code::ADD_MEM_REG, region(GPA, MEMORY_BYTES, USER, 0), [memfd(MEMORY_BYTES)]);
    }

    /// Sets up a ring of 256 entries in the test's memory, without starting it.
    fn set_up(&mut self, index: u32) {
        self.ok(Code::SET_VRING_NUM, state(index, 256), []);
        self.ok(Code::SET_VRING_BASE, state(index, 100), []);
        self.ok(Code::SET_VRING_ADDR, ring_address(index, None), []);
    }

    fn kick(&mut self, index: u32) {
        self.ok(Code::SET_VRING_KICK, file(index), [eventfd()]);
    }

    fn call(&mut self, index: u32) {
        self.ok(Code::SET_VRING_CALL, file(index), [eventfd()]);
    }

    fn enable(&mut self, index: u32) {
        self.ok(Code::SET_VRING_ENABLE, state(index, 1), []);
    }

    /// Adds memory, and starts and enables a ring.
    fn run(&mut self, index: u32) {
        self.add_memory();
        self.set_up(index);
        self.kick(index);
        self.enable(index);
        self.calls.take();
    }

    /// Stops a ring and returns the index at which it stopped.
    fn stop(&mut self, index: u32) -> u32 {
        let body = self.ask(Code::GET_VRING_BASE, state(index, 0));
        assert_eq!(body[..4], index.to_ne_bytes());
        u32::from_ne_bytes(body[4..].try_into().expect("8 bytes"))
    }
}

fn message(code: Code, needs_reply: bool, body: &[u8], fds: Vec<OwnedFd>) -> Message {
    let header = Header { request: code.into(), needs_reply, body_bytes: body.len() };
    Message { header, body: body.to_vec(), fds }
}

fn memfd(size_bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("vhost-user-test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size_bytes).unwrap();
    fd
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn no_fds() -> Vec<OwnedFd> {
    Vec::new()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A vring state description.
fn state(index: u32, num: u32) -> Vec<u8> {
    [index, num].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The body of SET_VRING_KICK and its like, with a descriptor.
fn file(index: u32) -> Vec<u8> {
    words(&[index.into()])
}

/// The same without a descriptor.
fn no_file(index: u32) -> Vec<u8> {
    words(&[u64::from(index) | 0x100])
}

fn region(gpa: u64, size_bytes: u64, user_address: u64, offset_bytes: u64) -> Vec<u8> {
    words(&[0, gpa, size_bytes, user_address, offset_bytes])
}

/// Descriptor table, available ring and used ring of ring `index` in the test's memory, as offsets.
fn ring_offsets(index: u32) -> [u64; 3] {
    let start = u64::from(index) * 0x1_0000;
    [start, start + 0x2000, start + 0x4000]
}

fn ring_gpas(index: u32) -> [u64; 3] {
    ring_offsets(index).map(|offset| GPA + offset)
}

fn ring_address(index: u32, used_log_gpa: Option<u64>) -> Vec<u8> {
    address(index, ring_offsets(index).map(|offset| USER + offset), used_log_gpa)
}

/// A vring address description: descriptor table, available ring, used ring.
fn address(index: u32, [desc_table, avail_ring, used_ring]: [u64; 3], used_log_gpa: Option<u64>) -> Vec<u8> {
    let flags = u32::from(used_log_gpa.is_some());
    let mut bytes = state(index, flags);
    bytes.extend(words(&[desc_table, used_ring, avail_ring, used_log_gpa.unwrap_or(0)]));
    bytes
}

#[test]
fn the_device_abandons_the_queues_and_the_memory_of_a_gone_front_end() {
    let mut device = FakeDevice::default();
    let calls = device.calls.clone();
    let mut rig = Rig { session: Session::new(&mut device), calls: calls.clone() };
    rig.ok(Code::SET_PROTOCOL_FEATURES, OFFERED.bits().to_ne_bytes(), []);
    rig.run(0);
    drop(rig);
    assert_eq!(calls.take(), [Call::Abandon, Call::SetMemory(vec![])]);
}

#[test]
fn requests_of_a_gone_front_end_are_logged_until_the_next_one_connects() {
    let mut device = FakeDevice::default();
    let calls = device.calls.clone();
    drop(Session::new(&mut device));
    assert_eq!(calls.take(), [Call::SetDirtyLog(false), Call::Abandon, Call::SetMemory(vec![])]);
}
