//! What the host asks a vCPU to do.

use core::fmt;

use ringpass_guest_abi::{Doorbell, RingLayout};
use ringpass_workload::{Job, Verify, Wait};

use crate::words::{Reader, Words, Writer};

/// Most pieces of RAM that a vCPU is told of.
pub const RAM_REGIONS_MAX: usize = 8;

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Use this queue from now on. Its ring is new. Answered with an empty report.
    Attach(Attachment),
    /// [`ringpass_workload::prefill`].
    Prefill(Job, Table),
    /// [`ringpass_workload::run`].
    Run(Job, Table),
    /// [`ringpass_workload::verify_all`].
    VerifyAll(Job, Table),
}

/// A queue, and what the guest needs to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Guest-physical address of the rings area.
    pub rings_gpa: u64,
    /// Guest-physical address of the SQE area.
    pub sqes_gpa: u64,
    /// Where the parts of the ring are.
    pub layout: RingLayout,
    /// Added to guest-physical addresses in SQEs.
    pub iova_base: u64,
    /// How the doorbell is rung.
    pub bell: Bell,
    /// The guest's RAM, for buffers. Entries of length 0 do not count.
    pub ram: [RamRegion; RAM_REGIONS_MAX],
    /// The guest's clock.
    pub tick_rate: TickRate,
}

/// How a doorbell is rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bell {
    /// There is none.
    None,
    /// A byte written to a port.
    Port(u16),
    /// A `u32` written to a guest-physical address.
    Mmio(u64),
}

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// How long a tick of the time stamp counter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TickRate {
    /// Nanoseconds per 2^32 ticks.
    ns_per_gigatick: u64,
}

impl TickRate {
    /// The rate of a counter that makes `khz` thousand ticks a second, 1 at least.
    pub fn from_khz(khz: u32) -> Self {
        Self { ns_per_gigatick: (1_000_000 << 32) / u64::from(khz.max(1)) }
    }

    /// `ticks` in nanoseconds.
    pub fn ns(self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.ns_per_gigatick)) >> 32) as u64
    }
}

/// Where a job's table of expected contents lies: entries of eight bytes in the program region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// From the start of the program region.
    pub offset_bytes: u64,
    /// Number of entries.
    pub entries: u64,
}

/// The words are no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MalformedCommand;

const ATTACH: u64 = 1;
const PREFILL: u64 = 2;
const RUN: u64 = 3;
const VERIFY_ALL: u64 = 4;

impl Command {
    /// The command as words.
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
        }
        words.finish()
    }

    /// The command that `words` are.
    pub fn from_words(words: &Words) -> Result<Self, MalformedCommand> {
        let mut words = Reader(words.iter());
        let kind = words.take();
        let command = match kind {
            ATTACH => take_attachment(&mut words).map(Self::Attach),
            PREFILL => take_job(&mut words).map(|(job, table)| Self::Prefill(job, table)),
            RUN => take_job(&mut words).map(|(job, table)| Self::Run(job, table)),
            VERIFY_ALL => take_job(&mut words).map(|(job, table)| Self::VerifyAll(job, table)),
            _ => None,
        };
        command.ok_or(MalformedCommand)
    }
}

fn put_attachment(words: &mut Writer, attachment: &Attachment) {
    let Attachment { rings_gpa, sqes_gpa, layout, iova_base, bell, ram, tick_rate } = *attachment;
    words.put(rings_gpa);
    words.put(sqes_gpa);
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
    let offsets = [
        sq_entries,
        cq_entries,
        sq_head_offset,
        sq_tail_offset,
        sq_flags_offset,
        cq_head_offset,
        cq_tail_offset,
        cq_flags_offset,
        cqes_offset,
    ];
    offsets.into_iter().for_each(|value| words.put(value));
    words.put(rings_bytes);
    words.put(sqes_bytes);
    words.put(match doorbell {
        Doorbell::WhenAsleep => 0u64,
        Doorbell::Always => 1,
    });
    words.put(iova_base);
    let (kind, address) = match bell {
        Bell::None => (0u64, 0),
        Bell::Port(port) => (1, u64::from(port)),
        Bell::Mmio(gpa) => (2, gpa),
    };
    words.put(kind);
    words.put(address);
    for region in ram {
        words.put(region.gpa);
        words.put(region.len_bytes);
    }
    words.put(tick_rate.ns_per_gigatick);
}

fn take_attachment(words: &mut Reader<'_>) -> Option<Attachment> {
    Some(Attachment {
        rings_gpa: words.take(),
        sqes_gpa: words.take(),
        layout: RingLayout {
            sq_entries: words.take_u32()?,
            cq_entries: words.take_u32()?,
            sq_head_offset: words.take_u32()?,
            sq_tail_offset: words.take_u32()?,
            sq_flags_offset: words.take_u32()?,
            cq_head_offset: words.take_u32()?,
            cq_tail_offset: words.take_u32()?,
            cq_flags_offset: words.take_u32()?,
            cqes_offset: words.take_u32()?,
            rings_bytes: words.take(),
            sqes_bytes: words.take(),
            doorbell: match words.take() {
                0 => Doorbell::WhenAsleep,
                1 => Doorbell::Always,
                _ => return None,
            },
        },
        iova_base: words.take(),
        bell: match (words.take(), words.take()) {
            (0, _) => Bell::None,
            (1, port) => Bell::Port(u16::try_from(port).ok()?),
            (2, gpa) => Bell::Mmio(gpa),
            _ => return None,
        },
        ram: core::array::from_fn(|_| RamRegion { gpa: words.take(), len_bytes: words.take() }),
        tick_rate: TickRate { ns_per_gigatick: words.take() },
    })
}

