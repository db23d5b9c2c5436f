//! Requests of the front-end.

use vhost::vhost_user::message::FrontendReq;

use super::body::Fields;
use super::{MAX_FDS, MessageError};

const U64_BYTES: usize = 8;
const VRING_STATE_BYTES: usize = 8;
const VRING_ADDRESS_BYTES: usize = 40;
const REGION_BYTES: usize = 32;
const TABLE_HEADER_BYTES: usize = 8;
const SINGLE_REGION_BYTES: usize = 8 + REGION_BYTES;
const LOG_BYTES: usize = 16;
const CONFIG_HEADER_BYTES: usize = 12;
/// The fields of an in-flight description take 20 bytes; QEMU and rust-vmm send the C structure, which has 24.
const INFLIGHT_BYTES: usize = 20;
const INFLIGHT_PADDED_BYTES: usize = 24;

/// VHOST_VRING_F_LOG: the writes to the used ring are logged, too.
const VRING_FLAG_LOG: u32 = 1;
/// Bits 0 to 7 of the body of SET_VRING_KICK, _CALL and _ERR: the vring.
const VRING_FILE_INDEX_MASK: u64 = 0xff;
/// Bit 8: there is no file descriptor.
const VRING_FILE_NO_FD: u64 = 0x100;

/// One region of guest memory, as the front-end describes it. The parser checks only its form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionDescription {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// The address at which the front-end has mapped it; vring addresses refer to that mapping.
    pub user_address: u64,
    /// Where it begins in its file, in bytes.
    pub file_offset_bytes: u64,
}

/// The addresses at which the front-end has mapped the parts of a vring (VHOST_USER_SET_VRING_ADDR). The driver chooses
/// them, so they may be anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddress {
    /// Index of the vring; unchecked.
    pub index: u32,
    /// Descriptor table, in the front-end's address space.
    pub desc_table: u64,
    /// Used ring, in the front-end's address space.
    pub used_ring: u64,
    /// Available ring, in the front-end's address space.
    pub avail_ring: u64,
    /// The guest address under which the dirty log knows the used ring, if the device must log its writes to it. The
    /// address need not be in the memory table.
    pub used_log_gpa: Option<u64>,
}

/// A vring, and whether the message carried an eventfd for it (VHOST_USER_SET_VRING_KICK, _CALL, _ERR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFile {
    /// Index of the vring; unchecked.
    pub index: u32,
    /// False: the back-end must poll instead.
    pub has_fd: bool,
}

/// An in-flight region (VHOST_USER_GET_INFLIGHT_FD, VHOST_USER_SET_INFLIGHT_FD).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightDescription {
    /// Length of the region in bytes.
    pub size_bytes: u64,
    /// Where it begins in its file, in bytes.
    pub offset_bytes: u64,
    /// Number of queues.
    pub queues: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// The front-end sends the structure with its 4 bytes of padding, and expects padding in the reply.
    pub is_padded: bool,
}

impl InflightDescription {
    /// The description as a body.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(INFLIGHT_PADDED_BYTES);
        bytes.extend(self.size_bytes.to_ne_bytes());
        bytes.extend(self.offset_bytes.to_ne_bytes());
        bytes.extend(self.queues.to_ne_bytes());
        bytes.extend(self.queue_size.to_ne_bytes());
        if self.is_padded {
            bytes.resize(INFLIGHT_PADDED_BYTES, 0);
        }
        bytes
    }
}

