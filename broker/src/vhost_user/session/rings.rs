//! Set-up, start and stop of vrings.
//!
//! A ring starts with SET_VRING_KICK and stops with GET_VRING_BASE. Some front-ends set up a ring again without having
//! stopped it (Cloud Hypervisor after a reset of the guest): the first message that would change a started ring stops
//! it, and the SET_VRING_KICK that follows starts it again.
//!
//! The driver chooses size and addresses of a ring, and no front-end checks them all. So the session stores them
//! unchecked and checks them when the ring starts. If the ring cannot run with them ([`RingFault`]), it is broken: the
//! request succeeds, the device signals the error eventfd, and the next set-up of the ring starts it.

use std::os::fd::OwnedFd;

use tracing::{debug, warn};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::super::device::QueueEventfds;
use super::super::eventfd;
use super::super::message::VringAddress;
use super::super::ring_fault::RingFault;
use super::vring::RingAddresses;
use super::{RequestError, Session};
use crate::log_limit::LogCause;
use crate::virtqueue::{InflightQueue, QueueSetup};

/// The parts of a split ring: fixed bytes, bytes for each descriptor, and bytes that exist only with
/// VIRTIO_RING_F_EVENT_IDX (VIRTIO 1.2, 2.7).
const DESC_TABLE: RingPart =
    RingPart { name: "descriptor table", alignment_bytes: 16, fixed_bytes: 0, entry_bytes: 16, event_bytes: 0 };
const AVAIL_RING: RingPart =
    RingPart { name: "available ring", alignment_bytes: 2, fixed_bytes: 4, entry_bytes: 2, event_bytes: 2 };
const USED_RING: RingPart =
    RingPart { name: "used ring", alignment_bytes: 4, fixed_bytes: 4, entry_bytes: 8, event_bytes: 2 };

struct RingPart {
    name: &'static str,
    alignment_bytes: u64,
    fixed_bytes: u64,
    entry_bytes: u64,
    event_bytes: u64,
}

/// Why a ring does not start.
enum StartError {
    /// The front-end's fault.
    Request(RequestError),
    /// The driver's fault.
    Ring(RingFault),
}

impl From<RequestError> for StartError {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

impl From<RingFault> for StartError {
    fn from(fault: RingFault) -> Self {
        Self::Ring(fault)
    }
}

impl Session<'_> {
    pub(super) fn set_vring_num(&mut self, index: u32, size: u32) -> Result<(), RequestError> {
        let index = self.vring_index(index)?;
        if self.vrings[index].size != Some(size) {
            self.stop(index)?;
            self.vrings[index].size = Some(size);
        }
        Ok(())
    }

    /// For a running ring, the same addresses again only turn the logging of its used ring on or off.
    pub(super) fn set_vring_addr(&mut self, address: VringAddress) -> Result<(), RequestError> {
        let index = self.vring_index(address.index)?;
        let VringAddress { desc_table, avail_ring, used_ring, used_log_gpa, .. } = address;
        let addresses = RingAddresses { desc_table, avail_ring, used_ring };
        if self.vrings[index].addresses != Some(addresses) {
            self.stop(index)?;
            self.vrings[index].addresses = Some(addresses);
        }
        let vring = &mut self.vrings[index];
        if vring.is_started && vring.used_log_gpa != used_log_gpa {
            self.device.set_used_log(index as u16, used_log_gpa);
        }
        vring.used_log_gpa = used_log_gpa;
        Ok(())
    }

    pub(super) fn set_vring_base(&mut self, index: u32, next_avail: u16) -> Result<(), RequestError> {
        let index = self.vring_index(index)?;
        self.stop(index)?;
        self.vrings[index].next_avail = next_avail;
        Ok(())
    }

