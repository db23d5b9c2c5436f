//! Queues that become rings: the device's side of `docs/abi.md`.
//!
//! A driver asks for a ring on an ordinary virtqueue. So the worker of that queue takes the request, and runs the
//! queue's epoch machine ([`ringpass_guest_abi::epoch::device`]). What takes long or may wait happens on other threads:
//!
//! - [`Attachment`]: a queue whose ATTACH is pending. Belongs to the queue's worker.
//! - [`PendingAttachRequest`]: a request of the attach protocol that the worker answers now or later.
//! - [`SharedRings`]: what the workers and the builder share. [`availability`]: whether the device gives out rings.
//!   [`range_registry`]: which ranges of guest memory belong to which queue. [`ring_metrics`]: what operators see.
//! - [`builder`]: the thread that has the [ring host](crate::ring_host) pin the guest's memory and make rings, one after
//!   the other. [`pinned`]: what it owns from the first ring to the end of the last attachment: memory is pinned only
//!   while there are rings. [`discards`]: notices that the front-end discards pinned memory.
//! - [`ring_watch`]: the thread that follows the ends of rings, and what the host's guard finds. [`pauses`]: the queues
//!   that get no ring for a while after a ring had more requests outstanding than it may have. [`penalty`]: for how long.
//! - [`BuilderCommand`]: a command to the builder, which comes through a [`mailbox`]. [`CancellationToken`]: lets a
//!   worker cancel a ring that it requested.
//! - [`Workers`]: how the builder and the ends of rings reach the workers. The module knows nothing else of them.
//!
//! The worker carries out the steps of the machine in `engine/worker/epochs.rs`, and takes the requests in
//! `engine/worker/attach_requests.rs`.

mod attachment;
mod availability;
pub(super) mod builder;
mod builder_command;
mod cancellation;
mod countdown;
mod discards;
mod mailbox;
mod pauses;
mod penalty;
mod pinned;
mod range_registry;
mod refusal;
mod request;
mod ring_executor;
mod ring_metrics;
pub(super) mod ring_watch;
mod shared;
mod status;
mod workers;

use std::sync::Arc;

use ringpass_guest_abi::attach::AttachLimits;
use ringpass_guest_abi::probe::{MAGIC, ProbeAnswer, VERSION};
use ringpass_guest_abi::request::ErrorCode;
use ringpass_guest_abi::{SLOT_SHIFT_MIN, SegmentLimits};
use vm_memory::GuestMemoryBackend;

pub(super) use attachment::{Attachment, AttachmentId, LiveRing, PendingRing, Ranges, host_address};
pub use availability::{OperatorMode, RingKind};
pub(super) use builder_command::{BuildRequest, BuilderCommand, BuilderSender, Built};
#[cfg(test)]
pub(super) use builder_command::{BuilderReceiver, builder_channel};
pub(super) use cancellation::CancellationToken;
pub(super) use refusal::AttachRefusal;
pub use refusal::Refused;
pub(super) use request::PendingAttachRequest;
pub(super) use shared::SharedRings;
pub use status::{KindStatus, RingCounts, RingStatus, RingsStatus};
pub(super) use workers::{AttachEvent, Workers};

use super::alignment::Alignment;
use crate::memory::slot_shift_for;
pub use crate::ring_host::AttachConfig;
use crate::ring_host::{RingControl, SEGMENT_BYTES_MAX};
use crate::vhost_user::DeviceMemory;

/// What the workers of a device that offers rings share.
#[derive(Clone, Debug)]
pub(super) struct Attach {
    config: Arc<AttachConfig>,
    queue_count: u16,
    pub(super) rings: Arc<SharedRings>,
    builder: BuilderSender,
    host: Arc<RingControl>,
    workers: Arc<dyn Workers>,
}

impl Attach {
    pub(super) fn new(
        config: Arc<AttachConfig>,
        queue_count: u16,
        rings: Arc<SharedRings>,
        builder: BuilderSender,
        host: Arc<RingControl>,
        workers: Arc<dyn Workers>,
    ) -> Self {
        Self { config, queue_count, rings, builder, host, workers }
    }

    /// What ATTACH may ask for, for a guest with this memory.
    pub(super) fn limits(&self, memory: &DeviceMemory) -> AttachLimits {
        let end_gpa = memory.last_addr().0.saturating_add(1);
        // No slots reach above 16 TiB. The builder refuses such memory, and says why.
        self.config.limits(slot_shift_for(end_gpa).unwrap_or(SLOT_SHIFT_MIN))
    }

    /// The answer to PROBE, for a guest with this memory and a disk that demands this alignment of buffers.
    pub(super) fn probe_answer(&self, memory: &DeviceMemory, alignment: Option<Alignment>) -> ProbeAnswer {
        let AttachLimits { features, sq_entries_max, cq_entries_max, page_bytes } = self.limits(memory);
        let SegmentLimits { address_align_bytes, length_align_bytes, bytes_max } = segment_limits(alignment);
        let refusal = self.rings.availability.closed(RingKind::Direct).map_or(ErrorCode::None, |refused| refused.code);
        ProbeAnswer {
            magic: MAGIC.into(),
            answer_bytes: (ProbeAnswer::BYTES as u32).into(),
            version_min: VERSION.into(),
            version_max: VERSION.into(),
            features: features.into(),
            sq_entries_max: sq_entries_max.into(),
            cq_entries_max: cq_entries_max.into(),
            page_bytes: page_bytes.into(),
            address_align_bytes: address_align_bytes.into(),
            length_align_bytes: length_align_bytes.into(),
            segment_bytes_max: bytes_max.into(),
            queue_count: self.queue_count.into(),
            refusal: (refusal as u16).into(),
            reserved: 0.into(),
        }
    }

    /// Sends a command to the builder.
    pub(super) fn command(&self, command: BuilderCommand) {
        self.builder.send(command);
    }

    /// The disk has another size.
    pub(super) fn set_disk_size(&self, size_bytes: u64) {
        self.host.set_disk_size(size_bytes);
    }

    /// Reaches the workers of all queues.
    pub(super) fn workers(&self) -> &Arc<dyn Workers> {
        &self.workers
    }
}

/// What a ring takes as one segment, with a disk that demands this alignment.
pub(super) fn segment_limits(alignment: Option<Alignment>) -> SegmentLimits {
    let (address_align_bytes, length_align_bytes) = alignment.map_or((1, 1), |alignment| {
        // Reads have blocks that are no larger.
        (alignment.address_mask as u32 + 1, alignment.write_block_bytes)
    });
    SegmentLimits { address_align_bytes, length_align_bytes, bytes_max: SEGMENT_BYTES_MAX }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_takes_what_direct_io_takes_and_anything_through_the_page_cache() {
        let alignment =
            Alignment { address_mask: 3, read_block_bytes: 512, write_block_bytes: 4096, is_coarser_than_guest: false };
        let limits = segment_limits(Some(alignment));
        assert_eq!((limits.address_align_bytes, limits.length_align_bytes), (4, 4096));
        assert!(segment_limits(None).takes(1, 511, 3));
    }
}
