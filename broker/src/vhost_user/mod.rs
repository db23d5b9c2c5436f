//! The back-end's side of the vhost-user protocol.
//!
//! A front-end (a VMM) connects to a socket and describes the guest's memory and its virtqueues, and the device of this
//! process serves these. From the outside in:
//!
//! 1. [`Server`] listens, serves one front-end after another, and ends when its owner tells it to.
//! 2. [`Connection`] splits the stream into [`Message`]s with their file descriptors.
//! 3. [`message`] parses them: pure functions from bytes to checked requests.
//! 4. [`Session`] is the state that the requests build. It checks each request against that state and drives the
//!    device.
//! 5. [`Device`] executes queues. It does not know messages.
//!
//! Source: the vhost-user specification of QEMU (docs/interop/vhost-user.rst) and, where front-ends differ from the
//! specification, the front-ends.

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

pub use connection::{
    Connection, ConnectionError, Message, PeerWatch, Received, Unfinished, UnfinishedExchange, Wait, Waiter,
};
pub use device::{ConfigWriteError, Device, DeviceMemory, QueueEventfds};
pub use eventfd::NotAnEventfd;
pub(crate) use eventfd::adopt as adopt_eventfd;
pub(crate) use features::feature_names;
pub use listener::{BoundSocket, ListenError, SocketAccess};
pub use memory_table::{MAX_REGIONS, MemoryTable, MemoryTableError};
pub use ring_fault::RingFault;
pub use server::{Server, ServerError, ServerHandle};
pub use session::{RequestError, Session, SessionError};
pub use signals::Signals;