/// A well-formed request of the front-end. Names are those of the specification without `VHOST_USER_`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the specification, with their units")]
#[non_exhaustive]
pub enum Request {
    GetFeatures,
    SetFeatures { features: u64 },
    SetOwner,
    ResetOwner,
    SetMemTable { regions: Vec<RegionDescription> },
    SetLogBase { size_bytes: u64, offset_bytes: u64 },
    SetLogFd,
    SetVringNum { index: u32, size: u32 },
    SetVringAddr(VringAddress),
    SetVringBase { index: u32, next_avail: u16 },
    GetVringBase { index: u32 },
    SetVringKick(VringFile),
    SetVringCall(VringFile),
    SetVringErr(VringFile),
    GetProtocolFeatures,
    SetProtocolFeatures { features: u64 },
    GetQueueNum,
    SetVringEnable { index: u32, is_enabled: bool },
    SetBackendReqFd,
    GetConfig { offset_bytes: u32, size_bytes: u32, flags: u32 },
    SetConfig { offset_bytes: u32, flags: u32, bytes: Vec<u8> },
    GetInflightFd(InflightDescription),
    SetInflightFd(InflightDescription),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionDescription),
    RemMemReg(RegionDescription),
    SetStatus { status: u8 },
    GetStatus,
}

impl Request {
    /// Parses a message that came with `fds` file descriptors.
    ///
    /// # Errors
    ///
    /// Names the size, field or number of descriptors that violates the specification.
    pub fn parse(request: u32, body: &[u8], fds: usize) -> Result<Self, MessageError> {
        let known = FrontendReq::try_from(request).map_err(|_| MessageError::Unimplemented { request })?;
        let (parsed, expected_fds) = parse_body(known, body)?;
        match expected_fds {
            Fds::Exactly(expected) if fds != expected => Err(MessageError::FdCount { request: known, fds, expected }),
            // The specification lets front-ends pass the region's file again; the back-end closes it unused.
            Fds::AtMostOne if fds > 1 => Err(MessageError::FdCount { request: known, fds, expected: 1 }),
            _ => Ok(parsed),
        }
    }
}

enum Fds {
    Exactly(usize),
    AtMostOne,
}

