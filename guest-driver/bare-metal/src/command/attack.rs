//! A hostile script, as a command.

use ringpass_guest_abi::FixedAddressing;
use ringpass_workload::hostile::{Extent, Target};

use super::attachment::{RAM_REGIONS_MAX, put_addressing, take_addressing};
use super::ram_region::{RamRegion, put_regions, take_regions};
use crate::words::{Reader, Writer};

/// Maximum number of holes of each kind in an [`Attack`].
pub const ATTACK_EXTENTS_MAX: usize = 4;
/// Maximum number of host addresses in an [`Attack`].
pub const HOST_ADDRESSES_MAX: usize = 8;

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
    /// [`Target::addressing`].
    pub addressing: FixedAddressing,
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
            addressing: self.addressing,
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

pub(super) fn put_attack(words: &mut Writer, attack: &Attack) {
    let Attack {
        ram,
        filled_holes,
        empty_holes,
        host_addresses,
        addressing,
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
    put_addressing(words, addressing);
    let others = [buffer_gpa, buffer_bytes, disk_bytes, disk_offset_bytes, timeout_ns];
    others.into_iter().for_each(|value| words.put(value));
    words.put(read_only);
    words.put(zero_length);
}

pub(super) fn take_attack(words: &mut Reader<'_>) -> Option<Attack> {
    Some(Attack {
        ram: take_regions(words),
        filled_holes: take_regions(words),
        empty_holes: take_regions(words),
        host_addresses: core::array::from_fn(|_| words.take()),
        addressing: take_addressing(words)?,
        buffer_gpa: words.take(),
        buffer_bytes: words.take_u32()?,
        disk_bytes: words.take(),
        disk_offset_bytes: words.take(),
        timeout_ns: words.take(),
        read_only: words.take_bool()?,
        zero_length: words.take_bool()?,
    })
}
