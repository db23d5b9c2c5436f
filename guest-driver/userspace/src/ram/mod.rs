//! The RAM of a process that is its own guest.

mod access;
mod allocator;
mod area;
mod free;
mod guest_ram;

pub(crate) use access::{map_sealed, mapped_ring};
pub use allocator::{AllocateError, RamAllocator};
pub use area::RamArea;
pub use guest_ram::{GuestRam, RamError, RamRegion};

/// The unit of regions and areas, in bytes.
pub(crate) const PAGE_BYTES: u64 = 4096;
