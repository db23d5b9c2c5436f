//! The device's side of a split virtqueue.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as RingError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::chain::DescriptorChain;
use super::dirty_log::DirtyLog;
use super::error::QueueError;
use super::inflight::InflightQueue;
use super::recovery::{Recovered, recover};

/// Sizes in bytes (VIRTIO 1.2, 2.7): of a descriptor; of the available ring without its entries, and of an entry; of
/// the used ring in front of its entries, of an entry, and of `avail_event` behind them.
const DESCRIPTOR_BYTES: u64 = 16;
const AVAIL_HEADER_AND_EVENT_BYTES: u64 = 6;
const AVAIL_ENTRY_BYTES: u64 = 2;
const USED_HEADER_BYTES: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;
const USED_EVENT_BYTES: u64 = 2;
/// Offset of `idx` in the used ring, and the size of `flags`, `idx` and `avail_event`.
const USED_IDX_OFFSET: u64 = 2;
const U16_BYTES: u64 = 2;

const DESC_TABLE: &str = "descriptor table";
const AVAIL_RING: &str = "available ring";
const USED_RING: &str = "used ring";

/// Everything that is known of a vring when it starts. Nothing of it is checked yet.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// Number of descriptors (VHOST_USER_SET_VRING_NUM): a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc_table: GuestAddress,
    /// Guest-physical address of the available ring.
    pub avail_ring: GuestAddress,
    /// Guest-physical address of the used ring.
    pub used_ring: GuestAddress,
    /// Index of the next available entry to take (VHOST_USER_SET_VRING_BASE).
    pub next_avail: u16,
    /// Whether VIRTIO_RING_F_EVENT_IDX was accepted.
    pub event_idx: bool,
    /// Where the used ring is for the dirty log (VHOST_USER_SET_VRING_ADDR with VHOST_VRING_F_LOG).
    pub used_log_gpa: Option<u64>,
    /// This queue's part of the in-flight region, if the front-end keeps one.
    pub inflight: Option<InflightQueue>,
}

/// The device's side of one split virtqueue: takes chains, gives them back.
///
/// The memory is given to each call, because the front-end may change it between two. The rings are written by the
/// driver at any time; an error means that this queue must stop, with what is in flight.
#[derive(Debug)]
pub struct SplitQueue {
    ring: Queue,
    desc_table: GuestAddress,
    avail_ring: GuestAddress,
    /// Taken by an earlier process and not given back: to be taken again first.
    replay: VecDeque<u16>,
    /// Which heads are taken and not given back, and how many.
    is_in_flight: Box<[bool]>,
    in_flight: u16,
    tracker: Option<Tracker>,
    used_log_gpa: Option<u64>,
    /// Something may have been given back since `needs_signal` was last asked; it was never asked.
    is_signal_due: bool,
    is_first_signal: bool,
}

impl SplitQueue {
    /// Checks the set-up and finds out where the queue goes on.
    ///
    /// With an in-flight region that was in use, [`pop`](Self::pop) first gives the chains that an earlier process had
    /// taken and not given back, in the order in which they were first taken; the region then also decides what
    /// entry comes next, not `setup.next_avail`.
    ///
    /// # Errors
    ///
    /// The size or an address breaks the rules of VIRTIO 1.2, 2.7, a ring is not all in `memory`, or the in-flight
    /// region does not belong to this queue.
    pub fn new<M: GuestMemory>(setup: QueueSetup, memory: &M) -> Result<Self, QueueError> {
        let mut ring = checked_ring(&setup, memory)?;
        let used_idx = ring.used_idx(memory, Ordering::Acquire).map_err(unreachable(USED_RING))?.0;
        let recovered = match &setup.inflight {
            Some(region) => recover(region, setup.size, used_idx, setup.next_avail)?,
            None => Recovered { next_avail: setup.next_avail, ..Recovered::default() },
        };
        ring.set_next_used(used_idx);
        ring.set_next_avail(recovered.next_avail);
        let mut is_in_flight = vec![false; usize::from(setup.size)].into_boxed_slice();
        for &head in &recovered.replay {
            is_in_flight[usize::from(head)] = true;
        }
        Ok(Self {
            ring,
            desc_table: setup.desc_table,
            avail_ring: setup.avail_ring,
            in_flight: recovered.replay.len() as u16,
            replay: recovered.replay.into(),
            is_in_flight,
            tracker: setup.inflight.map(|region| Tracker {
                region,
                next_counter: recovered.next_counter,
                last_batch_head: recovered.last_batch_head,
            }),
            used_log_gpa: setup.used_log_gpa,
            is_signal_due: true,
            is_first_signal: true,
        })
    }

