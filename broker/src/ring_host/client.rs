//! The engine's side of a ring host: memory, and rings as values.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringpass_guest_abi::{FixedAddressing, RingLayout};
use vmm_sys_util::eventfd::EventFd;

use super::channel::Channel;
use super::control::{RingControl, RingEvents, RingOwner};
use super::message::{Answer, Control, Encoded, Order, RingId, RingSpec};
use super::refused::Refused;
use crate::memory::{IOVA_BASE, RegionConfig};
use crate::ring::{RingConfig, RingEnd, borrow_eventfd};

/// The time between two questions whether an answer is still wanted.
const LOOK: Duration = Duration::from_millis(2);
/// How long a host may take to start: a hundred times as long as on a busy machine.
pub(super) const START_PATIENCE: Duration = Duration::from_secs(60);

/// Orders to a ring host: about the guest's memory, and for new rings. For one thread, which may wait: pinning takes
/// half a second for each GiB.
#[derive(Debug)]
pub(crate) struct RingClient {
    orders: Channel,
    control: Arc<RingControl>,
    next_number: u64,
    /// The files of the regions that are pinned, with their numbers. The host takes files with the same number for the
    /// same file. A file that is here stays open, so no other file has its address.
    files: Vec<(Arc<File>, u64)>,
}

/// Why memory is not pinned.
#[derive(Debug)]
pub(crate) enum PinError {
    /// The caller does not want it any more.
    NotWanted,
    /// The host cannot do it.
    Refused(Refused),
}

/// Where a ring is to be, and what it signals.
#[derive(Debug)]
pub(crate) struct NewRing<'e> {
    pub(crate) config: RingConfig,
    pub(crate) rings_gpa: u64,
    pub(crate) sqes_gpa: u64,
    pub(crate) doorbell: &'e EventFd,
    pub(crate) call: Option<&'e EventFd>,
}

/// A ring that a host runs for the engine. Closed when dropped.
#[derive(Debug)]
pub(crate) struct HostedRing {
    id: RingId,
    layout: RingLayout,
    addressing: FixedAddressing,
    end: RingEnd,
    control: Arc<RingControl>,
}

/// Takes the engine's ends of the three sockets, once the host has started. It waits for that for at most `patience`.
pub(super) fn open(
    [orders, control, events]: [Channel; 3],
    patience: Duration,
) -> Result<(RingClient, RingEvents), String> {
    let control = Arc::new(RingControl::new(control));
    let client = RingClient { orders, control: Arc::clone(&control), next_number: 0, files: Vec::new() };
    let end = Instant::now() + patience;
    // A signal ends a wait, too.
    while matches!(client.orders.wait(Some(end.saturating_duration_since(Instant::now()))), Ok(false)) {
        if Instant::now() >= end {
            return Err(format!("it is not ready after {} s", patience.as_secs()));
        }
    }
    match client.orders.receive().map(|packet| packet.map(Answer::decode)) {
        Ok(Some(Ok(Answer::Done))) => Ok((client, RingEvents::new(events, control))),
        Ok(Some(Ok(Answer::Refused(refused)))) => Err(refused.why),
        other => Err(format!("it ended before it was ready ({other:?})")),
    }
}

impl RingClient {
    pub(crate) fn control(&self) -> &Arc<RingControl> {
        &self.control
    }

    /// Pins guest RAM for rings on `disk`. Nothing may be pinned. Gives up when `is_wanted` says no.
    pub(crate) fn pin(
        &mut self,
        disk: BorrowedFd<'_>,
        regions: &[RegionConfig],
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), PinError> {
        let files = self.send_regions(regions);
        let number = self.number();
        self.send(&Order::Pin { number, disk });
        self.await_memory(number, files, is_wanted)
    }

    /// Gives the rings that run these regions in place of the former ones. Gives up when `is_wanted` says no.
    pub(crate) fn set_memory(
        &mut self,
        regions: &[RegionConfig],
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), PinError> {
        let files = self.send_regions(regions);
        let number = self.number();
        self.send(&Order::SetMemory { number });
        self.await_memory(number, files, is_wanted)
    }

    /// Waits until no I/O uses memory that was taken away. False: the host does not wait longer.
    pub(crate) fn await_drain(&mut self) -> bool {
        self.send(&Order::AwaitDrain);
        self.answer() == Answer::Done
    }

