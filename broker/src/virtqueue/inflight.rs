//! The in-flight region: the chains that a queue has taken and not returned yet, in memory that outlives the process.
//!
//! The format and the order of its stores are those of the vhost-user specification, "Inflight I/O tracking", split
//! virtqueues. The front-end keeps the region across a reconnect and writes nothing to it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;

use super::device_record::{AREA_BYTES, DeviceRecordArea};
use super::rings::QUEUE_SIZE_MAX;
use super::shared_memory::{SharedMemory, SharedMemoryError};
use crate::limits::grow_beyond_cap;
use crate::lost_memory::Purpose;

/// `version` of a region in use; 0 is a region that no process has used yet.
pub(super) const VERSION: u16 = 1;

/// Offsets of the fields of `QueueRegionSplit`.
const FEATURES_OFFSET: usize = 0;
const VERSION_OFFSET: usize = 8;
const DESC_NUM_OFFSET: usize = 10;
const LAST_BATCH_HEAD_OFFSET: usize = 12;
const USED_IDX_OFFSET: usize = 14;
const HEADER_BYTES: usize = 16;
/// Position of the driver's settings in `features` of the first queue. The specification defines no feature yet and
/// makes back-ends write 0; future features will begin at the other end.
const SETTINGS_SHIFT: u32 = 56;
/// Size of `DescStateSplit`, and the offsets of its fields.
const ENTRY_BYTES: usize = 16;
const ENTRY_INFLIGHT_OFFSET: usize = 0;
const ENTRY_NEXT_OFFSET: usize = 6;
const ENTRY_COUNTER_OFFSET: usize = 8;
/// All back-ends that we know of (libvhost-user, DPDK) align the regions of the queues to this. A front-end may give
/// one back-end the region of another.
const REGION_ALIGNMENT_BYTES: usize = 64;

/// Why an in-flight region cannot be made or used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InflightError {
    /// The region is for no queues, or for queues of an invalid size.
    #[error("an in-flight region for {queues} queues of {queue_size} descriptors: it must be for 1 to 32768 of each")]
    Shape {
        /// Number of queues.
        queues: u16,
        /// Descriptors of each.
        queue_size: u16,
    },
    /// The area is too small for its queues.
    #[error("an in-flight region of {size_bytes} bytes: {queues} queues of {queue_size} need {needed_bytes}")]
    TooSmall {
        /// Size of the area in bytes.
        size_bytes: u64,
        /// Number of queues.
        queues: u16,
        /// Descriptors of each.
        queue_size: u16,
        /// The required size in bytes.
        needed_bytes: u64,
    },
    /// The region cannot be mapped.
    #[error("the in-flight region: {0}")]
    Mapping(#[from] SharedMemoryError),
    /// The file for the region cannot be made.
    #[error("{what} failed: {source}")]
    Create {
        /// What the back-end was doing.
        what: &'static str,
        /// The kernel's error.
        source: std::io::Error,
    },
}

/// A new in-flight region, as the answer to VHOST_USER_GET_INFLIGHT_FD. It begins at offset 0 of the file.
#[derive(Debug)]
pub struct InflightFile {
    /// A memfd that cannot be shortened: zeroes for the queues, and behind them an empty device record.
    pub fd: OwnedFd,
    /// Length of the region, and of the file, in bytes.
    pub size_bytes: u64,
}

/// A mapped in-flight region.
#[derive(Debug)]
pub struct InflightRegion {
    memory: SharedMemory,
    queues: u16,
    queue_size: u16,
    /// `None`: another back-end, or an older ringpass, made the region.
    device_record: Option<DeviceRecordArea>,
}

