//! Turns bytes into a sequence of messages.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq as Code;

use super::super::fake::{FEATURES, MAX_QUEUE_SIZE, QUEUES};
use crate::fuzzing::Choices;

/// The maximum number of messages in one script.
const MESSAGES_MAX: usize = 64;
/// Name of the memfds that a script sends, by which tests find them in /proc.
pub(super) const MEMFD_NAME: &str = "vhost-user-fuzzing";

/// Guest memory of the script, and its address in the front-end.
const GPA: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY_BYTES: u64 = 0x4_0000;

/// A message with the bytes that go over the socket.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The messages with which every front-end begins.
const OPENING: [Code; 3] = [Code::SET_PROTOCOL_FEATURES, Code::SET_FEATURES, Code::ADD_MEM_REG];
/// The messages that set up a ring.
const RING: [Code; 4] = [Code::SET_VRING_NUM, Code::SET_VRING_ADDR, Code::SET_VRING_KICK, Code::SET_VRING_ENABLE];
/// The messages that start logging.
const LOGGING: [Code; 2] = [Code::SET_LOG_BASE, Code::SET_FEATURES];

/// The messages that some bytes describe: the usual sequences of front-ends, with other messages in between.
pub(super) struct Script<'a> {
    choices: Choices<'a>,
    messages: usize,
    /// The rest of the usual sequence.
    usual: &'static [Code],
    /// The ring that the sequence sets up.
    ring: u32,
}

impl<'a> Script<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { choices: Choices::new(bytes), messages: 0, usual: &OPENING, ring: 0 }
    }

    fn byte(&mut self) -> u8 {
        self.choices.byte()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.choices.below(from.len())]
    }

    /// Mostly the first item.
    fn mostly<T: Copy>(&mut self, from: &[T]) -> T {
        match self.byte() {
            0..0xf0 => from[0],
            byte => from[usize::from(byte) % from.len()],
        }
    }

    /// Rarely true.
    fn is_wild(&mut self) -> bool {
        self.byte() >= 0xf8
    }

    /// Any message, or the first one of a sequence.
    fn free_choice(&mut self) -> Code {
        let sequence: &'static [Code] = match self.byte() {
            0..0x60 => &RING,
            0x60..0x80 => &LOGGING,
            // A separate test covers the numbers that no request has.
            byte => return Code::try_from(u32::from(byte) % 50).unwrap_or(Code::GET_VRING_BASE),
        };
        self.ring = self.pick(&[0, 1, 2]);
        self.usual = &sequence[1..];
        sequence[0]
    }

    fn index(&mut self) -> u32 {
        self.mostly(&[self.ring, 0, 1, 2, u32::from(QUEUES), 255, u32::MAX])
    }

    fn features(&mut self) -> u64 {
        let logging = self.pick(&[0, 0, 1 << 26]);
        let bits = self.mostly(&[1 << 30, 1 << 30, 0, 1 << 34, u64::MAX]);
        logging | bits | self.mostly(&[FEATURES, 0, 1 << 29])
    }

    fn region(&mut self) -> [u64; 4] {
        let gpa = self.mostly(&[GPA, GPA, 0, GPA + MEMORY_BYTES, GPA + 4096, u64::MAX - 4095]);
        let size_bytes = self.mostly(&[MEMORY_BYTES, MEMORY_BYTES, 4096, 100, 0, u64::MAX]);
        let user_address = self.mostly(&[USER, USER, USER + MEMORY_BYTES, 0, u64::MAX - 4095]);
        [gpa, size_bytes, user_address, self.mostly(&[0, 0, 4096, 1, u64::MAX])]
    }

    fn ring_part(&mut self, offset_bytes: u64) -> u64 {
        let start = u64::from(self.ring % 4) * 0x1_0000;
        self.mostly(&[USER, USER, USER, USER + MEMORY_BYTES - 64, 0, u64::MAX - 64]).wrapping_add(start + offset_bytes)
    }

    fn body(&mut self, code: Code) -> Vec<u8> {
        match code {
            Code::SET_FEATURES => words(&[self.features()]),
            Code::SET_PROTOCOL_FEATURES => {
                words(&[self.mostly(&[0x1b22b, 0x1b22b, 0x1b22b, 0x1b223, 0x1b229, 0, 1 << 14])])
            }
            Code::SET_STATUS => words(&[self.mostly(&[0, 1, 3, 11, 15, 0xff, 0x100])]),
            Code::SET_MEM_TABLE => {
                let regions: Vec<_> = (0..self.byte() % 3).map(|_| self.region()).collect();
                let count = regions.len() as u32 + u32::from(self.is_wild());
                [halves(&[count, 0]), words(regions.as_flattened())].concat()
            }
            Code::ADD_MEM_REG | Code::REM_MEM_REG => [words(&[0]), words(&self.region())].concat(),
            Code::SET_LOG_BASE => words(&[self.mostly(&[4096, 64, 0, u64::MAX]), self.mostly(&[0, 0, 4096, 1])]),
            Code::SET_VRING_NUM => {
                let size = self.mostly(&[256, 8, 1, MAX_QUEUE_SIZE.into(), 0, 3, 0x8000, u32::MAX]);
                halves(&[self.index(), size])
            }
            Code::SET_VRING_BASE => halves(&[self.index(), self.mostly(&[0, 1, 0xffff, 0x1_0000])]),
            Code::GET_VRING_BASE => halves(&[self.index(), 0]),
            Code::SET_VRING_ENABLE => halves(&[self.index(), self.mostly(&[1, 1, 0, 2])]),
            Code::SET_VRING_ADDR => {
                let head = halves(&[self.index(), self.pick(&[0, 0, 0, 1])]);
                let parts = [self.ring_part(0), self.ring_part(0x4000), self.ring_part(0x2000), self.ring_part(0x4000)];
                [head, words(&parts)].concat()
            }
            Code::SET_VRING_KICK | Code::SET_VRING_CALL | Code::SET_VRING_ERR => {
                let index = u64::from(self.index() & 0xff);
                words(&[index | self.mostly(&[0, 0, 0x100, 0x200])])
            }
            Code::GET_CONFIG => {
                halves(&[self.mostly(&[0, 32, 59, 4095, 4096, u32::MAX]), self.mostly(&[1, 60, 256, 0]), 0])
            }
            Code::SET_CONFIG => {
                let header = halves(&[self.mostly(&[32, 32, 0, 59]), 1, self.mostly(&[0, 1, 2, 4])]);
                [header, vec![self.byte()]].concat()
            }
            Code::GET_INFLIGHT_FD | Code::SET_INFLIGHT_FD => {
                let area = words(&[self.mostly(&[MEMORY_BYTES, 4096, 1, u64::MAX]), self.mostly(&[0, 0, 4096, 1])]);
                let queues = self.mostly(&[QUEUES, 1, 0, u16::MAX]);
                let size = self.mostly(&[256, MAX_QUEUE_SIZE, 0, u16::MAX]);
                let shape: Vec<u8> = [queues, size, 0, 0].iter().flat_map(|half| half.to_ne_bytes()).collect();
                [area, shape].concat()
            }
            _ => Vec::new(),
        }
    }

    /// The descriptors that a request needs, or other ones.
    fn fds(&mut self, code: Code, body: &[u8]) -> Vec<OwnedFd> {
        let count = match code {
            _ if self.is_wild() => self.byte() % 4,
            Code::SET_MEM_TABLE => body.first().map_or(0, |count| count % 4),
            Code::SET_VRING_KICK | Code::SET_VRING_CALL | Code::SET_VRING_ERR => {
                u8::from(body.get(1).is_none_or(|flags| flags & 1 == 0))
            }
            Code::SET_LOG_BASE
            | Code::SET_LOG_FD
            | Code::SET_BACKEND_REQ_FD
            | Code::SET_INFLIGHT_FD
            | Code::ADD_MEM_REG => 1,
            _ => 0,
        };
        (0..count).map(|_| self.fd(code)).collect()
    }

    fn fd(&mut self, code: Code) -> OwnedFd {
        let is_usual = !self.is_wild();
        match code {
            Code::SET_VRING_KICK | Code::SET_VRING_CALL | Code::SET_VRING_ERR | Code::SET_LOG_FD if is_usual => {
                eventfd()
            }
            Code::SET_BACKEND_REQ_FD if is_usual => socket(),
            _ if is_usual => memfd(MEMORY_BYTES),
            _ => match self.byte() % 4 {
                0 => eventfd(),
                1 => socket(),
                2 => memfd(0),
                _ => memfd(4096),
            },
        }
    }
}

