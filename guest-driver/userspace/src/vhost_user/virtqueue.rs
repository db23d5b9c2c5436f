//! The driver's side of a split virtqueue (VIRTIO 1.2, 2.7), without event indexes and indirect tables.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::memory::Memory;
use crate::ram::RamArea;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
/// The flag in the available ring: the driver wants no interrupts. In the used ring: the device wants no kicks.
const NO_NOTIFICATION: u16 = 1;
const DESCRIPTOR_BYTES: u64 = 16;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) gpa: u64,
    pub(super) len_bytes: u32,
    pub(super) is_writable: bool,
}

impl Buffer {
    pub(super) fn readable(gpa: u64, len_bytes: u32) -> Self {
        Self { gpa, len_bytes, is_writable: false }
    }

    pub(super) fn writable(gpa: u64, len_bytes: u32) -> Self {
        Self { gpa, len_bytes, is_writable: true }
    }
}

/// What the device gets of a queue: the addresses of its three parts and its eventfds. It outlives the connection.
#[derive(Debug)]
pub(super) struct Vring {
    pub(super) size: u16,
    pub(super) desc_gpa: u64,
    pub(super) avail_gpa: u64,
    pub(super) used_gpa: u64,
    pub(super) kick: EventFd,
    /// The application can change it, like a machine that moves interrupts.
    call: Mutex<Arc<EventFd>>,
    used: RamArea,
}

impl Vring {
    /// The eventfd that the device signals.
    pub(super) fn call(&self) -> Arc<EventFd> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes another eventfd for interrupts. The caller sends it to the device.
    pub(super) fn renew_call(&self) -> Result<Arc<EventFd>, Error> {
        let call = Arc::new(eventfd()?);
        let before = std::mem::replace(&mut *self.call.lock().unwrap_or_else(PoisonError::into_inner), call.clone());
        // Wake a thread that waits for the former eventfd: it then waits for the new one.
        let _ = before.write(1);
        Ok(call)
    }

    /// The used index that the device has written: a device that was lost continues there.
    pub(super) fn used_idx(&self) -> u16 {
        self.used.word16(2).map_or(0, |word| u16::from_le(word.load(Ordering::Acquire)))
    }
}

/// The driver's side of a virtqueue.
#[derive(Debug)]
pub(super) struct Virtqueue {
    vring: Arc<Vring>,
    desc: RamArea,
    avail: RamArea,
    /// The free descriptors.
    free: Vec<u16>,
    /// The descriptors of each chain, by the chain's head.
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    next_used: u16,
}

impl Virtqueue {
    /// A queue of `size` descriptors, a power of two.
    pub(super) fn new(memory: &Memory, size: u16) -> Result<Self, Error> {
        let entries = u64::from(size);
        // Each part begins at a page, which is more than VIRTIO requires.
        let mut desc = memory.allocate(DESCRIPTOR_BYTES * entries)?;
        let mut avail = memory.allocate(6 + 2 * entries)?;
        let mut used = memory.allocate(6 + 8 * entries)?;
        for area in [&mut desc, &mut avail, &mut used] {
            area.write(0, &vec![0; area.len_bytes() as usize]);
            // The device uses the parts for as long as the connection lasts.
            area.lend();
        }
        let vring = Vring {
            size,
            desc_gpa: desc.gpa(),
            avail_gpa: avail.gpa(),
            used_gpa: used.gpa(),
            kick: eventfd()?,
            call: Mutex::new(Arc::new(eventfd()?)),
            used,
        };
        Ok(Self {
            vring: Arc::new(vring),
            desc,
            avail,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_avail: 0,
            next_used: 0,
        })
    }

    pub(super) fn vring(&self) -> &Arc<Vring> {
        &self.vring
    }

    /// Whether there is room for a chain of this many buffers.
    pub(super) fn has_room(&self, buffers: usize) -> bool {
        self.free.len() >= buffers
    }

