//! The requests of this interface: types of virtio-blk requests that no other virtio-blk request uses.
//!
//! A request is a descriptor chain as VIRTIO 1.2, 5.2.6 describes it:
//!
//! | part | written by | bytes |
//! | --- | --- | --- |
//! | header: type, reserved (0), sector (0) | driver | 16 |
//! | payload (ATTACH, DETACH) | driver | [`AttachPayload`](crate::attach::AttachPayload), [`DetachPayload`] |
//! | answer | device | [`ProbeAnswer`](crate::probe::ProbeAnswer), [`EventAnswer`] or [`Outcome`] |
//! | status | device | 1 |
//!
//! How the parts are spread over descriptors means nothing (VIRTIO 1.2, 2.7.4). The status is the last device-writable
//! byte. A device that does not know the type answers `VIRTIO_BLK_S_UNSUPP` there, as VIRTIO demands, and touches
//! nothing else.

use crate::little_endian::{Le16, Le32, Le64, wire};

/// PROBE, queue 0: what the device is. The answer is a [`ProbeAnswer`](crate::probe::ProbeAnswer).
pub const T_PROBE: u32 = 0x7270_0000;
/// ARM, on the queue to be attached, which must be empty. Completes at once. The driver leaves it unreaped for as long
/// as the queue is attached. The answer is an [`Outcome`].
pub const T_ARM: u32 = 0x7270_0002;
/// ATTACH, right behind ARM and the last entry of its queue. Pending for as long as the queue is attached. The payload is
/// an [`AttachPayload`](crate::attach::AttachPayload), the answer an [`Outcome`].
pub const T_ATTACH: u32 = 0x7270_0005;
/// EVENT, queue 0: completes when the driver should look at its control pages. The answer is an [`EventAnswer`].
pub const T_EVENT: u32 = 0x7270_0006;
/// DETACH, queue 0: the driver has set the detach word of a queue's control page. The payload is a [`DetachPayload`],
/// the answer an [`Outcome`].
pub const T_DETACH: u32 = 0x7270_0009;

/// [`EventAnswer::events`]: an announcement was made on some queue, or an ATTACH completed.
pub const EVENT_QUEUES: u32 = 1 << 0;

/// A request of this interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestType {
    /// [`T_PROBE`]
    Probe,
    /// [`T_ARM`]
    Arm,
    /// [`T_ATTACH`]
    Attach,
    /// [`T_EVENT`]
    Event,
    /// [`T_DETACH`]
    Detach,
}

impl RequestType {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Probe, Self::Arm, Self::Attach, Self::Event, Self::Detach];

    /// The request with this number in the virtio-blk header. `None`: not one of this interface.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|request| request.number() == number)
    }

    /// The number in the virtio-blk header.
    ///
    /// Bit 0 says, as in all of virtio-blk, whether there is a device-readable payload. No two differ in bit 0 or bit 31
    /// alone, which some devices do not look at.
    pub fn number(self) -> u32 {
        match self {
            Self::Probe => T_PROBE,
            Self::Arm => T_ARM,
            Self::Attach => T_ATTACH,
            Self::Event => T_EVENT,
            Self::Detach => T_DETACH,
        }
    }

    /// Bytes of the device-readable payload in version 0. Longer ones are accepted if the rest is zero.
    pub fn payload_bytes(self) -> usize {
        match self {
            Self::Probe | Self::Arm | Self::Event => 0,
            Self::Attach => crate::attach::AttachPayload::BYTES,
            Self::Detach => DetachPayload::BYTES,
        }
    }

    /// Bytes of the answer in version 0. A device writes as many of them as there is room for.
    pub fn answer_bytes(self) -> usize {
        match self {
            Self::Probe => crate::probe::ProbeAnswer::BYTES,
            Self::Event => EventAnswer::BYTES,
            Self::Arm | Self::Attach | Self::Detach => Outcome::BYTES,
        }
    }
}

/// Longest payload that a device looks at, in bytes. A longer one is refused with [`ErrorCode::Length`].
pub const PAYLOAD_BYTES_MAX: u32 = 4096;

