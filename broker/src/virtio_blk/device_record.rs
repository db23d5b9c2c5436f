//! The device record: what a driver was told of the device and relies on. It must not change across a restart of the
//! server.

use std::fmt::{self, Display};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::config::WRITEBACK_OFFSET_BYTES;
use super::{BlkConfig, CONFIG_SPACE_BYTES, SECTOR_BYTES};
use crate::vhost_user::feature_names;

const ID_BYTES: usize = 20;
const BYTES: usize = 8 + 8 + CONFIG_SPACE_BYTES + ID_BYTES;

/// What a driver was told of a device, and what it accepted, for the next process that serves this driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    /// The features that the device offered.
    offered: u64,
    /// The features that the driver accepted.
    accepted: u64,
    /// The configuration space. `writeback` is 0, because the driver controls it.
    space: [u8; CONFIG_SPACE_BYTES],
    serial: [u8; ID_BYTES],
}

/// The change of the device that a running driver must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// The device is what the driver was told.
    Same,
    /// The disk has grown, and the driver must learn its new size.
    Larger,
}

/// The device differs from what the driver was told, and a running driver cannot be told otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest runs with a disk that this server does not offer: {}. The server executes nothing for it. Restart the \
     server as before, or reset the guest's device (restart the VMM)",
    .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
)]
pub struct DeviceChanged(Vec<Difference>);

/// One difference from what a driver was told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Difference {
    what: &'static str,
    told: String,
    now: String,
    remedy: String,
}

impl Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, told, now, remedy } = self;
        write!(f, "{what}: {told} before the restart, {now} now ({remedy})")
    }
}

impl DeviceRecord {
    /// What a driver that accepted these features was told of this device.
    pub fn new(device: &BlkConfig, accepted: u64) -> Self {
        let mut space = device.to_bytes(true);
        space[WRITEBACK_OFFSET_BYTES] = 0;
        Self { offered: device.device_features(), accepted, space, serial: *device.serial().as_bytes() }
    }

