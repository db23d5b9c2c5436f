//! Split virtqueues: rings, in-flight tracking, dirty log.

use vm_memory::GuestAddress;

/// Everything that is known of a vring when it starts.
#[derive(Debug)]
pub struct QueueSetup {
    /// Number of descriptors (VHOST_USER_SET_VRING_NUM): a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc_table: GuestAddress,
    /// Guest-physical address of the available ring.
    pub avail_ring: GuestAddress,
    /// Guest-physical address of the used ring.
    pub used_ring: GuestAddress,
    /// Index of the next available entry to take (VHOST_USER_SET_VRING_BASE).
    pub next_avail: u16,
    /// Whether VIRTIO_RING_F_EVENT_IDX was accepted.
    pub event_idx: bool,
    /// Where the used ring is for the dirty log (VHOST_USER_SET_VRING_ADDR with VHOST_VRING_F_LOG).
    pub used_log_gpa: Option<u64>,
    /// This queue's part of the in-flight region, if the front-end keeps one.
    pub inflight: Option<InflightQueue>,
}

/// The part of an in-flight region that belongs to one queue.
#[derive(Debug)]
pub struct InflightQueue(());

/// The front-end's log of pages that the device wrote.
#[derive(Debug)]
pub struct DirtyLog(());
