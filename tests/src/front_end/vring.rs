//! The driver's side of a split virtqueue (VIRTIO 1.2, 2.7), which can also put anything into it.

use std::{
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use vm_memory::{Bytes, GuestAddress};

use super::{
    descriptor::{DESCRIPTOR_BYTES, Descriptor, F_NEXT},
    event::Eventfds,
    ram::{Arena, Ram},
};

/// Flag in the available ring: no interrupts wanted. In the used ring: no kicks wanted.
const NO_NOTIFICATION: u16 = 1;

/// Where a vring is in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringLayout {
    /// Number of entries.
    pub size: u16,
    /// Descriptor table.
    pub desc_gpa: u64,
    /// Available ring.
    pub avail_gpa: u64,
    /// Used ring.
    pub used_gpa: u64,
}

impl VringLayout {
    /// Takes the memory of a vring from an arena.
    ///
    /// # Errors
    ///
    /// Not so much is left.
    pub fn take(arena: &mut Arena, size: u16) -> Result<Self> {
        let entries = u64::from(size);
        Ok(Self {
            size,
            desc_gpa: arena.take(DESCRIPTOR_BYTES * entries, 16)?,
            avail_gpa: arena.take(6 + 2 * entries, 2)?,
            used_gpa: arena.take(Self::used_bytes(size), 4096)?,
        })
    }

