//! The engine's disk, taken from a lease.

use std::error::Error;
use std::sync::Arc;

use anyhow::bail;
use ringpass_broker::disk::{DiskLease, LeaseState, LocatedDisk};
use ringpass_broker::engine::DiskSource;
use ringpass_broker::limits::{LimitError, bound_file_growth, cap_file_growth_at};

/// Acquires the disk when the engine requests it, and releases it afterwards.
pub(super) struct LeasedDisk {
    lease: Arc<DiskLease>,
}

impl LeasedDisk {
    pub(super) fn new(lease: Arc<DiskLease>) -> Self {
        Self { lease }
    }
}

impl DiskSource for LeasedDisk {
    fn request(&mut self) {
        self.lease.acquire();
    }

    fn stop_waiting(&mut self) {
        self.lease.stop_waiting();
    }

    fn release(&mut self, is_wanted: &dyn Fn() -> bool) {
        self.lease.release_while(is_wanted);
    }

    fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn Error + Send + Sync>> {
        let located = self.lease.located();
        let size_bytes = match self.lease.state() {
            LeaseState::Held(disk) => disk.refresh_size()?,
            _ => located.refresh_size()?,
        };
        follow_growth(located, size_bytes)?;
        Ok(size_bytes)
    }
}

/// Limits the size to which this process can grow files (RLIMIT_FSIZE), so that the kernel, too, checks what the engine
/// checks for each request.
pub(super) fn cap_growth(disk: &LocatedDisk, size_bytes: u64) -> Result<(), LimitError> {
    // A read-only disk cannot grow, and the limit would apply to the whole process.
    if disk.is_read_only() { Ok(()) } else { cap_file_growth_at(disk.kind(), size_bytes) }
}

/// Lets this process make files of this size at most, for good. Without a size, the disk has its largest size now.
pub(super) fn bound_growth(disk: &LocatedDisk, size_max_bytes: Option<u64>) -> Result<(), LimitError> {
    if disk.is_read_only() {
        return Ok(());
    }
    bound_file_growth(disk.kind(), size_max_bytes.unwrap_or(0).max(disk.size_bytes()))
}

/// As [`cap_growth`], after [`bound_growth`].
pub(super) fn follow_growth(disk: &LocatedDisk, size_bytes: u64) -> anyhow::Result<()> {
    match cap_growth(disk, size_bytes) {
        Err(LimitError::HardTooLow { hard_bytes, .. }) => bail!(
            "the image has {size_bytes} bytes, but this server may serve {hard_bytes} at most: restart the server; to let \
             images grow without a restart, start it with --max-size SIZE"
        ),
        other => Ok(other?),
    }
}
