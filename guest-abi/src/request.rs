//! The requests of this interface: virtio-blk requests with types that no other virtio-blk request uses.
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
//! The parts can be split over descriptors in any way (VIRTIO 1.2, 2.7.4). The status is the last device-writable byte.
//! A device that does not know the type writes `VIRTIO_BLK_S_UNSUPP` there, as VIRTIO demands, and writes nothing else.

use crate::little_endian::{Le16, Le32, Le64, wire};

/// PROBE, queue 0: asks what the device supports. The answer is a [`ProbeAnswer`](crate::probe::ProbeAnswer).
pub const T_PROBE: u32 = 0x7270_0000;
/// ARM, on the queue to be attached, which must be empty. Completes at once. The driver does not reap it while the
/// queue is attached. The answer is an [`Outcome`].
pub const T_ARM: u32 = 0x7270_0002;
/// ATTACH, directly after ARM, and the last entry of its queue. Pending while the queue is attached. The payload is an
/// [`AttachPayload`](crate::attach::AttachPayload), the answer is an [`Outcome`].
pub const T_ATTACH: u32 = 0x7270_0005;
/// EVENT, queue 0: completes when the driver should read its control pages. The answer is an [`EventAnswer`].
pub const T_EVENT: u32 = 0x7270_0006;
/// DETACH, queue 0: the driver has set the detach word of a queue's control page. The payload is a [`DetachPayload`],
/// the answer is an [`Outcome`].
pub const T_DETACH: u32 = 0x7270_0009;

/// [`EventAnswer::events`]: the device made an announcement on some queue, or completed an ATTACH.
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
    /// All requests.
    pub const ALL: [Self; 5] = [Self::Probe, Self::Arm, Self::Attach, Self::Event, Self::Detach];

    /// The request with this number in the virtio-blk header. `None`: not a request of this interface.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|request| request.number() == number)
    }

    /// The number in the virtio-blk header.
    ///
    /// As in all of virtio-blk, bit 0 states whether there is a device-readable payload. No two numbers differ only in
    /// bit 0 or only in bit 31, because some devices ignore these bits.
    pub fn number(self) -> u32 {
        match self {
            Self::Probe => T_PROBE,
            Self::Arm => T_ARM,
            Self::Attach => T_ATTACH,
            Self::Event => T_EVENT,
            Self::Detach => T_DETACH,
        }
    }

    /// Length in bytes of the device-readable payload in version 0. A longer payload is accepted if the rest is zero.
    pub fn payload_bytes(self) -> usize {
        match self {
            Self::Probe | Self::Arm | Self::Event => 0,
            Self::Attach => crate::attach::AttachPayload::BYTES,
            Self::Detach => DetachPayload::BYTES,
        }
    }

    /// Length in bytes of the answer in version 0. A device writes as many bytes as the buffer has room for.
    pub fn answer_bytes(self) -> usize {
        match self {
            Self::Probe => crate::probe::ProbeAnswer::BYTES,
            Self::Event => EventAnswer::BYTES,
            Self::Arm | Self::Attach | Self::Detach => Outcome::BYTES,
        }
    }
}

/// Maximum length of a payload in bytes. The device refuses a longer payload with [`ErrorCode::Length`].
pub const PAYLOAD_BYTES_MAX: u32 = 4096;

/// The result of a request ([`Outcome::error`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub enum ErrorCode {
    /// Success.
    None = 0,
    /// ATTACH ended because the driver sent DETACH. The status is `VIRTIO_BLK_S_OK`.
    Detached = 1,
    /// The device does not support the version.
    Version = 2,
    /// A feature bit is set that the device did not offer.
    Features = 3,
    /// A field that must be zero is not zero, or bytes after the last field that the device knows are not zero.
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
    /// A range is not, or no longer, in one piece of guest RAM, or the host cannot place rings in memory of that kind.
    Memory = 10,
    /// The request is on the wrong queue: ARM and ATTACH must not be on queue 0, all others must be.
    Queue = 11,
    /// ARM on a queue with other requests, or ATTACH not directly after ARM.
    Order = 12,
    /// Another queue, or a ring that is still closing, uses a range. Try again later.
    Busy = 13,
    /// The device offers no rings now. An EVENT completes when the driver can try again.
    Mode = 14,
    /// The host lacks a resource (memory that may be locked, descriptors). Trying again later may help.
    Resources = 15,
    /// Guest memory was discarded while it was pinned. The device offers no rings before its next reset.
    Discarded = 16,
    /// The ring had more requests outstanding than its CQ has entries. The queue gets no ring for a while. An EVENT
    /// completes when the driver can try again.
    Cost = 17,
}

impl ErrorCode {
    /// All codes of version 0.
    pub const ALL: [Self; 18] = [
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
        Self::Cost,
    ];

    /// The code with this number; `None` for a code of a later version, which a driver treats as final.
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
    /// The byte offset of the refused field in the payload; 0xffff_ffff if none.
    pub field_offset_bytes: Le32,
    /// The value of that field, or the limit, depending on the code. For information, not for programs.
    pub value: Le64,
}
wire!(Outcome { error, field_offset_bytes, value });

/// [`Outcome::field_offset_bytes`]: no field.
pub const NO_FIELD: u32 = 0xffff_ffff;

impl Outcome {
    /// An outcome that concerns no field.
    pub fn of(error: ErrorCode) -> Self {
        Self { error: (error as u32).into(), field_offset_bytes: NO_FIELD.into(), value: 0.into() }
    }
}

/// The answer of EVENT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EventAnswer {
    /// [`EVENT_QUEUES`]; 0 when the queue stops. Drivers ignore unknown bits.
    pub events: Le32,
    /// 0.
    pub reserved: Le32,
}
wire!(EventAnswer { events, reserved });

/// The payload of DETACH.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DetachPayload {
    /// The queue, at least 1.
    pub queue: Le16,
    /// 0.
    pub reserved: [Le16; 3],
}
wire!(DetachPayload { queue, reserved });

impl DetachPayload {
    /// The queue, if the payload is well-formed and the queue is one of `queue_count` queues and can be attached.
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
/// Further bytes must be zero: a device refuses a driver of a later version that needs more than the device knows,
/// instead of processing only a part of the payload.
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
