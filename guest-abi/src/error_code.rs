//! The codes with which the device answers, and when a driver may try again.

/// The result of a request ([`Outcome::error`](crate::request::Outcome::error)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub enum ErrorCode {
    /// Success.
    None = 0,
    /// ATTACH ended because the driver set the detach word. The status is `VIRTIO_BLK_S_OK`.
    Detached = 1,
    /// The device does not support the version.
    Version = 2,
    /// A feature bit is set that the device did not offer.
    Features = 3,
    /// A field that must be zero is not zero, or bytes after the last field that the device knows are not zero.
    Reserved = 4,
    /// The payload is too short, or longer than [`PAYLOAD_BYTES_MAX`](crate::request::PAYLOAD_BYTES_MAX).
    Length = 5,
    /// A number of entries is not a power of two, is above the limit of PROBE, or the CQ is smaller than the SQ.
    Entries = 6,
    /// An address is not a multiple of the page size of PROBE.
    Alignment = 7,
    /// A range does not end below 16 TiB.
    Range = 8,
    /// Two of the five ranges overlap.
    Overlap = 9,
    /// A range is not, or no longer, in one piece of guest RAM; or this guest's RAM cannot hold rings (its kind, or RAM above
    /// 16 TiB).
    Memory = 10,
    /// The request is on the wrong queue: ARM and ATTACH must not be on queue 0, PROBE and EVENT must be.
    Queue = 11,
    /// ARM on a queue with other requests, or ATTACH not directly after ARM.
    Order = 12,
    /// Another queue, or a ring that is still closing, uses a range.
    Busy = 13,
    /// The device offers no rings now.
    Mode = 14,
    /// The host lacks a resource (memory that may be locked, descriptors).
    Resources = 15,
    /// Guest memory was discarded while it was pinned. The device offers no rings before its next reset.
    Discarded = 16,
    /// The ring had more requests outstanding than its CQ has entries. The queue gets no ring for a while.
    Cost = 17,
    /// The front-end keeps no in-flight region, without which a device that takes over would lose and repeat requests.
    Inflight = 18,
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [Self; 19] = [
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
        Self::Inflight,
    ];

    /// The code with this number; `None` for a code of a later version, which a driver treats as [`Retry::No`].
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Whether the status byte is `VIRTIO_BLK_S_OK` (0); `VIRTIO_BLK_S_IOERR` (1) otherwise.
    pub fn is_ok(self) -> bool {
        matches!(self, Self::None | Self::Detached)
    }

    /// When a driver that was refused a ring with this code, or that has lost one, may send ATTACH again.
    pub fn retry(self) -> Retry {
        match self {
            Self::Version | Self::Features | Self::Entries | Self::Alignment => Retry::Probe,
            Self::Mode | Self::Cost => Retry::Event,
            Self::Busy | Self::Resources => Retry::Later,
            Self::None
            | Self::Detached
            | Self::Reserved
            | Self::Length
            | Self::Range
            | Self::Overlap
            | Self::Memory
            | Self::Queue
            | Self::Order
            | Self::Discarded
            | Self::Inflight => Retry::No,
        }
    }
}

/// When a driver may send ATTACH again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Not before the next reset of the device.
    No,
    /// After another PROBE, according to its answer: another device has taken over. Once.
    Probe,
    /// When an EVENT that was completed after the driver had sent the refused ATTACH reports
    /// [`EVENT_QUEUES`](crate::request::EVENT_QUEUES).
    Event,
    /// One second after the refusal. Each further refusal doubles the wait, up to one minute.
    Later,
}
