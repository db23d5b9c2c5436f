//! The description of a device as one line of JSON.

use ringpass_guest_abi::{AddressingError, Doorbell, FixedAddressing, LayoutError, RingLayout};
use serde::{Deserialize, Serialize};

use crate::ram::PAGE_BYTES;

/// Version of the message.
const VERSION: u32 = 2;
/// Maximum number of descriptors of one message: `SCM_MAX_FD` (`<net/scm.h>`).
pub(super) const FDS_MAX: usize = 253;

/// Everything that a guest has to know about its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// 2.
    pub version: u32,
    /// The guest's RAM, at least one region.
    pub regions: Vec<RegionSetup>,
    /// The queues, at least one.
    pub queues: Vec<QueueSetup>,
    /// The number of bytes to add to a guest-physical address for `sqe.addr`: a multiple of 1 GiB, not 0.
    pub iova_base: u64,
    /// `sqe.buf_index` is the guest-physical address shifted right by this many bits: 22 to 30.
    pub slot_shift: u32,
    /// Size of the disk: a multiple of `logical_block_bytes`.
    pub disk_bytes: u64,
    /// The unit of positions and lengths on the disk: a power of two, at least 512.
    pub logical_block_bytes: u32,
    /// Whether the disk refuses writes.
    pub read_only: bool,
}

/// A region of RAM. Its file is one of the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionSetup {
    /// First byte, guest-physical.
    pub gpa: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Start of the region in the file.
    pub offset_bytes: u64,
}

/// A queue whose ring is in guest RAM. Its eventfds are two of the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSetup {
    /// The rings area, guest-physical; a multiple of 4096.
    pub rings_gpa: u64,
    /// The SQE area, guest-physical; a multiple of 4096.
    pub sqes_gpa: u64,
    /// The layout of the ring in these areas.
    #[serde(with = "LayoutFields")]
    pub layout: RingLayout,
}

/// [`RingLayout`] for serde, because `guest-abi` does not depend on serde.
#[derive(Serialize, Deserialize)]
#[serde(remote = "RingLayout", deny_unknown_fields)]
struct LayoutFields {
    sq_entries: u32,
    cq_entries: u32,
    sq_head_offset: u32,
    sq_tail_offset: u32,
    sq_flags_offset: u32,
    cq_head_offset: u32,
    cq_tail_offset: u32,
    cq_flags_offset: u32,
    cqes_offset: u32,
    rings_bytes: u64,
    sqes_bytes: u64,
    #[serde(with = "DoorbellNames")]
    doorbell: Doorbell,
}

/// [`Doorbell`] for serde.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Doorbell", rename_all = "kebab-case")]
enum DoorbellNames {
    WhenAsleep,
    Always,
}

/// The reason why a setup is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// This crate does not know the version of the setup.
    #[error("the setup has version {version}, but this program knows version {VERSION}: use programs of one release")]
    Version {
        /// [`Setup::version`].
        version: u32,
    },
    /// The setup must have at least one region and one queue.
    #[error("the setup has no {what}")]
    None {
        /// `"regions"` or `"queues"`.
        what: &'static str,
    },
    /// The setup needs more descriptors than one message can carry.
    #[error(
        "{regions} regions and {queues} queues need more than {FDS_MAX} file descriptors, but one message carries no more"
    )]
    TooMany {
        /// Number of regions.
        regions: usize,
        /// Number of queues.
        queues: usize,
    },
    /// A field has a value outside its range.
    #[error("{field} is {value:#x}: it must be {must}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// The field's value.
        value: u64,
        /// The permitted values.
        must: &'static str,
    },
    /// The rule for addresses is invalid.
    #[error(transparent)]
    Addressing(#[from] AddressingError),
    /// The layout of a ring is invalid.
    #[error("the ring of queue {queue}: {source}")]
    Layout {
        /// The queue, counted from 0.
        queue: usize,
        /// The reason.
        source: LayoutError,
    },
    /// A ring's area is not page-aligned, or not inside one region.
    #[error(
        "the {what} area of queue {queue} ({len_bytes} bytes at guest-physical {gpa:#x}) must start at a page and lie in \
         one region of RAM"
    )]
    Area {
        /// The queue, counted from 0.
        queue: usize,
        /// `"rings"` or `"SQE"`.
        what: &'static str,
        /// First byte, guest-physical.
        gpa: u64,
        /// Length in bytes.
        len_bytes: u64,
    },
}

impl Setup {
    /// The version that this crate writes and reads.
    pub const VERSION: u32 = VERSION;

    /// The number of descriptors that accompany the setup.
    pub(super) fn fd_count(&self) -> usize {
        self.regions.len() + 2 * self.queues.len()
    }

    /// How SQEs name the guest's RAM.
    ///
    /// # Errors
    ///
    /// `iova_base` or `slot_shift` is out of range.
    pub fn addressing(&self) -> Result<FixedAddressing, AddressingError> {
        FixedAddressing::new(self.iova_base, self.slot_shift)
    }

    /// Checks everything that can be checked without the descriptors.
    pub fn check(&self) -> Result<(), SetupError> {
        if self.version != VERSION {
            return Err(SetupError::Version { version: self.version });
        }
        for (what, is_empty) in [("regions", self.regions.is_empty()), ("queues", self.queues.is_empty())] {
            if is_empty {
                return Err(SetupError::None { what });
            }
        }
        if self.fd_count() > FDS_MAX {
            return Err(SetupError::TooMany { regions: self.regions.len(), queues: self.queues.len() });
        }
        self.addressing()?;
        let block_bytes = self.logical_block_bytes;
        let fields = [
            (
                "logical_block_bytes",
                u64::from(block_bytes),
                block_bytes >= 512 && block_bytes.is_power_of_two(),
                "a power of two, at least 512",
            ),
            (
                "disk_bytes",
                self.disk_bytes,
                self.disk_bytes.checked_rem(u64::from(block_bytes)) == Some(0),
                "a multiple of logical_block_bytes",
            ),
        ];
        for (field, value, holds, must) in fields {
            if !holds {
                return Err(SetupError::Field { field, value, must });
            }
        }
        for (index, queue) in self.queues.iter().enumerate() {
            self.check_queue(index, queue)?;
        }
        Ok(())
    }

    fn check_queue(&self, index: usize, queue: &QueueSetup) -> Result<(), SetupError> {
        queue.layout.validate().map_err(|source| SetupError::Layout { queue: index, source })?;
        let areas =
            [("rings", queue.rings_gpa, queue.layout.rings_bytes), ("SQE", queue.sqes_gpa, queue.layout.sqes_bytes)];
        for (what, gpa, len_bytes) in areas {
            let inside =
                |region: &RegionSetup| match (gpa.checked_add(len_bytes), region.gpa.checked_add(region.len_bytes)) {
                    (Some(end), Some(region_end)) => region.gpa <= gpa && end <= region_end,
                    _ => false,
                };
            if gpa % PAGE_BYTES != 0 || !self.regions.iter().any(inside) {
                return Err(SetupError::Area { queue: index, what, gpa, len_bytes });
            }
        }
        Ok(())
    }
}
