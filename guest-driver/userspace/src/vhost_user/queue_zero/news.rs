//! What the device has said on queue 0, as counters: other threads see without the lock whether there is anything new.

use std::sync::atomic::AtomicU64;

/// The numbers of answers since the connection.
#[derive(Debug, Default)]
pub(in super::super) struct News {
    /// Events that the device has reported.
    pub(in super::super) events: AtomicU64,
    /// Answers to PROBE.
    pub(in super::super) probes: AtomicU64,
}
