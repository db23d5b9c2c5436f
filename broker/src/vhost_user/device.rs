//! The interface that the vhost-user protocol requires of a device, which executes the queues.
//!
//! The session drives a [`Device`] and does not know how requests are executed; the device does not know messages. All
//! calls come from one thread, the protocol thread. A front-end waits for the answer to most messages while it holds
//! its own locks (QEMU: the big lock), so each method says how long it may take.

use std::error::Error;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::connection::PeerWatch;
use super::ring_fault::RingFault;
use crate::virtqueue::{DirtyLog, QueueSetup};

/// The guest's memory as the front-end describes it: regions of files at guest-physical addresses.
///
/// A table never changes. When the front-end changes its memory, a new table shares the mappings of the regions that
/// stay.
pub type DeviceMemory = vm_memory::GuestMemoryMmap<()>;

/// The eventfds of one vring (VHOST_USER_SET_VRING_KICK, _CALL, _ERR).
///
/// An eventfd may be a blocking one. O_NONBLOCK belongs to the open file description, which the front-end goes on using
/// (libblkio promises its users a blocking eventfd), so the back-end never changes that flag. A read blocks when there
/// is no kick. A write blocks when the counter is at its maximum, which only the front-end can cause.
#[derive(Debug, Default)]
pub struct QueueEventfds {
    /// The driver signals it when it has made chains available. `None`: the device must poll the queue.
    pub kick: Option<EventFd>,
    /// The device signals it when it has used chains. `None`: the driver polls the used ring.
    pub call: Option<EventFd>,
    /// The device signals it when the queue breaks.
    pub err: Option<EventFd>,
}

/// Why the device refused the driver's write to the configuration space. A refused write changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigWriteError {
    /// Some of the bytes are outside the fields that the driver may write with the features that it accepted.
    #[error(
        "the driver cannot write bytes {offset_bytes}..{end_bytes} of the configuration space; it can only write \
         `writeback`, after it accepted VIRTIO_BLK_F_CONFIG_WCE"
    )]
    NotWritable {
        /// Where the write began.
        offset_bytes: u32,
        /// The first byte after it.
        end_bytes: u64,
    },
    /// The field is writable, but the value is invalid.
    #[error("{value} is not a valid value of the configuration field `{field}`")]
    BadValue {
        /// The field's name in VIRTIO.
        field: &'static str,
        /// The value.
        value: u64,
    },
}

/// A device as the vhost-user session sees it.
///
/// The session checks that queue indexes are below [`queue_count`](Self::queue_count), and it starts a queue only once
/// before it stops it.
pub trait Device: Send {
    /// A front-end has connected. `peer` tells when it is gone. From then on no call waits for I/O any longer: the
    /// session ignores the results, because there is no front-end to answer, and calls [`abandon`](Self::abandon) next.
    /// `None`: the device cannot find out, so each call waits to the end.
    fn set_peer(&mut self, peer: Option<PeerWatch>);

    /// The number of queues: at least 1, at most 256.
    fn queue_count(&self) -> u16;

    /// The largest size of a queue: a power of two, at most 32768.
    fn max_queue_size(&self) -> u16;

    /// The VIRTIO feature bits of the device and of its rings. The session owns those of vhost-user (bits 26 and 30).
    fn device_features(&self) -> u64;

    /// The feature bits that the driver accepted: a subset of [`device_features`](Self::device_features).
    ///
    /// The session calls this while no queue is started. What the driver has written to the configuration space stays.
    fn set_driver_features(&mut self, features: u64);

