//! What the vhost-user side asks of a device: the seam between the protocol and the execution of queues.
//!
//! The session drives a [`Device`] and knows nothing of how requests are executed; the device knows nothing of
//! messages. All calls come from one thread, the protocol thread. A front-end waits for the answer of most messages
//! while it holds its own locks (QEMU: the big lock), so each call says how long it may take.

use std::error::Error;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::connection::PeerWatch;
use super::ring_fault::RingFault;
use crate::virtqueue::{DirtyLog, QueueSetup};

/// The guest's memory as the front-end described it: regions of files at guest-physical addresses.
///
/// A table is never changed: a change by the front-end makes a new one that shares the mappings of the regions that
/// stayed.
pub type DeviceMemory = vm_memory::GuestMemoryMmap<()>;

/// The eventfds of one vring (VHOST_USER_SET_VRING_KICK, _CALL, _ERR).
///
/// Each is an eventfd, perhaps one that blocks: O_NONBLOCK belongs to the open file description, which the front-end
/// goes on using (libblkio promises its users a blocking one), so it is never changed here. A read blocks when there is
/// no kick; a write when the counter is at its end, which only the front-end can bring about.
#[derive(Debug, Default)]
pub struct QueueEventfds {
    /// The driver signals it when it made chains available. `None`: the queue must be polled.
    pub kick: Option<EventFd>,
    /// The device signals it when it used chains. `None`: the driver polls the used ring.
    pub call: Option<EventFd>,
    /// The device signals it when the queue cannot go on.
    pub err: Option<EventFd>,
}

/// Why the driver's write to the configuration space was refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigWriteError {
    /// The bytes are not all in fields that the driver may write with the features it accepted.
    #[error(
        "bytes {offset_bytes}..{end_bytes} of the configuration space cannot be written; only `writeback` can, after \
         VIRTIO_BLK_F_CONFIG_WCE was accepted"
    )]
    NotWritable {
        /// Where the write began.
        offset_bytes: u32,
        /// The first byte after it.
        end_bytes: u64,
    },
    /// The field is writable, but not with this value.
    #[error("{value} is no value of the configuration field `{field}`")]
    BadValue {
        /// The field's name in VIRTIO.
        field: &'static str,
        /// The value.
        value: u64,
    },
}

/// A device as the vhost-user session sees it.
///
/// Queue indexes are below [`queue_count`](Self::queue_count); the session has checked that. A queue is started at most
/// once before it is stopped.
pub trait Device: Send {
    /// A front-end has connected. Once it is gone, no call goes on waiting for I/O: what it gives then does not matter, for nobody
    /// is answered, and [`abandon`](Self::abandon) follows. `None`: nobody can tell, and each call waits to the end.
    fn set_peer(&mut self, peer: Option<PeerWatch>);

    /// How many queues the device has: at least 1, at most 256.
    fn queue_count(&self) -> u16;

    /// The largest size of a queue: a power of two, at most 32768.
    fn max_queue_size(&self) -> u16;

    /// The VIRTIO feature bits of the device and of its rings. Those of vhost-user (bits 26 and 30) are the session's.
    fn device_features(&self) -> u64;

    /// The feature bits that the driver accepted: a subset of [`device_features`](Self::device_features).
    ///
    /// Comes while no queue is started. What the driver wrote to the configuration space stays.
    fn set_driver_features(&mut self, features: u64);

