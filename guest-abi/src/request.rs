//! The requests of this interface: virtio-blk requests with types that no other virtio-blk request uses.
//!
//! A request is a descriptor chain as VIRTIO 1.2, 5.2.6 describes it:
//!
//! | part | written by | bytes |
//! | --- | --- | --- |
//! | header: type, reserved (0), sector (0) | driver | 16 |
//! | payload (ATTACH) | driver | [`AttachPayload`](crate::attach::AttachPayload) |
//! | answer | device | [`ProbeAnswer`](crate::probe::ProbeAnswer), [`EventAnswer`] or [`Outcome`] |
//! | status | device | 1 |
//!
//! The parts can be split over descriptors in any way (VIRTIO 1.2, 2.7.4). The status is the last device-writable byte.
//! A device that does not know the type writes `VIRTIO_BLK_S_UNSUPP` there, as VIRTIO demands, and writes nothing else.

pub use crate::error_code::{ErrorCode, Retry};
use crate::little_endian::{Le32, Le64, wire};

/// PROBE, queue 0: asks what the device supports. The answer is a [`ProbeAnswer`](crate::probe::ProbeAnswer).
pub const T_PROBE: u32 = 0x7270_0000;
/// ARM, on the queue to be attached, which must be empty. Completes at once. The driver does not reap it while the
/// queue is attached. The answer is an [`Outcome`].
pub const T_ARM: u32 = 0x7270_0002;
/// ATTACH, directly after ARM, and the last entry of its queue. Pending while the queue is attached. The payload is an
/// [`AttachPayload`](crate::attach::AttachPayload), the answer is an [`Outcome`].
pub const T_ATTACH: u32 = 0x7270_0005;
/// EVENT, queue 0: completes when the driver should look at its queues. The answer is an [`EventAnswer`].
pub const T_EVENT: u32 = 0x7270_0006;
/// [`EventAnswer::events`]: look at every queue. The device has announced something or completed an ATTACH on some queue,
/// or it may give rings again. A device that starts sets the bit in its first answer.
///
/// The other bits are reserved; drivers ignore them.
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
}

impl RequestType {
    /// All requests.
    pub const ALL: [Self; 4] = [Self::Probe, Self::Arm, Self::Attach, Self::Event];

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
        }
    }

    /// Length in bytes of the device-readable payload in version 1. A longer payload is accepted if the rest is zero.
    pub fn payload_bytes(self) -> usize {
        match self {
            Self::Probe | Self::Arm | Self::Event => 0,
            Self::Attach => crate::attach::AttachPayload::BYTES,
        }
    }

    /// Length in bytes of the answer in version 1. A device writes as many bytes as the buffer has room for.
    pub fn answer_bytes(self) -> usize {
        match self {
            Self::Probe => crate::probe::ProbeAnswer::BYTES,
            Self::Event => EventAnswer::BYTES,
            Self::Arm | Self::Attach => Outcome::BYTES,
        }
    }
}

/// Maximum length of a payload in bytes. The device refuses a longer payload with [`ErrorCode::Length`].
pub const PAYLOAD_BYTES_MAX: u32 = 4096;

/// The answer of ARM and ATTACH.
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
