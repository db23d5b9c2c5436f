//! The device's side of a split virtqueue.

mod popped;
mod tracker;

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

pub use self::popped::{PoppedChain, UnrecordedChain};
use self::tracker::Tracker;
use super::chain::DescriptorChain;
use super::dirty_log::DirtyLog;
use super::error::QueueError;
use super::inflight::InflightQueue;
use super::recovery::{Recovered, recover};
use super::rings::{RingAddresses, Rings, UsedBytes};

/// The parameters of a vring at its start. None of them is checked yet.
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
    /// The VIRTIO features that the driver has accepted: those of the ring, and those of the device, which decide what
    /// requests the ring may hold.
    pub driver_features: u64,
    /// The address under which the dirty log knows the used ring (VHOST_USER_SET_VRING_ADDR with VHOST_VRING_F_LOG).
    pub used_log_gpa: Option<u64>,
    /// This queue's part of the in-flight region, if the front-end keeps one.
    pub inflight: Option<InflightQueue>,
}

impl QueueSetup {
    /// Whether the driver accepted VIRTIO_RING_F_EVENT_IDX.
    pub fn event_idx(&self) -> bool {
        self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }
}

/// The owner of a chain, by its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// The driver owns it, available or not.
    Free,
    /// The device owns it.
    Taken,
    /// It is in the used ring, whose index has not passed it yet: neither side may use it.
    Used,
}

/// The device's side of one split virtqueue: takes chains and returns them.
///
/// The driver writes to the rings at any time. An error means that this queue must stop, with its chains in flight.
#[derive(Debug)]
pub struct SplitQueue {
    rings: Rings,
    addresses: RingAddresses,
    next_avail: u16,
    /// The available index that was loaded last: up to it, the queue takes entries without another load.
    avail_idx: u16,
    next_used: u16,
    /// Chains that an earlier process took and did not return; the queue takes them again first.
    replay: VecDeque<u16>,
    /// The owner of each head, and the number of taken chains.
    heads: Box<[Head]>,
    in_flight: u16,
    /// The heads in the used ring that its stored index does not cover yet. Never longer than the queue.
    batch: Vec<u16>,
    tracker: Option<Tracker>,
    used_log_gpa: Option<u64>,
    event_idx: bool,
    /// `next_used` at the last call of `needs_signal`. `None`: there was none, and the driver may have missed any
    /// signal.
    signal_asked_at: Option<u16>,
}

impl SplitQueue {
    /// Checks the set-up and determines where the queue goes on.
    ///
    /// With an in-flight region that was in use, [`pop`](Self::pop) first returns the chains that an earlier process
    /// took and did not return, in the order in which they were first taken. The region then also decides the next
    /// entry, instead of `setup.next_avail`.
    ///
    /// # Errors
    ///
    /// The size or an address violates VIRTIO 1.2, 2.7, a ring is not in one region of `memory`, or the in-flight
    /// region does not belong to this queue.
    pub fn new(setup: QueueSetup, memory: &GuestMemoryMmap) -> Result<Self, QueueError> {
        let event_idx = setup.event_idx();
        let QueueSetup { size, desc_table, avail_ring, used_ring, next_avail, used_log_gpa, inflight, .. } = setup;
        let addresses = RingAddresses { desc_table, avail_ring, used_ring };
        let rings = Rings::locate(size, addresses, event_idx, memory)?;
        let next_used = rings.used_idx();
        let recovered = match &inflight {
            Some(region) => recover(region, size, next_used, next_avail)?,
            None => Recovered { next_avail, ..Recovered::default() },
        };
        let Recovered { next_avail, replay, next_counter, last_batch_head } = recovered;
        let mut heads = vec![Head::Free; usize::from(size)].into_boxed_slice();
        for &head in &replay {
            heads[usize::from(head)] = Head::Taken;
        }
        Ok(Self {
            rings,
            addresses,
            next_avail,
            avail_idx: next_avail,
            next_used,
            in_flight: replay.len() as u16,
            replay: replay.into(),
            heads,
            batch: Vec::with_capacity(usize::from(size)),
            tracker: inflight.map(|region| Tracker::new(region, next_counter, last_batch_head)),
            used_log_gpa,
            event_idx,
            signal_asked_at: None,
        })
    }

