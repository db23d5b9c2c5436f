//! What the engine and a ring host tell each other. Each message is a packet of numbers and descriptors, without lengths
//! or pointers.

use std::os::fd::{BorrowedFd, OwnedFd};

use ringpass_guest_abi::request::ErrorCode;
use ringpass_guest_abi::{Doorbell, RingLayout};

use super::channel::{Packet, WORDS};
use super::refused::Refused;

/// A ring of a host, by a number that the engine chose. No two rings have the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct RingId(pub(super) u64);

/// An order to the thread of the host that pins memory and makes rings. Each one but `Region` is answered.
#[derive(Debug)]
pub(super) enum Order<F> {
    /// A region of guest RAM. The next `Pin` or `SetMemory` is about all regions since the last.
    Region {
        gpa: u64,
        len_bytes: u64,
        file_offset_bytes: u64,
        /// Regions with the same number are parts of the same file.
        file_number: u64,
        file: F,
    },
    /// Pin the regions, for rings on this disk. Cancelled by its number.
    Pin { number: u64, disk: F },
    /// Give the rings that run these regions in place of their former ones. Cancelled by its number.
    SetMemory { number: u64 },
    /// Wait until no I/O uses memory that was taken away, at most as long as the host is willing to.
    AwaitDrain,
    /// Make a ring.
    MakeRing(RingSpec<F>),
    /// Unpin the memory. Rings that run keep theirs until their end.
    Unpin,
}

/// The ring that is to be made.
#[derive(Debug)]
pub(super) struct RingSpec<F> {
    pub(super) id: RingId,
    pub(super) rings_gpa: u64,
    pub(super) sqes_gpa: u64,
    pub(super) sq_entries: u32,
    pub(super) cq_entries: u32,
    pub(super) doorbell: F,
    pub(super) call: Option<F>,
}

/// An order to the thread of the host that is never busy for long.
#[derive(Debug)]
pub(super) enum Control<F> {
    /// Completions of the ring signal this eventfd from now on, or nothing. Answered.
    SetCall { id: RingId, call: Option<F> },
    /// Close the ring.
    Close { id: RingId },
    /// The words of the ring say that it has more requests outstanding than it may have.
    Suspect { id: RingId },
    /// Give up the order with this number, if it has not been carried out.
    Cancel { number: u64 },
    /// The disk has this size now. Answered.
    SetDiskSize { size_bytes: u64 },
}

/// The answer to an order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The host has started, or the order was carried out.
    Done,
    /// The order was cancelled.
    NotWanted,
    /// I/O still uses memory that was taken away.
    NotDrained,
    /// The ring runs.
    Made { layout: RingLayout, slot_shift: u32 },
    /// The order was not carried out.
    Refused(Refused),
}

/// What happened to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostEvent {
    /// The ring runs.
    Runs { id: RingId },
    /// The ring and all of its I/O have ended.
    Gone { id: RingId },
    /// The host closes the ring, because it had more requests outstanding than its CQ has entries. `None`: the kernel
    /// did not tell how many for too long.
    Excess { id: RingId, outstanding: Option<u32> },
}

/// A packet that is no message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// The kernel had no descriptor for a file of the message.
    #[error(
        "a file was lost on its way: the process has reached its RLIMIT_NOFILE, or a security module refuses the file"
    )]
    LostFile {
        /// Whether the sender waits for an answer.
        is_answered: bool,
    },
    /// Both ends are one program, so this is a bug or an attack.
    #[error("kind {kind} is no message")]
    Unknown { kind: u64 },
}

/// A message as the sender has it: the numbers and the borrowed files.
pub(super) struct Encoded<'f> {
    pub(super) words: [u64; WORDS],
    pub(super) text: String,
    pub(super) fds: Vec<BorrowedFd<'f>>,
}

impl<'f> Encoded<'f> {
    fn new<const N: usize>(kind: u64, numbers: [u64; N]) -> Self {
        let mut words = [0; WORDS];
        words[0] = kind;
        words[1..=N].copy_from_slice(&numbers);
        Self { words, text: String::new(), fds: Vec::new() }
    }

    fn with(self, fds: impl IntoIterator<Item = BorrowedFd<'f>>) -> Self {
        Self { fds: fds.into_iter().collect(), ..self }
    }
}

/// Takes the files of a packet in their order.
struct Files(std::vec::IntoIter<OwnedFd>);

impl Files {
    fn next(&mut self) -> Result<OwnedFd, DecodeError> {
        self.0.next().ok_or(DecodeError::LostFile { is_answered: true })
    }

    fn next_if(&mut self, is_there: u64) -> Result<Option<OwnedFd>, DecodeError> {
        (is_there != 0).then(|| self.next()).transpose()
    }
}

fn parts(packet: Packet) -> ([u64; WORDS], Files, String) {
    (packet.words, Files(packet.fds.into_iter()), packet.text)
}

