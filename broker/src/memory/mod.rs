//! Guest memory: the regions that the front-end handed over, their place, and how the kernel learns their addresses.
//!
//! - [`GuestMemory`]: the guest's RAM as regions of (guest-physical address, file, offset), checked and mapped.
//! - [`IovaLayout`]: the same RAM as fixed buffers: which piece of which file lies at which address of which
//!   slot. Pure arithmetic.
//! - [`PinnedMemory`]: the fixed buffers themselves, pinned once and shared by all rings of a device.
//!
//! The addresses work like this. io_uring remembers the virtual address *at which a buffer was registered*, checks
//! every fixed read and write against it, and from then on uses the pinned pages, not the mapping. So each piece is
//! mapped at [`IOVA_BASE`] + guest-physical address, registered, and unmapped again: `sqe.addr = IOVA_BASE + gpa` is
//! then exact, bounds-checked by the kernel and free, for any number of guests in one process.
//!
//! Rules for this whole module: guest memory is never referenced, only mapped and named by address; a region is
//! checked as a whole before anything is mapped; the front-end must not discard memory once it is pinned.

mod error;
mod iova_map;
mod layout;
mod pin;
mod region;
mod register;
mod staging;
#[cfg(test)]
mod tests;

pub use error::MemoryError;
pub(crate) use layout::slot_shift_for;
pub use layout::{IovaLayout, Piece, Slot, Source, Span};
pub use pin::{ChangedSlots, PinnedMemory, Sharing};
pub use region::{Backing, GuestMemory, RegionConfig};

/// The virtual address at which guest-physical address 0 lies in SQEs: 32 TiB.
///
/// Not zero, because the kernel refuses to register a buffer at address 0. The 16 TiB from here on are free in a Linux
/// process with 47 bits of address space (programs, libraries and stacks lie above 80 TiB or below 4 GiB, and so does
/// the memory that the address and thread sanitizers occupy), and are used only while a span is being registered. A
/// multiple of 16 TiB, so that adding and or-ing a guest-physical address give the same.
pub const IOVA_BASE: u64 = 1 << 45;