impl InflightRegion {
    /// Makes a region for `queues` queues of `queue_size` descriptors each, and for a record of the device. It comes
    /// into use when the front-end sends it back.
    ///
    /// # Errors
    ///
    /// The shape is invalid, or the kernel makes no file.
    pub fn create(queues: u16, queue_size: u16) -> Result<InflightFile, InflightError> {
        let queues_bytes = region_bytes(queues, queue_size)?;
        let size_bytes = queues_bytes + AREA_BYTES as u64;
        let failed = |what| move |source| InflightError::Create { what, source };
        let system = |what| move |errno: rustix::io::Errno| failed(what)(errno.into());
        let fd = rustix::fs::memfd_create("ringpass-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(system("making the memfd of an in-flight region"))?;
        grow_beyond_cap(size_bytes, || Ok(rustix::fs::ftruncate(&fd, size_bytes)?))
            .map_err(failed("sizing the memfd of an in-flight region"))?;
        // The front-end holds the file while this process uses the mapping: with the seals it cannot remove pages under
        // the mapping.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
            .map_err(system("sealing the memfd of an in-flight region"))?;
        let copy = fd.try_clone().map_err(failed("duplicating the memfd of an in-flight region"))?;
        let memory = SharedMemory::map(copy, 0, size_bytes, Purpose::InflightRegion)?;
        if let Some(area) = memory.part(queues_bytes as usize, AREA_BYTES) {
            DeviceRecordArea::prepare(&area);
        }
        Ok(InflightFile { fd, size_bytes })
    }

    /// Maps the region that the front-end gives (VHOST_USER_SET_INFLIGHT_FD). Its content is checked when a queue
    /// starts.
    ///
    /// # Errors
    ///
    /// The shape is invalid, the queues need more than `size_bytes`, or the area cannot be mapped.
    pub fn from_fd(
        fd: OwnedFd,
        offset_bytes: u64,
        size_bytes: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let needed_bytes = region_bytes(queues, queue_size)?;
        if size_bytes < needed_bytes {
            return Err(InflightError::TooSmall { size_bytes, queues, queue_size, needed_bytes });
        }
        let with_record_bytes = needed_bytes + AREA_BYTES as u64;
        // Other back-ends may round the size up, beyond the end of the file.
        let file_bytes = rustix::fs::fstat(&fd).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        let has_record = size_bytes.min(file_bytes.saturating_sub(offset_bytes)) >= with_record_bytes;
        let mapped_bytes = if has_record { with_record_bytes } else { needed_bytes };
        let memory = SharedMemory::map(fd, offset_bytes, mapped_bytes, Purpose::InflightRegion)?;
        let area = memory.part(needed_bytes as usize, AREA_BYTES);
        Ok(Self { memory, queues, queue_size, device_record: area.and_then(DeviceRecordArea::find) })
    }

    /// The driver's settings that a process recorded last; 0 if none did. The device defines the bits.
    ///
    /// Front-ends do not repeat every setting to a successor process, so the region keeps them where the successor
    /// finds them: in bits that only ringpass uses, and that other back-ends do not look at.
    pub fn driver_settings(&self) -> u8 {
        (self.features().load(Ordering::Acquire) >> SETTINGS_SHIFT) as u8
    }

    /// Records the driver's settings.
    pub fn set_driver_settings(&self, settings: u8) {
        let others = self.features().load(Ordering::Acquire) & !(0xff << SETTINGS_SHIFT);
        self.features().store(others | u64::from(settings) << SETTINGS_SHIFT, Ordering::Release);
    }

    /// The device record that a process wrote last. `None`: no process has written one, or another back-end made the
    /// region.
    pub fn device_record(&self) -> Option<Vec<u8>> {
        self.device_record.as_ref()?.read()
    }

    /// Writes the device record: at most [`DEVICE_RECORD_MAX_BYTES`](super::DEVICE_RECORD_MAX_BYTES). Does nothing if
    /// the region has no room for it because another back-end made it.
    pub fn set_device_record(&self, record: &[u8]) {
        if let Some(area) = &self.device_record {
            area.write(record);
        }
    }

    fn features(&self) -> &AtomicU64 {
        self.memory.to_store(FEATURES_OFFSET)
    }

    /// The part of queue `index`. `None`: the region was made for fewer queues.
    pub fn queue(&self, index: u16) -> Option<InflightQueue> {
        if index >= self.queues {
            return None;
        }
        let stride = queue_stride(self.queue_size);
        let memory = self.memory.part(usize::from(index) * stride, stride)?;
        Some(InflightQueue { memory, entries: self.queue_size })
    }
}

/// Distance from one queue's part of a region to the next.
fn queue_stride(queue_size: u16) -> usize {
    (HEADER_BYTES + usize::from(queue_size) * ENTRY_BYTES).next_multiple_of(REGION_ALIGNMENT_BYTES)
}

fn region_bytes(queues: u16, queue_size: u16) -> Result<u64, InflightError> {
    if queues == 0 || queues > QUEUE_SIZE_MAX || queue_size == 0 || queue_size > QUEUE_SIZE_MAX {
        return Err(InflightError::Shape { queues, queue_size });
    }
    Ok(u64::from(queues) * queue_stride(queue_size) as u64)
}

/// The part of an in-flight region that belongs to one queue. It keeps the region mapped.
///
/// A loaded value may be anything. Every store is one integer, made in program order: a process that is killed leaves
/// its earlier stores, and none of the later ones.
#[derive(Clone, Debug)]
pub struct InflightQueue {
    /// `QueueRegionSplit`.
    memory: SharedMemory,
    entries: u16,
}

impl InflightQueue {
    /// Number of descriptors that can be tracked.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Resets the region to its unused state: the next start of the queue trusts the front-end and replays nothing. For
    /// a stopped queue whose driver is reset: a chain that is still recorded then could not be answered, and no driver
    /// will ask for it again.
    pub fn begin_again(&self) {
        self.set_version(0);
    }

