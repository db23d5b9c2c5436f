//! The vhost-user protocol, the back-end's side of it.
//!
//! A front-end (a VMM) connects to a socket, describes the guest's memory and its virtqueues, and the device of this
//! process serves them. From the outside in:
//!
//! 1. [`Server`] listens, serves one front-end after another, and ends when it is told to.
//! 2. [`Connection`] cuts the stream into [`Message`]s with their file descriptors.
//! 3. [`message`] takes them apart: pure functions from bytes to checked requests.
//! 4. [`Session`] is the state that the requests build. It checks each against that state and drives the device.
//! 5. [`Device`] is what executes queues. It knows no messages.
//!
//! Source: the vhost-user specification of QEMU (docs/interop/vhost-user.rst) and, where front-ends differ from it, the
//! front-ends.

mod backend_channel;
mod connection;
mod device;
mod eventfd;
#[cfg(any(test, feature = "fuzzing"))]
mod fake;
mod features;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub(crate) mod listener;
mod memory_table;
pub mod message;
mod ring_fault;
mod server;
mod session;
mod signals;

pub use connection::{Connection, ConnectionError, Message, PeerWatch, Received, Undone, Unfinished, Wait, Waiter};
pub use device::{ConfigWriteError, Device, DeviceMemory, QueueEventfds};
pub use eventfd::NotAnEventfd;
pub(crate) use features::feature_names;
pub use listener::{BoundSocket, ListenError, SocketAccess};
pub use memory_table::{MAX_REGIONS, MemoryTable, MemoryTableError};
pub use ring_fault::RingFault;
pub use server::{Server, ServerError, ServerHandle};
pub use session::{RequestError, Session, SessionError};
pub use signals::Signals;
