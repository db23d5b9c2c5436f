//! A disk behind a vhost-user socket, for a process that is its own guest.
//!
//! The process is front-end and driver at the same time: it provides its own RAM, sets up the queues of the device,
//! requests rings in band (`docs/abi.md`), and reads and writes. On a ring, nothing is between its memory and the host
//! kernel.
//!
//! - [`Disk`]: the connection, the RAM, and the requests flush, discard and write zeroes.
//! - [`Queue`]: reads and writes, by polling or by interrupt; one queue for each thread.
//! - [`ByAddress`]: a queue for requests that name memory by guest-physical address.
//!
//! Every wait has a limit: if the device is silent for longer than [`Options::patience`], the call fails with
//! [`Error::Silent`]. Requests on a [`Queue`] are the exception: they stay in the queue until the device is back, and
//! the caller of [`Queue::wait`] chooses how long to wait.
//!
//! Buffers are [`RamArea`](crate::RamArea)s of the disk's RAM. [`Disk::allocate`] hands them out, and their drop
//! returns them. A queue owns the buffer of a request until the request has ended, and then returns the buffer in
//! [`Done`]. The disk never hands out a buffer to which a device may still write: not after the drop of the buffer's
//! queue, not when the device violates the protocol, and not when the device does not confirm the end of its I/O.
//!
//! The private modules:
//!
//! | module | has |
//! | --- | --- |
//! | `connection` | the front-end, which sets the device up, also when the device restarts |
//! | `watchdog` | the time limits of messages to the device |
//! | `virtqueue`, `requests`, `segments` | virtio-blk requests on a split virtqueue |
//! | `attachment` | the rings of a queue and their epochs |
//! | `driver` | the driver of a queue, which chooses ring, virtqueue or queue 0 for each request |
//! | `drivers` | the drivers of the queues that the application has not taken |
//! | `queue_zero` | queue 0, which all queues share |
//! | `event_thread` | the thread that waits for interrupts of queue 0 |
//! | `memory` | the RAM, region by region |
//!
//! The documentation of the [crate] has an example.

mod attachment;
mod backoff;
mod by_address;
mod config;
mod connection;
mod disk;
mod driver;
mod drivers;
mod error;
mod event_thread;
mod memory;
mod options;
mod queue;
mod queue_zero;
mod requests;
mod segments;
#[cfg(test)]
mod test_device;
mod virtqueue;
mod watchdog;

pub use attachment::RingSize;
pub use by_address::ByAddress;
pub use config::Geometry;
pub use disk::Disk;
pub use driver::Counters;
pub use error::Error;
pub use options::{Options, Way};
pub use queue::{Done, ExecutedBy, Operation, Queue};
