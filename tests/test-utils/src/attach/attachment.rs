//! The guest memory that an attached queue uses.

use anyhow::Result;
use ringpass_guest_abi::{
    attach::{AreaAddress, AttachPayload},
    control::CONTROL_PAGE_BYTES,
    probe::VERSION,
    rings_area_bytes, sqes_area_bytes,
};

use super::RequestPlaces;
use crate::ram::Arena;

/// Entries of the SQ.
pub const SQ_ENTRIES: u32 = 32;
/// Entries of the CQ.
pub const CQ_ENTRIES: u32 = 64;
/// The page size that the device tells.
pub(super) const PAGE_BYTES: u32 = 4096;

/// A driver's buffers: equally long, one behind the other.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// Guest-physical address of the first buffer.
    pub gpa: u64,
    /// Number of buffers.
    pub count: u64,
    /// Length of each buffer.
    pub each_bytes: u32,
}

impl Buffers {
    /// Guest-physical address of a buffer. Indexes beyond the last buffer begin again at the first.
    pub fn at(&self, index: u64) -> u64 {
        self.gpa + index % self.count * u64::from(self.each_bytes)
    }
}

/// The guest memory that an attached queue uses.
#[derive(Debug, Clone, Copy)]
pub struct Attachment {
    /// Places of the driver's requests on the virtqueue: [`Attachment::PLACES`] of them.
    pub requests: RequestPlaces,
    /// The control page and the two areas of the ring, as ATTACH tells them.
    pub payload: AttachPayload,
    /// Data of requests on the ring.
    pub buffers: Buffers,
}

impl Attachment {
    /// How many places the driver's requests take.
    pub const PLACES: u64 = 3;

    /// Takes the memory from an arena.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn take(arena: &mut Arena) -> Result<Self> {
        let requests = RequestPlaces::take(arena, Self::PLACES)?;
        Self::with_requests(arena, requests)
    }

    /// Takes the memory from an arena, except the memory of the requests, which is elsewhere.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn with_requests(arena: &mut Arena, requests: RequestPlaces) -> Result<Self> {
        let payload = Self::take_payload(arena)?;
        let (count, page) = (CQ_ENTRIES.into(), u64::from(PAGE_BYTES));
        let buffers = Buffers { gpa: arena.take(count * page, page)?, count, each_bytes: PAGE_BYTES };
        Ok(Self { requests, payload, buffers })
    }

    /// Takes a control page and two areas from an arena. Returns the payload of ATTACH for them.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn take_payload(arena: &mut Arena) -> Result<AttachPayload> {
        let page = u64::from(PAGE_BYTES);
        let control_gpa = arena.take(CONTROL_PAGE_BYTES.into(), page)?;
        let mut area = || -> Result<AreaAddress> {
            let rings_gpa = arena.take(rings_area_bytes(CQ_ENTRIES).next_multiple_of(page), page)?.into();
            let sqes_gpa = arena.take(sqes_area_bytes(SQ_ENTRIES).next_multiple_of(page), page)?.into();
            Ok(AreaAddress { rings_gpa, sqes_gpa })
        };
        Ok(Self::payload_of(control_gpa, [area()?, area()?]))
    }

    /// The payload of ATTACH for this control page and these areas.
    pub fn payload_of(control_gpa: u64, areas: [AreaAddress; 2]) -> AttachPayload {
        AttachPayload {
            version: VERSION.into(),
            sq_entries: SQ_ENTRIES.into(),
            cq_entries: CQ_ENTRIES.into(),
            control_gpa: control_gpa.into(),
            areas,
            ..AttachPayload::default()
        }
    }
}
