//! The vhost-user protocol, the back-end's side of it.

mod device;

pub use device::{ConfigWriteError, Device, DeviceMemory, QueueEventfds};
