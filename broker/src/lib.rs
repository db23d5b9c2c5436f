//! The ringpass broker: gives guests io_uring rings in their own memory.
//!
//! A guest that holds such a ring writes submission queue entries and reads completion queue entries itself, and the
//! host kernel executes them. The broker sets the ring up, and afterwards is not on the data path:
//!
//! 1. [`disk`] opens and locks the image or block device.
//! 2. [`memory`] checks the guest's RAM and pins it as fixed buffers, at addresses that the guest can compute.
//! 3. [`ring`] creates a disabled io_uring in guest RAM (or in a window that the embedder shows to the guest), gives it
//!    the buffers, the disk and the completion eventfd, restricts it to a policy, and enables it; and it detects the
//!    real end of the ring.
//! 4. [`direct`] combines these into a device with queues.
//!
//! With the feature `sandbox`, the module `sandbox` confines a program that serves a device. With the feature `kvm`,
//! the module `kvm` connects those queues to virtual machines.
//!
//! A program calls [`lost_memory::handle_lost_memory`] once, to limit the damage that a front-end does by shortening
//! its files. [`kernel`] and [`probe`] report what this kernel and these limits allow; [`limits`] has the resource
//! limits that matter; [`printable`] shows errors and text of others to people.

#[cfg(test)]
mod alone;
pub mod control;
pub mod direct;
pub mod disk;
pub mod engine;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzzing;
pub mod kernel;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod limits;
mod log_limit;
pub mod lost_memory;
pub mod memory;
pub mod printable;
pub mod privileges;
pub mod probe;
mod process_end;
mod processes;
pub mod ring;
#[cfg(feature = "sandbox")]
pub mod sandbox;
mod signal_line;
mod threads;
pub mod vhost_user;
pub mod virtio_blk;
pub mod virtqueue;

pub use process_end::before_process_end;
