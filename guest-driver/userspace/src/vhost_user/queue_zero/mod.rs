//! Queue 0, which is always a virtqueue: for rare and slow requests, and for requests about other queues.

mod news;
mod request;
mod shared;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringpass_guest_abi::probe::{Device, ProbeAnswer};
use ringpass_guest_abi::request::{EventAnswer, T_EVENT, T_PROBE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

pub(super) use self::news::News;
pub(super) use self::request::{Answer, QueueZeroRequest, RequestId};
pub(super) use self::shared::SharedQueueZero;
use super::Error;
use super::backoff::Backoff;
use super::config::Geometry;
use super::memory::Memory;
use super::requests::{Body, Requests};
use super::virtqueue::{Virtqueue, Vring};

/// How long the driver waits for the answer to PROBE before it goes on with an ordinary disk. The device answers when it
/// has its disk, for which it may have to wait. A late answer is as good.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the driver waits before it sends EVENT again to a process that does not know it, because that process gives no
/// rings. Each further refusal doubles the wait.
const EVENT_RETRY_FIRST: Duration = Duration::from_secs(1);
const EVENT_RETRY_MAX: Duration = Duration::from_secs(60);

/// The driver of queue 0. One EVENT is always pending; the requests of all queues come in addition.
#[derive(Debug)]
pub(super) struct QueueZero {
    queue: Virtqueue,
    requests: Requests,
    /// The head of the pending PROBE.
    probe: Option<u16>,
    /// PROBE is to be sent when there is room.
    is_probe_wanted: bool,
    /// The device's description of its rings. `None`: an ordinary disk, or PROBE is pending.
    device: Option<Device>,
    /// The head of the pending EVENT.
    event: Option<u16>,
    /// How often in a row the device has not known EVENT, and when the driver sends it again, if that lies ahead.
    event_refusals: u32,
    event_at: Option<Instant>,
    /// By head: the requests that the device has, except PROBE and EVENT.
    pending: BTreeMap<u16, Pending>,
    /// Answers that the driver has not taken yet. Other requests may already use their heads.
    answers: BTreeMap<RequestId, Answer>,
    next_id: u64,
    /// A request of another queue found no room: that queue tries again when there is room.
    is_room_wanted: bool,
    news: Arc<News>,
    /// The other queues, whose users may be waiting for interrupts.
    other_queues: Vec<Arc<Vring>>,
}

/// A request that the device has.
#[derive(Debug)]
struct Pending {
    id: RequestId,
    /// The queue whose user the answer wakes.
    for_queue: Option<Arc<Vring>>,
}

impl QueueZero {
    pub(super) fn new(memory: &Memory, size: u16, geometry: &Geometry, news: Arc<News>) -> Result<Self, Error> {
        let queue = Virtqueue::new(memory, size)?;
        let requests = Requests::new(memory, &queue, geometry)?;
        Ok(Self {
            queue,
            requests,
            probe: None,
            is_probe_wanted: false,
            device: None,
            event: None,
            event_refusals: 0,
            event_at: None,
            pending: BTreeMap::new(),
            answers: BTreeMap::new(),
            next_id: 0,
            is_room_wanted: false,
            news,
            other_queues: Vec::new(),
        })
    }

    /// From now on, each event of the device wakes the users of these queues.
    pub(super) fn set_other_queues(&mut self, other_queues: Vec<Arc<Vring>>) {
        self.other_queues = other_queues;
    }

    pub(super) fn vring(&self) -> &Arc<Vring> {
        self.queue.vring()
    }

    /// Asks the device for its description, and waits for a while for the answer.
    pub(super) fn probe(&mut self, patience: Duration) -> Result<(), Error> {
        self.probe_again();
        let mut backoff = Backoff::new(patience.min(PROBE_TIMEOUT));
        loop {
            self.reap()?;
            if !self.is_probing() || !backoff.pause() {
                return Ok(());
            }
        }
    }

    /// Asks the device for its description without waiting for the answer, unless it has been asked already: now, or when
    /// the queue has room.
    pub(super) fn probe_again(&mut self) {
        if self.probe.is_none() {
            self.probe = self.make_available(T_PROBE, &Body::Payload(&[]));
            self.is_probe_wanted = self.probe.is_none();
        }
    }

    /// Whether the device has not answered PROBE yet.
    pub(super) fn is_probing(&self) -> bool {
        self.probe.is_some() || self.is_probe_wanted
    }

    /// The device's description of its rings, if it has answered and offers some.
    pub(super) fn device(&self) -> Option<Device> {
        self.device
    }

    /// As if the device had given this answer to PROBE.
    #[cfg(test)]
    pub(super) fn set_device(&mut self, device: Device) {
        self.device = Some(device);
    }

    fn handle_probe(&mut self, head: u16) {
        let is_ok = u32::from(self.requests.status(head)) == VIRTIO_BLK_S_OK;
        let answer = is_ok.then(|| ProbeAnswer::from_prefix(&self.requests.answer(head)));
        self.device =
            answer.and_then(|answer| answer.check().inspect_err(|error| tracing::info!("no rings: {error}")).ok());
        if self.device.is_some() {
            self.post_event();
        }
        // Queues may have been waiting for this answer before they ask for rings.
        self.news.probes.fetch_add(1, Ordering::Release);
        self.wake_other_queues();
    }

    /// Sends an EVENT, which the device completes to report what concerns queues that no thread looks at.
    fn post_event(&mut self) {
        if self.event.is_none() {
            self.event = self.make_available(T_EVENT, &Body::Payload(&[]));
        }
        // Without room again, when there is some.
        self.event_at = self.event.is_none().then(Instant::now);
    }

    /// Sends a request, and returns the id by which the caller takes the answer later. The answer wakes the user of
    /// `for_queue`. `None`: there is no room now.
    pub(super) fn send(&mut self, request: &QueueZeroRequest, for_queue: Option<&Arc<Vring>>) -> Option<RequestId> {
        let Some(head) = self.make_request_available(request) else {
            self.is_room_wanted |= for_queue.is_some();
            return None;
        };
        Some(self.register(head, for_queue.cloned()))
    }

    /// Keeps the answer of the request with this head when it comes.
    fn register(&mut self, head: u16, for_queue: Option<Arc<Vring>>) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.pending.insert(head, Pending { id, for_queue });
        id
    }

    fn make_request_available(&mut self, request: &QueueZeroRequest) -> Option<u16> {
        match *request {
            QueueZeroRequest::Flush => self.make_available(VIRTIO_BLK_T_FLUSH, &Body::Empty),
            QueueZeroRequest::Discard { offset_bytes, len_bytes } => {
                self.make_available(VIRTIO_BLK_T_DISCARD, &Body::Range(&range(offset_bytes, len_bytes, 0)))
            }
            QueueZeroRequest::WriteZeroes { offset_bytes, len_bytes, unmap } => {
                let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
                self.make_available(VIRTIO_BLK_T_WRITE_ZEROES, &Body::Range(&range(offset_bytes, len_bytes, flags)))
            }
            QueueZeroRequest::GetId => self.make_available(VIRTIO_BLK_T_GET_ID, &Body::Payload(&[])),
            QueueZeroRequest::Transfer { offset_bytes, gpa, len_bytes, is_write } => {
                let sent = self.requests.transfer(&mut self.queue, offset_bytes, gpa, len_bytes, is_write)?;
                debug_assert_eq!(sent.len_bytes, len_bytes, "callers send a longer transfer in parts");
                self.kick();
                Some(sent.head)
            }
        }
    }

    /// Maximum number of bytes of one read or write on this queue.
    pub(super) fn transfer_bytes_max(&self) -> u32 {
        self.requests.transfer_bytes_max()
    }

    /// The answer to a request, if the device has given it.
    pub(super) fn take_answer(&mut self, id: RequestId) -> Option<Answer> {
        self.answers.remove(&id)
    }

    /// Discards the answer to a request. The request keeps its descriptors until the device completes it.
    pub(super) fn discard_answer(&mut self, id: RequestId) {
        self.pending.retain(|_, pending| pending.id != id);
        self.answers.remove(&id);
    }

    /// Takes the chains that the device has returned.
    pub(super) fn reap(&mut self) -> Result<(), Error> {
        while let Some(head) = self.queue.reap()? {
            if self.probe == Some(head) {
                self.probe = None;
                self.handle_probe(head);
            } else if self.event == Some(head) {
                self.event = None;
                self.handle_event(head);
            } else if let Some(Pending { id, for_queue }) = self.pending.remove(&head) {
                let answer = Answer { status: self.requests.status(head), bytes: self.requests.answer(head) };
                self.answers.insert(id, answer);
                if let Some(vring) = for_queue {
                    let _ = vring.call().write(1);
                }
            }
            if std::mem::take(&mut self.is_room_wanted) {
                self.wake_other_queues();
            }
        }
        if self.is_probe_wanted {
            self.probe_again();
        }
        if self.event_at.is_some_and(|at| Instant::now() >= at) {
            self.post_event();
        }
        Ok(())
    }

    /// As if the wait after a refused EVENT were over.
    #[cfg(test)]
    pub(super) fn end_wait_for_event(&mut self) {
        self.event_at = self.event_at.map(|_| Instant::now());
    }

    fn handle_event(&mut self, head: u16) {
        if u32::from(self.requests.status(head)) != VIRTIO_BLK_S_OK {
            let wait = EVENT_RETRY_FIRST * (1 << self.event_refusals.min(6));
            self.event_at = Some(Instant::now() + wait.min(EVENT_RETRY_MAX));
            self.event_refusals += 1;
            return;
        }
        self.event_refusals = 0;
        let answer = self.requests.answer(head);
        // Post the next EVENT before handling this one, so that the driver misses nothing in between.
        self.post_event();
        if EventAnswer::from_bytes(answer[..EventAnswer::BYTES].try_into().expect("8 bytes")).events.get() != 0 {
            self.news.events.fetch_add(1, Ordering::Release);
            self.wake_other_queues();
        }
    }

    pub(super) fn wake_other_queues(&self) {
        for vring in &self.other_queues {
            let _ = vring.call().write(1);
        }
    }

    fn make_available(&mut self, kind: u32, body: &Body<'_>) -> Option<u16> {
        let head = self.requests.send(&mut self.queue, kind, body)?;
        self.kick();
        Some(head)
    }

    fn kick(&self) {
        if self.queue.wants_kick() {
            self.queue.kick();
        }
    }
}

/// A `struct virtio_blk_discard_write_zeroes` (VIRTIO 1.2, 5.2.6).
fn range(offset_bytes: u64, len_bytes: u64, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&(offset_bytes / 512).to_le_bytes());
    range[8..12].copy_from_slice(&u32::try_from(len_bytes / 512).unwrap_or(u32::MAX).to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}
