//! A queue for a vCPU, as a command.

use ringpass_guest_abi::{Doorbell, FixedAddressing, RingLayout};

use super::ram_region::{RamRegion, put_regions, take_regions};
use super::tick_rate::TickRate;
use crate::words::{Reader, Writer};

/// Maximum number of RAM regions that a vCPU learns.
pub const RAM_REGIONS_MAX: usize = 8;

/// A queue, with everything that the guest needs to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Guest-physical address of the rings area.
    pub rings_gpa: u64,
    /// Guest-physical address of the SQE area.
    pub sqes_gpa: u64,
    /// The layout of the ring.
    pub layout: RingLayout,
    /// How SQEs name guest memory.
    pub addressing: FixedAddressing,
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

/// Puts how SQEs name guest memory.
pub(super) fn put_addressing(words: &mut Writer, addressing: FixedAddressing) {
    words.put(addressing.iova_base());
    words.put(addressing.slot_shift());
}

/// Takes how SQEs name guest memory.
pub(super) fn take_addressing(words: &mut Reader<'_>) -> Option<FixedAddressing> {
    let iova_base = words.take();
    FixedAddressing::new(iova_base, words.take_u32()?).ok()
}

pub(super) fn put_attachment(words: &mut Writer, attachment: &Attachment) {
    let Attachment { rings_gpa, sqes_gpa, layout, addressing, bell, ram, tick_rate } = *attachment;
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
    put_addressing(words, addressing);
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

pub(super) fn take_attachment(words: &mut Reader<'_>) -> Option<Attachment> {
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
        addressing: take_addressing(words)?,
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
