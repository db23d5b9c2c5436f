//! Guest memory: what the front-end handed over, where it lies, and how the kernel learns its addresses.
//!
//! - [`GuestMemory`]: the guest's RAM as regions of (guest-physical address, file, offset), checked and mapped.
//! - [`IovaLayout`]: the same RAM as fixed buffers: which piece of which file stands at which address of which 1 GiB
//!   slot. Pure arithmetic.
//! - [`PinnedMemory`]: the fixed buffers themselves, pinned once and shared by all rings of a device.
//!
//! The addresses work like this. io_uring remembers the virtual address *at which a buffer was registered*, checks
//! every fixed read and write against it, and from then on uses the pinned pages, not the mapping. So each slot is
//! mapped at [`IOVA_BASE`] + guest-physical address, registered, and unmapped again: `sqe.addr = IOVA_BASE + gpa` is
//! then exact, bounds-checked by the kernel and free, for any number of guests in one process.
//!
//! Rules that hold everywhere here: guest memory is never referenced, only mapped and named by address; a region is
//! checked as a whole before anything is mapped; memory once pinned must not be discarded by the front-end.

mod error;
mod iova_map;
mod layout;
mod pin;
mod region;
#[cfg(test)]
mod tests;

pub use error::MemoryError;
pub use layout::{IovaLayout, Piece, Slot, Source};
pub use pin::{ChangedSlots, PinnedMemory, Sharing};
pub use region::{Backing, GuestMemory, RegionConfig};

/// Virtual address at which guest-physical address 0 stands in SQEs: 32 TiB.
///
/// Not zero, because the kernel refuses to register a buffer at address 0. The 16 TiB from here on are free in a Linux
/// process with 47 bits of address space (programs, libraries and stacks lie above 80 TiB or below 4 GiB, and so does
/// what the address and thread sanitizers occupy), and are only ever used while a slot is being registered. A multiple of
/// 16 TiB, so that adding and or-ing a guest-physical address are the same.
pub const IOVA_BASE: u64 = 1 << 45;