fn put_job(words: &mut Writer, kind: u64, job: &Job, table: Table) {
    let Job {
        area_offset_bytes,
        area_bytes,
        operations,
        duration_ns,
        timeout_ns,
        pause_ns,
        seed,
        buffers_gpa,
        buffer_stride_bytes,
        block_bytes,
        depth,
        write_percent,
        durable_percent,
        wait,
        verify,
    } = *job;
    let long = [
        kind,
        table.offset_bytes,
        table.entries,
        area_offset_bytes,
        area_bytes,
        operations,
        duration_ns,
        timeout_ns,
        pause_ns,
        seed,
        buffers_gpa,
        buffer_stride_bytes,
    ];
    long.into_iter().for_each(|value| words.put(value));
    let short = [block_bytes, depth, write_percent, durable_percent, wait as u32, verify as u32];
    short.into_iter().for_each(|value| words.put(value));
}

fn take_job(words: &mut Reader<'_>) -> Option<(Job, Table)> {
    let table = Table { offset_bytes: words.take(), entries: words.take() };
    let job = Job {
        area_offset_bytes: words.take(),
        area_bytes: words.take(),
        operations: words.take(),
        duration_ns: words.take(),
        timeout_ns: words.take(),
        pause_ns: words.take(),
        seed: words.take(),
        buffers_gpa: words.take(),
        buffer_stride_bytes: words.take(),
        block_bytes: words.take_u32()?,
        depth: words.take_u32()?,
        write_percent: words.take_u32()?,
        durable_percent: words.take_u32()?,
        wait: {
            let value = words.take();
            [Wait::Poll, Wait::Interrupt, Wait::InterruptMuting].into_iter().find(|wait| *wait as u64 == value)?
        },
        verify: {
            let value = words.take();
            [Verify::Off, Verify::On].into_iter().find(|verify| *verify as u64 == value)?
        },
    };
    Some((job, table))
}

impl fmt::Display for MalformedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the words in the mailbox are no command")
    }
}

impl core::error::Error for MalformedCommand {}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            area_offset_bytes: 1,
            area_bytes: 2,
            operations: 3,
            duration_ns: 4,
            timeout_ns: 5,
            pause_ns: 6,
            seed: u64::MAX,
            buffers_gpa: 8,
            buffer_stride_bytes: 9,
            block_bytes: 10,
            depth: 11,
            write_percent: 12,
            durable_percent: 13,
            wait: Wait::InterruptMuting,
            verify: Verify::On,
        }
    }

    fn attachment() -> Attachment {
        Attachment {
            rings_gpa: 1,
            sqes_gpa: 2,
            layout: RingLayout {
                sq_entries: 3,
                cq_entries: 4,
                sq_head_offset: 5,
                sq_tail_offset: 6,
                sq_flags_offset: 7,
                cq_head_offset: 8,
                cq_tail_offset: 9,
                cq_flags_offset: 10,
                cqes_offset: 11,
                rings_bytes: 12,
                sqes_bytes: 13,
                doorbell: Doorbell::Always,
            },
            iova_base: 14,
            bell: Bell::Mmio(15),
            ram: core::array::from_fn(|index| RamRegion { gpa: 16 + index as u64, len_bytes: 32 + index as u64 }),
            tick_rate: TickRate::from_khz(2_500_000),
        }
    }

    #[test]
    fn every_command_comes_back_from_its_words() {
        let table = Table { offset_bytes: 77, entries: 78 };
        let commands = [
            Command::Attach(attachment()),
            Command::Attach(Attachment { bell: Bell::Port(0x201), ..attachment() }),
            Command::Attach(Attachment { bell: Bell::None, ..attachment() }),
            Command::Prefill(job(), table),
            Command::Run(job(), table),
            Command::VerifyAll(Job { wait: Wait::Poll, verify: Verify::Off, ..job() }, table),
        ];
        for command in commands {
            assert_eq!(Command::from_words(&command.to_words()), Ok(command));
        }
    }

    #[test]
    fn words_that_are_no_command_are_refused() {
        let with = |index: usize, value| {
            let mut words = Command::Run(job(), Table::default()).to_words();
            words[index] = value;
            Command::from_words(&words)
        };
        assert_eq!(with(0, 99), Err(MalformedCommand));
        // Behind the kind: two words of the table, nine of 64 bits, four of 32 bits, wait, verify.
        assert_eq!(with(12, 1 << 32), Err(MalformedCommand));
        assert_eq!(with(16, 3), Err(MalformedCommand));
        assert_eq!(with(17, 2), Err(MalformedCommand));
        assert!(with(17, 0).is_ok());
    }

    #[test]
    fn ticks_become_nanoseconds_without_drift_over_a_day() {
        let rate = TickRate::from_khz(2_596_096);
        let day_ns = 86_400 * 1_000_000_000u64;
        let ticks = (u128::from(day_ns) * 2_596_096 / 1_000_000) as u64;
        assert!(rate.ns(ticks).abs_diff(day_ns) < day_ns / 1_000_000_000);
    }
}
