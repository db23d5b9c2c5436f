//! The ringpass guest driver for a process that is its own guest: a container, an application, a test.
//!
//! Such a guest has no virtual machine. The process shares RAM with the device (memfds, or files on tmpfs or
//! hugetlbfs). Both sides name bytes of this RAM by *guest-physical* address, and eventfds take the place of doorbells
//! and interrupts. The device is `ringpass serve`, another vhost-user-blk device, or a process that embeds the broker.
//! Where the device offers rings of the host's io_uring, the process gives its requests directly to the host kernel.
//!
//! # Where things are
//!
//! | to | use |
//! | --- | --- |
//! | read and write a disk behind a vhost-user socket, through rings or virtqueues | [`vhost_user`] |
//! | receive a device from a broker process over a UNIX socket, or hand it over | [`handover`] |
//! | map RAM and allocate areas of it | [`GuestRam`], [`RamAllocator`] |
//! | put a ring into RAM | [`RamRing`], with [`ringpass_guest_abi::DriverRing`] |
//! | sleep until a device signals an eventfd | [`wait_for_interrupt`] |
//!
//! | type | is |
//! | --- | --- |
//! | [`vhost_user::Disk`] | a connected disk: its queues, its buffers, flush, discard and write zeroes |
//! | [`vhost_user::Queue`] | one queue of a disk, for one thread at a time: reads and writes, by polling or by interrupt |
//! | [`vhost_user::Done`] | a read or write that has ended, with its buffer |
//! | [`vhost_user::Geometry`] | size, block size and limits of a disk |
//! | [`vhost_user::Options`] | the options of a connection: RAM, queues, rings or virtqueues, time limit for the device |
//! | [`vhost_user::ByAddress`] | a queue for requests that name memory by guest-physical address |
//! | [`handover::Handover`] | a received device: its description, the files of its RAM, the eventfds of its queues |
//! | [`handover::Setup`] | the description of a device, as one line of JSON |
//! | [`GuestRam`] | the RAM of a guest, mapped in this process; made of [`RamRegion`]s |
//! | [`RamAllocator`] | hands out [`RamArea`]s of that RAM |
//! | [`RamArea`] | a piece of RAM with one owner; its drop returns it. The buffers of a disk are such areas, too |
//! | [`RamRing`] | the memory of a ring in two such areas |
//!
//! # Use a disk that `ringpass serve` serves
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use ringpass_guest::vhost_user::{Disk, Operation, Options};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // The driver makes 4 MiB of RAM for buffers and queues. The device has 10 s for each answer.
//!     let limit = Duration::from_secs(10);
//!     let disk = Disk::connect("/run/vm1.sock", Options::default().memory_bytes(4 << 20).patience(limit))?;
//!
//!     // Queue 0 belongs to the driver. Queue 1 is a ring if the device offers rings, and otherwise a virtqueue.
//!     let mut queue = disk.queue(1)?;
//!
//!     // Write the first 4096 bytes of the disk. The queue owns the buffer until the request has ended.
//!     let mut buffer = disk.allocate(4096)?;
//!     buffer.bytes_mut(0, 4096).ok_or("the buffer is too short")?.fill(0xa5);
//!     queue.submit(Operation::Write, buffer, 0, 4096, 1).map_err(|_| "the queue is full")?;
//!     let written = queue.wait(limit).ok_or("the write takes too long")?;
//!     assert_eq!((written.tag, written.result?), (1, 4096));
//!
//!     // A write is stable when a flush after it succeeds.
//!     disk.flush()?;
//!
//!     // Read the bytes into the same buffer.
//!     let mut buffer = written.buffer;
//!     buffer.bytes_mut(0, 4096).ok_or("the buffer is too short")?.fill(0);
//!     queue.submit(Operation::Read, buffer, 0, 4096, 2).map_err(|_| "the queue is full")?;
//!     let mut read = queue.wait(limit).ok_or("the read takes too long")?;
//!     assert_eq!((read.tag, read.result?), (2, 4096));
//!     assert!(read.buffer.bytes_mut(0, 4096).is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0xa5)));
//!
//!     // Stop the queues. The device confirms that all I/O has ended.
//!     disk.close()?;
//!     Ok(())
//! }
//! ```
//!
//! The program `examples/ringpass-dd` keeps several queues busy in this way, and continues when the server restarts.
//!
//! # Drive a ring that a broker process hands over
//!
//! ```no_run
//! use std::error::Error;
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use ringpass_guest::ringpass_guest_abi::{DriverRing, Sqe};
//! use ringpass_guest::{GuestRam, handover, wait_for_interrupt};
//!
//! fn read_4_kib(socket: &UnixStream) -> Result<Vec<u8>, Box<dyn Error>> {
//!     let device = handover::receive(socket)?;
//!     // SAFETY: the broker process does not shorten the files. This function borrows the bytes of the buffer only after
//!     // its request has ended, and drops the buffer only then.
//!     let ram = Arc::new(unsafe { GuestRam::map(&device.regions()) }?);
//!     let mut allocator = ram.allocator()?;
//!
//!     // The broker has placed the ring: reserve its two areas, and allocate a buffer elsewhere.
//!     let (queue, events) = (&device.setup.queues[0], &device.events[0]);
//!     let memory = allocator.ring(queue.rings_gpa, &queue.layout, queue.sqes_gpa)?;
//!     let mut ring = DriverRing::new(memory, queue.layout)?;
//!     let mut buffer = allocator.allocate(4096)?;
//!
//!     let address = device.setup.addressing()?.resolve(buffer.gpa(), 4096)?;
//!     ring.push(&Sqe::read_fixed(address, 4096, 0, 7))?;
//!     if ring.publish() {
//!         let _ = events.doorbell.write(1);
//!     }
//!     let cqe = loop {
//!         match ring.reap() {
//!             Some(cqe) => break cqe,
//!             None => drop(wait_for_interrupt(&events.completion, Duration::from_secs(1))),
//!         }
//!     };
//!     assert_eq!((cqe.user_data, cqe.res), (7, 4096));
//!     Ok(buffer.bytes_mut(0, 4096).ok_or("the buffer is too short")?.to_vec())
//! }
//! ```

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
pub use {ringpass_guest_abi, serde_json, vhost, vmm_sys_util};