    /// The record for a successor process.
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.offered.to_le_bytes()[..], &self.accepted.to_le_bytes(), &self.space, &self.serial].concat()
    }

    /// Parses the record of an earlier process. Any bytes may come; `None` if they are not a record.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
        let (offered, rest) = bytes.split_first_chunk()?;
        let (accepted, rest) = rest.split_first_chunk()?;
        let (space, rest) = rest.split_first_chunk()?;
        let (offered, accepted) = (u64::from_le_bytes(*offered), u64::from_le_bytes(*accepted));
        Some(Self { offered, accepted, space: *space, serial: rest.try_into().ok()? })
    }

    /// Whether a driver that was told `self` can go on with a device that is `now`.
    ///
    /// Additions are no obstacle: more queues or features, larger limits, a larger disk. Hints may change: the physical
    /// block, and the best alignment of discards. Losses are an obstacle, and so is a smaller disk, because the guest's
    /// file systems reach to the old end.
    ///
    /// `queues_in_use` is the number of queues that the front-end has. QEMU shows its guest that number, and not the
    /// device's: a device with fewer queues than before is the same for a guest that was not shown them all.
    ///
    /// # Errors
    ///
    /// The driver cannot go on. Each reason names the option that restores the device.
    pub fn compare(&self, now: &Self, queues_in_use: u16) -> Result<Continuity, DeviceChanged> {
        let differences: Vec<Difference> = [
            self.other_capacity(now),
            self.other_block(now),
            self.other_access(now),
            self.other_serial(now),
            self.fewer(now, Field::QUEUES, queues_in_use.into()),
            self.fewer_if(VIRTIO_BLK_F_SEG_MAX, now, Field::SEGMENTS),
            self.fewer_if(VIRTIO_BLK_F_SIZE_MAX, now, Field::SEGMENT_BYTES),
            self.lost_features(now),
            self.fewer_if(VIRTIO_BLK_F_DISCARD, now, Field::DISCARD_SECTORS),
            self.fewer_if(VIRTIO_BLK_F_DISCARD, now, Field::DISCARD_RANGES),
            self.fewer_if(VIRTIO_BLK_F_WRITE_ZEROES, now, Field::ZEROES_SECTORS),
            self.fewer_if(VIRTIO_BLK_F_WRITE_ZEROES, now, Field::ZEROES_RANGES),
            self.fewer_if(VIRTIO_BLK_F_WRITE_ZEROES, now, Field::ZEROES_UNMAP),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !differences.is_empty() {
            return Err(DeviceChanged(differences));
        }
        Ok(if now.capacity_sectors() > self.capacity_sectors() { Continuity::Larger } else { Continuity::Same })
    }

    fn other_capacity(&self, now: &Self) -> Option<Difference> {
        let (told, now) = (self.capacity_sectors(), now.capacity_sectors());
        let bytes = |sectors: u64| format!("{} bytes", u128::from(sectors) * u128::from(SECTOR_BYTES));
        (now < told).then(|| Difference {
            what: "size of the disk",
            told: bytes(told),
            now: bytes(now),
            remedy: "give the disk its size back; to shrink it under a running guest, shrink it while the server \
                     runs and send SIGHUP"
                .into(),
        })
    }

    fn other_block(&self, now: &Self) -> Option<Difference> {
        let (told, now) = (self.number(Field::BLOCK_BYTES), now.number(Field::BLOCK_BYTES));
        (told != now).then(|| Difference {
            what: "logical block",
            told: format!("{told} bytes"),
            now: format!("{now} bytes"),
            remedy: format!("--logical-block-size {told}"),
        })
    }

    fn other_access(&self, now: &Self) -> Option<Difference> {
        let (told, now) = (has(self.offered, VIRTIO_BLK_F_RO), has(now.offered, VIRTIO_BLK_F_RO));
        let name = |read_only| String::from(if read_only { "read-only" } else { "read-write" });
        (told != now).then(|| Difference {
            what: "access",
            told: name(told),
            now: name(now),
            remedy: if told { "start the server with --read-only" } else { "start the server without --read-only" }
                .into(),
        })
    }

    fn other_serial(&self, now: &Self) -> Option<Difference> {
        let text = |serial: &[u8; ID_BYTES]| {
            let end = serial.iter().position(|&byte| byte == 0).unwrap_or(ID_BYTES);
            format!("{:?}", String::from_utf8_lossy(&serial[..end]))
        };
        (self.serial != now.serial).then(|| Difference {
            what: "serial number",
            told: text(&self.serial),
            now: text(&now.serial),
            remedy: format!("--serial {}", text(&self.serial)),
        })
    }

    fn lost_features(&self, now: &Self) -> Option<Difference> {
        // `other_access` reports the access.
        let lost = self.accepted & !now.offered & !(1 << VIRTIO_BLK_F_RO);
        (lost != 0).then(|| Difference {
            what: "features that the guest uses",
            told: feature_names(lost),
            now: "not offered".into(),
            remedy: "use the former disk, file system and --direct-io, or the former ringpass version".into(),
        })
    }

    fn fewer_if(&self, feature: u32, now: &Self, field: Field) -> Option<Difference> {
        // If the device has lost the feature, `lost_features` reports that.
        (has(self.accepted, feature) && has(now.offered, feature)).then(|| self.fewer(now, field, u32::MAX)).flatten()
    }

    /// Reports a smaller value than the driver was told. `most` is the largest value that the driver uses.
    fn fewer(&self, now: &Self, field: Field, most: u32) -> Option<Difference> {
        let (told, now) = (self.number(field).min(most), now.number(field));
        (now < told).then(|| Difference {
            what: field.what,
            told: told.to_string(),
            now: now.to_string(),
            remedy: field.remedy.replace("{}", &told.to_string()),
        })
    }

    fn capacity_sectors(&self) -> u64 {
        u64::from_le_bytes(self.space[..8].try_into().expect("eight bytes"))
    }

    fn number(&self, field: Field) -> u32 {
        let mut bytes = [0; 4];
        bytes[..field.len_bytes].copy_from_slice(&self.space[field.offset_bytes..][..field.len_bytes]);
        u32::from_le_bytes(bytes)
    }
}

/// A number of the configuration space.
#[derive(Clone, Copy)]
struct Field {
    offset_bytes: usize,
    len_bytes: usize,
    what: &'static str,
    remedy: &'static str,
}

const OF_THE_DISK: &str = "use the former disk, file system and --direct-io";

impl Field {
    const SEGMENT_BYTES: Self = Self::new(8, 4, "bytes of a segment", "use the former ringpass version");
    const SEGMENTS: Self = Self::new(12, 4, "segments of a request", "use the former --queue-size");
    const BLOCK_BYTES: Self = Self::new(20, 4, "logical block", "--logical-block-size {}");
    const QUEUES: Self = Self::new(34, 2, "queues in use", "--num-queues {} or more");
    const DISCARD_SECTORS: Self = Self::new(36, 4, "sectors of a discard", OF_THE_DISK);
    const DISCARD_RANGES: Self = Self::new(40, 4, "ranges of a discard", "use the former ringpass version");
    const ZEROES_SECTORS: Self = Self::new(48, 4, "sectors of a write zeroes request", OF_THE_DISK);
    const ZEROES_RANGES: Self = Self::new(52, 4, "ranges of a write zeroes request", "use the former ringpass version");
    const ZEROES_UNMAP: Self = Self::new(56, 1, "whether write zeroes may unmap", OF_THE_DISK);

    const fn new(offset_bytes: usize, len_bytes: usize, what: &'static str, remedy: &'static str) -> Self {
        Self { offset_bytes, len_bytes, what, remedy }
    }
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

#[cfg(test)]
mod tests;