    /// The head that the next chain of this many buffers will have.
    pub(super) fn next_head(&self, buffers: usize) -> Option<u16> {
        let first = self.free.len().checked_sub(buffers)?;
        self.free.get(first).copied()
    }

    /// Whether the device has no chain.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == usize::from(self.vring.size)
    }

    /// Makes a chain available, and returns its head. `None`: there is no room.
    pub(super) fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || !self.has_room(buffers.len()) {
            return None;
        }
        let indexes = self.free.split_off(self.free.len() - buffers.len());
        for (position, buffer) in buffers.iter().enumerate() {
            let next = indexes.get(position + 1);
            let flags = next.map_or(0, |_| F_NEXT) | if buffer.is_writable { F_WRITE } else { 0 };
            let mut bytes = [0; DESCRIPTOR_BYTES as usize];
            bytes[..8].copy_from_slice(&buffer.gpa.to_le_bytes());
            bytes[8..12].copy_from_slice(&buffer.len_bytes.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.copied().unwrap_or(0).to_le_bytes());
            let written = self.desc.write(DESCRIPTOR_BYTES * u64::from(indexes[position]), &bytes);
            debug_assert!(written, "a table has all its descriptors");
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = indexes;
        let slot = u64::from(self.next_avail % self.vring.size);
        store(&self.avail, 4 + 2 * slot, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        // The chain must be written before the index covers it.
        store(&self.avail, 2, self.next_avail, Ordering::Release);
        Some(head)
    }

    /// Whether the device wants a kick for the chains that the driver has made available.
    pub(super) fn wants_kick(&self) -> bool {
        // The device must be able to see the index before the driver reads the flag (VIRTIO 1.2, 2.7.13.3.1).
        fence(Ordering::SeqCst);
        load(&self.vring.used, 0, Ordering::Relaxed) & NO_NOTIFICATION == 0
    }

    /// Kicks the device. A full counter of the eventfd wakes the device as well.
    pub(super) fn kick(&self) {
        let _ = self.vring.kick.write(1);
    }

    /// How many chains the device has returned that the driver has not taken.
    pub(super) fn ready(&self) -> u16 {
        self.vring.used_idx().wrapping_sub(self.next_used)
    }

    /// Takes the next chain that the device has returned, and returns its head.
    pub(super) fn reap(&mut self) -> Result<Option<u16>, Error> {
        let ready = self.ready();
        if ready == 0 {
            return Ok(None);
        }
        if ready > self.next_avail.wrapping_sub(self.next_used) {
            return Err(Error::BrokenDevice(format!("it returned {ready} chains, which are more than it had")));
        }
        let slot = u64::from(self.next_used % self.vring.size);
        let id =
            self.vring.used.word32(4 + 8 * slot).map_or(u32::MAX, |word| u32::from_le(word.load(Ordering::Relaxed)));
        let chain = usize::try_from(id).ok().and_then(|id| self.chains.get_mut(id)).filter(|chain| !chain.is_empty());
        let Some(chain) = chain else {
            return Err(Error::BrokenDevice(format!("it returned chain {id}, which it did not have")));
        };
        self.next_used = self.next_used.wrapping_add(1);
        self.free.append(chain);
        // `id` is below the size of the queue, because it is an index of `chains`.
        Ok(Some(id as u16))
    }

    /// Turns interrupts on or off. Returns true if the device has already returned a chain, for which it may send no
    /// interrupt.
    pub(super) fn enable_interrupts(&self, enabled: bool) -> bool {
        store(&self.avail, 0, if enabled { 0 } else { NO_NOTIFICATION }, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.ready() != 0
    }
}

fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("making the eventfd of a queue"))
}

fn load(area: &RamArea, offset_bytes: u64, order: Ordering) -> u16 {
    area.word16(offset_bytes).map_or(0, |word| u16::from_le(word.load(order)))
}

fn store(area: &RamArea, offset_bytes: u64, value: u16, order: Ordering) {
    if let Some(word) = area.word16(offset_bytes) {
        word.store(value.to_le(), order);
    }
}