    /// Starts the ring, or exchanges the eventfd of a running one.
    pub(super) fn set_vring_kick(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), RequestError> {
        let index = self.vring_index(index)?;
        let kick = adopt(index, fd)?;
        if self.vrings[index].is_started {
            self.device.set_kick(index as u16, kick);
            return Ok(());
        }
        let setup = self.queue_setup(index);
        let err = duplicate_for_device(self.vrings[index].err.as_ref())?;
        let setup = match setup {
            Ok(setup) => setup,
            Err(StartError::Request(error)) => return Err(error),
            Err(StartError::Ring(fault)) => {
                self.vrings[index].is_broken = true;
                self.device.break_queue(index as u16, fault, err);
                return Ok(());
            }
        };
        let call = duplicate_for_device(self.vrings[index].call.as_ref())?;
        self.settle_driver_features();
        debug!(index, size = setup.size, next_avail = setup.next_avail, "vring starts");
        self.note_forgotten_settings();
        self.device.start_queue(index as u16, setup, QueueEventfds { kick, call, err });
        self.vrings[index].is_started = true;
        self.vrings[index].is_broken = false;
        self.vrings[index].is_tracked = true;
        self.apply_enabled(index);
        Ok(())
    }

    /// Warns once, when a ring starts and the front-end has not restored the settings.
    fn note_forgotten_settings(&mut self) {
        if std::mem::take(&mut self.has_forgotten_settings) && self.device.driver_settings() == 0 {
            warn!(
                "the write cache is on: the guest of the previous front-end had turned it off, and this front-end has \
                 sent no in-flight region with that setting (if it is the same guest, turn the cache off again there)"
            );
        }
    }

    fn queue_setup(&self, index: usize) -> Result<QueueSetup, StartError> {
        let vring = &self.vrings[index];
        let missing = |missing| RequestError::VringIncomplete { index, missing };
        let asked = vring.size.ok_or_else(|| missing("SET_VRING_NUM"))?;
        let addresses = vring.addresses.ok_or_else(|| missing("SET_VRING_ADDR"))?;
        let max = self.device.max_queue_size();
        let size = match u16::try_from(asked) {
            Ok(size) if size.is_power_of_two() && size <= max => size,
            _ => return Err(RingFault::Size { size: asked, max }.into()),
        };
        let driver_features = self.negotiation.driver_features();
        let event_idx = driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut found = [GuestAddress(0); 3];
        for (gpa, (part, user_address)) in found.iter_mut().zip(parts(addresses)) {
            let event_bytes = if event_idx { part.event_bytes } else { 0 };
            let size_bytes = part.fixed_bytes + u64::from(size) * part.entry_bytes + event_bytes;
            *gpa = self.locate(&part, user_address, size_bytes)?;
        }
        let [desc_table, avail_ring, used_ring] = found;
        Ok(QueueSetup {
            size,
            desc_table,
            avail_ring,
            used_ring,
            next_avail: vring.next_avail,
            driver_features,
            used_log_gpa: vring.used_log_gpa,
            inflight: self.inflight_queue(index, size)?,
        })
    }

    fn inflight_queue(&self, index: usize, size: u16) -> Result<Option<InflightQueue>, RingFault> {
        let Some(region) = &self.inflight else { return Ok(None) };
        match region.queue(index as u16) {
            Some(queue) if queue.entries() < size => {
                Err(RingFault::InflightTooSmall { size, entries: queue.entries() })
            }
            Some(queue) => Ok(Some(queue)),
            None => {
                // A guest that resets its device starts the ring again and again.
                if let Some(total) = self.refusals.count(LogCause::new("in-flight region without the vring")) {
                    warn!(index, total, "vring not tracked: the front-end's in-flight region has no part for it");
                }
                Ok(None)
            }
        }
    }

    fn locate(&self, part: &RingPart, user_address: u64, size_bytes: u64) -> Result<GuestAddress, RingFault> {
        let &RingPart { name: part, alignment_bytes, .. } = part;
        match self.memory.translate(user_address, size_bytes) {
            Some(GuestAddress(gpa)) if gpa % alignment_bytes != 0 => {
                Err(RingFault::Misaligned { part, gpa, alignment_bytes })
            }
            Some(gpa) => Ok(gpa),
            None => Err(RingFault::OutsideMemory { part, user_address, size_bytes }),
        }
    }

    pub(super) fn set_vring_call(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), RequestError> {
        let index = self.vring_index(index)?;
        let call = adopt(index, fd)?;
        if self.vrings[index].is_started {
            let given = duplicate_for_device(call.as_ref())?;
            self.device.set_call(index as u16, given);
        }
        self.vrings[index].call = call;
        Ok(())
    }