impl<'f> Order<BorrowedFd<'f>> {
    pub(super) fn encode(&self) -> Encoded<'f> {
        match *self {
            Self::Region { gpa, len_bytes, file_offset_bytes, file_number, file } => {
                Encoded::new(1, [gpa, len_bytes, file_offset_bytes, file_number]).with([file])
            }
            Self::Pin { number, disk } => Encoded::new(2, [number]).with([disk]),
            Self::SetMemory { number } => Encoded::new(3, [number]),
            Self::AwaitDrain => Encoded::new(4, []),
            Self::MakeRing(RingSpec { id, rings_gpa, sqes_gpa, sq_entries, cq_entries, doorbell, call }) => {
                let numbers = [id.0, rings_gpa, sqes_gpa, sq_entries.into(), cq_entries.into(), call.is_some().into()];
                Encoded::new(5, numbers).with([doorbell].into_iter().chain(call))
            }
            Self::Unpin => Encoded::new(6, []),
        }
    }
}

impl Order<OwnedFd> {
    pub(super) fn decode(packet: Packet) -> Result<Self, DecodeError> {
        let (words, mut files, _) = parts(packet);
        match words {
            [1, gpa, len_bytes, file_offset_bytes, file_number, ..] => {
                let file = files.next().map_err(|_| DecodeError::LostFile { is_answered: false })?;
                Ok(Self::Region { gpa, len_bytes, file_offset_bytes, file_number, file })
            }
            [2, number, ..] => Ok(Self::Pin { number, disk: files.next()? }),
            [3, number, ..] => Ok(Self::SetMemory { number }),
            [4, ..] => Ok(Self::AwaitDrain),
            [5, id, rings_gpa, sqes_gpa, sq_entries, cq_entries, has_call, ..] => Ok(Self::MakeRing(RingSpec {
                id: RingId(id),
                rings_gpa,
                sqes_gpa,
                // Numbers that do not fit are refused as numbers of entries.
                sq_entries: sq_entries.try_into().unwrap_or(u32::MAX),
                cq_entries: cq_entries.try_into().unwrap_or(u32::MAX),
                doorbell: files.next()?,
                call: files.next_if(has_call)?,
            })),
            [6, ..] => Ok(Self::Unpin),
            [kind, ..] => Err(DecodeError::Unknown { kind }),
        }
    }
}

impl<'f> Control<BorrowedFd<'f>> {
    pub(super) fn encode(&self) -> Encoded<'f> {
        match *self {
            Self::SetCall { id, call } => Encoded::new(1, [id.0, call.is_some().into()]).with(call),
            Self::Close { id } => Encoded::new(2, [id.0]),
            Self::Suspect { id } => Encoded::new(3, [id.0]),
            Self::Cancel { number } => Encoded::new(4, [number]),
            Self::SetDiskSize { size_bytes } => Encoded::new(5, [size_bytes]),
        }
    }
}

impl Control<OwnedFd> {
    pub(super) fn decode(packet: Packet) -> Result<Self, DecodeError> {
        let (words, mut files, _) = parts(packet);
        match words {
            [1, id, has_call, ..] => Ok(Self::SetCall { id: RingId(id), call: files.next_if(has_call)? }),
            [2, id, ..] => Ok(Self::Close { id: RingId(id) }),
            [3, id, ..] => Ok(Self::Suspect { id: RingId(id) }),
            [4, number, ..] => Ok(Self::Cancel { number }),
            [5, size_bytes, ..] => Ok(Self::SetDiskSize { size_bytes }),
            [kind, ..] => Err(DecodeError::Unknown { kind }),
        }
    }
}

impl Answer {
    pub(super) fn encode(self) -> Encoded<'static> {
        match self {
            Self::Done => Encoded::new(1, []),
            Self::NotWanted => Encoded::new(2, []),
            Self::NotDrained => Encoded::new(3, []),
            Self::Made { layout, slot_shift } => {
                let RingLayout {
                    sq_entries,
                    cq_entries,
                    sq_head_offset,
                    sq_tail_offset,
                    sq_flags_offset,
                    cq_head_offset,
                    cq_tail_offset,
                    cq_flags_offset,
                    cqes_offset,
                    rings_bytes,
                    sqes_bytes,
                    doorbell,
                } = layout;
                let numbers = [
                    slot_shift,
                    sq_entries,
                    cq_entries,
                    sq_head_offset,
                    sq_tail_offset,
                    sq_flags_offset,
                    cq_head_offset,
                    cq_tail_offset,
                    cq_flags_offset,
                    cqes_offset,
                    (doorbell == Doorbell::Always).into(),
                ];
                let mut encoded = Encoded::new(4, numbers.map(u64::from));
                [encoded.words[12], encoded.words[13]] = [rings_bytes, sqes_bytes];
                encoded
            }
            Self::Refused(Refused { code, why }) => Encoded { text: why, ..Encoded::new(5, [code as u64]) },
        }
    }

    pub(super) fn decode(packet: Packet) -> Result<Self, DecodeError> {
        let (words, _, why) = parts(packet);
        let small = |place: usize| u32::try_from(words[place]).unwrap_or(u32::MAX);
        match words {
            [1, ..] => Ok(Self::Done),
            [2, ..] => Ok(Self::NotWanted),
            [3, ..] => Ok(Self::NotDrained),
            [4, ..] => {
                let layout = RingLayout {
                    sq_entries: small(2),
                    cq_entries: small(3),
                    sq_head_offset: small(4),
                    sq_tail_offset: small(5),
                    sq_flags_offset: small(6),
                    cq_head_offset: small(7),
                    cq_tail_offset: small(8),
                    cq_flags_offset: small(9),
                    cqes_offset: small(10),
                    rings_bytes: words[12],
                    sqes_bytes: words[13],
                    doorbell: if words[11] == 0 { Doorbell::WhenAsleep } else { Doorbell::Always },
                };
                Ok(Self::Made { layout, slot_shift: small(1) })
            }
            [5, ..] => {
                let code = ErrorCode::from_number(small(1)).unwrap_or(ErrorCode::Resources);
                Ok(Self::Refused(Refused { code, why }))
            }
            [kind, ..] => Err(DecodeError::Unknown { kind }),
        }
    }
}

