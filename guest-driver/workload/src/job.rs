//! The job of a workload, as plain data.

use core::fmt;

use ringpass_guest_abi::{AddressError, FixedAddressing, SEGMENT_BOUNDARY_BYTES, SLOT_SHIFT_MAX};

use crate::content::{IN_FLIGHT, UNKNOWN};

/// Maximum number of requests that a job keeps in flight.
pub const DEPTH_MAX: u32 = 512;

/// The smallest unit of a disk.
const SECTOR_BYTES: u32 = 512;

/// How the workload notices completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[repr(u32)]
pub enum Wait {
    /// Interrupts are muted, and the workload polls the queue.
    Poll = 0,
    /// Interrupts are on, and the workload sleeps when there is nothing to reap.
    Interrupt = 1,
    /// Like `Interrupt`, but the workload mutes and unmutes interrupts at random (seeded) moments. It finds and counts
    /// completions that no interrupt announced ([`Report::missed_interrupts`](crate::Report)).
    InterruptMuting = 2,
}

/// Whether the workload generates and compares contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[repr(u32)]
pub enum Verify {
    /// The workload does not touch buffers, and the content of written blocks becomes unknown.
    Off = 0,
    /// The workload generates every written byte for its write, and compares every read byte.
    On = 1,
}

/// One queue's workload.
///
/// The structure has plain integers in C layout without padding, so that it can be in a page shared with a virtual
/// machine. A reader must know that a `Job` was written there: `wait` and `verify` have only the named values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(C)]
pub struct Job {
    /// First byte of the job's area on the disk, a multiple of 512.
    pub area_offset_bytes: u64,
    /// Length of the area: a multiple of `block_bytes`, at least `depth` and at most 2^32 - 1 blocks.
    pub area_bytes: u64,
    /// [`run`](crate::run()) ends after this many requests; 0: no such limit.
    pub operations: u64,
    /// [`run`](crate::run()) ends after this time; 0: no such limit.
    pub duration_ns: u64,
    /// A request without a completion after this time is reported as lost, and the run ends. Not 0.
    pub timeout_ns: u64,
    /// Pause whenever nothing is in flight, so that an SQ thread falls asleep; 0: no pause.
    pub pause_ns: u64,
    /// The seed that determines all choices and contents.
    pub seed: u64,
    /// Guest-physical address of the first of `depth` buffers, a multiple of 512.
    pub buffers_gpa: u64,
    /// Distance of two buffers: at least `block_bytes`, a multiple of 512.
    pub buffer_stride_bytes: u64,
    /// Length of each request: a multiple of 512, at most 1 GiB, and a multiple of the disk's logical block size (which
    /// a job does not know: otherwise the disk answers -EINVAL).
    pub block_bytes: u32,
    /// Number of requests to keep in flight, 1 to [`DEPTH_MAX`].
    pub depth: u32,
    /// Share of writes, 0 to 100.
    pub write_percent: u32,
    /// Share of the writes that are durable when they complete, 0 to 100.
    pub durable_percent: u32,
    /// How the workload notices completions.
    pub wait: Wait,
    /// Whether the workload generates and compares contents.
    pub verify: Verify,
}

/// The reason why a job is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobError {
    /// A field has a value outside its range.
    Field {
        /// The field's name.
        field: &'static str,
        /// The field's value.
        value: u64,
        /// The permitted values.
        must: &'static str,
    },
    /// Neither `operations` nor `duration_ns` ends the run.
    Endless,
    /// The disk area has fewer blocks than requests in flight, or more than 2^32 - 1 blocks.
    BlockCount {
        /// Blocks in the area.
        blocks: u64,
        /// [`Job::depth`].
        depth: u32,
    },
    /// A request cannot use a buffer at that address.
    Buffer(AddressError),
    /// The guest has no memory for a buffer.
    NoMemory {
        /// Guest-physical address of the buffer.
        gpa: u64,
        /// [`Job::block_bytes`].
        len_bytes: u32,
    },
    /// The expected table does not have one entry per block.
    ExpectedLength {
        /// Blocks in the area.
        blocks: u64,
        /// Number of given entries.
        entries: u64,
    },
    /// A block that may be read has unknown content: run [`prefill`](crate::prefill) first.
    UnknownContent {
        /// The first such block.
        block: u64,
    },
    /// An entry of the expected table is not a [`checksum`](crate::checksum).
    NotAChecksum {
        /// The first such block.
        block: u64,
    },
}

impl Job {
    /// Blocks in the disk area.
    pub fn blocks(&self) -> u64 {
        self.area_bytes.checked_div(u64::from(self.block_bytes)).unwrap_or(0)
    }

    /// The buffer of request slot `index`, guest-physical.
    pub(crate) fn buffer_gpa(&self, index: u32) -> u64 {
        self.buffers_gpa + u64::from(index) * self.buffer_stride_bytes
    }

