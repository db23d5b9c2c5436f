//! The driver of one split virtqueue (VIRTIO 1.2, 2.7).

mod layout;
mod rule_breaking;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use vm_memory::{Bytes, GuestAddress};

pub use self::layout::VringLayout;
use crate::{
    descriptor::{DESCRIPTOR_BYTES, Descriptor, linked_table},
    event::Eventfds,
    ram::Ram,
};

/// Flag in the available ring: the driver wants no interrupts. In the used ring: the device wants no kicks.
const NO_NOTIFICATION: u16 = 1;

/// A used element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub len_bytes: u32,
}

/// The driver of one vring.
#[derive(Debug)]
pub struct DriverVring {
    ram: Ram,
    layout: VringLayout,
    event_idx: bool,
    eventfds: Arc<Eventfds>,
    free: Vec<u16>,
    /// By head: the descriptors of the chain.
    chains: Vec<Vec<u16>>,
    /// By head: how often it is available and not used.
    available: Vec<u16>,
    /// Whether `available` is all that the device can have taken.
    knows_available: bool,
    next_avail: u16,
    published: u16,
    next_used: u16,
}

impl DriverVring {
    /// A driver of an empty vring, whose memory it zeroes.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn new(ram: &Ram, layout: VringLayout, event_idx: bool, eventfds: Arc<Eventfds>) -> Result<Self> {
        let size = layout.size;
        for (gpa, len_bytes) in [
            (layout.desc_gpa, VringLayout::table_bytes(size)),
            (layout.avail_gpa, VringLayout::avail_bytes(size)),
            (layout.used_gpa, VringLayout::used_bytes(size)),
        ] {
            ram.memory().write_slice(&vec![0; usize::try_from(len_bytes)?], GuestAddress(gpa))?;
        }
        Ok(Self {
            ram: ram.clone(),
            layout,
            event_idx,
            eventfds,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            available: vec![0; size.into()],
            knows_available: true,
            next_avail: 0,
            published: 0,
            next_used: 0,
        })
    }

    /// Empties the vring, as a driver does that resets its device.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn reset(&mut self) -> Result<()> {
        *self = Self::new(&self.ram, self.layout, self.event_idx, self.eventfds.clone())?;
        Ok(())
    }

    /// Where the vring is.
    pub fn layout(&self) -> VringLayout {
        self.layout
    }

    /// The eventfds of the vring.
    pub fn eventfds(&self) -> &Arc<Eventfds> {
        &self.eventfds
    }

    /// The RAM of the vring.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The driver uses other RAM from now on, in which the vring is at the same place.
    pub fn set_ram(&mut self, ram: &Ram) {
        self.ram = ram.clone();
    }

    /// Whether driver and device suppress kicks and interrupts by index (`VIRTIO_RING_F_EVENT_IDX`).
    pub fn has_event_idx(&self) -> bool {
        self.event_idx
    }

    /// Chooses how kicks and interrupts are suppressed. Only before the device starts the vring.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.event_idx = event_idx;
    }

    /// How many used elements the driver has taken: what a front-end reads from the used ring after the back-end died.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Where the used element is that the driver took last.
    pub fn last_used_gpa(&self) -> u64 {
        self.layout.used_element_gpa(self.next_used.wrapping_sub(1))
    }

    /// The index of the next entry that becomes available.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index in RAM.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn used_idx(&self) -> Result<u16> {
        self.layout.used_idx(&self.ram)
    }

    /// Writes a table of chained descriptors into RAM. Returns the descriptor that names the table.
    ///
    /// # Errors
    ///
    /// The table is not in RAM.
    pub fn write_indirect_table(&self, table_gpa: u64, chain: &[Descriptor]) -> Result<Descriptor> {
        self.ram.memory().write_slice(&linked_table(chain)?, GuestAddress(table_gpa))?;
        Ok(Descriptor::indirect(table_gpa, u32::try_from(DESCRIPTOR_BYTES)? * u32::try_from(chain.len())?))
    }

    /// Whether the descriptor table has room for this many descriptors.
    pub fn has_room(&self, descriptors: usize) -> bool {
        self.free.len() >= descriptors
    }

    /// Adds a chain, linked in the order given. [`publish`](Self::publish) makes it available. Returns the head.
    ///
    /// # Errors
    ///
    /// Too few descriptors are free.
    pub fn add(&mut self, chain: &[Descriptor]) -> Result<u16> {
        ensure!(self.has_room(chain.len()) && !chain.is_empty(), "no room for {} descriptors", chain.len());
        let indexes: Vec<u16> = self.free.split_off(self.free.len() - chain.len());
        for (position, &descriptor) in chain.iter().enumerate() {
            let next = indexes.get(position + 1);
            let linked = next.map_or(descriptor, |&next| descriptor.linked_to(next));
            self.write_descriptor(indexes[position], linked)?;
        }
        let head = indexes[0];
        self.add_head(head)?;
        self.chains[usize::from(head)] = indexes;
        Ok(head)
    }

    /// Makes everything added available, and kicks if the device wants that. Returns whether it kicked.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM, or the eventfd cannot be written.
    pub fn publish(&mut self) -> Result<bool> {
        let old = self.published;
        self.publish_quietly()?;
        self.kick_if_wanted(old)
    }

    /// Makes everything added available, without a kick.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn publish_quietly(&mut self) -> Result<()> {
        self.store(self.layout.avail_gpa + 2, self.next_avail, Ordering::Release)?;
        self.published = self.next_avail;
        Ok(())
    }

    /// Kicks if the device has asked for a kick since the available index was `old`. Returns whether it kicked.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM, or the eventfd cannot be written.
    pub fn kick_if_wanted(&self, old: u16) -> Result<bool> {
        let wants_kick = self.device_wants_kick(old)?;
        if wants_kick {
            self.kick()?;
        }
        Ok(wants_kick)
    }

    /// Signals the kick eventfd.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn kick(&self) -> Result<()> {
        self.eventfds.kick().signal()
    }

    /// VIRTIO 1.2, 2.7.13.3 and 2.7.7.2 for the other direction.
    fn device_wants_kick(&self, old: u16) -> Result<bool> {
        // The device must see the index before the driver reads what the device wants (VIRTIO 1.2, 2.7.13.3.1).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return Ok(self.load(self.layout.used_gpa)? & NO_NOTIFICATION == 0);
        }
        let event = self.load(self.layout.avail_event_gpa())?;
        let new = self.published;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks for an interrupt with the next used element, or for none.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn want_interrupts(&self, wanted: bool) -> Result<()> {
        let flags = if wanted || self.event_idx { 0 } else { NO_NOTIFICATION };
        self.store(self.layout.avail_gpa, flags, Ordering::Relaxed)?;
        if self.event_idx {
            // The device reaches the index before this one after all others.
            let event = if wanted { self.next_used } else { self.next_used.wrapping_sub(1) };
            self.store(self.layout.used_event_gpa(), event, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// The next used element, if there is one. The descriptors of its chain are free again.
    ///
    /// # Errors
    ///
    /// The device used a chain that is not outstanding, or more chains than are.
    pub fn take_used(&mut self) -> Result<Option<Used>> {
        let used_idx = self.used_idx()?;
        let ready = used_idx.wrapping_sub(self.next_used);
        if ready == 0 {
            return Ok(None);
        }
        let outstanding = self.published.wrapping_sub(self.next_used);
        ensure!(ready <= outstanding, "{ready} used elements, and only {outstanding} chains are outstanding");
        let gpa = GuestAddress(self.layout.used_element_gpa(self.next_used));
        let element: u64 = u64::from_le(self.ram.memory().read_obj(gpa)?);
        let (id, len_bytes) = (element as u32, (element >> 32) as u32);
        let head = u16::try_from(id).ok().filter(|&head| head < self.layout.size);
        let head = head.with_context(|| format!("a used element for chain {id}"))?;
        let available = &mut self.available[usize::from(head)];
        ensure!(*available > 0 || !self.knows_available, "a used element for chain {head}, which is not outstanding");
        *available = available.saturating_sub(1);
        self.next_used = self.next_used.wrapping_add(1);
        self.free.append(&mut self.chains[usize::from(head)]);
        Ok(Some(Used { head, len_bytes }))
    }

    /// Waits for the next used element. Waits for the call eventfd, and for nothing else.
    ///
    /// # Errors
    ///
    /// As [`wait_for_call`](Self::wait_for_call) and [`take_used`](Self::take_used).
    pub fn next_used_by_call(&mut self, timeout: Duration) -> Result<Used> {
        self.wait_for_call(timeout)?;
        self.take_used()?.context("nothing is used")
    }

    /// Waits for the next used element. Looks at the ring all the time.
    ///
    /// # Errors
    ///
    /// As [`spin_for_used`](Self::spin_for_used) and [`take_used`](Self::take_used).
    pub fn next_used_by_spinning(&mut self, timeout: Duration) -> Result<Used> {
        self.spin_for_used(timeout)?;
        self.take_used()?.context("nothing is used")
    }

    /// Waits until something is used. Waits for the call eventfd, and for nothing else.
    ///
    /// # Errors
    ///
    /// Nothing is used in time, or something is used and no interrupt comes.
    pub fn wait_for_call(&mut self, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        loop {
            self.want_interrupts(true)?;
            if self.used_idx()? != self.next_used {
                return Ok(());
            }
            let call = self.eventfds.call();
            if !call.wait(end.saturating_duration_since(Instant::now()))? {
                let missed = self.used_idx()? != self.next_used;
                bail!("{} within {timeout:?}", if missed { "the interrupt did not come" } else { "nothing is used" });
            }
            call.take()?;
        }
    }

    /// Waits until something is used. Looks at the ring all the time.
    ///
    /// # Errors
    ///
    /// Nothing is used in time.
    pub fn spin_for_used(&self, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        while self.used_idx()? == self.next_used {
            ensure!(Instant::now() < end, "nothing is used within {timeout:?}");
            thread::yield_now();
        }
        Ok(())
    }

    fn load(&self, gpa: u64) -> Result<u16> {
        Ok(u16::from_le(self.ram.memory().load(GuestAddress(gpa), Ordering::Relaxed)?))
    }

    fn store(&self, gpa: u64, value: u16, ordering: Ordering) -> Result<()> {
        Ok(self.ram.memory().store(value.to_le(), GuestAddress(gpa), ordering)?)
    }
}
