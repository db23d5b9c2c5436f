//! A disk behind a vhost-user socket, for a process that is its own guest.
//!
//! The process is front-end and driver at the same time: it provides its own RAM, sets up the queues of the device,
//! requests rings in band (`docs/abi.md`), and reads and writes. Nothing is then between its memory and the host
//! kernel.
//!
//! - [`Disk`]: the connection, the RAM, and queue 0 with flush, discard and write zeroes.
//! - [`Queue`]: reads and writes, by polling or by interrupt; one queue for each thread.
//!
//! Every wait is limited: if the device is silent for longer than [`Options::patience`], the call fails with
//! [`Error::Silent`]. Requests on a [`Queue`] are the exception: they stay in the queue until the device is back, and
//! the caller of [`Queue::wait`] chooses how long to wait.
//!
//! Buffers are [`RamArea`](crate::RamArea)s of the disk's RAM. [`Disk::allocate`] hands them out, and they return when
//! they are dropped. A queue owns the buffer of a request until the request has ended, and then returns the buffer in
//! [`Done`]. The disk never hands out a buffer to which a device may still write: not when the buffer's queue is
//! dropped, not when the device breaks the protocol, and not when the device does not confirm the end of its I/O.
//!
//! The private modules: `connection` keeps the device set up, even when the device restarts; `watchdog` ends waits;
//! `virtqueue`, `requests` and `segments` implement virtio-blk; `attachment` is the ring of a queue with its epochs;
//! `driver` decides which way each request of a queue goes; `drivers` holds the drivers of the queues that the
//! application has not taken; `first_queue` is queue 0, which all queues share; `events` is the thread that listens to
//! queue 0.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use ringpass_guest::vhost_user::{Disk, Operation, Options};
//!
//! let disk = Disk::connect("/run/vm1.sock", Options::default())?;
//! let mut queue = disk.queue(1)?;
//! let buffer = disk.allocate(4096)?;
//! queue.submit(Operation::Read, buffer, 0, 4096, 7).expect("an empty queue has room");
//! let done = queue.wait(Duration::from_secs(1)).expect("a disk that answers");
//! assert_eq!((done.tag, done.result?), (7, 4096));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
