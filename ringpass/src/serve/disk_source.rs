//! The engine's disk, taken from a lease.

use std::error::Error;
use std::sync::Arc;

use ringpass_broker::disk::{DiskLease, LeaseState, LocatedDisk};
use ringpass_broker::engine::DiskSource;
use ringpass_broker::limits::{LimitError, cap_file_growth_at};

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
        cap_growth(located, size_bytes)?;
        Ok(size_bytes)
    }
}

/// Limits the size to which this process can grow files (RLIMIT_FSIZE), so that the kernel, too, checks what the engine
/// checks for each request.
pub(super) fn cap_growth(disk: &LocatedDisk, size_bytes: u64) -> Result<(), LimitError> {
    // A read-only disk cannot grow, and the limit would apply to the whole process.
    if disk.is_read_only() { Ok(()) } else { cap_file_growth_at(disk.kind(), size_bytes) }
}
