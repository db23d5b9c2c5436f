//! A request of a load: what it does, and where in RAM it is.

use super::{
    super::{
        blk::SECTOR_BYTES,
        descriptor::{DESCRIPTOR_BYTES, Descriptor},
    },
    Period,
};

/// The most data descriptors of one request.
pub(super) const MAX_SEGMENTS: usize = 4;

/// Bytes of a slot beside its data.
pub(super) const CONTROL_BYTES: u64 = 64 + DESCRIPTOR_BYTES * (MAX_SEGMENTS as u64 + 2);

#[derive(Debug, Clone, Copy)]
pub(super) enum Operation {
    Read,
    Write { version: u32 },
    WriteZeroes,
    Flush,
}

#[derive(Debug)]
pub(super) struct Slot {
    /// Header, status and table of descriptors.
    pub(super) control_gpa: u64,
    pub(super) data_gpa: u64,
    pub(super) request: Option<Request>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) operation: Operation,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) data_gpa: u64,
    /// The period of its submission, while the load notes which pages the device writes.
    pub(super) period: Option<Period>,
}

impl Slot {
    pub(super) fn status_gpa(&self) -> u64 {
        self.control_gpa + 32
    }

    pub(super) fn ranges_gpa(&self) -> u64 {
        self.control_gpa + 48
    }

    pub(super) fn table_gpa(&self) -> u64 {
        self.control_gpa + 64
    }
}

/// The buffer in up to [`MAX_SEGMENTS`] descriptors, cut at sectors.
pub(super) fn segments(rng: &mut fastrand::Rng, buffer: Descriptor) -> Vec<Descriptor> {
    let sectors = buffer.len_bytes / SECTOR_BYTES as u32;
    let mut cuts: Vec<u32> = (1..rng.usize(1..=MAX_SEGMENTS)).map(|_| rng.u32(0..sectors)).collect();
    cuts.extend([0, sectors]);
    cuts.sort_unstable();
    cuts.dedup();
    let part = |cut: &[u32]| Descriptor {
        gpa: buffer.gpa + u64::from(cut[0]) * SECTOR_BYTES,
        len_bytes: (cut[1] - cut[0]) * SECTOR_BYTES as u32,
        ..buffer
    };
    cuts.windows(2).map(part).collect()
}