fn parse_body(request: FrontendReq, body: &[u8]) -> Result<(Request, Fds), MessageError> {
    use FrontendReq as Code;
    let no_fds = Fds::Exactly(0);
    Ok(match request {
        Code::GET_FEATURES => (empty(request, body, Request::GetFeatures)?, no_fds),
        Code::SET_FEATURES => (Request::SetFeatures { features: number(request, body)? }, no_fds),
        Code::SET_OWNER => (empty(request, body, Request::SetOwner)?, no_fds),
        Code::RESET_OWNER => (empty(request, body, Request::ResetOwner)?, no_fds),
        Code::SET_MEM_TABLE => {
            let regions = memory_table(request, body)?;
            let fds = regions.len();
            (Request::SetMemTable { regions }, Fds::Exactly(fds))
        }
        Code::SET_LOG_BASE => {
            let mut fields = Fields::exactly(request, body, LOG_BYTES, "16 (an address of 8 bytes is useless)")?;
            (Request::SetLogBase { size_bytes: fields.u64(), offset_bytes: fields.u64() }, Fds::Exactly(1))
        }
        Code::SET_LOG_FD => (empty(request, body, Request::SetLogFd)?, Fds::Exactly(1)),
        Code::SET_VRING_NUM => {
            let (index, size) = vring_state(request, body)?;
            (Request::SetVringNum { index, size }, no_fds)
        }
        Code::SET_VRING_ADDR => (Request::SetVringAddr(vring_address(request, body)?), no_fds),
        Code::SET_VRING_BASE => {
            let (index, base) = vring_state(request, body)?;
            let next_avail =
                u16::try_from(base).map_err(|_| bad_field(request, "the index of a split ring", base.into()))?;
            (Request::SetVringBase { index, next_avail }, no_fds)
        }
        Code::GET_VRING_BASE => (Request::GetVringBase { index: vring_state(request, body)?.0 }, no_fds),
        Code::SET_VRING_KICK => with_file(vring_file(request, body)?, Request::SetVringKick),
        Code::SET_VRING_CALL => with_file(vring_file(request, body)?, Request::SetVringCall),
        Code::SET_VRING_ERR => with_file(vring_file(request, body)?, Request::SetVringErr),
        Code::GET_PROTOCOL_FEATURES => (empty(request, body, Request::GetProtocolFeatures)?, no_fds),
        Code::SET_PROTOCOL_FEATURES => (Request::SetProtocolFeatures { features: number(request, body)? }, no_fds),
        Code::GET_QUEUE_NUM => (empty(request, body, Request::GetQueueNum)?, no_fds),
        Code::SET_VRING_ENABLE => match vring_state(request, body)? {
            (index, num @ (0 | 1)) => (Request::SetVringEnable { index, is_enabled: num == 1 }, no_fds),
            (_, num) => return Err(bad_field(request, "the state of a ring", num.into())),
        },
        Code::SET_BACKEND_REQ_FD => (empty(request, body, Request::SetBackendReqFd)?, Fds::Exactly(1)),
        Code::GET_CONFIG => (get_config(request, body)?, no_fds),
        Code::SET_CONFIG => (set_config(request, body)?, no_fds),
        Code::GET_INFLIGHT_FD => (Request::GetInflightFd(inflight(request, body)?), no_fds),
        Code::SET_INFLIGHT_FD => (Request::SetInflightFd(inflight(request, body)?), Fds::Exactly(1)),
        Code::RESET_DEVICE => (empty(request, body, Request::ResetDevice)?, no_fds),
        Code::GET_MAX_MEM_SLOTS => (empty(request, body, Request::GetMaxMemSlots)?, no_fds),
        Code::ADD_MEM_REG => (Request::AddMemReg(single_region(request, body)?), Fds::Exactly(1)),
        Code::REM_MEM_REG => (Request::RemMemReg(single_region(request, body)?), Fds::AtMostOne),
        Code::SET_STATUS => {
            let status = number(request, body)?;
            let status = u8::try_from(status).map_err(|_| bad_field(request, "the device status", status))?;
            (Request::SetStatus { status }, no_fds)
        }
        Code::GET_STATUS => (empty(request, body, Request::GetStatus)?, no_fds),
        // Each belongs to a feature that this back-end does not offer.
        Code::SEND_RARP
        | Code::NET_SET_MTU
        | Code::IOTLB_MSG
        | Code::SET_VRING_ENDIAN
        | Code::CREATE_CRYPTO_SESSION
        | Code::CLOSE_CRYPTO_SESSION
        | Code::POSTCOPY_ADVISE
        | Code::POSTCOPY_LISTEN
        | Code::POSTCOPY_END
        | Code::GPU_SET_SOCKET
        | Code::VRING_KICK
        | Code::GET_SHARED_OBJECT
        | Code::SET_DEVICE_STATE_FD
        | Code::CHECK_DEVICE_STATE
        | Code::GET_SHMEM_CONFIG => return Err(MessageError::Unimplemented { request: request.into() }),
    })
}

fn bad_field(request: FrontendReq, field: &'static str, value: u64) -> MessageError {
    MessageError::BadField { request, field, value }
}

fn empty(request: FrontendReq, body: &[u8], parsed: Request) -> Result<Request, MessageError> {
    Fields::exactly(request, body, 0, "0").map(|_| parsed)
}

fn number(request: FrontendReq, body: &[u8]) -> Result<u64, MessageError> {
    Fields::exactly(request, body, U64_BYTES, "8").map(|mut fields| fields.u64())
}

fn vring_state(request: FrontendReq, body: &[u8]) -> Result<(u32, u32), MessageError> {
    let mut fields = Fields::exactly(request, body, VRING_STATE_BYTES, "8")?;
    Ok((fields.u32(), fields.u32()))
}

fn vring_address(request: FrontendReq, body: &[u8]) -> Result<VringAddress, MessageError> {
    let mut fields = Fields::exactly(request, body, VRING_ADDRESS_BYTES, "40")?;
    let (index, flags) = (fields.u32(), fields.u32());
    if flags & !VRING_FLAG_LOG != 0 {
        return Err(bad_field(request, "flags", flags.into()));
    }
    let (desc_table, used_ring, avail_ring, log_gpa) = (fields.u64(), fields.u64(), fields.u64(), fields.u64());
    let used_log_gpa = (flags & VRING_FLAG_LOG != 0).then_some(log_gpa);
    Ok(VringAddress { index, desc_table, used_ring, avail_ring, used_log_gpa })
}