    pub(super) fn version(&self) -> u16 {
        self.memory.atomic::<AtomicU16>(VERSION_OFFSET).load(Ordering::Acquire)
    }

    pub(super) fn set_version(&self, version: u16) {
        self.memory.to_store::<AtomicU16>(VERSION_OFFSET).store(version, Ordering::Release);
    }

    /// For other readers of the region; this back-end uses the size that the front-end named.
    pub(super) fn set_desc_num(&self, desc_num: u16) {
        self.memory.to_store::<AtomicU16>(DESC_NUM_OFFSET).store(desc_num, Ordering::Release);
    }

    pub(super) fn last_batch_head(&self) -> u16 {
        self.memory.atomic::<AtomicU16>(LAST_BATCH_HEAD_OFFSET).load(Ordering::Acquire)
    }

    pub(super) fn set_last_batch_head(&self, head: u16) {
        self.memory.to_store::<AtomicU16>(LAST_BATCH_HEAD_OFFSET).store(head, Ordering::Release);
    }

    pub(super) fn used_idx(&self) -> u16 {
        self.memory.atomic::<AtomicU16>(USED_IDX_OFFSET).load(Ordering::Acquire)
    }

    pub(super) fn set_used_idx(&self, used_idx: u16) {
        self.memory.to_store::<AtomicU16>(USED_IDX_OFFSET).store(used_idx, Ordering::Release);
    }

    pub(super) fn is_in_flight(&self, head: u16) -> bool {
        self.memory.atomic::<AtomicU8>(self.entry(head) + ENTRY_INFLIGHT_OFFSET).load(Ordering::Acquire) != 0
    }

    pub(super) fn set_in_flight(&self, head: u16, in_flight: bool) {
        let offset = self.entry(head) + ENTRY_INFLIGHT_OFFSET;
        self.memory.to_store::<AtomicU8>(offset).store(u8::from(in_flight), Ordering::Release);
    }

    pub(super) fn counter(&self, head: u16) -> u64 {
        self.memory.atomic::<AtomicU64>(self.entry(head) + ENTRY_COUNTER_OFFSET).load(Ordering::Acquire)
    }

    pub(super) fn set_counter(&self, head: u16, counter: u64) {
        self.memory.to_store::<AtomicU64>(self.entry(head) + ENTRY_COUNTER_OFFSET).store(counter, Ordering::Release);
    }

    pub(super) fn next(&self, head: u16) -> u16 {
        self.memory.atomic::<AtomicU16>(self.entry(head) + ENTRY_NEXT_OFFSET).load(Ordering::Acquire)
    }

    pub(super) fn set_next(&self, head: u16, next: u16) {
        self.memory.to_store::<AtomicU16>(self.entry(head) + ENTRY_NEXT_OFFSET).store(next, Ordering::Release);
    }

    /// Offset of `DescStateSplit` number `head`, which is below the number of entries.
    fn entry(&self, head: u16) -> usize {
        HEADER_BYTES + usize::from(head) * ENTRY_BYTES
    }
}