impl Iterator for Script<'_> {
    type Item = Sent;

    fn next(&mut self) -> Option<Sent> {
        if self.choices.is_empty() || self.messages == MESSAGES_MAX {
            return None;
        }
        // Scripts mostly follow the usual sequences, so that most of them set something up.
        let code = match self.usual.split_first() {
            Some((code, rest)) if !self.is_wild() => {
                self.usual = rest;
                *code
            }
            _ => self.free_choice(),
        };
        self.messages += 1;
        let mut body = self.body(code);
        let fds = self.fds(code, &body);
        if self.is_wild() {
            body.resize(usize::from(self.byte()), 0xa5);
        }
        let flags = self.mostly(&[9, 1]) | if self.is_wild() { u32::from(self.byte()) } else { 0 };
        let size_bytes = body.len() as u32 + if self.is_wild() { u32::from(self.byte()) } else { 0 };
        Some(Sent { bytes: [halves(&[code.into(), flags, size_bytes]), body].concat(), fds })
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn halves(halves: &[u32]) -> Vec<u8> {
    halves.iter().flat_map(|half| half.to_ne_bytes()).collect()
}

/// An eventfd with a unique count, by which tests find it in /proc: the kernel reuses its numbers.
fn eventfd() -> OwnedFd {
    static COUNT: AtomicU32 = AtomicU32::new(1 << 16);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    rustix::event::eventfd(count, EventfdFlags::CLOEXEC).expect("an eventfd")
}

fn socket() -> OwnedFd {
    UnixStream::pair().expect("a pair of sockets").0.into()
}

fn memfd(size_bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create(MEMFD_NAME, MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, size_bytes).expect("a size for the memfd");
    fd
}
