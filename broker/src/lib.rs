//! The ringpass broker: gives guests io_uring rings in their own memory, and serves disks over vhost-user.
//!
//! A guest that holds such a ring writes submission queue entries and reads completion queue entries itself, and the
//! host kernel executes them. The broker sets the ring up and is then not on the data path. A guest without a driver for rings
//! uses the virtqueues of a vhost-user-blk device, which the broker executes on io_uring.
//!
//! # Where things are
//!
//! | to | use |
//! | --- | --- |
//! | open and lock an image or a block device | [`disk`] |
//! | check guest RAM, and pin it as fixed buffers at addresses that the guest can compute | [`memory`] |
//! | make one restricted ring, and learn when it has ended | [`ring`] |
//! | put these together as a device with queues | [`direct`] |
//! | connect the queues to a virtual machine | `kvm` (feature `kvm`) |
//! | make the rings of guests in another process | [`ring_host`] |
//! | execute the virtqueues of a virtio-blk device | [`engine`], with [`virtio_blk`] and [`virtqueue`] |
//! | talk to a VMM | [`vhost_user`] |
//! | answer questions about a device on a socket | [`control`] |
//! | learn what this kernel and these limits allow | [`probe`], [`kernel`], [`limits`] |
//! | give up what a process does not need | [`privileges`], `sandbox` (feature `sandbox`) |
//! | survive a front-end that shortens its files | [`lost_memory::handle_lost_memory`], once for each process, and [`before_process_end`] |
//! | show people errors and text that came from others | [`printable`] |
//!
//! # Embed rings in a VMM
//!
//! ```no_run
//! use std::fs::File;
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use ringpass_broker::direct::{DirectConfig, DirectDevice, QueueConfig, QueuePlacement, SubmissionConfig};
//! use ringpass_broker::disk::{Disk, DiskConfig};
//! use ringpass_broker::kernel;
//! use ringpass_broker::memory::{GuestMemory, RegionConfig, Sharing};
//! use ringpass_broker::ring::{RingConfig, SqThreadConfig};
//! use ringpass_broker::ringpass_guest_abi::RingLayout;
//! use ringpass_broker::ringpass_restrictions::{Access, Policy};
//! use ringpass_broker::vmm_sys_util::eventfd::EventFd;
//!
//! # fn tell_the_driver(_: &RingLayout) {}
//! fn give_a_ring(guest_ram: Arc<File>) -> Result<(), Box<dyn std::error::Error>> {
//!     let disk = Arc::new(Disk::open(&DiskConfig::new("disk.img"))?);
//!
//!     // The guest's RAM: memfd, tmpfs or hugetlbfs files at guest-physical addresses.
//!     let region = RegionConfig { gpa: 0, len_bytes: 1 << 30, file: guest_ram, file_offset_bytes: 0 };
//!     let memory = GuestMemory::new([region])?;
//!
//!     // What the guest's rings may do, compiled for this kernel.
//!     let support = kernel::support()?;
//!     let policy = Policy::direct(Access::ReadWrite).compile(&support)?;
//!     let submission = SubmissionConfig::SqThread(SqThreadConfig::default());
//!     let config = DirectConfig::new(submission, Sharing::for_kernel(&support));
//!     let device = DirectDevice::new(disk, &memory, policy, config)?;
//!
//!     // A ring in the guest's RAM, at addresses that its driver chose. The guest signals the doorbell when the SQ thread
//!     // sleeps; the kernel signals the interrupt at completions.
//!     let (doorbell, interrupt) = (EventFd::new(0)?, EventFd::new(0)?);
//!     let size = RingConfig { sq_entries: 256, cq_entries: 512 };
//!     let place = QueuePlacement::GuestRam { rings_gpa: 0x10_0000, sqes_gpa: 0x11_0000 };
//!     let queue = device.attach(QueueConfig::new(size, place).doorbell(doorbell).completion(interrupt))?;
//!     tell_the_driver(queue.layout());
//!
//!     // At the end, the guest's memory can be used for other things only when the last I/O has ended.
//!     queue.close().wait(Duration::from_secs(30))?;
//!     Ok(())
//! }
//! ```
//!
//! The guest's side of the ring is the crate [`ringpass_guest_abi`]. `examples/own_guest.rs` has both sides.
//!
//! # Serve a disk
//!
//! ```no_run
//! use std::error::Error;
//! use std::io;
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use ringpass_broker::disk::{Disk, DiskConfig};
//! use ringpass_broker::engine::{DiskSource, Engine, EngineConfig};
//! use ringpass_broker::vhost_user::Server;
//! use ringpass_broker::virtio_blk::{BlkConfig, BlkParameters};
//!
//! /// A disk that this process has from its start to its end.
//! struct OwnDisk(Arc<Disk>);
//!
//! impl DiskSource for OwnDisk {
//!     fn request(&mut self) {}
//!
//!     fn stop_waiting(&mut self) {}
//!
//!     fn release(&mut self, _is_wanted: &dyn Fn() -> bool) {}
//!
//!     fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn Error + Send + Sync>> {
//!         Ok(self.0.size_bytes())
//!     }
//! }
//!
//! fn main() -> Result<(), Box<dyn Error>> {
//!     let disk = Arc::new(Disk::open(&DiskConfig::new("disk.img"))?);
//!     let parameters = BlkParameters::new(disk.size_bytes())
//!         .logical_block_bytes(disk.logical_block_bytes())
//!         .physical_block_bytes(disk.physical_block_bytes());
//!     let config = EngineConfig::new(BlkConfig::new(parameters)?);
//!     let source = OwnDisk(disk.clone());
//!     let mut engine = Engine::new(config, |_| -> io::Result<Box<dyn DiskSource>> { Ok(Box::new(source)) })?;
//!     engine.control().set_disk(&disk);
//!
//!     // One front-end after another, until another thread calls `ServerHandle::stop`.
//!     Server::bind(Path::new("/run/vm1.sock"))?.run(&mut engine)?;
//!     engine.shutdown();
//!     Ok(())
//! }
//! ```
//!
//! A [`disk::DiskLease`] as the source lets go of the disk for a live migration and waits for the I/O of a server that was
//! killed; [`engine::AttachConfig`] offers rings to the guests of the device.

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
mod ring_fd;
pub mod ring_host;
#[cfg(feature = "sandbox")]
pub mod sandbox;
mod signal_line;
#[cfg(test)]
mod skipped;
mod socket_file;
mod threads;
pub mod vhost_user;
pub mod virtio_blk;
pub mod virtqueue;

pub use process_end::before_process_end;
// The types of these crates are in public signatures.
pub use {ringpass_guest_abi, ringpass_restrictions, rustix, vm_memory, vmm_sys_util};