/// How a request ended ([`Outcome::error`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub enum ErrorCode {
    /// It was done.
    None = 0,
    /// ATTACH: the driver asked for it with DETACH. The status is `VIRTIO_BLK_S_OK`.
    Detached = 1,
    /// The version is not one that the device has.
    Version = 2,
    /// A feature bit is set that the device did not offer.
    Features = 3,
    /// A field that must be zero is not, or bytes behind the last field that the device knows.
    Reserved = 4,
    /// The payload is too short, or longer than [`PAYLOAD_BYTES_MAX`].
    Length = 5,
    /// A number of entries is not a power of two, is above the limit of PROBE, or the CQ is smaller than the SQ.
    Entries = 6,
    /// An address is not a multiple of the page size of PROBE.
    Alignment = 7,
    /// A range does not end below 16 TiB.
    Range = 8,
    /// Two of the five ranges overlap.
    Overlap = 9,
    /// A range does not lie in one piece of guest RAM, or not any more, or the host cannot have rings in memory of that kind.
    Memory = 10,
    /// The request is for another queue: ARM and ATTACH never on queue 0, all others only there.
    Queue = 11,
    /// ARM on a queue with other requests, or ATTACH not right behind ARM.
    Order = 12,
    /// A range is used by another queue, or still by a ring that is being taken apart. Trying again later helps.
    Busy = 13,
    /// The device does not give out rings now. An EVENT tells when to try again.
    Mode = 14,
    /// The host lacks something (memory that may be locked, descriptors). Trying again later may help.
    Resources = 15,
    /// Guest memory was discarded while it was pinned. No ring before the next device reset.
    Discarded = 16,
}

impl ErrorCode {
    /// All codes of version 0.
    pub const ALL: [Self; 17] = [
        Self::None,
        Self::Detached,
        Self::Version,
        Self::Features,
        Self::Reserved,
        Self::Length,
        Self::Entries,
        Self::Alignment,
        Self::Range,
        Self::Overlap,
        Self::Memory,
        Self::Queue,
        Self::Order,
        Self::Busy,
        Self::Mode,
        Self::Resources,
        Self::Discarded,
    ];

    /// The code with this number; `None` for one of a later version, which a driver treats as final.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Whether the status byte is `VIRTIO_BLK_S_OK` (0); `VIRTIO_BLK_S_IOERR` (1) otherwise.
    pub fn is_ok(self) -> bool {
        matches!(self, Self::None | Self::Detached)
    }
}

/// The answer of ARM, ATTACH and DETACH.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Outcome {
    /// An [`ErrorCode`].
    pub error: Le32,
    /// The field of the payload that was refused, as its offset in bytes; 0xffff_ffff if none.
    pub field_offset_bytes: Le32,
    /// What was found there, or what the limit is; see the code. For people, not for programs.
    pub value: Le64,
}
wire!(Outcome { error, field_offset_bytes, value });

/// [`Outcome::field_offset_bytes`]: no field.
pub const NO_FIELD: u32 = 0xffff_ffff;

impl Outcome {
    /// An outcome that is about no field.
    pub fn of(error: ErrorCode) -> Self {
        Self { error: (error as u32).into(), field_offset_bytes: NO_FIELD.into(), value: 0.into() }
    }
}

/// The answer of EVENT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EventAnswer {
    /// [`EVENT_QUEUES`]; 0 when the queue stops. A driver ignores bits that it does not know.
    pub events: Le32,
    /// 0.
    pub reserved: Le32,
}
wire!(EventAnswer { events, reserved });

/// The payload of DETACH.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DetachPayload {
    /// The queue, 1 and up.
    pub queue: Le16,
    /// 0.
    pub reserved: [Le16; 3],
}
wire!(DetachPayload { queue, reserved });

impl DetachPayload {
    /// The queue, if the payload is well-formed and names one of `queue_count` that can be attached.
    pub fn check(&self, queue_count: u16) -> Result<u16, ErrorCode> {
        if self.reserved != [Le16::new(0); 3] {
            return Err(ErrorCode::Reserved);
        }
        let queue = self.queue.get();
        if queue == 0 || queue >= queue_count { Err(ErrorCode::Queue) } else { Ok(queue) }
    }
}

/// Copies the `bytes` of a payload into the fixed size that this version knows.
///
/// Bytes behind it must be zero: a driver of a later version that needs more than this device knows is refused rather
/// than half understood.
pub fn payload<const N: usize>(bytes: &[u8]) -> Result<[u8; N], ErrorCode> {
    if bytes.len() > PAYLOAD_BYTES_MAX as usize {
        return Err(ErrorCode::Length);
    }
    let (known, rest) = bytes.split_first_chunk::<N>().ok_or(ErrorCode::Length)?;
    if rest.iter().any(|&byte| byte != 0) {
        return Err(ErrorCode::Reserved);
    }
    Ok(*known)
}

#[cfg(test)]
mod tests;
