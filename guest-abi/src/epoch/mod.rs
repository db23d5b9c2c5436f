//! Epochs: how a queue changes the consumer of its ring without losing or repeating a request.
//!
//! An *epoch* is the lifetime of one ring of one queue. Epochs are numbered. Epochs with an even number use the first
//! [`Area`], epochs with an odd number the second. The device announces the current epoch and its phase in one word of
//! the control page ([`Announcement`]). The driver acknowledges by writing the same word back to another place. The two
//! sides agree on nothing else.
//!
//! - `Open`: the ring of this epoch runs. The driver may submit to it.
//! - `Drain`: the driver must submit no more requests, wait for the outstanding ones, and acknowledge. The ring keeps
//!   running until the driver acknowledges.
//! - `Ended`: the rings of this epoch and of all older epochs are gone, and all their I/O has ended. Each request that
//!   the kernel consumed has its CQE in the area. The driver reaps these CQEs, acknowledges, and submits all other
//!   requests again in the next epoch. A request with a CQE of -ECANCELED was not executed, so the driver submits it
//!   again, too.
//!
//! The next epoch opens only after the driver has acknowledged the end of the current epoch. So the driver never reads
//! an area that the device prepares. The device, even if it is another process by now, needs only the two
//! words: *every* start with a word that is not zero is a recovery, and every recovery announces `Ended` for the epoch
//! in the word.
//!
//! The second area exists for drains. A closed ring still writes to its area (the ring's flags) for 20 to 75 ms (Linux
//! 6.18). The next epoch need not wait for that; the epoch after it waits.
//!
//! [`device::Machine`] and [`driver::Machine`] are the two sides as state machines: events in, actions out, no memory
//! access. The tables of `docs/abi.md` are generated from them.

use core::fmt;

pub mod device;
pub mod driver;

/// Number of low bits of a word that hold the phase. The bits above them hold the epoch's number.
pub const PHASE_BITS: u32 = 2;
/// The bits of a word that hold the phase.
pub const PHASE_MASK: u32 = 3;

/// [`Phase::Open`] in the low two bits of the word. If these bits are 0, the device has announced nothing yet.
pub const PHASE_OPEN: u32 = 1;
/// [`Phase::Drain`] in the low two bits of the word.
pub const PHASE_DRAIN: u32 = 2;
/// [`Phase::Ended`] in the low two bits of the word.
pub const PHASE_ENDED: u32 = 3;

/// The phase of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The epoch's ring runs.
    Open,
    /// The epoch's ring runs, and the driver must drain it.
    Drain,
    /// The epoch's ring is gone.
    Ended,
}

/// One of the two areas of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Area {
    /// The area of epochs with an even number.
    Even,
    /// The area of epochs with an odd number.
    Odd,
}

impl Area {
    /// Both areas.
    pub const ALL: [Self; 2] = [Self::Even, Self::Odd];

    /// The index in [`AttachPayload::areas`](crate::attach::AttachPayload::areas): 0 or 1.
    pub fn index(self) -> usize {
        match self {
            Self::Even => 0,
            Self::Odd => 1,
        }
    }
}

/// The number of an epoch, 30 bits; the highest number is followed by 0.
///
/// Both sides compare numbers only for equality, with the current epoch and the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(u32);

impl Epoch {
    /// The epoch before the first. A device may announce its end, but it never has a ring.
    pub const NONE: Self = Self(0);

    /// The epoch with the lower 30 bits of `number`.
    pub const fn new(number: u32) -> Self {
        Self(number & (u32::MAX >> PHASE_BITS))
    }

    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The next epoch.
    pub fn next(self) -> Self {
        Self::new(self.0.wrapping_add(1))
    }

    /// The previous epoch.
    pub fn previous(self) -> Self {
        Self::new(self.0.wrapping_sub(1))
    }

    /// The area of the epoch's ring.
    pub fn area(self) -> Area {
        if self.0 % 2 == 0 { Area::Even } else { Area::Odd }
    }
}

/// The device's announcement in the control page, and the driver's acknowledgement of it: a word of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Announcement {
    /// The epoch that the announcement is about.
    pub epoch: Epoch,
    /// The phase of that epoch.
    pub phase: Phase,
}

impl Announcement {
    /// Decodes a word. `None`: the device has announced nothing yet. Every word is valid.
    pub fn from_word(word: u32) -> Option<Self> {
        let phase = match word & PHASE_MASK {
            PHASE_OPEN => Phase::Open,
            PHASE_DRAIN => Phase::Drain,
            PHASE_ENDED => Phase::Ended,
            _ => return None,
        };
        Some(Self { epoch: Epoch::new(word >> PHASE_BITS), phase })
    }

    /// Encodes the announcement as a word.
    pub fn to_word(self) -> u32 {
        let phase = match self.phase {
            Phase::Open => PHASE_OPEN,
            Phase::Drain => PHASE_DRAIN,
            Phase::Ended => PHASE_ENDED,
        };
        self.epoch.0 << PHASE_BITS | phase
    }
}

/// Up to four actions, in the order in which the caller must do them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Actions<T> {
    items: [Option<T>; 4],
    length: usize,
}

impl<T: Copy> Actions<T> {
    fn none() -> Self {
        Self { items: [None; 4], length: 0 }
    }

    fn push(&mut self, action: T) {
        // No step has more than four actions, as `every_step_has_room_for_its_actions` shows. A fifth would be left
        // out.
        if let Some(item) = self.items.get_mut(self.length) {
            *item = Some(action);
            self.length += 1;
        } else {
            debug_assert!(false, "a step with more than four actions");
        }
    }
}

impl<T> IntoIterator for Actions<T> {
    type Item = T;
    type IntoIter = core::iter::Flatten<core::array::IntoIter<Option<T>, 4>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter().flatten()
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests;