    /// The device's configuration space as it is now (VIRTIO 1.2, 5.2.4).
    fn config_space(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError>;

    /// Settings of the driver that a successor process must know, in bits that the device defines; initially 0.
    fn driver_settings(&self) -> u8;

    /// Restores the [`driver_settings`](Self::driver_settings) of an earlier process or of this one. The front-end kept
    /// them, so any value may come.
    fn restore_driver_settings(&mut self, settings: u8);

    /// What the device has told the driver and what the driver has accepted, for a successor process: bytes that the
    /// device defines, at most [`DEVICE_RECORD_MAX_BYTES`](crate::virtqueue::DEVICE_RECORD_MAX_BYTES).
    fn record(&self) -> Vec<u8>;

    /// Compares the [`record`](Self::record) of an earlier process with this device. The front-end kept it, so any
    /// bytes may come; the device ignores bytes that are not a record. True: the driver can go on, and the session must
    /// tell it that the configuration changed.
    ///
    /// # Errors
    ///
    /// The driver relies on a property that this device lacks. The device must not execute anything for it.
    fn compare_record(&self, record: &[u8], queues_in_use: u16) -> Result<bool, Box<dyn Error + Send + Sync>>;

    /// Another front-end has come. The device forgets what the previous driver accepted and wrote; requests under way
    /// end as they began.
    fn forget_driver(&mut self);

    /// Sets the guest's memory.
    ///
    /// Returns when every queue takes new chains from this memory only and, if this memory lacks some of the previous
    /// table's, when no I/O under way can land in the missing memory any more. What the device prepares in added memory
    /// need not be ready by then.
    fn set_memory(&mut self, memory: Arc<DeviceMemory>);

    /// Sets the log in which the device marks the pages that it writes; `None` stops the logging.
    ///
    /// Returns when the log is in force: the device marks every page that it writes after that, also for requests that
    /// began before.
    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>);

    /// Sets the address under which the dirty log knows the used ring of a running queue (VHOST_VRING_F_LOG); `None`:
    /// the used ring is not logged.
    ///
    /// Returns when the change is in force.
    fn set_used_log(&mut self, index: u16, used_log_gpa: Option<u64>);

    /// Starts a queue, which stays disabled until [`set_enabled`](Self::set_enabled) enables it.
    ///
    /// Returns at once. The device executes nothing before the I/O of an earlier run of this queue has ended and the
    /// device holds the lock of the disk. It signals the error eventfd of a queue whose rings are unusable.
    fn start_queue(&mut self, index: u16, setup: QueueSetup, eventfds: QueueEventfds);

    /// The driver set up a queue that cannot run. The front-end takes it for started, but it is not: the device signals
    /// the error eventfd, counts and logs the fault, and has nothing to stop later.
    ///
    /// Returns at once.
    fn break_queue(&mut self, index: u16, fault: RingFault, err: Option<EventFd>);

    /// Stops a started queue and returns the index of the next available entry that the device would have taken.
    ///
    /// Waits for the I/O of this queue, and of no other. Chains that an earlier process took according to the in-flight
    /// region count as taken, so the device executes them before this returns, even if it has to wait for the disk; a
    /// broken queue is the exception. A queue that never ran returns the index that it was started with.
    ///
    /// `None`: the front-end is gone, and the queue's I/O goes on. The session does nothing else for that front-end.
    fn stop_queue(&mut self, index: u16) -> Option<u16>;

    /// Sets whether a started queue may take chains. Requests under way go on.
    ///
    /// Returns when the change is in force.
    fn set_enabled(&mut self, index: u16, enabled: bool);

    /// Replaces the call eventfd of a started queue and signals the new one once, so that no interrupt is lost.
    ///
    /// Returns when the device no longer uses the old one.
    fn set_call(&mut self, index: u16, call: Option<EventFd>);

    /// Replaces the kick eventfd of a started queue. The device looks at the queue at once, as after a kick.
    fn set_kick(&mut self, index: u16, kick: Option<EventFd>);

    /// Replaces the error eventfd of a started queue.
    fn set_err(&mut self, index: u16, err: Option<EventFd>);

    /// The front-end is gone and has not stopped its queues.
    ///
    /// Returns at once. The device takes no new chains. Requests under way end into the memory, the used ring and the
    /// in-flight region that they began with, and the device logs their writes as before. A later start of the same
    /// queue waits for them, inside the device.
    fn abandon(&mut self);

    /// Stops all queues and waits for their I/O, at the end of the program. The device forgets what the driver accepted
    /// and wrote.
    ///
    /// A reset by the driver does not call this: the session then stops the queues one by one.
    fn reset(&mut self);

    /// Reads the size of the disk again, because the operator says that it changed. True: the capacity has changed.
    ///
    /// # Errors
    ///
    /// The device cannot use the new size; it goes on with the old one.
    fn refresh_capacity(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>>;
}
