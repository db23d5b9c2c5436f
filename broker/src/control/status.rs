//! What a device reports about itself.

use serde::{Deserialize, Serialize};

/// What a device is, and how its queues are executed now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The name of the device.
    pub name: String,
    /// The process that serves the device.
    pub pid: u32,
    /// The version of ringpass.
    pub version: String,
    /// The disk.
    pub disk: DiskStatus,
    /// The value of `--mode`: `auto`, `direct` or `virtqueue`.
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
    /// The unit in which the guest reads and writes, in bytes.
    pub logical_block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether I/O bypasses the host's page cache.
    pub direct_io: bool,
}

/// Whether guests can have rings of the host's io_uring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingsOffer {
    /// Whether the device offers rings.
    pub offered: bool,
    /// If not: the reasons.
    pub why_not: Vec<String>,
    /// If rings are offered but unavailable for now: the reason.
    pub closed: Option<String>,
    /// The limits of a ring.
    pub limits: Option<LimitStatus>,
    /// How many rings ended because their guest had more requests outstanding than it may have.
    #[serde(default)]
    pub ended_for_cost: u64,
    /// What guests with rings must do without.
    pub wants: String,
}

/// The limits of a ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitStatus {
    /// Most SQ entries, for guests whose memory ends at or below 64 GiB.
    pub sq_entries_max: u32,
    /// Most CQ entries, for such guests.
    pub cq_entries_max: u32,
    /// Most bytes of one SQE.
    pub segment_bytes_max: u32,
}

/// The executor of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ExecutedBy {
    /// The device's process executes the virtqueue.
    Virtqueue,
    /// The host kernel executes the ring.
    Ring,
    /// The queue is between rings: an epoch begins or ends, and neither executes the queue.
    BetweenRings,
}

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// The index of the queue.
    pub index: u16,
    /// Whether the front-end has started the queue.
    #[serde(default = "unknown_counts_as_started")]
    pub started: bool,
    /// The executor of the queue.
    pub executed_by: ExecutedBy,
    /// The epoch of an attached queue.
    pub epoch: Option<u32>,
    /// The phase of the epoch: `opening`, `open`, `draining`, `ending`, `ended`, …
    pub phase: Option<String>,
    /// SQ entries of its ring.
    pub sq_entries: Option<u32>,
    /// CQ entries of its ring.
    pub cq_entries: Option<u32>,
    /// Why the queue got no ring, or lost its ring, most recently.
    pub why_no_ring: Option<String>,
}

/// Servers of ringpass 0.1.0 do not report it.
fn unknown_counts_as_started() -> bool {
    true
}

/// What a device has done since the start of its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// The name of the device.
    pub name: String,
    /// When its process began to count, in milliseconds since 1970: a different number means that the counters started
    /// again at zero. Absent from older servers.
    #[serde(default)]
    pub started_ms: Option<u64>,
    /// How long it has counted, in milliseconds.
    #[serde(default)]
    pub age_ms: Option<u64>,
    /// Each queue.
    pub queues: Vec<QueueStats>,
}

/// What a queue has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStats {
    /// The index of the queue.
    pub index: u16,
    /// The requests that went through the device's process.
    pub by_device: ByDevice,
    /// The counts in the words of its rings. The words are in the guest's memory: exact for an honest guest, and the
    /// guest can forge them for itself. Absent for a queue that had no ring.
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
    /// Requests that failed on the disk.
    pub failed: u64,
    /// Requests that the device refused.
    pub refused: u64,
    /// Requests that went through bounce buffers, because direct I/O cannot execute them as the guest sends them.
    #[serde(default)]
    pub bounced: u64,
    /// Bounced requests that wrote a part of a block of direct I/O, and so cost a read and a write.
    #[serde(default)]
    pub partial_writes: u64,
    /// Kicks that reached the process; on attached queues doorbells.
    pub kicks: u64,
    /// Interrupts that the process sent.
    pub signals: u64,
}

/// The counts in the words of a queue's rings.
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
        assert_eq!(serde_json::to_value(ExecutedBy::BetweenRings).unwrap(), "between-rings");
        assert_eq!(serde_json::from_value::<DeviceStats>(json).unwrap(), stats);
    }
}
