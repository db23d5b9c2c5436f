//! Parses one descriptor chain into a checked request.

use ringpass_guest_abi::request::{RequestType, T_PROBE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::{Chain, HEADER_BYTES};
use super::request_types::refusal;
use super::{Refusal, RequestLimits, RequestTypes, SECTOR_BYTES, SegmentList, Status, Unanswerable};
use crate::virtqueue::DescriptorChain;

/// `sector`, `num_sectors` and `flags` of `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// What the device must do with a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Parsed {
    /// Execute the request; its data is in the segment list.
    Request(Request),
    /// Answer without executing anything. The segment list is empty.
    Answer(Answer),
    /// The request concerns the queues themselves (`docs/abi.md`). The segment list holds the payload, then room for
    /// the answer. A device that does not offer rings answers the request as [`Refusal::UnknownType`].
    AttachRequest(AttachRequest),
    /// The device cannot answer the chain: it must stop this queue, and no other.
    Malformed(Unanswerable),
}

/// A checked request, ready for execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Length of the data in the segment list: whole logical blocks and never 0 for reads and writes, 20 for `GetId`, 0
    /// for the others.
    pub data_bytes: u32,
    /// Address of the status: one byte, in the guest's memory.
    pub status_gpa: GuestAddress,
    /// Device-writable bytes before the status, for [`Answer::used_bytes`].
    pub writable_bytes: u32,
}

/// A request by which a driver asks for rings. The parser has not looked at its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    /// The type of the request.
    pub request_type: RequestType,
    /// Length of the payload: the first bytes in the segment list.
    pub payload_bytes: u32,
    /// Room for the answer: the rest of the segment list, and all device-writable bytes before the status.
    pub answer_bytes: u32,
    /// Address of the status: one byte, in the guest's memory.
    pub status_gpa: GuestAddress,
}

/// The operation that a request asks for. Its range is within the capacity, aligned to logical blocks and allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Read from this offset into the segments.
    Read {
        /// Offset on the disk.
        offset_bytes: u64,
    },
    /// Write the segments to this offset.
    Write {
        /// Offset on the disk.
        offset_bytes: u64,
    },
    /// Make all completed writes stable.
    Flush,
    /// Put the 20 bytes of the [`Serial`](super::Serial) into the segments.
    GetId,
    /// Discard the range: its content does not matter any more.
    Discard(ByteRange),
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Range of the disk.
        range: ByteRange,
        /// Whether the disk may deallocate the space.
        unmap: bool,
    },
}

/// A range of the disk of at least one logical block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// Start of the range.
    pub offset_bytes: u64,
    /// Length of the range.
    pub len_bytes: u64,
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: Status,
    /// Address of the status: one byte, in the guest's memory.
    pub status_gpa: GuestAddress,
    /// Device-writable bytes before the status.
    pub writable_bytes: u32,
    /// How many of them the device has certainly written, counted from the first byte.
    pub written_bytes: u32,
    /// What was wrong, for [`GuestErrors`](super::GuestErrors). `None`: nothing was wrong; the request has no sectors.
    pub refusal: Option<Refusal>,
}

impl Answer {
    /// The length for the used ring.
    ///
    /// "The device MUST write at least `len` bytes to descriptor, beginning at the first device-writable buffer"
    /// (VIRTIO 1.2, 2.7.8.2), and drivers take the first `len` bytes for overwritten. So the status, which is the last
    /// byte, counts only if the device wrote all bytes before it: a read that fails before its first byte has a length
    /// of 0, although the device wrote its status. VIRTIO allows a length that is too small. Drivers find the status
    /// without it (Linux, SeaBIOS and viostor do).
    #[inline]
    pub fn used_bytes(&self) -> u32 {
        if self.written_bytes >= self.writable_bytes {
            self.writable_bytes.saturating_add(1)
        } else {
            self.written_bytes
        }
    }
}

