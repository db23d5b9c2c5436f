//! The ringpass guest driver for a process that is its own guest: a container, a bare-metal application, or a test.
//!
//! Such a guest has RAM that it shares with the broker (memfds, tmpfs or hugetlbfs files), *guest-physical* addresses
//! that both sides agree on, and eventfds instead of doorbells and interrupts.
//!
//! - [`GuestRam`]: the RAM, mapped; [`RamAllocator`] hands out [`RamArea`]s of it.
//! - [`RamRing`]: an io_uring ring whose memory is in such areas, for `ringpass_guest_abi::DriverRing`.
//! - [`wait_for_interrupt`]: sleeps until a device signals an eventfd.
//! - [`vhost_user`]: a disk of `ringpass serve`, or of any other vhost-user-blk device, with rings if the device offers
//!   them.
//! - [`handover`]: the message by which a broker process passes a device to a guest process over a UNIX socket.

#![deny(unsafe_code)]

mod eventfd;
pub mod handover;
mod interrupt;
mod ram;
mod ring;
pub mod vhost_user;

pub use interrupt::wait_for_interrupt;
pub use ram::{AllocateError, GuestRam, RamAllocator, RamArea, RamError, RamRegion};
pub use ring::{RamRing, RingError};
