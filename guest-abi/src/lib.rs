//! The interface between a guest and the ringpass broker.
//!
//! The broker creates an io_uring whose submission queue (SQ) and completion queue (CQ) are in memory that the guest
//! can access. The broker restricts and enables the ring. From then on the guest is the only producer of submission
//! queue entries (SQEs) and the only consumer of completion queue entries (CQEs), and the host kernel is the other
//! side. This crate implements the guest's half of that contract, for any guest: a kernel, a bare-metal program, or a
//! process that is its own guest.
//!
//! - [`Sqe`] and [`Cqe`]: the entries, with the layout of `<linux/io_uring.h>`.
//! - [`RingLayout`]: the offsets of a ring's parts. The device *gives* them at run time; a driver never assumes them.
//! - [`FixedAddressing`]: converts a guest-physical address to `(buf_index, sqe.addr)`, with the rule of the device's slots.
//! - [`RingMemory`]: the few memory accesses that a driver needs. Each kind of guest implements them.
//! - [`DriverRing`]: the driver's side of a ring over such memory, with its memory orderings.
//! - [`block_queue`]: a queue of a block device as an interface, and the one that is such a ring.
//! - [`completion`]: what the result of a request means.
//! - [`MappedRing`]: [`RingMemory`] over two plain mappings, for guests that access them by pointer.
//!
//! The other modules turn a queue of a virtio-blk device into such a ring: version 1 of an interface that `docs/abi.md`
//! of the repository specifies.
//!
//! - [`request`], [`probe`], [`attach`]: the requests that a driver sends on ordinary virtqueues.
//! - [`attach_sequence`]: the permitted order of these requests on a queue.
//! - [`control`]: the page of words that device and driver share while a queue is attached.
//! - [`epoch`]: the protocol by which one ring replaces another, as two state machines.
//!
//! The crate has no dependencies and does not need `std`. All its logic is safe code; only [`MappedRing`] accesses raw
//! memory.
//!
//! # Example
//!
//! A guest reads the first 4 KiB of its disk. The last part plays the device; in a real guest the memory is guest RAM.
//!
//! ```
//! use std::ptr::NonNull;
//!
//! use ringpass_guest_abi::{
//!     Cqe, Doorbell, DriverRing, FixedAddressing, MappedRing, RingLayout, RingMemory, Sqe, rings_area_bytes,
//!     sqes_area_bytes,
//! };
//!
//! // What the device says: the size of the ring, where its parts are, and what is added to an address.
//! let layout = RingLayout {
//!     sq_entries: 8,
//!     cq_entries: 16,
//!     sq_head_offset: 0,
//!     sq_tail_offset: 64,
//!     sq_flags_offset: 276,
//!     cq_head_offset: 128,
//!     cq_tail_offset: 192,
//!     cq_flags_offset: 280,
//!     cqes_offset: 320,
//!     rings_bytes: rings_area_bytes(16),
//!     sqes_bytes: sqes_area_bytes(8),
//!     doorbell: Doorbell::Always,
//! };
//! let addressing = FixedAddressing::new(1 << 40, 22)?;
//!
//! // Two areas of memory, each starting at a page.
//! #[derive(Clone)]
//! #[repr(C, align(4096))]
//! struct Page([u8; 4096]);
//! let mut pages = vec![Page([0; 4096]); 2];
//! let areas = NonNull::from(pages.as_mut_slice()).cast::<u8>();
//! let map = || {
//!     // SAFETY: the second area starts one page into an allocation of two.
//!     let sqes = unsafe { areas.add(4096) };
//!     // SAFETY: both areas are one page, outlive the rings, and are not used otherwise.
//!     unsafe { MappedRing::new(areas, layout.rings_bytes, sqes, layout.sqes_bytes) }
//! };
//!
//! let mut ring = DriverRing::new(map(), layout)?;
//! let address = addressing.resolve(0x8000_1000, 4096)?;
//! assert_eq!((address.buf_index, address.addr), (0x200, (1 << 40) + 0x8000_1000));
//! ring.push(&Sqe::read_fixed(address, 4096, 0, 7))?;
//! if ring.publish() {
//!     // Ring the doorbell.
//! }
//!
//! // The device: one SQE was published; complete it.
//! let device = map();
//! assert_eq!(device.load_acquire(layout.sq_tail_offset), 1);
//! let cqe = [7, 0, 4096, 0]; // user_data (two words), res, flags
//! for (word, offset) in cqe.into_iter().zip((layout.cqes_offset..).step_by(4)) {
//!     device.store_relaxed(offset, word);
//! }
//! device.store_release(layout.cq_tail_offset, 1);
//!
//! assert_eq!(ring.reap(), Some(Cqe { user_data: 7, res: 4096, flags: 0 }));
//! assert_eq!(ring.reap(), None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![no_std]
#![deny(unsafe_code)]

// Only for unit tests. No other build of the crate can use `std`, so every build shows that the crate does not need it.
#[cfg(test)]
extern crate std;

/// The example in `README.md`, which the documentation tests compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod address;
pub mod attach;
pub mod attach_sequence;
pub mod block_queue;
pub mod completion;
pub mod control;
mod entry;
pub mod epoch;
mod error_code;
mod layout;
pub mod little_endian;
mod mapped;
mod memory;
pub mod probe;
pub mod request;
mod ring;
mod segment;
#[cfg(test)]
mod test_memory;
mod version;

pub use address::{
    AddressError, AddressingError, FixedAddress, FixedAddressing, GPA_LIMIT, SEGMENT_BOUNDARY_BYTES, SLOT_COUNT_MAX,
    SLOT_SHIFT_MAX, SLOT_SHIFT_MIN,
};
pub use entry::{Cqe, Opcode, Sqe, SqeFlags};
pub use layout::{
    CQ_ENTRIES_MAX, CQ_EVENTFD_DISABLED, CQE_BYTES, Doorbell, LayoutError, RINGS_HEADER_BYTES, RingLayout,
    SQ_CQ_OVERFLOW, SQ_ENTRIES_MAX, SQ_NEED_WAKEUP, SQE_BYTES, rings_area_bytes, sqes_area_bytes,
};
pub use mapped::MappedRing;
pub use memory::RingMemory;
pub use ring::{DriverRing, PushError, PushErrorReason};
pub use segment::SegmentLimits;