    /// Takes the next chain, if there is one. It is recorded as in flight before this returns.
    ///
    /// # Errors
    ///
    /// The available index is further away than the queue is long, the head is not in the table or is in flight
    /// already, or the ring is not in `memory`. The chain's descriptors are not looked at yet.
    pub fn pop<'m, M>(&mut self, memory: &'m M) -> Result<Option<DescriptorChain<'m, M>>, QueueError>
    where
        M: GuestMemory<Bitmap = ()>,
    {
        let head = match self.replay.pop_front() {
            Some(head) => head,
            None => match self.take_available(memory)? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        Ok(Some(DescriptorChain::new(memory, self.desc_table, self.ring.size(), head)))
    }

    fn take_available<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<u16>, QueueError> {
        let next_avail = self.ring.next_avail();
        let size = self.ring.size();
        let available = match self.ring.iter(memory) {
            Ok(mut available) => available.next(),
            Err(RingError::InvalidAvailRingIndex) => {
                let avail_idx = self.ring.avail_idx(memory, Ordering::Relaxed).map_err(unreachable(AVAIL_RING))?.0;
                return Err(QueueError::AvailIndex { avail_idx, next_avail, size });
            }
            Err(error) => return Err(unreachable(AVAIL_RING)(error)),
        };
        let Some(head) = available.map(|chain| chain.head_index()) else { return Ok(None) };
        let Some(is_in_flight) = self.is_in_flight.get_mut(usize::from(head)) else {
            self.ring.set_next_avail(next_avail);
            return Err(QueueError::HeadOutOfRange { head, size });
        };
        if *is_in_flight {
            self.ring.set_next_avail(next_avail);
            return Err(QueueError::HeadInFlight { head });
        }
        *is_in_flight = true;
        self.in_flight += 1;
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(head);
        }
        Ok(Some(head))
    }

    /// Gives a chain back to the driver: `written_bytes` bytes of its device-writable part were written.
    ///
    /// What the device wrote to the chain's buffers must be in `log` already. The driver may reuse the chain as soon as
    /// this has stored the index of the used ring. The caller signals afterwards, if
    /// [`needs_signal`](Self::needs_signal) says so.
    ///
    /// # Errors
    ///
    /// The chain is not in flight, or the used ring is not in `memory`: nothing was given back.
    pub fn complete<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written_bytes: u32,
        log: Option<&DirtyLog>,
    ) -> Result<(), QueueError> {
        if !self.is_in_flight.get(usize::from(head)).is_some_and(|&is_in_flight| is_in_flight) {
            return Err(QueueError::NotInFlight { head });
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.about_to_use(head);
        }
        let entry = u64::from(self.ring.next_used() % self.ring.size());
        self.ring.add_used(memory, head, written_bytes).map_err(unreachable(USED_RING))?;
        self.log_used(log, USED_HEADER_BYTES + entry * USED_ENTRY_BYTES, USED_ENTRY_BYTES);
        self.log_used(log, USED_IDX_OFFSET, U16_BYTES);
        if let Some(tracker) = &mut self.tracker {
            tracker.used(head, self.ring.next_used());
        }
        self.is_in_flight[usize::from(head)] = false;
        self.in_flight -= 1;
        self.is_signal_due = true;
        Ok(())
    }

    /// Whether [`pop`](Self::pop) would have something to say: a chain or an error. One load of the available index.
    ///
    /// # Errors
    ///
    /// The ring is not in `memory`.
    pub fn has_work<M: GuestMemory>(&self, memory: &M) -> Result<bool, QueueError> {
        let avail_idx = self.ring.avail_idx(memory, Ordering::Acquire).map_err(unreachable(AVAIL_RING))?.0;
        Ok(avail_idx != self.ring.next_avail() || !self.replay.is_empty())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call (VIRTIO 1.2, 2.7.7.2).
    ///
    /// The first call says yes in any case: an earlier process may have died before it signalled.
    ///
    /// # Errors
    ///
    /// The ring is not in `memory`.
    pub fn needs_signal<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.is_signal_due) {
            return Ok(false);
        }
        // With EVENT_IDX this also begins the count of what was given back since.
        let is_wanted = self.ring.needs_notification(memory).map_err(unreachable(AVAIL_RING))?;
        if std::mem::take(&mut self.is_first_signal) {
            return Ok(true);
        }
        if self.ring.event_idx_enabled() {
            return Ok(is_wanted);
        }
        // The driver sets the flag and then looks at the used index; we have stored the index and then look at the flag.
        fence(Ordering::SeqCst);
        let flags: u16 = memory
            .load(self.avail_ring, Ordering::Relaxed)
            .map_err(|source| QueueError::Unreachable { ring: AVAIL_RING, source })?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks the driver for kicks. True: there is work already, for which no kick need come.
    ///
    /// # Errors
    ///
    /// A ring is not in `memory`.
    pub fn enable_kicks<M: GuestMemory>(&mut self, memory: &M, log: Option<&DirtyLog>) -> Result<bool, QueueError> {
        let has_work = self.ring.enable_notification(memory).map_err(unreachable(USED_RING))?;
        self.log_kicks(log);
        Ok(has_work || !self.replay.is_empty())
    }

    /// Tells the driver that no kicks are needed. It may kick all the same.
    ///
    /// # Errors
    ///
    /// The used ring is not in `memory`.
    pub fn disable_kicks<M: GuestMemory>(&mut self, memory: &M, log: Option<&DirtyLog>) -> Result<(), QueueError> {
        self.ring.disable_notification(memory).map_err(unreachable(USED_RING))?;
        self.log_kicks(log);
        Ok(())
    }

    /// Where the used ring is for the dirty log from now on; `None`: it is not logged.
    pub fn set_used_log_gpa(&mut self, used_log_gpa: Option<u64>) {
        self.used_log_gpa = used_log_gpa;
    }

    /// Marks the whole used ring as written: when a queue starts while a log is kept, because an earlier process may have
    /// died between a store and its mark.
    pub fn mark_used_ring(&self, log: &DirtyLog) {
        self.log_used(Some(log), 0, used_ring_bytes(self.ring.size()));
    }

    /// Index of the next entry of the available ring to take: the answer to VHOST_USER_GET_VRING_BASE. Chains that are
    /// still to be replayed count as taken.
    pub fn next_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    /// How many chains are taken and not given back, those to be replayed included.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    fn log_kicks(&self, log: Option<&DirtyLog>) {
        if self.ring.event_idx_enabled() {
            let entries_bytes = u64::from(self.ring.size()) * USED_ENTRY_BYTES;
            self.log_used(log, USED_HEADER_BYTES + entries_bytes, U16_BYTES);
        } else {
            self.log_used(log, 0, U16_BYTES);
        }
    }

    fn log_used(&self, log: Option<&DirtyLog>, offset_bytes: u64, len_bytes: u64) {
        if let (Some(log), Some(gpa)) = (log, self.used_log_gpa) {
            log.mark(gpa.saturating_add(offset_bytes), len_bytes);
        }
    }
}

