//! The payload of ATTACH: the driver's addresses of the control page and the two areas, and the checks of these
//! addresses.

use core::fmt;
use core::mem::offset_of;

use crate::control::ControlPage;
use crate::epoch::Area;
use crate::little_endian::{Le16, Le32, Le64, wire};
use crate::request::{self, ErrorCode, Outcome};
use crate::version::VERSION;
use crate::{GPA_LIMIT, rings_area_bytes, sqes_area_bytes};

/// The addresses of one of the two areas, as the driver wrote them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AreaAddress {
    /// Indexes, flags and CQEs: guest-physical, a multiple of the page size.
    pub rings_gpa: Le64,
    /// SQEs: guest-physical, a multiple of the page size.
    pub sqes_gpa: Le64,
}
wire!(AreaAddress { rings_gpa, sqes_gpa });

/// The payload of ATTACH, as the driver wrote it, not yet checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AttachPayload {
    /// The version of the interface: [`VERSION`].
    pub version: Le16,
    /// 0.
    pub reserved: [Le16; 3],
    /// The features that the driver uses, each offered by PROBE.
    pub features: Le64,
    /// SQ entries, a power of two.
    pub sq_entries: Le32,
    /// CQ entries, a power of two, at least as many as SQ entries. The driver never has more requests outstanding.
    pub cq_entries: Le32,
    /// The control page: guest-physical, a multiple of the page size.
    pub control_gpa: Le64,
    /// The areas of even and of odd epochs.
    pub areas: [AreaAddress; 2],
}
wire!(AttachPayload { version, reserved, features, sq_entries, cq_entries, control_gpa, areas });

/// The limits of a device, from its answer to PROBE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachLimits {
    /// The features that the device offers.
    pub features: u64,
    /// Maximum number of SQ entries.
    pub sq_entries_max: u32,
    /// Maximum number of CQ entries.
    pub cq_entries_max: u32,
    /// Alignment and unit of length in bytes: a power of two, at least 4096.
    pub page_bytes: u32,
}

/// A range of guest-physical memory that ends below 16 TiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpaRange {
    gpa: u64,
    len_bytes: u64,
}

impl GpaRange {
    /// Address of the first byte.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Address of the byte after the range.
    pub fn end_gpa(&self) -> u64 {
        self.gpa + self.len_bytes
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.gpa < other.end_gpa() && other.gpa < self.end_gpa()
    }
}

/// A checked ATTACH: its fields are consistent and within the limits. The device still has to check that its ranges are
/// RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    features: u64,
    sq_entries: u32,
    cq_entries: u32,
    control: GpaRange,
    rings: [GpaRange; 2],
    sqes: [GpaRange; 2],
}

impl Geometry {
    /// The features that the driver uses; the device offers all of them.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// SQ entries.
    pub fn sq_entries(&self) -> u32 {
        self.sq_entries
    }

    /// CQ entries.
    pub fn cq_entries(&self) -> u32 {
        self.cq_entries
    }

    /// The control page.
    pub fn control(&self) -> GpaRange {
        self.control
    }

    /// Indexes, flags and CQEs of an area.
    pub fn rings(&self, area: Area) -> GpaRange {
        self.rings[area.index()]
    }

    /// SQEs of an area.
    pub fn sqes(&self, area: Area) -> GpaRange {
        self.sqes[area.index()]
    }

    /// All five ranges, each with the byte offset of its field in the payload.
    pub fn ranges(&self) -> [(u32, GpaRange); 5] {
        let [even, odd] = [0, 1].map(|index| (self.rings[index], self.sqes[index]));
        let [control, even_rings, even_sqes, odd_rings, odd_sqes] = RANGE_FIELDS;
        [(control, self.control), (even_rings, even.0), (even_sqes, even.1), (odd_rings, odd.0), (odd_sqes, odd.1)]
    }
}

const fn at(offset_bytes: usize) -> u32 {
    offset_bytes as u32
}

const AREAS: usize = offset_of!(AttachPayload, areas);

/// The offsets of the fields with the ranges' addresses: control page, then rings and SQEs of each area.
const RANGE_FIELDS: [u32; 5] = [
    at(offset_of!(AttachPayload, control_gpa)),
    at(AREAS + offset_of!(AreaAddress, rings_gpa)),
    at(AREAS + offset_of!(AreaAddress, sqes_gpa)),
    at(AREAS + AreaAddress::BYTES + offset_of!(AreaAddress, rings_gpa)),
    at(AREAS + AreaAddress::BYTES + offset_of!(AreaAddress, sqes_gpa)),
];

/// The reason why the device refuses an ATTACH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachError {
    /// The rule that the payload breaks.
    pub code: ErrorCode,
    /// Offset of the field in the payload; [`NO_FIELD`](request::NO_FIELD) if the error concerns the whole payload.
    pub field_offset_bytes: u32,
    /// The value of the field, or the length of the payload in bytes.
    pub value: u64,
}

