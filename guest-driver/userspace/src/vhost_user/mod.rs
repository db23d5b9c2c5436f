//! A disk behind a vhost-user socket, for a process that is its own guest.
//!
//! The process is front-end and driver at once: it brings its own RAM, sets the queues of the device up, asks for rings in band
//! (`docs/abi.md`), and reads and writes. From its memory to the host kernel there is then nothing in between.
//!
//! - [`Disk`]: the connection, the RAM, queue 0 with flush, discard and write zeroes.
//! - [`Queue`]: reads and writes, by polling or by interrupt; one for each thread.
//!
//! No wait is without end: a device that stays silent for longer than [`Options::patience`] makes the call fail with
//! [`Error::Silent`]. Requests on a [`Queue`] are the exception: they stay where they are until the device is back, and whoever
//! waits for one says for how long.
//!
//! Inside: `connection` keeps the device set up, whatever becomes of it; `watchdog` ends its waits; `virtqueue` and `requests` are
//! virtio-blk; `attachment` is the ring of a queue and where its epochs are; `driver` decides where each request of a queue goes;
//! `first_queue` is queue 0, which all queues share, and `events` the thread that listens to it.
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
mod config;
mod connection;
mod disk;
mod driver;
mod error;
mod events;
mod first_queue;
mod memory;
mod options;
mod queue;
mod requests;
mod shared;
#[cfg(test)]
mod test_device;
mod virtqueue;
mod watchdog;

pub use attachment::RingSize;
pub use config::Geometry;
pub use disk::Disk;
pub use driver::Counters;
pub use error::Error;
pub use options::{Options, Way};
pub use queue::{ByAddress, Done, ExecutedBy, Operation, Queue};