    /// The used index: what a front-end takes as base after the back-end has died.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn used_idx(&self, ram: &Ram) -> Result<u16> {
        Ok(ram.memory().load(GuestAddress(self.used_gpa + 2), Ordering::Acquire)?)
    }

    /// Length of the used ring in bytes, with the event index.
    pub fn used_bytes(size: u16) -> u64 {
        6 + 8 * u64::from(size)
    }
}

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
    /// Descriptors of the chain with this head.
    chains: Vec<Vec<u16>>,
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
        let entries = usize::from(layout.size);
        for (gpa, len_bytes) in [(layout.desc_gpa, 16 * entries), (layout.avail_gpa, 6 + 2 * entries)] {
            ram.memory().write_slice(&vec![0; len_bytes], GuestAddress(gpa))?;
        }
        ram.memory().write_slice(&vec![0; 6 + 8 * entries], GuestAddress(layout.used_gpa))?;
        Ok(Self {
            ram: ram.clone(),
            layout,
            event_idx,
            eventfds,
            free: (0..layout.size).rev().collect(),
            chains: vec![Vec::new(); entries],
            next_avail: 0,
            published: 0,
            next_used: 0,
        })
    }

    /// Empties the vring, as a driver does with one that it starts anew.
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

    /// Its eventfds.
    pub fn eventfds(&self) -> &Arc<Eventfds> {
        &self.eventfds
    }

    /// The RAM that it is in.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// From here on the buffers are in other RAM, in which the vring is at the same place.
    pub fn set_ram(&mut self, ram: &Ram) {
        self.ram = ram.clone();
    }

    /// How many used elements the driver has taken: what a front-end reads from the used ring after the back-end died.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Where the used element is that was taken last.
    pub fn last_used_gpa(&self) -> u64 {
        self.layout.used_gpa + 4 + 8 * u64::from(self.next_used.wrapping_sub(1) % self.layout.size)
    }

    /// The index of the next entry that becomes available.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index in memory.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn used_idx(&self) -> Result<u16> {
        self.layout.used_idx(&self.ram)
    }

    /// Writes one descriptor of the table, whatever it says.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) -> Result<()> {
        let gpa = self.layout.desc_gpa + DESCRIPTOR_BYTES * u64::from(index);
        Ok(self.ram.memory().write_slice(&descriptor.to_bytes(), GuestAddress(gpa))?)
    }

    /// Writes a table of chained descriptors into RAM and gives the descriptor that names it.
    ///
    /// # Errors
    ///
    /// The table is not in RAM.
    pub fn write_indirect_table(&self, table_gpa: u64, chain: &[Descriptor]) -> Result<Descriptor> {
        for (index, &descriptor) in chain.iter().enumerate() {
            let mut descriptor = descriptor;
            if index + 1 < chain.len() {
                descriptor.flags |= F_NEXT;
                descriptor.next = u16::try_from(index + 1)?;
            }
            let gpa = table_gpa + DESCRIPTOR_BYTES * index as u64;
            self.ram.memory().write_slice(&descriptor.to_bytes(), GuestAddress(gpa))?;
        }
        Ok(Descriptor::indirect(table_gpa, u32::try_from(DESCRIPTOR_BYTES)? * u32::try_from(chain.len())?))
    }

    /// Whether a chain of so many descriptors has room.
    pub fn has_room(&self, descriptors: usize) -> bool {
        self.free.len() >= descriptors
    }

    /// Adds a chain, linked in the order given; it becomes available with [`publish`](Self::publish). Gives its head.
    ///
    /// # Errors
    ///
    /// Too few descriptors are free.
    pub fn add(&mut self, chain: &[Descriptor]) -> Result<u16> {
        ensure!(self.has_room(chain.len()) && !chain.is_empty(), "no room for {} descriptors", chain.len());
        let indexes: Vec<u16> = self.free.split_off(self.free.len() - chain.len());
        for (position, &descriptor) in chain.iter().enumerate() {
            let mut descriptor = descriptor;
            if let Some(&next) = indexes.get(position + 1) {
                descriptor.flags |= F_NEXT;
                descriptor.next = next;
            }
            self.write_descriptor(indexes[position], descriptor)?;
        }
        let head = indexes[0];
        self.add_head(head)?;
        self.chains[usize::from(head)] = indexes;
        Ok(head)
    }

    /// Adds an entry with any head to the available ring: the chain is what the table holds there.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn add_head(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.next_avail % self.layout.size);
        self.ram.memory().write_obj(head, GuestAddress(self.layout.avail_gpa + 4 + 2 * slot))?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Makes everything added available, and kicks if the device wants that. Gives whether it kicked.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM, or the eventfd cannot be written.
    pub fn publish(&mut self) -> Result<bool> {
        let old = self.published;
        self.publish_quietly()?;
        if !self.device_wants_kick(old)? {
            return Ok(false);
        }
        self.kick()?;
        Ok(true)
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

    /// Writes any available index.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn write_avail_idx(&mut self, index: u16) -> Result<()> {
        (self.next_avail, self.published) = (index, index);
        self.store(self.layout.avail_gpa + 2, index, Ordering::Release)
    }

    /// Signals the kick eventfd.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn kick(&self) -> Result<()> {
        self.eventfds.kick().signal()
    }

    /// VIRTIO 1.2, 2.7.13.3 and 2.7.7.2 for the other direction.
    fn device_wants_kick(&self, old: u16) -> Result<bool> {
        // The index must be seen before the device's wish is read (VIRTIO 1.2, 2.7.13.3.1).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags: u16 = self.load(self.layout.used_gpa, Ordering::Relaxed)?;
            return Ok(flags & NO_NOTIFICATION == 0);
        }
        let event_gpa = self.layout.used_gpa + 4 + 8 * u64::from(self.layout.size);
        let event: u16 = self.load(event_gpa, Ordering::Relaxed)?;
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
            // An index that is reached late enough is "none".
            let event = if wanted { self.next_used } else { self.next_used.wrapping_sub(1) };
            self.store(self.layout.avail_gpa + 4 + 2 * u64::from(self.layout.size), event, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// The next used element, if there is one. Its descriptors are free again.
    ///
    /// # Errors
    ///
    /// The device used a chain that is not outstanding, or more than are.
    pub fn take_used(&mut self) -> Result<Option<Used>> {
        let used_idx = self.used_idx()?;
        let ready = used_idx.wrapping_sub(self.next_used);
        if ready == 0 {
            return Ok(None);
        }
        let outstanding = self.published.wrapping_sub(self.next_used);
        ensure!(ready <= outstanding, "{ready} used elements, and only {outstanding} chains are outstanding");
        let slot = u64::from(self.next_used % self.layout.size);
        let gpa = GuestAddress(self.layout.used_gpa + 4 + 8 * slot);
        let element: u64 = self.ram.memory().read_obj(gpa)?;
        let (id, len_bytes) = (element as u32, (element >> 32) as u32);
        let head = u16::try_from(id).ok().filter(|&head| head < self.layout.size);
        let head = head.with_context(|| format!("a used element for chain {id}"))?;
        self.next_used = self.next_used.wrapping_add(1);
        self.free.append(&mut self.chains[usize::from(head)]);
        Ok(Some(Used { head, len_bytes }))
    }

    /// Waits until something is used: for the call eventfd, and for nothing else.
    ///
    /// # Errors
    ///
    /// Nothing is used in time, or something is and there was no interrupt.
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

    /// Waits until something is used, by looking at the ring.
    ///
    /// # Errors
    ///
    /// Nothing is used in time.
    pub fn spin_for_used(&self, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        while self.used_idx()? == self.next_used {
            ensure!(Instant::now() < end, "nothing is used within {timeout:?}");
            std::thread::yield_now();
        }
        Ok(())
    }

    fn load(&self, gpa: u64, ordering: Ordering) -> Result<u16> {
        Ok(self.ram.memory().load(GuestAddress(gpa), ordering)?)
    }

    fn store(&self, gpa: u64, value: u16, ordering: Ordering) -> Result<()> {
        Ok(self.ram.memory().store(value, GuestAddress(gpa), ordering)?)
    }
}