    /// Finds the rings in changed guest memory.
    ///
    /// # Errors
    ///
    /// A ring is not in one region of `memory`. The queue then keeps the previous rings: the caller may return chains
    /// there, and must take no more until this call succeeds.
    pub fn set_memory(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.rings = Rings::locate(self.rings.size(), self.addresses, self.event_idx, memory)?;
        Ok(())
    }

    /// Takes the next chain, if there is one. The caller decides what becomes of it.
    ///
    /// # Errors
    ///
    /// The available index is further away than the queue is long, or the head is not in the table or is in flight
    /// already; the entry stays where it is. The chain's descriptors are not looked at yet.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<PoppedChain<'_>>, QueueError> {
        if let Some(head) = self.replay.pop_front() {
            return Ok(Some(PoppedChain::replayed(self, head)));
        }
        let head = self.take_available()?;
        Ok(head.map(|head| PoppedChain::available(self, head)))
    }

    /// Takes the next chain, if there is one, and records it as in flight at once. Gives the chain's head, by which it
    /// is completed, and its descriptors, whose addresses are looked up in `memory`.
    ///
    /// # Errors
    ///
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn pop_recorded<'m>(
        &'m mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<(u16, DescriptorChain<'m>)>, QueueError> {
        let Some(popped) = self.pop()? else { return Ok(None) };
        let head = popped.record();
        Ok(Some((head, DescriptorChain::in_queue(memory, &self.rings, head))))
    }

    /// Takes the next of the chains that an earlier process had taken and not completed, and none that is new. `None`:
    /// none of them is left.
    pub fn pop_replay(&mut self) -> Option<PoppedChain<'_>> {
        let head = self.replay.pop_front()?;
        Some(PoppedChain::replayed(self, head))
    }

    /// Whether some of the chains to be replayed are left.
    pub fn has_replay(&self) -> bool {
        !self.replay.is_empty()
    }

    #[inline]
    fn take_available(&mut self) -> Result<Option<u16>, QueueError> {
        let size = self.rings.size();
        if self.next_avail == self.avail_idx {
            let avail_idx = self.rings.avail_idx();
            if avail_idx.wrapping_sub(self.next_avail) > size {
                return Err(QueueError::AvailIndex { avail_idx, next_avail: self.next_avail, size });
            }
            self.avail_idx = avail_idx;
            if avail_idx == self.next_avail {
                return Ok(None);
            }
        }
        let head = self.rings.avail_entry(self.next_avail);
        match self.heads.get_mut(usize::from(head)) {
            None => return Err(QueueError::HeadOutOfRange { head, size }),
            Some(state @ Head::Free) => *state = Head::Taken,
            Some(Head::Taken | Head::Used) => return Err(QueueError::HeadInFlight { head }),
        }
        self.in_flight += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Records a chain that was taken as in flight.
    #[inline]
    fn note_taken(&mut self, head: u16) {
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(head);
        }
    }

    fn is_taken(&self, head: u16) -> bool {
        self.heads.get(usize::from(head)) == Some(&Head::Taken)
    }

    /// Puts the chain that was taken last from the available ring back.
    fn put_back(&mut self, head: u16) {
        self.heads[usize::from(head)] = Head::Free;
        self.in_flight -= 1;
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Adds a chain to the used ring; the driver sees it at the next [`publish`](Self::publish). The device wrote
    /// `written_bytes` bytes of the chain's device-writable part.
    ///
    /// # Errors
    ///
    /// The chain is not in flight, and nothing was added.
    #[inline]
    pub fn add_used(&mut self, head: u16, written_bytes: u32, log: Option<&DirtyLog>) -> Result<(), QueueError> {
        match self.heads.get_mut(usize::from(head)) {
            Some(state @ Head::Taken) => *state = Head::Used,
            Some(Head::Free | Head::Used) | None => return Err(QueueError::NotInFlight { head }),
        }
        self.in_flight -= 1;
        self.batch.push(head);
        if let Some(tracker) = &mut self.tracker {
            tracker.about_to_use(head);
        }
        let entry = self.rings.set_used_entry(self.next_used, head, written_bytes);
        self.next_used = self.next_used.wrapping_add(1);
        // Write first, then mark: the front-end clears marks and then reads.
        self.mark_used(log, entry);
        Ok(())
    }

    /// Lets the driver see the chains that were returned since the last call.
    ///
    /// What the device wrote to the chains' buffers must be in `log` already. The driver may reuse the chains as soon
    /// as this has stored the index of the used ring. The caller signals afterwards, if
    /// [`needs_signal`](Self::needs_signal) returns true.
    ///
    /// One call for several chains costs less than one for each: the driver polls the line of memory that this writes.
    #[inline]
    pub fn publish(&mut self, log: Option<&DirtyLog>) {
        if self.batch.is_empty() {
            return;
        }
        let index = self.rings.set_used_idx(self.next_used);
        self.mark_used(log, index);
        if let Some(tracker) = &self.tracker {
            tracker.used(&self.batch, self.next_used);
        }
        for head in self.batch.drain(..) {
            self.heads[usize::from(head)] = Head::Free;
        }
    }

    /// Completes one chain so that the driver sees it at once.
    ///
    /// # Errors
    ///
    /// As [`add_used`](Self::add_used).
    #[inline]
    pub fn complete(&mut self, head: u16, written_bytes: u32, log: Option<&DirtyLog>) -> Result<(), QueueError> {
        self.add_used(head, written_bytes, log)?;
        self.publish(log);
        Ok(())
    }

    /// Whether [`pop`](Self::pop) would return a chain or an error. Cheap enough to be polled.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.rings.avail_idx() != self.next_avail || !self.replay.is_empty()
    }

    /// Whether the driver wants an interrupt for the chains that were returned since the last call (VIRTIO 1.2,
    /// 2.7.7.2).
    ///
    /// The first call always returns true: an earlier process may have died before it signalled.
    pub fn needs_signal(&mut self) -> bool {
        let Some(asked_at) = self.signal_asked_at.replace(self.next_used) else { return true };
        let used_since = self.next_used.wrapping_sub(asked_at);
        if used_since == 0 {
            return false;
        }
        // The driver stores what it wants and then looks at the used index; the device has stored the index and now
        // looks at what the driver wants.
        fence(Ordering::SeqCst);
        if self.event_idx {
            self.next_used.wrapping_sub(self.rings.used_event()).wrapping_sub(1) < used_since
        } else {
            self.rings.avail_flags() & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    /// Asks the driver for kicks. True: there is already work, for which no kick need come.
    pub fn enable_kicks(&mut self, log: Option<&DirtyLog>) -> bool {
        let written =
            if self.event_idx { self.rings.set_avail_event(self.next_avail) } else { self.rings.set_used_flags(0) };
        self.mark_used(log, written);
        // The driver makes chains available and then looks whether the device wants a kick; the device has asked for it
        // and now looks for chains.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Tells the driver that the device needs no kicks. The driver may still kick.
    pub fn disable_kicks(&mut self, log: Option<&DirtyLog>) {
        // With EVENT_IDX kicks stop by themselves once the driver passes the requested index.
        if !self.event_idx {
            let written = self.rings.set_used_flags(VRING_USED_F_NO_NOTIFY as u16);
            self.mark_used(log, written);
        }
    }

    /// Sets the address under which the dirty log knows the used ring from now on; `None`: the used ring is not logged.
    pub fn set_used_log_gpa(&mut self, used_log_gpa: Option<u64>) {
        self.used_log_gpa = used_log_gpa;
    }

    /// Marks the whole used ring as written. For a queue that starts while a log is in force, because an earlier
    /// process may have died between a store and its mark.
    pub fn mark_used_ring(&self, log: &DirtyLog) {
        self.mark_used(Some(log), self.rings.whole_used_ring());
    }

    /// Index of the next entry of the available ring to take: the answer to VHOST_USER_GET_VRING_BASE. Chains that are
    /// still to be replayed count as taken.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// How many chains are taken and not returned, including those to be replayed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.rings.size()
    }

    #[inline]
    fn mark_used(&self, log: Option<&DirtyLog>, bytes: UsedBytes) {
        if let (Some(log), Some(gpa)) = (log, self.used_log_gpa) {
            log.mark(gpa.saturating_add(bytes.offset as u64), bytes.len as u64);
        }
    }
}
