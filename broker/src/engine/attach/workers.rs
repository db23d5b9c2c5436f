//! How rings reach the workers of their queues.

use std::fmt;

use ringpass_guest_abi::epoch::Area;
use ringpass_guest_abi::request::ErrorCode;

use super::attachment::AttachmentId;
use super::builder_command::Built;

/// What a worker is told about one of its attachments.
#[derive(Debug)]
pub(in crate::engine) enum AttachEvent {
    /// The builder made a ring.
    Built(Box<Built>),
    /// The builder made no ring.
    BuildFailed(ErrorCode),
    /// The ring of this area, which was closed, is gone.
    Gone(Area),
    /// The ring had more requests outstanding than it may have. No ring follows before the driver asks again.
    Excess,
}

/// Reaches the workers of a device, from the builder, from ends of rings and from other workers.
///
/// Nothing here waits. A worker does not end while its queues have rings, so that it receives the ends of those rings,
/// even if the engine's handle is gone.
pub(in crate::engine) trait Workers: fmt::Debug + Send + Sync {
    /// Tells the worker of a queue what happened for an attachment of this queue.
    fn attach_event(&self, queue: u16, attachment: AttachmentId, event: AttachEvent);

    /// Has the worker of queue 0 complete EVENT, so that the driver looks at its queues.
    fn tell_driver(&self);

    /// Has all workers end their rings. Other rings may follow.
    fn end_rings(&self, reason: ErrorCode);

    /// Has all workers end their rings and complete each ATTACH. No ring follows before the driver asks again.
    fn finish_rings(&self, reason: ErrorCode);
}