    /// The device's configuration space as it is now (VIRTIO 1.2, 5.2.4).
    fn config_space(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError>;

    /// What the driver has set that a process which takes over must know: bits of the device's own, 0 at first.
    fn driver_settings(&self) -> u8;

    /// Takes up what [`driver_settings`](Self::driver_settings) of an earlier process was, or of this one. It was kept by the
    /// front-end: any value may come.
    fn restore_driver_settings(&mut self, settings: u8);

    /// What the driver was told of the device and has accepted, for a process that takes over: bytes of the device's own, at most
    /// [`DEVICE_RECORD_MAX_BYTES`](crate::virtqueue::DEVICE_RECORD_MAX_BYTES).
    fn record(&self) -> Vec<u8>;

    /// Compares what [`record`](Self::record) of an earlier process was with the device as it is. It was kept by the front-end: any
    /// bytes may come, and what is no record says nothing. True: the driver can go on, and is to be told that the configuration changed.
    ///
    /// # Errors
    ///
    /// The driver relies on what this device is not. Nothing must be executed for it.
    fn compare_record(&self, record: &[u8], queues_in_use: u16) -> Result<bool, Box<dyn Error + Send + Sync>>;

    /// Another front-end has come. What the driver before accepted and wrote counts for it no more; what is under way ends as it began.
    fn forget_driver(&mut self);

    /// The guest's memory, from now on.
    ///
    /// Returns when every queue takes new chains from it only and, if memory of the table before is not in it, when no I/O that
    /// is under way can land in that any more. What a device prepares in memory that is new need not be ready.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>);

    /// Where pages that the device writes are marked; `None` stops it.
    ///
    /// Returns when in force: a page that is written after that is marked, also by requests that began before.
    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>);

    /// Where the used ring of a queue that runs is in the dirty log (VHOST_VRING_F_LOG); `None`: it is not logged.
    ///
    /// Returns when in force.
    fn set_used_log(&mut self, index: u16, used_log_gpa: Option<u64>);

    /// Starts a queue, disabled until [`set_enabled`](Self::set_enabled) says otherwise.
    ///
    /// Returns at once. Nothing is executed before the I/O of an earlier run of this queue has ended and the lock of
    /// the disk is held. A queue whose rings turn out to be unusable signals its error eventfd.
    fn start_queue(&mut self, index: u16, setup: QueueSetup, eventfds: QueueEventfds);

    /// The driver set a queue up so that it cannot run. The front-end takes it for started, but it is not: the device signals
    /// the error eventfd, counts and logs the fault, and stops nothing later.
    ///
    /// Returns at once.
    fn break_queue(&mut self, index: u16, fault: RingFault, err: Option<EventFd>);

    /// Stops a queue that was started and gives the index of the next available entry it would have taken.
    ///
    /// Waits for the I/O of this queue, and of no other. What an earlier process had taken according to the in-flight
    /// region counts as taken, so it is executed before this returns, even if the disk has to be waited for; unless the
    /// queue is broken. A queue that never got to run gives the index it was started with.
    ///
    /// `None`: the front-end is gone, and the queue's I/O goes on. Nothing else is to be done for that front-end.
    fn stop_queue(&mut self, index: u16) -> Option<u16>;

    /// Whether a started queue may take chains. What is under way goes on.
    ///
    /// Returns when in force.
    fn set_enabled(&mut self, index: u16, enabled: bool);

    /// Replaces the call eventfd of a started queue and signals the new one once, so that no interrupt is lost.
    ///
    /// Returns when the old one is used no more.
    fn set_call(&mut self, index: u16, call: Option<EventFd>);

    /// Replaces the kick eventfd of a started queue, which is looked at once as if it had been kicked.
    fn set_kick(&mut self, index: u16, kick: Option<EventFd>);

    /// Replaces the error eventfd of a started queue.
    fn set_err(&mut self, index: u16, err: Option<EventFd>);

    /// The front-end is gone, without having stopped its queues.
    ///
    /// Returns at once. Nothing new is taken; what is under way ends into the memory, the used ring and the in-flight
    /// region that it began with, and is logged as before. A later start of the same queue waits for that, inside the
    /// device.
    fn abandon(&mut self);

    /// Stops all queues and waits for their I/O: the end of the program. What the driver accepted and wrote is forgotten.
    ///
    /// A reset by the driver is not this: the session stops the queues then, one by one.
    fn reset(&mut self);

    /// Reads the size of the disk again, because somebody says that it changed. True: the capacity is another one now.
    ///
    /// # Errors
    ///
    /// The new size cannot be used; the device goes on with the old one.
    fn refresh_capacity(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>>;
}