fn vring_file(request: FrontendReq, body: &[u8]) -> Result<VringFile, MessageError> {
    let value = number(request, body)?;
    if value & !(VRING_FILE_INDEX_MASK | VRING_FILE_NO_FD) != 0 {
        return Err(bad_field(request, "vring and flag", value));
    }
    let index = (value & VRING_FILE_INDEX_MASK) as u32;
    Ok(VringFile { index, has_fd: value & VRING_FILE_NO_FD == 0 })
}

fn with_file(file: VringFile, request: impl FnOnce(VringFile) -> Request) -> (Request, Fds) {
    (request(file), Fds::Exactly(usize::from(file.has_fd)))
}

fn region(fields: &mut Fields<'_>) -> RegionDescription {
    RegionDescription {
        gpa: fields.u64(),
        size_bytes: fields.u64(),
        user_address: fields.u64(),
        file_offset_bytes: fields.u64(),
    }
}

fn memory_table(request: FrontendReq, body: &[u8]) -> Result<Vec<RegionDescription>, MessageError> {
    let expected = "8 and 32 for each region";
    let mut fields = Fields::at_least(request, body, TABLE_HEADER_BYTES, expected)?;
    let (count, _padding) = (fields.u32(), fields.u32());
    let regions = match usize::try_from(count) {
        Ok(regions) if regions <= MAX_FDS => regions,
        _ => return Err(bad_field(request, "the number of regions", count.into())),
    };
    let mut fields = Fields::exactly(request, body, TABLE_HEADER_BYTES + regions * REGION_BYTES, expected)?;
    fields.u64();
    Ok((0..regions).map(|_| region(&mut fields)).collect())
}

fn single_region(request: FrontendReq, body: &[u8]) -> Result<RegionDescription, MessageError> {
    let mut fields = Fields::exactly(request, body, SINGLE_REGION_BYTES, "40")?;
    let _padding = fields.u64();
    Ok(region(&mut fields))
}

fn inflight(request: FrontendReq, body: &[u8]) -> Result<InflightDescription, MessageError> {
    let is_padded = body.len() == INFLIGHT_PADDED_BYTES;
    let expected_bytes = if is_padded { INFLIGHT_PADDED_BYTES } else { INFLIGHT_BYTES };
    let mut fields = Fields::exactly(request, body, expected_bytes, "20 or 24")?;
    Ok(InflightDescription {
        size_bytes: fields.u64(),
        offset_bytes: fields.u64(),
        queues: fields.u16(),
        queue_size: fields.u16(),
        is_padded,
    })
}

/// Offset, size and flags. The driver may choose where it reads or writes, so the parser accepts any offset and size.
fn config_header(fields: &mut Fields<'_>) -> (u32, u32, u32) {
    (fields.u32(), fields.u32(), fields.u32())
}

/// The request has room for the reply or not; front-ends send both forms.
fn get_config(request: FrontendReq, body: &[u8]) -> Result<Request, MessageError> {
    let expected = "12, or 12 and the requested size";
    let mut fields = Fields::at_least(request, body, CONFIG_HEADER_BYTES, expected)?;
    let (offset_bytes, size_bytes, flags) = config_header(&mut fields);
    match fields.rest().len() {
        room_bytes if room_bytes == 0 || room_bytes == size_bytes as usize => {
            Ok(Request::GetConfig { offset_bytes, size_bytes, flags })
        }
        _ => Err(MessageError::BodySize { request, size_bytes: body.len(), expected }),
    }
}

fn set_config(request: FrontendReq, body: &[u8]) -> Result<Request, MessageError> {
    let expected = "12 and the written size";
    let mut fields = Fields::at_least(request, body, CONFIG_HEADER_BYTES, expected)?;
    let (offset_bytes, size_bytes, flags) = config_header(&mut fields);
    let bytes = fields.rest();
    if bytes.len() != size_bytes as usize {
        return Err(MessageError::BodySize { request, size_bytes: body.len(), expected });
    }
    Ok(Request::SetConfig { offset_bytes, flags, bytes: bytes.to_vec() })
}