impl From<AttachError> for Outcome {
    fn from(error: AttachError) -> Self {
        Self {
            error: (error.code as u32).into(),
            field_offset_bytes: error.field_offset_bytes.into(),
            value: error.value.into(),
        }
    }
}

impl AttachPayload {
    /// Parses the payload in `bytes`: a copy of the device-readable part after the header.
    pub fn parse(bytes: &[u8]) -> Result<Self, AttachError> {
        let code_error = |code| AttachError { code, field_offset_bytes: request::NO_FIELD, value: bytes.len() as u64 };
        request::payload(bytes).map(|bytes| Self::from_bytes(&bytes)).map_err(code_error)
    }

    /// Checks every field, the cheap checks first. Bad input has no effect except the error.
    pub fn check(&self, limits: &AttachLimits) -> Result<Geometry, AttachError> {
        let refuse = |code, field: usize, value| Err(AttachError { code, field_offset_bytes: at(field), value });
        if self.version.get() != VERSION {
            return refuse(ErrorCode::Version, offset_of!(Self, version), self.version.get().into());
        }
        if let Some(reserved) = self.reserved.iter().find(|reserved| reserved.get() != 0) {
            return refuse(ErrorCode::Reserved, offset_of!(Self, reserved), reserved.get().into());
        }
        let features = self.features.get();
        if features & !limits.features != 0 {
            return refuse(ErrorCode::Features, offset_of!(Self, features), features);
        }
        let (sq_entries, cq_entries) = (self.sq_entries.get(), self.cq_entries.get());
        if !sq_entries.is_power_of_two() || sq_entries > limits.sq_entries_max {
            return refuse(ErrorCode::Entries, offset_of!(Self, sq_entries), sq_entries.into());
        }
        // The kernel refuses a CQ with fewer entries than the SQ (`io_uring_fill_params`).
        if !cq_entries.is_power_of_two() || cq_entries > limits.cq_entries_max || cq_entries < sq_entries {
            return refuse(ErrorCode::Entries, offset_of!(Self, cq_entries), cq_entries.into());
        }
        let lengths = Lengths::of(sq_entries, cq_entries, limits.page_bytes);
        let [even, odd] = self.areas;
        let gpas = [self.control_gpa, even.rings_gpa, even.sqes_gpa, odd.rings_gpa, odd.sqes_gpa].map(Le64::get);
        let mut ranges = [GpaRange { gpa: 0, len_bytes: 0 }; 5];
        for (index, (gpa, len_bytes)) in gpas.into_iter().zip(lengths.in_order()).enumerate() {
            let range = check_range(gpa, len_bytes, limits.page_bytes);
            let refused = |code| AttachError { code, field_offset_bytes: RANGE_FIELDS[index], value: gpa };
            let range = range.map_err(refused)?;
            if ranges[..index].iter().any(|earlier| earlier.overlaps(&range)) {
                return Err(refused(ErrorCode::Overlap));
            }
            ranges[index] = range;
        }
        let [control, even_rings, even_sqes, odd_rings, odd_sqes] = ranges;
        let (rings, sqes) = ([even_rings, odd_rings], [even_sqes, odd_sqes]);
        Ok(Geometry { features, sq_entries, cq_entries, control, rings, sqes })
    }
}

/// Lengths of the ranges of an ATTACH, in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// The control page, in bytes.
    pub control_bytes: u64,
    /// Indexes, flags and CQEs of one area, in bytes.
    pub rings_bytes: u64,
    /// SQEs of one area, in bytes.
    pub sqes_bytes: u64,
}

impl Lengths {
    /// The lengths for rings of this size on a device with pages of `page_bytes`.
    pub fn of(sq_entries: u32, cq_entries: u32, page_bytes: u32) -> Self {
        let whole = |bytes: u64| bytes.next_multiple_of(u64::from(page_bytes).max(1));
        Self {
            control_bytes: whole(size_of::<ControlPage>() as u64),
            rings_bytes: whole(rings_area_bytes(cq_entries)),
            sqes_bytes: whole(sqes_area_bytes(sq_entries)),
        }
    }

    fn in_order(&self) -> [u64; 5] {
        [self.control_bytes, self.rings_bytes, self.sqes_bytes, self.rings_bytes, self.sqes_bytes]
    }
}

fn check_range(gpa: u64, len_bytes: u64, page_bytes: u32) -> Result<GpaRange, ErrorCode> {
    if gpa.checked_rem(u64::from(page_bytes)) != Some(0) {
        return Err(ErrorCode::Alignment);
    }
    match gpa.checked_add(len_bytes) {
        Some(end_gpa) if end_gpa <= GPA_LIMIT => Ok(GpaRange { gpa, len_bytes }),
        _ => Err(ErrorCode::Range),
    }
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, field_offset_bytes, value } = *self;
        if field_offset_bytes == request::NO_FIELD {
            return write!(f, "ATTACH refused ({code:?}): the payload has {value} bytes");
        }
        write!(f, "ATTACH refused ({code:?}): the field at offset {field_offset_bytes} is {value:#x}")
    }
}

impl core::error::Error for AttachError {}

#[cfg(test)]
mod tests;
