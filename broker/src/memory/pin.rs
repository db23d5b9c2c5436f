//! Guest RAM as registered buffers, pinned once and shared by all rings of a device.

use std::collections::BTreeMap;
use std::io;

use ringpass_restrictions::{KernelSupport, RegisterOperation};

use super::MemoryError;
use super::layout::Span;
use super::region::GuestMemory;
use super::register::{Charge, current_memlock, new_holder, pin_span, pinned_by_this_process, register_table};
use super::staging::Staging;
use crate::limits::Memlock;
use crate::ring_fd::RingFd;

/// How further rings use memory that is pinned already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// They clone the table (`IORING_REGISTER_CLONE_BUFFERS`, Linux 6.12): without delay, and the memory counts once.
    Clone,
    /// Each ring pins the memory again: as slowly as the first time, and the memory counts against RLIMIT_MEMLOCK once
    /// per ring.
    PinAgain,
}

impl Sharing {
    /// The best way that this kernel supports.
    pub fn for_kernel(kernel: &KernelSupport) -> Self {
        let can_clone = kernel.register_operations.contains(RegisterOperation::REGISTER_CLONE_BUFFERS);
        if can_clone { Self::Clone } else { Self::PinAgain }
    }
}

/// Guest RAM, pinned as fixed buffers.
///
/// The buffers belong to a ring of their own, which never runs. Rings that do I/O clone its table, so that nothing
/// slow happens on a running ring: registering 1 GiB of 4 KiB pages holds the ring's lock for about half a second.
///
/// Drop privileges (CAP_IPC_LOCK, the user) *before* pinning: the kernel does not clone memory that was pinned with
/// other privileges.
#[derive(Debug)]
pub struct PinnedMemory {
    /// None with [`Sharing::PinAgain`]: each ring has its own buffers.
    holder: Option<RingFd>,
    memory: GuestMemory,
    accounting: Accounting,
    /// For each span, the memory that pinning it added to this process, in bytes: a huge page that spans share counts
    /// for one of them.
    pinned_bytes: BTreeMap<u32, u64>,
}

/// The account to which pinned memory is charged. The kernel clones only within one account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Accounting {
    exempt: bool,
    uid: u32,
}

impl Accounting {
    fn of(memlock: &Memlock) -> Self {
        Self { exempt: memlock.exempt, uid: rustix::process::getuid().as_raw() }
    }
}

/// The slots that a change of memory touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedSlots {
    /// The first fixed buffer.
    pub first: u32,
    /// The number of fixed buffers from there on.
    pub count: u32,
}

impl ChangedSlots {
    /// From the first slot of these spans to the last. Slots between them keep what they have.
    fn of<'a>(spans: impl IntoIterator<Item = &'a Span>) -> Self {
        let ends = |span: &'a Span| [span.slots.first(), span.slots.last()].into_iter().flatten();
        let indexes = spans.into_iter().flat_map(ends).map(|slot| (slot.index, slot.index));
        let bounds = indexes.reduce(|(first, last), (index, _)| (first.min(index), last.max(index)));
        bounds.map_or(Self { first: 0, count: 0 }, |(first, last)| Self { first, count: last + 1 - first })
    }
}

impl PinnedMemory {
    /// Pins all of `memory`. Takes about 50 ms per GiB of 4 KiB pages that exist, ten times as long for pages that
    /// must be allocated first, and almost no time for huge pages. With [`Sharing::PinAgain`] nothing is pinned yet.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Memlock`] if RLIMIT_MEMLOCK does not allow it, with the memory that is needed and how to raise
    /// the limit; nothing stays pinned.
    pub fn pin(memory: &GuestMemory, sharing: Sharing) -> Result<Self, MemoryError> {
        Self::pin_while(memory, sharing, &|| true)
    }

