//! The commands of the host to a vCPU, and their encoding.

mod attachment;
mod attack;
mod job;
mod ram_region;
mod tick_rate;

use core::fmt;

use ringpass_workload::Job;

use self::attachment::{put_attachment, take_attachment};
use self::attack::{put_attack, take_attack};
use self::job::{put_job, take_job};
use crate::words::{Reader, Words, Writer};

pub use self::attachment::{Attachment, Bell, RAM_REGIONS_MAX};
pub use self::attack::{ATTACK_EXTENTS_MAX, Attack, HOST_ADDRESSES_MAX};
pub use self::job::Table;
pub use self::ram_region::RamRegion;
pub use self::tick_rate::TickRate;

/// A command for a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Use this queue from now on. Its ring is new. The answer is an empty report.
    Attach(Attachment),
    /// [`ringpass_workload::prefill`].
    Prefill(Job, Table),
    /// [`ringpass_workload::run`].
    Run(Job, Table),
    /// [`ringpass_workload::verify_all`].
    VerifyAll(Job, Table),
    /// [`ringpass_workload::hostile::run_hostile`].
    Hostile(Attack),
}

/// The words are not a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MalformedCommand;

const ATTACH: u64 = 1;
const PREFILL: u64 = 2;
const RUN: u64 = 3;
const VERIFY_ALL: u64 = 4;
const HOSTILE: u64 = 5;

impl Command {
    /// Encodes the command as words.
    pub fn to_words(&self) -> Words {
        let mut words = Writer::new();
        match self {
            Self::Attach(attachment) => {
                words.put(ATTACH);
                put_attachment(&mut words, attachment);
            }
            Self::Prefill(job, table) => put_job(&mut words, PREFILL, job, *table),
            Self::Run(job, table) => put_job(&mut words, RUN, job, *table),
            Self::VerifyAll(job, table) => put_job(&mut words, VERIFY_ALL, job, *table),
            Self::Hostile(attack) => {
                words.put(HOSTILE);
                put_attack(&mut words, attack);
            }
        }
        words.finish()
    }

    /// Decodes a command.
    pub fn from_words(words: &Words) -> Result<Self, MalformedCommand> {
        let mut words = Reader(words.iter());
        let kind = words.take();
        let command = match kind {
            ATTACH => take_attachment(&mut words).map(Self::Attach),
            PREFILL => take_job(&mut words).map(|(job, table)| Self::Prefill(job, table)),
            RUN => take_job(&mut words).map(|(job, table)| Self::Run(job, table)),
            VERIFY_ALL => take_job(&mut words).map(|(job, table)| Self::VerifyAll(job, table)),
            HOSTILE => take_attack(&mut words).map(Self::Hostile),
            _ => None,
        };
        command.ok_or(MalformedCommand)
    }
}

impl fmt::Display for MalformedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the words in the mailbox are not a command")
    }
}

impl core::error::Error for MalformedCommand {}

#[cfg(test)]
mod tests;
