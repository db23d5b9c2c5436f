//! What a guest and the ringpass broker share.
//!
//! The broker creates an io_uring whose submission queue (SQ) and completion queue (CQ) live in memory that the
//! guest can reach, restricts it, and enables it. From then on the guest is the only producer of submission queue
//! entries (SQEs) and the only consumer of completion queue entries (CQEs), and the host kernel is the other side.
//! This crate is the guest's half of that contract, for any guest: a kernel, a bare-metal program, or a process
//! that is its own guest.
//!
//! - [`Sqe`] and [`Cqe`]: the entries, as `<linux/io_uring.h>` lays them out.
//! - [`RingLayout`]: where everything is. Offsets are *given* by the device at run time and never assumed.
//! - [`FixedAddressing`]: how a guest-physical address becomes `(buf_index, sqe.addr)`, and the 1 GiB rule.
//! - [`RingMemory`]: the few memory accesses a driver needs, to be provided by each kind of guest.
//! - [`DriverRing`]: the driver's side of the ring over such memory, with its memory orderings.
//! - [`MappedRing`]: [`RingMemory`] over two plain mappings, for guests that can name them by pointer.
//!
//! The crate has no dependencies and needs no `std`. All its logic is safe code; only [`MappedRing`] touches raw
//! memory.

#![no_std]
#![deny(unsafe_code)]

mod address;
mod entry;
mod layout;
mod mapped;
mod memory;
mod ring;

pub use address::{AddressError, FixedAddress, FixedAddressing, SLOT_BYTES, SLOT_COUNT_MAX};
pub use entry::{Cqe, Opcode, Sqe, SqeFlags};
pub use layout::{
    CQ_EVENTFD_DISABLED, Doorbell, LayoutError, RingLayout, SQ_CQ_OVERFLOW, SQ_NEED_WAKEUP, rings_area_bytes,
    sqes_area_bytes,
};
pub use mapped::MappedRing;
pub use memory::RingMemory;
pub use ring::{DriverRing, PushError, PushErrorReason};
