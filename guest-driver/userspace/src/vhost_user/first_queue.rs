//! Queue 0, which always is a virtqueue: what is rare and slow, and the requests about other queues.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringpass_guest_abi::probe::{Device, ProbeAnswer};
use ringpass_guest_abi::request::{DetachPayload, EventAnswer, T_DETACH, T_EVENT, T_PROBE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::Error;
use super::memory::Memory;
use super::requests::{ANSWER_BYTES, Body, Requests};
use super::virtqueue::{Setup, Virtqueue};

/// How long a device may take to say what it is. After that it is an ordinary disk.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to spin for an answer, and then to sleep at most between two looks.
const SPIN: Duration = Duration::from_micros(50);
const SLEEP_MAX: Duration = Duration::from_millis(1);
const ID_BYTES: usize = 20;

/// The driver of queue 0. An EVENT is always pending; beside it are requests of all queues.
#[derive(Debug)]
pub(super) struct FirstQueue {
    queue: Virtqueue,
    requests: Requests,
    event: Option<u16>,
    /// By head: requests whose answers are wanted, and the queue whose user is to be woken up then.
    awaited: BTreeMap<u16, (Ticket, Option<Arc<Setup>>)>,
    /// Answers that nobody has taken yet. Their heads may have other requests already.
    answered: BTreeMap<Ticket, Answer>,
    next_ticket: u64,
    /// A question of another queue found no room.
    lacks_room: bool,
    /// Counts what the device told of.
    news: Arc<AtomicU64>,
    /// The other queues, whose users may be waiting for interrupts.
    others: Vec<Arc<Setup>>,
}

/// Names a question until its answer is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// What the device made of a request. (The place of the request may have another one since.)
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    status: u8,
    bytes: [u8; ANSWER_BYTES as usize],
}

/// What can be asked on queue 0, besides what it does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    Flush,
    Discard {
        offset_bytes: u64,
        len_bytes: u64,
    },
    WriteZeroes {
        offset_bytes: u64,
        len_bytes: u64,
        unmap: bool,
    },
    GetId,
    Detach {
        queue: u16,
    },
    /// A read or write that cannot go another way.
    Transfer {
        offset_bytes: u64,
        gpa: u64,
        len_bytes: u32,
        is_write: bool,
    },
}

impl Answer {
    pub(super) fn check(&self, what: &'static str) -> Result<(), Error> {
        match self.status {
            status if u32::from(status) == VIRTIO_BLK_S_OK => Ok(()),
            status => Err(Error::Status { what, status }),
        }
    }

    /// The serial number that the answer to GET_ID has: up to 20 characters.
    pub(super) fn serial(&self) -> String {
        let id: Vec<u8> = self.bytes[..ID_BYTES].iter().copied().take_while(|&byte| byte != 0).collect();
        String::from_utf8_lossy(&id).into_owned()
    }
}

impl Question {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::WriteZeroes { .. } => "write zeroes",
            Self::GetId => "get id",
            Self::Detach { .. } => "DETACH",
            Self::Transfer { is_write: true, .. } => "write",
            Self::Transfer { is_write: false, .. } => "read",
        }
    }
}

