//! The commands of the host to a vCPU.

use core::fmt;

use ringpass_guest_abi::{Doorbell, FixedAddressing, RingLayout};
use ringpass_workload::hostile::{Extent, Target};
use ringpass_workload::{Job, Verify, Wait};

use crate::words::{Reader, Words, Writer};

/// Maximum number of RAM regions that a vCPU learns.
pub const RAM_REGIONS_MAX: usize = 8;

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

/// The [`Target`] of a hostile guest, in fixed memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attack {
    /// [`Target::ram`]; entries of length 0 are ignored.
    pub ram: [RamRegion; RAM_REGIONS_MAX],
    /// [`Target::filled_holes`]; entries of length 0 are ignored.
    pub filled_holes: [RamRegion; ATTACK_EXTENTS_MAX],
    /// [`Target::empty_holes`]; entries of length 0 are ignored.
    pub empty_holes: [RamRegion; ATTACK_EXTENTS_MAX],
    /// [`Target::host_addresses`]; zeroes are ignored.
    pub host_addresses: [u64; HOST_ADDRESSES_MAX],
    /// [`FixedAddressing::iova_base`].
    pub iova_base: u64,
    /// [`Target::buffer_gpa`].
    pub buffer_gpa: u64,
    /// [`Target::buffer_bytes`].
    pub buffer_bytes: u32,
    /// [`Target::disk_bytes`].
    pub disk_bytes: u64,
    /// [`Target::disk_offset_bytes`].
    pub disk_offset_bytes: u64,
    /// [`Target::read_only`].
    pub read_only: bool,
    /// [`Target::zero_length`].
    pub zero_length: bool,
    /// Time-out of each step.
    pub timeout_ns: u64,
}

/// Maximum number of holes of each kind in an [`Attack`].
pub const ATTACK_EXTENTS_MAX: usize = 4;
/// Maximum number of host addresses in an [`Attack`].
pub const HOST_ADDRESSES_MAX: usize = 8;

impl Attack {
    /// Runs `with` on the target that this value describes.
    pub fn with_target<R>(&self, with: impl FnOnce(&Target<'_>) -> R) -> R {
        let (ram, ram_count) = extents(&self.ram);
        let (filled_holes, filled_count) = extents(&self.filled_holes);
        let (empty_holes, empty_count) = extents(&self.empty_holes);
        let host_count = self.host_addresses.iter().take_while(|address| **address != 0).count();
        with(&Target {
            ram: &ram[..ram_count],
            filled_holes: &filled_holes[..filled_count],
            empty_holes: &empty_holes[..empty_count],
            addressing: FixedAddressing { iova_base: self.iova_base },
            buffer_gpa: self.buffer_gpa,
            buffer_bytes: self.buffer_bytes,
            disk_bytes: self.disk_bytes,
            disk_offset_bytes: self.disk_offset_bytes,
            read_only: self.read_only,
            host_addresses: &self.host_addresses[..host_count],
            zero_length: self.zero_length,
        })
    }
}

/// The regions, those with bytes first, and the number of those with bytes.
fn extents<const N: usize>(regions: &[RamRegion; N]) -> ([Extent; N], usize) {
    let mut extents = [Extent { gpa: 0, len_bytes: 0 }; N];
    let mut count = 0;
    for region in regions.iter().filter(|region| region.len_bytes != 0) {
        extents[count] = Extent { gpa: region.gpa, len_bytes: region.len_bytes };
        count += 1;
    }
    (extents, count)
}

/// A queue, with everything that the guest needs to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Guest-physical address of the rings area.
    pub rings_gpa: u64,
    /// Guest-physical address of the SQE area.
    pub sqes_gpa: u64,
    /// The layout of the ring.
    pub layout: RingLayout,
    /// The number of bytes to add to guest-physical addresses in SQEs.
    pub iova_base: u64,
    /// How to ring the doorbell.
    pub bell: Bell,
    /// The guest's RAM, for buffers. Entries of length 0 are ignored.
    pub ram: [RamRegion; RAM_REGIONS_MAX],
    /// The guest's clock.
    pub tick_rate: TickRate,
}

/// How to ring a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bell {
    /// There is no doorbell.
    None,
    /// Write a byte to a port.
    Port(u16),
    /// Write a `u32` to a guest-physical address.
    Mmio(u64),
}

/// A region of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// The duration of a tick of the time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TickRate {
    /// Nanoseconds per 2^32 ticks.
    ns_per_gigatick: u64,
}

impl TickRate {
    /// The rate of a counter with `khz` thousand ticks per second. `None` for 0, because the clock would never advance.
    pub fn from_khz(khz: u32) -> Option<Self> {
        let ns_per_gigatick = (1_000_000u64 << 32).checked_div(khz.into())?;
        Some(Self { ns_per_gigatick })
    }

    /// Converts `ticks` to nanoseconds.
    pub fn ns(self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.ns_per_gigatick)) >> 32) as u64
    }
}

/// The position of a job's table of expected contents: entries of eight bytes in the program region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Offset from the start of the program region.
    pub offset_bytes: u64,
    /// Number of entries.
    pub entries: u64,
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
    put_regions(words, &ram);
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
        ram: take_regions(words),
        tick_rate: TickRate { ns_per_gigatick: words.take() },
    })
}

fn put_regions(words: &mut Writer, regions: &[RamRegion]) {
    for region in regions {
        words.put(region.gpa);
        words.put(region.len_bytes);
    }
}

fn take_regions<const N: usize>(words: &mut Reader<'_>) -> [RamRegion; N] {
    core::array::from_fn(|_| RamRegion { gpa: words.take(), len_bytes: words.take() })
}

fn put_attack(words: &mut Writer, attack: &Attack) {
    let Attack {
        ram,
        filled_holes,
        empty_holes,
        host_addresses,
        iova_base,
        buffer_gpa,
        buffer_bytes,
        disk_bytes,
        disk_offset_bytes,
        read_only,
        zero_length,
        timeout_ns,
    } = *attack;
    put_regions(words, &ram);
    put_regions(words, &filled_holes);
    put_regions(words, &empty_holes);
    host_addresses.into_iter().for_each(|address| words.put(address));
    let buffer_bytes = u64::from(buffer_bytes);
    let others = [iova_base, buffer_gpa, buffer_bytes, disk_bytes, disk_offset_bytes, timeout_ns];
    others.into_iter().for_each(|value| words.put(value));
    words.put(read_only);
    words.put(zero_length);
}

fn take_attack(words: &mut Reader<'_>) -> Option<Attack> {
    Some(Attack {
        ram: take_regions(words),
        filled_holes: take_regions(words),
        empty_holes: take_regions(words),
        host_addresses: core::array::from_fn(|_| words.take()),
        iova_base: words.take(),
        buffer_gpa: words.take(),
        buffer_bytes: words.take_u32()?,
        disk_bytes: words.take(),
        disk_offset_bytes: words.take(),
        timeout_ns: words.take(),
        read_only: words.take_bool()?,
        zero_length: words.take_bool()?,
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
        write!(f, "the words in the mailbox are not a command")
    }
}

impl core::error::Error for MalformedCommand {}

#[cfg(test)]
mod tests;
