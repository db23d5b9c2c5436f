//! Queue 0, which is always a virtqueue: for rare and slow requests, and for the requests about other queues.

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
use super::config::Geometry;
use super::memory::Memory;
use super::requests::{ANSWER_BYTES, Body, Requests};
use super::virtqueue::{Setup, Virtqueue};

/// How long a device may take to answer PROBE. After that the driver takes it for an ordinary disk.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to spin for an answer, and the longest sleep between two looks after that.
const SPIN: Duration = Duration::from_micros(50);
const SLEEP_MAX: Duration = Duration::from_millis(1);
const ID_BYTES: usize = 20;

/// The driver of queue 0. One EVENT is always pending; requests of all queues come beside it.
#[derive(Debug)]
pub(super) struct FirstQueue {
    queue: Virtqueue,
    requests: Requests,
    event: Option<u16>,
    /// By head: requests whose answers are wanted, and the queue whose user the answer wakes.
    awaited: BTreeMap<u16, (Ticket, Option<Arc<Setup>>)>,
    /// Answers that were not taken yet. Their heads may belong to other requests already.
    answered: BTreeMap<Ticket, Answer>,
    next_ticket: u64,
    /// A question of another queue found no room.
    lacks_room: bool,
    /// Counts the events that the device reported.
    news: Arc<AtomicU64>,
    /// The other queues, whose users may be waiting for interrupts.
    others: Vec<Arc<Setup>>,
}

/// Names a question until its answer is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// The device's answer to a request, copied: the place of the request may belong to another one by now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    status: u8,
    bytes: [u8; ANSWER_BYTES as usize],
}

/// The requests that other parts of the driver can send on queue 0.
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
    /// A read or write that cannot go another way, of at most [`FirstQueue::transfer_bytes_max`].
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
    pub(super) fn new(memory: &Memory, size: u16, geometry: &Geometry, news: Arc<AtomicU64>) -> Result<Self, Error> {
        let queue = Virtqueue::new(memory, size)?;
        let requests = Requests::new(memory, &queue, geometry)?;
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

    /// From now on, each event of the device wakes the users of these queues.
    pub(super) fn set_others(&mut self, others: Vec<Arc<Setup>>) {
        self.others = others;
    }

    /// Sends a new EVENT: a device that came back without an in-flight region may not know the old one.
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

    /// Posts an EVENT, by which the device reports what concerns queues that no thread looks at.
    pub(super) fn post_event(&mut self) {
        if self.event.is_none() {
            self.event = self.send(T_EVENT, 0, &Body::Payload(&[]));
        }
    }

    /// Sends a question. The caller can take the answer later, by the ticket; the answer wakes `user`. `None`: there is no room now.
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
                let sent = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, is_write)?;
                debug_assert_eq!(sent.len_bytes, len_bytes, "a longer transfer is asked for in pieces");
                self.kick();
                Some(sent.head)
            }
        }
    }

    /// Most bytes of one read or write on this queue.
    pub(super) fn transfer_bytes_max(&self) -> u32 {
        self.requests.transfer_bytes_max()
    }

    /// The answer to a question, if it is there.
    pub(super) fn take(&mut self, ticket: Ticket) -> Option<Answer> {
        self.answered.remove(&ticket)
    }

    /// Gives an answer up. Its place stays taken until the answer comes.
    pub(super) fn abandon(&mut self, ticket: Ticket) {
        self.awaited.retain(|_, (awaited, _)| *awaited != ticket);
        self.answered.remove(&ticket);
    }

    /// Takes the chains that came back.
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
        // First the next EVENT, then the look at this one: so nothing that comes in between is missed.
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

/// The pauses between looks at an answer that usually comes soon, up to a time limit.
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

    /// Pauses. False: the time is up.
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
