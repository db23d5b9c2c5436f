//! What a workload is to do, as plain data.

use core::fmt;

use ringpass_guest_abi::{AddressError, FixedAddressing};

use crate::content::{IN_FLIGHT, UNKNOWN};

/// Most requests a job keeps in flight.
pub const DEPTH_MAX: u32 = 512;

/// The smallest unit of a disk.
const SECTOR_BYTES: u32 = 512;

/// How the workload learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[repr(u32)]
pub enum Wait {
    /// Interrupts are muted, the queue is looked at all the time.
    Poll = 0,
    /// Interrupts are on; the workload sleeps when there is nothing to reap.
    Interrupt = 1,
    /// As `Interrupt`, and interrupts are muted and unmuted at random (seeded) moments. A completion that no
    /// interrupt announced is found and counted ([`Report::missed_interrupts`](crate::Report)).
    InterruptMuting = 2,
}

/// Whether contents are made and compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[repr(u32)]
pub enum Verify {
    /// Buffers are left as they are, and what is written becomes unknown.
    Off = 0,
    /// Every byte written is made for this write, every byte read is compared.
    On = 1,
}

/// One queue's workload.
///
/// Plain integers in C layout without padding, so that it can lie in a page shared with a virtual machine. Whoever
/// reads it from there must know that a `Job` was written there: `wait` and `verify` have only the values named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(C)]
pub struct Job {
    /// First byte of the part of the disk that the job uses, a multiple of 512.
    pub area_offset_bytes: u64,
    /// Length of that part: a multiple of `block_bytes`, at least `depth` and at most 2^32 - 1 blocks.
    pub area_bytes: u64,
    /// [`run`](crate::run()) ends after this many requests; 0: no such limit.
    pub operations: u64,
    /// [`run`](crate::run()) ends after this time; 0: no such limit.
    pub duration_ns: u64,
    /// A request without a completion after this time is reported as lost, and the run ends. Not 0.
    pub timeout_ns: u64,
    /// Nothing is done for this long whenever nothing is in flight, so that an SQ thread falls asleep; 0: no pause.
    pub pause_ns: u64,
    /// All choices and contents follow from it.
    pub seed: u64,
    /// The first of `depth` buffers, guest-physical, a multiple of 512.
    pub buffers_gpa: u64,
    /// From one buffer to the next: at least `block_bytes`, a multiple of 512.
    pub buffer_stride_bytes: u64,
    /// Bytes of each request: a multiple of 512, at most 1 GiB, and of the disk's logical block size (which a job does
    /// not know: the disk answers -EINVAL).
    pub block_bytes: u32,
    /// Requests kept in flight, 1 to [`DEPTH_MAX`].
    pub depth: u32,
    /// Share of writes, 0 to 100.
    pub write_percent: u32,
    /// Share of the writes that are durable when they complete, 0 to 100.
    pub durable_percent: u32,
    /// How completions are noticed.
    pub wait: Wait,
    /// Whether contents are made and compared.
    pub verify: Verify,
}

/// Why a job cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobError {
    /// A field has a value outside its range.
    Field {
        /// Its name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        must: &'static str,
    },
    /// Neither `operations` nor `duration_ns` ends the run.
    Endless,
    /// The disk area has fewer blocks than requests in flight, or more than 2^32 - 1.
    BlockCount {
        /// Blocks in the area.
        blocks: u64,
        /// [`Job::depth`].
        depth: u32,
    },
    /// A buffer cannot be named in a request.
    Buffer(AddressError),
    /// The guest has no memory for a buffer.
    NoMemory {
        /// Where it should be, guest-physical.
        gpa: u64,
        /// [`Job::block_bytes`].
        len_bytes: u32,
    },
    /// The expected table does not have one entry per block.
    ExpectedLength {
        /// Blocks in the area.
        blocks: u64,
        /// Entries given.
        entries: u64,
    },
    /// A block that may be read has unknown content: [`prefill`](crate::prefill) first.
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

    /// Checks every field, and that all buffers can be named in requests.
    pub fn check(&self) -> Result<(), JobError> {
        let sector_bytes = u64::from(SECTOR_BYTES);
        let block_bytes = u64::from(self.block_bytes);
        let in_sectors = |value: u64| value.is_multiple_of(sector_bytes);
        let fields = [
            (
                "block_bytes",
                block_bytes,
                block_bytes != 0 && in_sectors(block_bytes) && block_bytes <= 1 << 30,
                "a multiple of 512, from 512 to 1 GiB",
            ),
            ("depth", u64::from(self.depth), (1..=DEPTH_MAX).contains(&self.depth), "from 1 to 512"),
            ("write_percent", u64::from(self.write_percent), self.write_percent <= 100, "from 0 to 100"),
            ("durable_percent", u64::from(self.durable_percent), self.durable_percent <= 100, "from 0 to 100"),
            ("timeout_ns", self.timeout_ns, self.timeout_ns != 0, "at least 1"),
            (
                "area_offset_bytes",
                self.area_offset_bytes,
                in_sectors(self.area_offset_bytes) && self.area_offset_bytes.checked_add(self.area_bytes).is_some(),
                "a multiple of 512 with room for the area behind it",
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
        // The base does not matter for whether an address can be named.
        let addressing = FixedAddressing { iova_base: 0 };
        for index in 0..self.depth {
            addressing.resolve(self.buffer_gpa(index), self.block_bytes).map_err(JobError::Buffer)?;
        }
        Ok(())
    }

    /// Checks that the run ends.
    pub(crate) fn check_end(&self) -> Result<(), JobError> {
        if self.operations == 0 && self.duration_ns == 0 { Err(JobError::Endless) } else { Ok(()) }
    }

    /// Checks the table of what the blocks hold. `reads`: blocks will be read, and compared if the job verifies.
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
                write!(f, "the disk area has {blocks} blocks: it must have at least the depth, {depth}, and below 2^32")
            }
            Self::Buffer(error) => write!(f, "a buffer cannot be used: {error}"),
            Self::NoMemory { gpa, len_bytes } => {
                write!(f, "the guest has no memory for a buffer of {len_bytes} bytes at guest-physical {gpa:#x}")
            }
            Self::ExpectedLength { blocks, entries } => {
                write!(f, "the expected table has {entries} entries, the disk area {blocks} blocks")
            }
            Self::UnknownContent { block } => {
                write!(f, "the content of block {block} is unknown, so that reads cannot be verified: prefill first")
            }
            Self::NotAChecksum { block } => {
                write!(f, "the expected table's entry for block {block} is not a checksum (its highest bit is set)")
            }
        }
    }
}

impl core::error::Error for JobError {}