impl FirstQueue {
    pub(super) fn new(memory: &Memory, size: u16, news: Arc<AtomicU64>) -> Result<Self, Error> {
        let queue = Virtqueue::new(memory, size)?;
        let requests = Requests::new(memory, &queue)?;
        let (awaited, answered) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self {
            queue,
            requests,
            event: None,
            awaited,
            answered,
            next_ticket: 0,
            lacks_room: false,
            news,
            others: Vec::new(),
        })
    }

    /// Has the users of these queues woken up when the device tells of something.
    pub(super) fn set_others(&mut self, others: Vec<Arc<Setup>>) {
        self.others = others;
    }

    /// A device that came back without an in-flight region may not know of the EVENT any more.
    pub(super) fn renew_event(&mut self) {
        self.event = None;
        self.post_event();
    }

    pub(super) fn setup(&self) -> &Arc<Setup> {
        self.queue.setup()
    }

    /// What the device is. `None`: an ordinary disk.
    pub(super) fn probe(&mut self, patience: Duration) -> Result<Option<Device>, Error> {
        let Some(head) = self.send(T_PROBE, 0, &Body::Payload(&[])) else { return Ok(None) };
        let ticket = self.await_answer(head, None);
        let mut pauses = Pauses::new(patience.min(PROBE_TIMEOUT));
        let answer = loop {
            self.service()?;
            if let Some(answer) = self.take(ticket) {
                break answer;
            }
            if !pauses.pause() {
                self.abandon(ticket);
                return Ok(None);
            }
        };
        if answer.check("PROBE").is_err() {
            return Ok(None);
        }
        let answer = ProbeAnswer::from_prefix(&answer.bytes);
        Ok(answer.check().inspect_err(|error| tracing::info!("no rings: {error}")).ok())
    }

    /// Has the device tell of what concerns queues that nobody looks at.
    pub(super) fn post_event(&mut self) {
        if self.event.is_none() {
            self.event = self.send(T_EVENT, 0, &Body::Payload(&[]));
        }
    }

    /// Sends a question. Its answer can be taken later, by the ticket. `user` is woken up then. `None`: there is no room for now.
    pub(super) fn ask(&mut self, question: &Question, user: Option<&Arc<Setup>>) -> Option<Ticket> {
        let Some(head) = self.send_question(question) else {
            self.lacks_room |= user.is_some();
            return None;
        };
        Some(self.await_answer(head, user.cloned()))
    }

    fn await_answer(&mut self, head: u16, user: Option<Arc<Setup>>) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.awaited.insert(head, (ticket, user));
        ticket
    }

    fn send_question(&mut self, question: &Question) -> Option<u16> {
        match *question {
            Question::Flush => self.send(VIRTIO_BLK_T_FLUSH, 0, &Body::Nothing),
            Question::Discard { offset_bytes, len_bytes } => {
                self.send(VIRTIO_BLK_T_DISCARD, 0, &Body::Range(&range(offset_bytes, len_bytes, 0)))
            }
            Question::WriteZeroes { offset_bytes, len_bytes, unmap } => {
                let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
                self.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &Body::Range(&range(offset_bytes, len_bytes, flags)))
            }
            Question::GetId => self.send(VIRTIO_BLK_T_GET_ID, 0, &Body::Payload(&[])),
            Question::Detach { queue } => {
                let payload = DetachPayload { queue: queue.into(), ..DetachPayload::default() }.to_bytes();
                self.send(T_DETACH, 0, &Body::Payload(&payload))
            }
            Question::Transfer { offset_bytes, gpa, len_bytes, is_write } => {
                let head = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, is_write);
                self.kick();
                head
            }
        }
    }

    /// The answer to a question, if it is there.
    pub(super) fn take(&mut self, ticket: Ticket) -> Option<Answer> {
        self.answered.remove(&ticket)
    }

    /// Nobody waits for the answer any more. Its place stays taken until it comes.
    pub(super) fn abandon(&mut self, ticket: Ticket) {
        self.awaited.retain(|_, (awaited, _)| *awaited != ticket);
        self.answered.remove(&ticket);
    }

    /// Takes what came back.
    pub(super) fn service(&mut self) -> Result<(), Error> {
        while let Some(head) = self.queue.reap()? {
            if self.event == Some(head) {
                self.event = None;
                self.take_event(head);
            } else if let Some((ticket, user)) = self.awaited.remove(&head) {
                let answer = Answer { status: self.requests.status(head), bytes: self.requests.answer(head) };
                self.answered.insert(ticket, answer);
                if let Some(user) = user {
                    let _ = user.call().write(1);
                }
            }
            if std::mem::take(&mut self.lacks_room) {
                self.wake_others();
            }
        }
        Ok(())
    }

    fn take_event(&mut self, head: u16) {
        let answer = self.requests.answer(head);
        // The next one first, then the look: nothing that comes in between is missed.
        self.post_event();
        if EventAnswer::from_bytes(answer[..EventAnswer::BYTES].try_into().expect("8 bytes")).events.get() != 0 {
            self.news.fetch_add(1, Ordering::Release);
            self.wake_others();
        }
    }

    pub(super) fn wake_others(&self) {
        for other in &self.others {
            let _ = other.call().write(1);
        }
    }

    fn send(&mut self, kind: u32, offset_bytes: u64, body: &Body<'_>) -> Option<u16> {
        let head = self.requests.send(&mut self.queue, kind, offset_bytes, body)?;
        self.kick();
        Some(head)
    }

    fn kick(&self) {
        if self.queue.wants_kick() {
            self.queue.kick();
        }
    }
}

fn range(offset_bytes: u64, len_bytes: u64, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&(offset_bytes / 512).to_le_bytes());
    range[8..12].copy_from_slice(&u32::try_from(len_bytes / 512).unwrap_or(u32::MAX).to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// The pauses between looks at something that comes soon, mostly, and is waited for only so long.
#[derive(Debug)]
pub(super) struct Pauses {
    begin: Instant,
    limit: Duration,
    next: Duration,
}

impl Pauses {
    pub(super) fn new(limit: Duration) -> Self {
        Self { begin: Instant::now(), limit, next: SPIN }
    }

    /// A pause. False: the time is up.
    pub(super) fn pause(&mut self) -> bool {
        let waited = self.begin.elapsed();
        if waited >= self.limit {
            return false;
        }
        if waited < SPIN {
            std::hint::spin_loop();
        } else {
            thread::sleep(self.next);
            self.next = (self.next * 2).min(SLEEP_MAX);
        }
        true
    }
}