/// Reads a descriptor chain once and checks it.
///
/// `types` are the driver's request types. `segments` gets the addresses of the data in the chain's memory.
///
/// The parser refuses types that the driver may not use, requests that VIRTIO 1.2 (5.2.6) forbids, requests that are
/// not in whole logical blocks, and requests with data in a direction that their type does not have. It ignores the
/// data of a flush, and accepts a buffer for the ID that is longer than 20 bytes.
#[inline]
pub fn parse(
    chain: DescriptorChain<'_>,
    limits: &RequestLimits,
    types: RequestTypes,
    segments: &mut SegmentList,
) -> Parsed {
    segments.clear();
    let memory = chain.memory();
    let chain = match Chain::walk(chain, segments) {
        Ok(chain) => chain,
        Err(error) => {
            segments.clear();
            return Parsed::Malformed(error);
        }
    };
    if let Some(request_type) = attach_request_type(&chain) {
        let Chain { readable_bytes: payload_bytes, writable_bytes: answer_bytes, status_gpa, .. } = chain;
        return Parsed::AttachRequest(AttachRequest { request_type, payload_bytes, answer_bytes, status_gpa });
    }
    match check(&chain, memory, limits, types, segments) {
        Ok(Some((operation, data_bytes))) => {
            let Chain { writable_bytes, status_gpa, .. } = chain;
            Parsed::Request(Request { operation, data_bytes, status_gpa, writable_bytes })
        }
        Ok(None) => answer(&chain, None, segments),
        Err(refusal) => answer(&chain, Some(refusal), segments),
    }
}

/// The request in `docs/abi.md` that a well-formed chain is, if any. The numbers of these types are far above all
/// others.
#[inline]
fn attach_request_type(chain: &Chain) -> Option<RequestType> {
    let request_type = Header::from_bytes(chain.header).request_type;
    if request_type < T_PROBE || chain.refusal.is_some() { None } else { RequestType::from_number(request_type) }
}

#[cold]
fn answer(chain: &Chain, refusal: Option<Refusal>, segments: &mut SegmentList) -> Parsed {
    segments.clear();
    let status = refusal.map_or(Status::Ok, Refusal::status);
    let Chain { writable_bytes, status_gpa, .. } = *chain;
    Parsed::Answer(Answer { status, status_gpa, writable_bytes, written_bytes: 0, refusal })
}

/// The operation and the length of its data. `None`: the request needs no work.
fn check(
    chain: &Chain,
    memory: &GuestMemoryMmap<()>,
    limits: &RequestLimits,
    types: RequestTypes,
    segments: &mut SegmentList,
) -> Result<Option<(Operation, u32)>, Refusal> {
    if let Some(refusal) = chain.refusal {
        return Err(refusal);
    }
    let header = Header::from_bytes(chain.header);
    let request_type = header.request_type;
    types.check(request_type)?;
    let Chain { readable_bytes, writable_bytes, .. } = *chain;
    let no_data = |len_bytes| {
        if len_bytes == 0 { Ok(()) } else { Err(Refusal::WrongDirection { request_type, len_bytes }) }
    };
    match request_type {
        VIRTIO_BLK_T_IN => {
            no_data(readable_bytes)?;
            let extent = limits.data_extent(&header, writable_bytes)?;
            Ok(extent.map(|range| (Operation::Read { offset_bytes: range.offset_bytes }, writable_bytes)))
        }
        VIRTIO_BLK_T_OUT => {
            limits.check_writable(request_type)?;
            no_data(writable_bytes)?;
            let extent = limits.data_extent(&header, readable_bytes)?;
            Ok(extent.map(|range| (Operation::Write { offset_bytes: range.offset_bytes }, readable_bytes)))
        }
        VIRTIO_BLK_T_FLUSH => {
            segments.clear();
            Ok(Some((Operation::Flush, 0)))
        }
        VIRTIO_BLK_T_GET_ID => {
            no_data(readable_bytes)?;
            if writable_bytes < VIRTIO_BLK_ID_BYTES {
                return Err(Refusal::DataLength { request_type, len_bytes: writable_bytes });
            }
            segments.truncate_bytes(VIRTIO_BLK_ID_BYTES as usize);
            Ok(Some((Operation::GetId, VIRTIO_BLK_ID_BYTES)))
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let max_sectors = limits.max_range_sectors(request_type)?;
            segments.truncate_bytes(readable_bytes as usize);
            let range = Range::read(request_type, readable_bytes, memory, segments)?;
            segments.clear();
            // The flags go first: the specification demands their status regardless of other errors.
            range.check_flags(request_type)?;
            no_data(writable_bytes)?;
            Ok(limits.range_operation(request_type, &range, max_sectors)?.map(|operation| (operation, 0)))
        }
        _ => Err(refusal(request_type)),
    }
}

/// The header's fields. The device ignores `reserved`, once the priority.
struct Header {
    request_type: u32,
    sector: u64,
}