impl HostEvent {
    pub(super) fn encode(self) -> Encoded<'static> {
        match self {
            Self::Gone { id } => Encoded::new(1, [id.0]),
            Self::Runs { id } => Encoded::new(3, [id.0]),
            Self::Excess { id, outstanding } => {
                Encoded::new(2, [id.0, outstanding.is_some().into(), outstanding.unwrap_or_default().into()])
            }
        }
    }

    pub(super) fn decode(packet: Packet) -> Result<Self, DecodeError> {
        match packet.words {
            [1, id, ..] => Ok(Self::Gone { id: RingId(id) }),
            [2, id, is_known, outstanding, ..] => Ok(Self::Excess {
                id: RingId(id),
                outstanding: (is_known != 0).then(|| outstanding.try_into().unwrap_or(u32::MAX)),
            }),
            [3, id, ..] => Ok(Self::Runs { id: RingId(id) }),
            [kind, ..] => Err(DecodeError::Unknown { kind }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn sent(encoded: Encoded<'_>) -> Packet {
        let fds = encoded.fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        Packet { words: encoded.words, text: encoded.text, fds }
    }

    #[test]
    fn answers_and_events_arrive_as_they_were_sent() {
        let layout = RingLayout {
            sq_entries: 8,
            cq_entries: 16,
            sq_head_offset: 1,
            sq_tail_offset: 2,
            sq_flags_offset: 3,
            cq_head_offset: 4,
            cq_tail_offset: 5,
            cq_flags_offset: 6,
            cqes_offset: 7,
            rings_bytes: 1 << 40,
            sqes_bytes: 1 << 41,
            doorbell: Doorbell::Always,
        };
        let polled = RingLayout { doorbell: Doorbell::WhenAsleep, ..layout };
        let refused = Refused { code: ErrorCode::Memory, why: "a reason".into() };
        for answer in [|| Answer::Done, || Answer::NotWanted, || Answer::NotDrained] {
            assert_eq!(Answer::decode(sent(answer().encode())).unwrap(), answer());
        }
        for layout in [layout, polled] {
            let made = || Answer::Made { layout, slot_shift: 22 };
            assert_eq!(Answer::decode(sent(made().encode())).unwrap(), made());
        }
        let answer = Answer::decode(sent(Answer::Refused(refused.clone()).encode())).unwrap();
        assert_eq!(answer, Answer::Refused(refused));
        for event in [
            HostEvent::Gone { id: RingId(7) },
            HostEvent::Runs { id: RingId(8) },
            HostEvent::Excess { id: RingId(u64::MAX), outstanding: Some(0) },
            HostEvent::Excess { id: RingId(1), outstanding: None },
        ] {
            assert_eq!(HostEvent::decode(sent(event.encode())).unwrap(), event);
        }
    }

    #[test]
    fn a_message_without_its_files_and_a_number_that_means_nothing_are_told_apart() {
        let file = tempfile::tempfile().unwrap();
        let spec = RingSpec {
            id: RingId(3),
            rings_gpa: 4096,
            sqes_gpa: 8192,
            sq_entries: 8,
            cq_entries: 16,
            doorbell: file.as_fd(),
            call: Some(file.as_fd()),
        };
        let mut packet = sent(Order::MakeRing(spec).encode());
        assert_eq!(packet.fds.len(), 2);
        packet.fds.pop();
        assert_eq!(Order::decode(packet).unwrap_err(), DecodeError::LostFile { is_answered: true });
        let call = sent(Control::SetCall { id: RingId(3), call: None }.encode());
        assert!(matches!(Control::decode(call), Ok(Control::SetCall { id: RingId(3), call: None })));
        let unknown = || Packet { words: [99; WORDS], ..Packet::default() };
        assert_eq!(Order::decode(unknown()).unwrap_err(), DecodeError::Unknown { kind: 99 });
        assert_eq!(Control::decode(unknown()).unwrap_err(), DecodeError::Unknown { kind: 99 });
    }
}