    /// Makes a ring over the pinned memory.
    pub(crate) fn make_ring(&mut self, ring: &NewRing<'_>, owner: RingOwner) -> Result<HostedRing, Refused> {
        let end = RingEnd::default();
        let id = self.control.expect_ring(owner, &end);
        self.send(&Order::MakeRing(RingSpec {
            id,
            rings_gpa: ring.rings_gpa,
            sqes_gpa: ring.sqes_gpa,
            sq_entries: ring.config.sq_entries,
            cq_entries: ring.config.cq_entries,
            doorbell: borrow_eventfd(ring.doorbell),
            call: ring.call.map(borrow_eventfd),
        }));
        match self.answer() {
            Answer::Made { layout, slot_shift } => {
                let addressing = FixedAddressing::new(IOVA_BASE, slot_shift);
                let addressing = addressing.unwrap_or_else(|_| self.control.lost(&"it named impossible slots"));
                Ok(HostedRing { id, layout, addressing, end, control: Arc::clone(&self.control) })
            }
            Answer::Refused(refused) => {
                self.control.forget_ring(id);
                Err(refused)
            }
            other => self.control.lost(&format_args!("it answered {other:?}")),
        }
    }

    /// Unpins the memory. Rings that run keep theirs until their end.
    pub(crate) fn unpin(&mut self) {
        self.send(&Order::Unpin);
        self.answer();
        self.files.clear();
    }

    /// Sends the regions, and returns their files with the numbers that these have for the host.
    fn send_regions(&mut self, regions: &[RegionConfig]) -> Vec<(Arc<File>, u64)> {
        let mut files = Vec::new();
        for RegionConfig { gpa, len_bytes, file, file_offset_bytes } in regions {
            let known = self.files.iter().chain(&files).find(|(known, _)| Arc::ptr_eq(known, file));
            let file_number = known.map_or(self.next_number, |&(_, number)| number);
            self.next_number = self.next_number.max(file_number + 1);
            files.push((Arc::clone(file), file_number));
            self.send(&Order::Region {
                gpa: *gpa,
                len_bytes: *len_bytes,
                file_offset_bytes: *file_offset_bytes,
                file_number,
                file: file.as_fd(),
            });
        }
        files
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number - 1
    }

    fn send(&self, order: &Order<BorrowedFd<'_>>) {
        let Encoded { words, text, fds } = order.encode();
        self.orders.send(&words, &text, &fds).unwrap_or_else(|error| self.control.lost(&error));
    }

    /// Waits for the answer to an order about memory with these files. Cancels the order when `is_wanted` says no.
    fn await_memory(
        &mut self,
        number: u64,
        files: Vec<(Arc<File>, u64)>,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), PinError> {
        while !self.orders.wait(Some(LOOK)).unwrap_or_else(|error| self.control.lost(&error)) {
            if !is_wanted() {
                self.control.send(&Control::Cancel { number });
                break;
            }
        }
        match self.answer() {
            Answer::Done => {
                self.files = files;
                Ok(())
            }
            Answer::NotWanted => Err(PinError::NotWanted),
            Answer::Refused(refused) => Err(PinError::Refused(refused)),
            other => self.control.lost(&format_args!("it answered {other:?}")),
        }
    }

    fn answer(&self) -> Answer {
        self.control.decoded(self.orders.receive(), Answer::decode)
    }
}

impl Drop for RingClient {
    /// The host ends when it finds its sockets closed.
    fn drop(&mut self) {
        self.control.begin_end();
    }
}

impl HostedRing {
    pub(crate) fn id(&self) -> RingId {
        self.id
    }

    /// Where the parts of the ring are in its area.
    pub(crate) fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// How the ring's SQEs name guest memory.
    pub(crate) fn addressing(&self) -> FixedAddressing {
        self.addressing
    }

    /// Completions signal `call` from now on, or nothing.
    ///
    /// # Errors
    ///
    /// The ring cannot have this eventfd; completions signal nothing then.
    pub(crate) fn set_call(&self, call: Option<&EventFd>) -> Result<(), Refused> {
        self.control.set_call(self.id, call)
    }

    /// Tells when the ring has ended, once it is closed or dropped.
    pub(crate) fn end(&self) -> RingEnd {
        self.end.clone()
    }

    /// Ends the ring. Its I/O under way continues; [`RingEnd`] tells when that has ended too.
    pub(crate) fn close(self) -> RingEnd {
        self.end()
    }
}

impl Drop for HostedRing {
    fn drop(&mut self) {
        self.end.note_closed();
        self.control.send(&Control::Close { id: self.id });
    }
}
