//! What a device says of itself.

use serde::{Deserialize, Serialize};

/// What a device is, and how it is executed now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The name under which it is found.
    pub name: String,
    /// The process that serves it.
    pub pid: u32,
    /// Version of ringpass.
    pub version: String,
    /// The disk.
    pub disk: DiskStatus,
    /// What `--mode` says: `auto`, `direct` or `virtqueue`.
    pub mode: String,
    /// Whether guests can have rings.
    pub rings: RingsOffer,
    /// Each queue.
    pub queues: Vec<QueueStatus>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its path, as it was given.
    pub path: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What the guest reads and writes in, in bytes.
    pub logical_block_bytes: u32,
    /// No writes.
    pub read_only: bool,
    /// The host's page cache is bypassed.
    pub direct_io: bool,
}

/// Whether guests can have rings of the host's io_uring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingsOffer {
    /// The device offers them.
    pub offered: bool,
    /// If not: why.
    pub why_not: Vec<String>,
    /// They are offered, and cannot be had for now: why.
    pub closed: Option<String>,
    /// What a ring may be.
    pub limits: Option<LimitStatus>,
    /// What guests with rings must do without.
    pub wants: String,
}

/// What a ring may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitStatus {
    /// Most SQ entries.
    pub sq_entries_max: u32,
    /// Most CQ entries.
    pub cq_entries_max: u32,
    /// Most bytes of one SQE.
    pub segment_bytes_max: u32,
}

/// Who executes a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExecutedBy {
    /// The device's process.
    Virtqueue,
    /// The host kernel.
    Ring,
    /// Nobody at the moment: an epoch begins or ends.
    Nobody,
}

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Its index.
    pub index: u16,
    /// The front-end has started it.
    #[serde(default = "unknown_counts_as_started")]
    pub started: bool,
    /// Who executes it.
    pub executed_by: ExecutedBy,
    /// The epoch of an attached queue.
    pub epoch: Option<u32>,
    /// Where the epoch is: `opening`, `open`, `draining`, `ending`, `ended`, …
    pub phase: Option<String>,
    /// SQ entries of its ring.
    pub sq_entries: Option<u32>,
    /// CQ entries of its ring.
    pub cq_entries: Option<u32>,
    /// Why it got no ring, or lost it, last.
    pub why_no_ring: Option<String>,
}

/// Servers of ringpass 0.1.0 do not say it.
fn unknown_counts_as_started() -> bool {
    true
}

/// What a device has done since its process began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// The name under which it is found.
    pub name: String,
    /// When its process began to count, in milliseconds since 1970: another number says that the counters began anew. Absent from
    /// older servers.
    #[serde(default)]
    pub started_ms: Option<u64>,
    /// How long it has counted, in milliseconds.
    #[serde(default)]
    pub age_ms: Option<u64>,
    /// Each queue.
    pub queues: Vec<QueueStats>,
}

/// What one queue has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStats {
    /// Its index.
    pub index: u16,
    /// What went through the device's process.
    pub by_device: ByDevice,
    /// What the words of its rings say. They are in the guest's memory: exact for an honest guest, and its own to forge.
    /// Absent for a queue that had no ring.
    pub by_guest: Option<ByGuest>,
}

/// Requests that the device's process executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByDevice {
    /// Reads that succeeded.
    pub reads: u64,
    /// Bytes that they read.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Bytes that they wrote.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Write zeroes requests.
    pub write_zeroes: u64,
    /// Requests that the disk did not carry out.
    pub failed: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Requests that went through bounce buffers, because direct I/O does not take them as the guest sends them.
    #[serde(default)]
    pub bounced: u64,
    /// Those of them that wrote a part of a block of direct I/O, and so cost a read and a write.
    #[serde(default)]
    pub partial_writes: u64,
    /// Kicks that reached the process; on attached queues doorbells.
    pub kicks: u64,
    /// Interrupts that the process sent.
    pub signals: u64,
}

/// What the words of a queue's rings say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByGuest {
    /// SQEs that the driver published.
    pub submitted: u64,
    /// CQEs that were posted.
    pub completed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_fields_are_an_interface() {
        let stats = DeviceStats {
            name: "vm1".into(),
            started_ms: Some(1),
            age_ms: Some(2),
            queues: vec![QueueStats {
                index: 1,
                by_device: ByDevice { reads: 3, ..ByDevice::default() },
                by_guest: Some(ByGuest { submitted: 5, completed: 4 }),
            }],
        };
        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!(json["queues"][0]["by_device"]["reads"], 3);
        assert_eq!(json["queues"][0]["by_guest"]["submitted"], 5);
        assert_eq!(serde_json::to_value(ExecutedBy::Ring).unwrap(), "ring");
        assert_eq!(serde_json::from_value::<DeviceStats>(json).unwrap(), stats);
    }
}