/// Writes this queue's part of the in-flight region.
#[derive(Debug)]
struct Tracker {
    region: InflightQueue,
    next_counter: u64,
    last_batch_head: u16,
}

impl Tracker {
    /// A chain was taken. Should we die before the last store, it is simply available still.
    fn taken(&mut self, head: u16) {
        self.region.set_counter(head, self.next_counter);
        self.next_counter = self.next_counter.wrapping_add(1);
        self.region.set_in_flight(head, true);
    }

    /// A chain is to be put into the used ring. Until the ring's index moves, this means nothing.
    fn about_to_use(&mut self, head: u16) {
        self.region.set_next(head, self.last_batch_head);
        self.region.set_last_batch_head(head);
        self.last_batch_head = head;
    }

    /// A chain is in the used ring, whose index is `used_idx` now.
    fn used(&mut self, head: u16, used_idx: u16) {
        self.region.set_in_flight(head, false);
        self.region.set_used_idx(used_idx);
    }
}

/// The ring with the addresses of `setup`, checked.
fn checked_ring<M: GuestMemory>(setup: &QueueSetup, memory: &M) -> Result<Queue, QueueError> {
    let size = setup.size;
    let mut ring = Queue::new(size).map_err(|_| QueueError::Size { size })?;
    let entries = u64::from(size);
    let avail_bytes = AVAIL_HEADER_AND_EVENT_BYTES + entries * AVAIL_ENTRY_BYTES;
    let areas = [
        (DESC_TABLE, setup.desc_table, 16, entries * DESCRIPTOR_BYTES, Permissions::Read),
        (AVAIL_RING, setup.avail_ring, 2, avail_bytes, Permissions::Read),
        (USED_RING, setup.used_ring, 4, used_ring_bytes(size), Permissions::Write),
    ];
    for (name, gpa, alignment_bytes, len_bytes, access) in areas {
        if !gpa.0.is_multiple_of(alignment_bytes) {
            return Err(QueueError::Misaligned { ring: name, gpa: gpa.0, alignment_bytes });
        }
        // At most 512 KiB.
        if !memory.check_range(gpa, len_bytes as usize, access) {
            return Err(QueueError::OutsideMemory { ring: name, gpa: gpa.0, len_bytes });
        }
    }
    let misaligned = |_| QueueError::Size { size };
    ring.try_set_desc_table_address(setup.desc_table).map_err(misaligned)?;
    ring.try_set_avail_ring_address(setup.avail_ring).map_err(misaligned)?;
    ring.try_set_used_ring_address(setup.used_ring).map_err(misaligned)?;
    ring.set_event_idx(setup.event_idx);
    ring.set_ready(true);
    Ok(ring)
}

fn used_ring_bytes(size: u16) -> u64 {
    USED_HEADER_BYTES + u64::from(size) * USED_ENTRY_BYTES + USED_EVENT_BYTES
}

/// The error of an access to a ring whose address was valid when the queue started.
fn unreachable(ring: &'static str) -> impl Fn(RingError) -> QueueError {
    move |error| match error {
        RingError::GuestMemory(source) => QueueError::Unreachable { ring, source },
        other => QueueError::Unreachable { ring, source: GuestMemoryError::IOError(std::io::Error::other(other)) },
    }
}
