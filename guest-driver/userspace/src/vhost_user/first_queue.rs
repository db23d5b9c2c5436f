//! Queue 0, which always is a virtqueue: what is rare and slow, and the requests about other queues.

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
use super::requests::{Body, Requests};
use super::virtqueue::{Setup, Virtqueue};

/// How long a device may take to say what it is. After that it is an ordinary disk.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to spin for an answer, and then to sleep at most between two looks.
const SPIN: Duration = Duration::from_micros(50);
const SLEEP_MAX: Duration = Duration::from_millis(1);
const ID_BYTES: usize = 20;

/// The driver of queue 0. One request at a time, and an EVENT that is always pending.
#[derive(Debug)]
pub(super) struct FirstQueue {
    queue: Virtqueue,
    requests: Requests,
    event: Option<u16>,
    /// A probe that was given up, and may still come back.
    abandoned: Vec<u16>,
    /// Counts what the device told of.
    news: Arc<AtomicU64>,
    /// The other queues, whose users may be waiting for interrupts.
    others: Vec<Arc<Setup>>,
}

impl FirstQueue {
    pub(super) fn new(memory: &Memory, size: u16, news: Arc<AtomicU64>) -> Result<Self, Error> {
        let queue = Virtqueue::new(memory, size)?;
        let requests = Requests::new(memory, &queue)?;
        Ok(Self { queue, requests, event: None, abandoned: Vec::new(), news, others: Vec::new() })
    }

    /// Has the users of these queues woken up when the device tells of something.
    pub(super) fn set_others(&mut self, others: Vec<Arc<Setup>>) {
        self.others = others;
    }

    /// A device that came back without an in-flight region may not know of the EVENT any more.
    pub(super) fn renew_event(&mut self) {
        self.abandoned.extend(self.event.take());
        self.post_event();
    }

    pub(super) fn setup(&self) -> &Arc<Setup> {
        self.queue.setup()
    }

    /// What the device is. `None`: an ordinary disk.
    pub(super) fn probe(&mut self) -> Result<Option<Device>, Error> {
        let Some(head) = self.send(T_PROBE, 0, &Body::Payload(&[])) else { return Ok(None) };
        if !self.await_chain(head, Some(PROBE_TIMEOUT))? {
            self.abandoned.push(head);
            return Ok(None);
        }
        if u32::from(self.requests.status(head)) != VIRTIO_BLK_S_OK {
            return Ok(None);
        }
        let answer = ProbeAnswer::from_prefix(&self.requests.answer(head));
        Ok(answer.check().inspect_err(|error| tracing::info!("no rings: {error}")).ok())
    }

    /// Has the device tell of what concerns queues that nobody looks at.
    pub(super) fn post_event(&mut self) {
        if self.event.is_none() {
            self.event = self.send(T_EVENT, 0, &Body::Payload(&[]));
        }
    }

    pub(super) fn detach(&mut self, queue: u16) -> Result<(), Error> {
        let payload = DetachPayload { queue: queue.into(), ..DetachPayload::default() }.to_bytes();
        self.request("DETACH", T_DETACH, 0, &Body::Payload(&payload)).map(drop)
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.request("flush", VIRTIO_BLK_T_FLUSH, 0, &Body::Nothing).map(drop)
    }

    pub(super) fn discard(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), Error> {
        self.range("discard", VIRTIO_BLK_T_DISCARD, offset_bytes, len_bytes, 0)
    }

    pub(super) fn write_zeroes(&mut self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> Result<(), Error> {
        let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        self.range("write zeroes", VIRTIO_BLK_T_WRITE_ZEROES, offset_bytes, len_bytes, flags)
    }

    /// Up to 20 characters.
    pub(super) fn serial(&mut self) -> Result<String, Error> {
        let head = self.request("get id", VIRTIO_BLK_T_GET_ID, 0, &Body::Payload(&[]))?;
        let answer = self.requests.answer(head);
        let id: Vec<u8> = answer[..ID_BYTES].iter().copied().take_while(|&byte| byte != 0).collect();
        Ok(String::from_utf8_lossy(&id).into_owned())
    }

    /// A read or write that cannot go another way.
    pub(super) fn transfer(
        &mut self,
        offset_bytes: u64,
        gpa: u64,
        len_bytes: u32,
        is_write: bool,
    ) -> Result<(), Error> {
        let head = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, is_write);
        let head = head.ok_or_else(|| Error::BrokenDevice("queue 0 is full of what nobody answers".into()))?;
        self.kick();
        self.finish(if is_write { "write" } else { "read" }, head).map(drop)
    }

    /// Takes what came back: EVENT, above all.
    pub(super) fn service(&mut self) -> Result<(), Error> {
        self.reap(None).map(drop)
    }

    fn range(
        &mut self,
        what: &'static str,
        kind: u32,
        offset_bytes: u64,
        len_bytes: u64,
        flags: u32,
    ) -> Result<(), Error> {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&(offset_bytes / 512).to_le_bytes());
        range[8..12].copy_from_slice(&u32::try_from(len_bytes / 512).unwrap_or(u32::MAX).to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.request(what, kind, 0, &Body::Range(&range)).map(drop)
    }

    fn request(&mut self, what: &'static str, kind: u32, offset_bytes: u64, body: &Body<'_>) -> Result<u16, Error> {
        let full = || Error::BrokenDevice("queue 0 is full of what nobody answers".into());
        let head = self.send(kind, offset_bytes, body).ok_or_else(full)?;
        self.finish(what, head)
    }

    fn finish(&mut self, what: &'static str, head: u16) -> Result<u16, Error> {
        self.await_chain(head, None)?;
        match self.requests.status(head) {
            status if u32::from(status) == VIRTIO_BLK_S_OK => Ok(head),
            status => Err(Error::Status { what, status }),
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

    /// Waits until a chain has come back. A device that is gone is waited for as well. False: not in this time.
    fn await_chain(&mut self, head: u16, timeout: Option<Duration>) -> Result<bool, Error> {
        let start = Instant::now();
        let mut pause = SPIN;
        loop {
            if self.reap(Some(head))? {
                return Ok(true);
            }
            let waited = start.elapsed();
            if timeout.is_some_and(|timeout| waited >= timeout) {
                return Ok(false);
            }
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                thread::sleep(pause);
                pause = (pause * 2).min(SLEEP_MAX);
            }
        }
    }

    /// Takes chains that came back. True: `wanted` was among them.
    fn reap(&mut self, wanted: Option<u16>) -> Result<bool, Error> {
        let mut found = false;
        while let Some(head) = self.queue.reap()? {
            if self.event == Some(head) {
                self.event = None;
                let answer = self.requests.answer(head);
                // The next one first, then the look: nothing that comes in between is missed.
                self.post_event();
                if EventAnswer::from_bytes(answer[..EventAnswer::BYTES].try_into().expect("8 bytes")).events.get() != 0
                {
                    self.news.fetch_add(1, Ordering::Release);
                    for other in &self.others {
                        let _ = other.call().write(1);
                    }
                }
            } else if wanted == Some(head) {
                found = true;
            } else {
                self.abandoned.retain(|&other| other != head);
            }
        }
        Ok(found)
    }
}
