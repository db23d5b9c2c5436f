//! Epochs: how a queue changes who consumes its ring, with no request lost and none done twice.
//!
//! An *epoch* is the life of one ring of one queue. Epochs are numbered; those with an even number use the first
//! [`Area`], the others the second. The device announces in one word of the control page where things are
//! ([`Announcement`]); the driver answers in another word by writing back what it has read. Nothing else is ever agreed on.
//!
//! - `Open`: the ring of this epoch runs. The driver may submit to it.
//! - `Drain`: the driver is to submit nothing more, wait for what is outstanding, and acknowledge. The ring still runs, and
//!   does so until the acknowledgement comes.
//! - `Ended`: the ring of this epoch and every older one is gone, and all their I/O has ended. Each request that was
//!   consumed has its CQE in the area. The driver reaps those, acknowledges, and submits all others again to the next
//!   epoch. A CQE of -ECANCELED was not executed: it counts as one of the others.
//!
//! The next epoch opens only after the end of this one was acknowledged. So the driver never reads an area that the device
//! prepares, and the device, whoever it is by now, needs to know nothing but the two words: *every* start with a word that is
//! not zero is a recovery, and every recovery announces `Ended` for the epoch that it finds there.
//!
//! Two areas are there for drains. A ring that is closed writes to its area for 20 to 75 ms yet (its flags; Linux 6.18),
//! and the next epoch need not wait for that. The one after it does.
//!
//! [`device::Machine`] and [`driver::Machine`] are the two sides: events in, actions out, no memory access. The tables of
//! `docs/abi.md` are printed from them.

use core::fmt;

pub mod device;
pub mod driver;

/// Bits of a word that are the phase; the number is above them.
const PHASE_BITS: u32 = 2;
const PHASE_MASK: u32 = (1 << PHASE_BITS) - 1;

/// [`Phase::Open`] in the low two bits of the word. 0 there: nothing was announced.
pub const PHASE_OPEN: u32 = 1;
/// [`Phase::Drain`] in the low two bits of the word.
pub const PHASE_DRAIN: u32 = 2;
/// [`Phase::Ended`] in the low two bits of the word.
pub const PHASE_ENDED: u32 = 3;

/// Where an epoch is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its ring runs.
    Open,
    /// Its ring runs and is to be drained.
    Drain,
    /// Its ring is gone.
    Ended,
}

/// One of the two areas of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Area {
    /// Of the epochs with an even number.
    Even,
    /// Of the epochs with an odd number.
    Odd,
}

impl Area {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Even, Self::Odd];

    /// Its place in [`AttachPayload::areas`](crate::attach::AttachPayload::areas): 0 or 1.
    pub fn index(self) -> usize {
        match self {
            Self::Even => 0,
            Self::Odd => 1,
        }
    }
}

/// The number of an epoch, 30 bits; after the highest comes 0.
///
/// Numbers are only ever compared for equality, with the one that is current and the one after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(u32);

impl Epoch {
    /// The epoch before the first: an end of it may be announced, a ring of it never was.
    pub const NONE: Self = Self(0);

    /// The epoch with the lower 30 bits of `number`.
    pub const fn new(number: u32) -> Self {
        Self(number & (u32::MAX >> PHASE_BITS))
    }

    /// Its number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The epoch after it.
    pub fn next(self) -> Self {
        Self::new(self.0.wrapping_add(1))
    }

    /// The epoch before it.
    pub fn previous(self) -> Self {
        Self::new(self.0.wrapping_sub(1))
    }

    /// The area of its ring.
    pub fn area(self) -> Area {
        if self.0.is_multiple_of(2) { Area::Even } else { Area::Odd }
    }
}

/// What the device says in the control page, and what the driver says back: a word of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Announcement {
    /// The epoch it is about.
    pub epoch: Epoch,
    /// Where that epoch is.
    pub phase: Phase,
}

impl Announcement {
    /// The announcement in a word. `None`: nothing was announced yet. Any word is one or none.
    pub fn from_word(word: u32) -> Option<Self> {
        let phase = match word & PHASE_MASK {
            PHASE_OPEN => Phase::Open,
            PHASE_DRAIN => Phase::Drain,
            PHASE_ENDED => Phase::Ended,
            _ => return None,
        };
        Some(Self { epoch: Epoch::new(word >> PHASE_BITS), phase })
    }

    /// The word.
    pub fn to_word(self) -> u32 {
        let phase = match self.phase {
            Phase::Open => PHASE_OPEN,
            Phase::Drain => PHASE_DRAIN,
            Phase::Ended => PHASE_ENDED,
        };
        self.epoch.0 << PHASE_BITS | phase
    }
}

/// Up to four actions, in the order in which they are to be done.
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
        // No step has more than four: `every_step_has_room_for_its_actions` shows it. One more would be left out.
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