impl Header {
    fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Self {
        // Little-endian, as one number: the first field is in its lowest bits.
        let fields = u128::from_le_bytes(bytes);
        Self { request_type: fields as u32, sector: (fields >> 64) as u64 }
    }
}

/// A discard or write zeroes range as the driver wrote it.
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Range {
    /// Copies the range from the segments, once.
    fn read(
        request_type: u32,
        len_bytes: u32,
        memory: &GuestMemoryMmap<()>,
        segments: &SegmentList,
    ) -> Result<Self, Refusal> {
        if len_bytes == 0 || len_bytes % (RANGE_BYTES as u32) != 0 {
            return Err(Refusal::DataLength { request_type, len_bytes });
        }
        if len_bytes > RANGE_BYTES as u32 {
            return Err(Refusal::TooManyRanges { request_type, ranges: len_bytes / RANGE_BYTES as u32 });
        }
        let mut bytes = [0; RANGE_BYTES];
        let mut filled = 0;
        for segment in segments.iter() {
            let part = bytes.get_mut(filled..filled + segment.len_bytes).unwrap_or_default();
            memory
                .read_slice(part, segment.gpa)
                .map_err(|_| Refusal::OutsideMemory { gpa: segment.gpa, len_bytes: segment.len_bytes as u32 })?;
            filled += segment.len_bytes;
        }
        let fields = u128::from_le_bytes(bytes);
        Ok(Self { sector: fields as u64, sectors: (fields >> 64) as u32, flags: (fields >> 96) as u32 })
    }

    /// Refuses flags that the type does not have.
    fn check_flags(&self, request_type: u32) -> Result<(), Refusal> {
        let known_flags = if request_type == VIRTIO_BLK_T_DISCARD { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        let flags = self.flags;
        if flags & !known_flags == 0 { Ok(()) } else { Err(Refusal::Flags { request_type, flags }) }
    }
}

impl RequestLimits {
    fn check_writable(&self, request_type: u32) -> Result<(), Refusal> {
        if self.read_only { Err(Refusal::ReadOnly { request_type }) } else { Ok(()) }
    }

    /// The extent of a read or write on the disk. `None` if the request has no data.
    #[inline]
    fn data_extent(&self, header: &Header, len_bytes: u32) -> Result<Option<ByteRange>, Refusal> {
        if len_bytes % SECTOR_BYTES != 0 {
            return Err(Refusal::DataLength { request_type: header.request_type, len_bytes });
        }
        self.extent(header.sector, (len_bytes / SECTOR_BYTES).into())
    }

    /// Checks an untrusted range of sectors. `None` if the range is empty.
    #[inline]
    fn extent(&self, sector: u64, sectors: u64) -> Result<Option<ByteRange>, Refusal> {
        let block_mask = u64::from(self.logical_block_sectors) - 1;
        if (sector | sectors) & block_mask != 0 {
            return Err(Refusal::Unaligned { sector, sectors });
        }
        if sectors > self.capacity_sectors || sector > self.capacity_sectors - sectors {
            return Err(Refusal::BeyondCapacity { sector, sectors });
        }
        let sector_bytes = u64::from(SECTOR_BYTES);
        let range = ByteRange { offset_bytes: sector * sector_bytes, len_bytes: sectors * sector_bytes };
        Ok((sectors > 0).then_some(range))
    }

    /// The maximum length of a range of this type. Refuses types that the device does not offer.
    fn max_range_sectors(&self, request_type: u32) -> Result<u32, Refusal> {
        let max_sectors = match request_type {
            VIRTIO_BLK_T_DISCARD => self.discard.map(|limits| limits.max_sectors),
            _ => self.write_zeroes.map(|limits| limits.max_sectors),
        };
        max_sectors.ok_or_else(|| refusal(request_type))
    }

    fn range_operation(
        &self,
        request_type: u32,
        range: &Range,
        max_sectors: u32,
    ) -> Result<Option<Operation>, Refusal> {
        let is_discard = request_type == VIRTIO_BLK_T_DISCARD;
        if range.sectors > max_sectors {
            return Err(Refusal::RangeTooLong { request_type, sectors: range.sectors });
        }
        let may_unmap = self.write_zeroes.is_some_and(|limits| limits.may_unmap);
        let unmap = may_unmap && range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        Ok(self.extent(range.sector, range.sectors.into())?.map(|extent| {
            if is_discard { Operation::Discard(extent) } else { Operation::WriteZeroes { range: extent, unmap } }
        }))
    }
}

#[cfg(test)]
mod tests;