    /// The same, cancelled when `is_wanted` returns false.
    ///
    /// `is_wanted` is called while pages are faulted in, usually every few milliseconds. The kernel clears a page of 1
    /// GiB in one step, and pins existing pages in one system call for a span of up to 1 GiB. Before Linux 5.14 that
    /// call faults in the pages as well: there `is_wanted` is called once for each span.
    ///
    /// # Errors
    ///
    /// As for [`pin`](Self::pin), and [`MemoryError::NotWanted`]; nothing stays pinned.
    pub fn pin_while(
        memory: &GuestMemory,
        sharing: Sharing,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Self, MemoryError> {
        let charge = Charge::new(memory, memory.layout().spans().iter())?;
        let accounting = Accounting::of(&charge.memlock);
        let holder = match sharing {
            Sharing::Clone => Some(new_holder(memory.layout().table_slots())?),
            Sharing::PinAgain => None,
        };
        // From here on, an error unpins all pages that are pinned so far.
        let mut pinned = Self { holder, memory: memory.clone(), accounting, pinned_bytes: BTreeMap::new() };
        if sharing == Sharing::Clone {
            let mut staging = Staging::new();
            for span in memory.layout().spans() {
                pinned.pin_span(span, Some(&mut staging), &charge, is_wanted)?;
            }
        }
        Ok(pinned)
    }

    /// The pinned memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Gives all of this memory to `ring`, which has no buffers yet.
    pub(crate) fn share_with(&self, ring: &RingFd) -> Result<(), MemoryError> {
        let layout = self.memory.layout();
        match &self.holder {
            Some(holder) => ring.clone_buffers(holder).map_err(|error| self.not_cloned(error)),
            None => {
                let charge = Charge::new(&self.memory, layout.spans().iter())?;
                register_table(ring, layout.table_slots())?;
                layout.spans().iter().try_for_each(|span| pin_span(ring, 0, &self.memory, span, &charge, &|| true))
            }
        }
    }

    /// Pins the memory that `memory` has and this value does not, beside this value, and leaves out the memory that
    /// `memory` does not have. Running rings are not touched until
    /// [`KernelRing::replace_memory`](crate::ring::KernelRing::replace_memory).
    ///
    /// Takes as long as [`pin`](Self::pin) takes for the changed spans; call it on a thread that may block.
    pub fn changed_to(&self, memory: &GuestMemory) -> Result<(Self, ChangedSlots), MemoryError> {
        self.changed_to_while(memory, &|| true)
    }

    /// The same, cancelled when `is_wanted` returns false, which is called as in [`pin_while`](Self::pin_while).
    ///
    /// # Errors
    ///
    /// As for [`pin`](Self::pin), and [`MemoryError::NotWanted`]; nothing stays pinned that was not pinned before.
    pub fn changed_to_while(
        &self,
        memory: &GuestMemory,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(Self, ChangedSlots), MemoryError> {
        let mut other = Self {
            holder: Some(self.copied(memory.layout().table_slots())?),
            memory: memory.clone(),
            accounting: self.accounting,
            pinned_bytes: self.pinned_bytes.clone(),
        };
        let (before, after) = (self.memory.layout(), memory.layout());
        debug_assert_eq!(before.slot_shift(), after.slot_shift(), "a change of memory keeps the size of slots");
        let came: Vec<_> = after.spans().iter().filter(|span| !memory.has_same_span(span, &self.memory)).collect();
        let left: Vec<_> = before.spans().iter().filter(|span| !self.memory.has_same_span(span, memory)).collect();
        // Before anything is pinned: a huge page that is already in the table is not accounted again, even if it stays
        // there only for a moment longer.
        left.iter().try_for_each(|span| other.clear_span(span))?;
        let charge = Charge::new(memory, came.iter().copied())?;
        // In the table itself: kernels without 525916ce4966 ("io_uring/rsrc: fix lost entries after cloned range") lose the slots
        // behind a cloned range.
        came.iter().try_for_each(|span| other.pin_span(span, None, &charge, is_wanted))?;
        Ok((other, ChangedSlots::of(came.into_iter().chain(left))))
    }

    /// Pins an empty span, and records how much more memory the process then has pinned.
    fn pin_span(
        &mut self,
        span: &Span,
        staging: Option<&mut Staging>,
        charge: &Charge,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), MemoryError> {
        let Some(holder) = &self.holder else { return Err(MemoryError::CannotPlug) };
        let before_bytes = pinned_by_this_process()?;
        let is_staged = match staging {
            Some(staging) => staging.pin_span(holder, &self.memory, span, charge, is_wanted)?,
            None => false,
        };
        if !is_staged {
            pin_span(holder, 0, &self.memory, span, charge, is_wanted)?;
        }
        self.pinned_bytes.insert(span.index, pinned_by_this_process()?.saturating_sub(before_bytes));
        Ok(())
    }

    /// Takes a span of the memory before a change out of the table.
    fn clear_span(&mut self, span: &Span) -> Result<(), MemoryError> {
        let Some(holder) = &self.holder else { return Err(MemoryError::CannotPlug) };
        self.pinned_bytes.remove(&span.index);
        let ChangedSlots { first, count } = ChangedSlots::of([span]);
        holder.clear_buffers(first, count).map_err(MemoryError::system("taking buffers out of the table"))
    }

    /// The same memory in a table as large as that of `other`, for undoing a change of rings.
    pub(crate) fn sized_like(&self, other: &Self) -> Result<Self, MemoryError> {
        let holder = self.copied(other.memory.layout().table_slots())?;
        let pinned_bytes = self.pinned_bytes.clone();
        Ok(Self { holder: Some(holder), memory: self.memory.clone(), accounting: self.accounting, pinned_bytes })
    }

    /// Gives a running `ring` the buffers of `slots`, all or none. Requests under way keep the old buffers until they
    /// complete.
    pub(crate) fn replace_slots(&self, ring: &RingFd, slots: ChangedSlots) -> Result<(), MemoryError> {
        let Some(holder) = &self.holder else { return Err(MemoryError::CannotPlug) };
        if slots.count == 0 {
            return Ok(());
        }
        ring.clone_buffer_slots(holder, slots.first, slots.count).map_err(|error| self.not_cloned(error))
    }

    /// Whether this process has pinned nothing but this memory. The former memory of changed slots stays pinned as long
    /// as a request uses it, and this is the only way to learn of that.
    ///
    /// Stays false if something else is pinned in this process, if such a request ended just while a span was being
    /// measured, or if a huge page counts for another span, which may be removed first.
    pub(crate) fn is_all_that_is_pinned(&self) -> Result<bool, MemoryError> {
        // Without a holder each ring has its own buffers.
        let Some(_) = &self.holder else { return Err(MemoryError::CannotPlug) };
        let mut spans = self.memory.layout().spans().iter();
        let has_own_pages =
            spans.all(|span| self.pinned_bytes.get(&span.index).is_some_and(|&own| own >= span.len_bytes()));
        Ok(has_own_pages && pinned_by_this_process()? <= self.pinned_bytes.values().sum())
    }

    /// A spare ring that shares everything pinned here, with at least `table_slots` slots.
    fn copied(&self, table_slots: u32) -> Result<RingFd, MemoryError> {
        let Some(holder) = &self.holder else { return Err(MemoryError::CannotPlug) };
        let kept_slots = self.memory.layout().table_slots();
        let copy = new_holder(table_slots.max(kept_slots))?;
        copy.clone_buffer_slots(holder, 0, kept_slots).map_err(|error| match self.not_cloned(error) {
            MemoryError::System { source, .. } if source.raw_os_error() == Some(nix::libc::EINVAL) => {
                MemoryError::CannotPlug
            }
            other => other,
        })?;
        Ok(copy)
    }

    /// The meaning of a refused clone.
    fn not_cloned(&self, source: io::Error) -> MemoryError {
        if source.raw_os_error() == Some(nix::libc::EINVAL)
            && current_memlock().is_ok_and(|memlock| Accounting::of(&memlock) != self.accounting)
        {
            return MemoryError::PrivilegesChanged;
        }
        MemoryError::System { what: "cloning the registered buffers", source }
    }
}

impl Drop for PinnedMemory {
    /// Unpins at once the memory that no other ring has cloned. The kernel takes a ring apart only some time after its
    /// descriptor is closed; until then the memory would count against RLIMIT_MEMLOCK, and the kernel might refuse the
    /// next guest's.
    fn drop(&mut self) {
        if let Some(Err(error)) = self.holder.as_ref().map(RingFd::unregister_buffers) {
            tracing::warn!(%error, "cannot unpin guest memory at once: it stays pinned until its ring ends");
        }
    }
}
