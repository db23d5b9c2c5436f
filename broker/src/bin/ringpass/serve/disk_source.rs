//! The engine's disk, from a lease.

use std::error::Error;
use std::sync::Arc;

use ringpass_broker::disk::{DiskLease, LeaseState, LocatedDisk};
use ringpass_broker::engine::DiskSource;
use ringpass_broker::limits::{LimitError, cap_file_growth_at};

/// Waits for the disk when the engine wants it, and gives it back.
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

/// The engine checks each request against the size; with this, the kernel does so too.
pub(super) fn cap_growth(disk: &LocatedDisk, size_bytes: u64) -> Result<(), LimitError> {
    // What cannot be written cannot grow, and the limit is one of the whole process.
    if disk.is_read_only() { Ok(()) } else { cap_file_growth_at(disk.kind(), size_bytes) }
}