    pub(super) fn set_vring_err(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<(), RequestError> {
        let index = self.vring_index(index)?;
        let err = adopt(index, fd)?;
        if self.vrings[index].is_started {
            let given = duplicate_for_device(err.as_ref())?;
            self.device.set_err(index as u16, given);
        }
        self.vrings[index].err = err;
        Ok(())
    }

    /// Also works for a ring that was never set up: QEMU enables all rings, regardless of which ones the driver uses.
    pub(super) fn set_vring_enable(&mut self, index: u32, is_enabled: bool) -> Result<(), RequestError> {
        let index = self.vring_index(index)?;
        self.vrings[index].enabled = Some(is_enabled);
        self.apply_enabled(index);
        Ok(())
    }

    pub(super) fn disable_all(&mut self) {
        for vring in &mut self.vrings {
            vring.enabled = Some(false);
        }
        self.apply_enabled_to_all();
    }

    /// Stops the ring and returns the body of the reply: the index at which it stopped. A broken ring stopped where it
    /// began.
    pub(super) fn get_vring_base(&mut self, index: u32) -> Result<Vec<u8>, RequestError> {
        let at = self.vring_index(index)?;
        if self.vrings[at].is_started || self.vrings[at].is_broken {
            self.stop(at)?;
            self.forget_log_if_all_stopped();
        }
        let next_avail = self.vrings[at].next_avail;
        Ok([index, next_avail.into()].into_iter().flat_map(u32::to_ne_bytes).collect())
    }

    pub(super) fn stop_all(&mut self) -> Result<(), RequestError> {
        (0..self.vrings.len()).try_for_each(|index| self.stop(index))
    }

    /// Clears the in-flight records after the driver's reset, with all rings stopped. The device cannot answer these
    /// requests any more, and no driver waits for them. It keeps the records of a vring that has not run in this
    /// session, because its driver may still wait.
    pub(super) fn begin_inflight_again(&mut self) {
        let Some(region) = &self.inflight else { return };
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            if std::mem::take(&mut vring.is_tracked) {
                if let Some(queue) = region.queue(index as u16) {
                    queue.begin_again();
                }
            }
        }
    }

    fn stop(&mut self, index: usize) -> Result<(), RequestError> {
        if self.vrings[index].is_started {
            let stopped_at = self.device.stop_queue(index as u16);
            let next_avail = stopped_at.ok_or(RequestError::FrontEndGone { index })?;
            debug!(index, next_avail, "vring stopped");
            self.vrings[index].note_stopped(next_avail);
        }
        self.vrings[index].is_broken = false;
        Ok(())
    }

    pub(super) fn apply_enabled_to_all(&mut self) {
        for index in 0..self.vrings.len() {
            self.apply_enabled(index);
        }
    }

    /// Tells the device whether a started ring is enabled, if that has changed.
    fn apply_enabled(&mut self, index: usize) {
        let is_held = self.are_rings_held();
        let vring = &mut self.vrings[index];
        let is_enabled = vring.enabled.unwrap_or(self.negotiation.are_rings_enabled_at_first()) && !is_held;
        if vring.is_started && vring.is_enabled_in_device != is_enabled {
            vring.is_enabled_in_device = is_enabled;
            self.device.set_enabled(index as u16, is_enabled);
        }
    }

    fn vring_index(&self, index: u32) -> Result<usize, RequestError> {
        match usize::try_from(index) {
            Ok(known) if known < self.vrings.len() => Ok(known),
            _ => Err(RequestError::NoSuchVring { index, count: self.vrings.len() }),
        }
    }
}

fn parts(addresses: RingAddresses) -> [(RingPart, u64); 3] {
    let RingAddresses { desc_table, avail_ring, used_ring } = addresses;
    [(DESC_TABLE, desc_table), (AVAIL_RING, avail_ring), (USED_RING, used_ring)]
}

fn adopt(index: usize, fd: Option<OwnedFd>) -> Result<Option<EventFd>, RequestError> {
    fd.map(eventfd::adopt).transpose().map_err(|source| RequestError::Eventfd { index, source })
}

fn duplicate_for_device(fd: Option<&EventFd>) -> Result<Option<EventFd>, RequestError> {
    eventfd::duplicate(fd).map_err(|source| RequestError::System { what: "duplicating an eventfd of a vring", source })
}