    /// Checks every field, and that requests can use all buffers.
    pub fn check(&self) -> Result<(), JobError> {
        let sector_bytes = u64::from(SECTOR_BYTES);
        let block_bytes = u64::from(self.block_bytes);
        let in_sectors = |value: u64| value % sector_bytes == 0;
        let fields = [
            (
                "block_bytes",
                block_bytes,
                block_bytes != 0 && in_sectors(block_bytes) && block_bytes <= SEGMENT_BOUNDARY_BYTES,
                "a multiple of 512, from 512 to 4 MiB",
            ),
            ("depth", u64::from(self.depth), (1..=DEPTH_MAX).contains(&self.depth), "from 1 to 512"),
            ("write_percent", u64::from(self.write_percent), self.write_percent <= 100, "from 0 to 100"),
            ("durable_percent", u64::from(self.durable_percent), self.durable_percent <= 100, "from 0 to 100"),
            ("timeout_ns", self.timeout_ns, self.timeout_ns != 0, "at least 1"),
            (
                "area_offset_bytes",
                self.area_offset_bytes,
                in_sectors(self.area_offset_bytes) && self.area_offset_bytes.checked_add(self.area_bytes).is_some(),
                "a multiple of 512 with room for the area after it",
            ),
            (
                "area_bytes",
                self.area_bytes,
                self.area_bytes.checked_rem(block_bytes) == Some(0),
                "a multiple of block_bytes",
            ),
            ("buffers_gpa", self.buffers_gpa, in_sectors(self.buffers_gpa), "a multiple of 512"),
            (
                "buffer_stride_bytes",
                self.buffer_stride_bytes,
                in_sectors(self.buffer_stride_bytes)
                    && self.buffer_stride_bytes >= block_bytes
                    && self
                        .buffer_stride_bytes
                        .checked_mul(u64::from(self.depth))
                        .and_then(|bytes| bytes.checked_add(self.buffers_gpa))
                        .is_some(),
                "a multiple of 512, at least block_bytes, and all buffers inside the address space",
            ),
        ];
        for (field, value, holds, must) in fields {
            if !holds {
                return Err(JobError::Field { field, value, must });
            }
        }
        let blocks = self.blocks();
        if blocks < u64::from(self.depth) || blocks > u64::from(u32::MAX) {
            return Err(JobError::BlockCount { blocks, depth: self.depth });
        }
        // Neither base nor shift affects whether a request can use an address below 64 GiB.
        let addressing = FixedAddressing::new(1 << 30, SLOT_SHIFT_MAX).expect("in range");
        for index in 0..self.depth {
            addressing.resolve(self.buffer_gpa(index), self.block_bytes).map_err(JobError::Buffer)?;
        }
        Ok(())
    }

    /// Checks that the run ends.
    pub(crate) fn check_end(&self) -> Result<(), JobError> {
        if self.operations == 0 && self.duration_ns == 0 { Err(JobError::Endless) } else { Ok(()) }
    }

    /// Checks the expected table. `reads`: the run reads blocks, and compares them if the job verifies.
    pub(crate) fn check_expected(&self, expected: &[u64], reads: bool) -> Result<(), JobError> {
        let (blocks, entries) = (self.blocks(), expected.len() as u64);
        if blocks != entries {
            return Err(JobError::ExpectedLength { blocks, entries });
        }
        let position = |block: Option<usize>| block.map(|block| block as u64);
        if let Some(block) = position(expected.iter().position(|entry| entry & IN_FLIGHT != 0)) {
            return Err(JobError::NotAChecksum { block });
        }
        if !reads || self.verify == Verify::Off {
            return Ok(());
        }
        match position(expected.iter().position(|&entry| entry == UNKNOWN)) {
            Some(block) => Err(JobError::UnknownContent { block }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field { field, value, must } => write!(f, "{field} is {value}: it must be {must}"),
            Self::Endless => write!(f, "operations and duration_ns are both 0: the run would never end"),
            Self::BlockCount { blocks, depth } => {
                write!(
                    f,
                    "the disk area has {blocks} blocks: it must have at least the depth, {depth}, and fewer than 2^32"
                )
            }
            Self::Buffer(error) => write!(f, "a buffer cannot be used: {error}"),
            Self::NoMemory { gpa, len_bytes } => {
                write!(f, "the guest has no memory for a buffer of {len_bytes} bytes at guest-physical {gpa:#x}")
            }
            Self::ExpectedLength { blocks, entries } => {
                write!(f, "the expected table has {entries} entries, but the disk area has {blocks} blocks")
            }
            Self::UnknownContent { block } => {
                write!(f, "the content of block {block} is unknown, so reads cannot be verified: prefill first")
            }
            Self::NotAChecksum { block } => {
                write!(f, "the expected table's entry for block {block} is not a checksum (its highest bit is set)")
            }
        }
    }
}

impl core::error::Error for JobError {}
